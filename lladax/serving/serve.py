"""`--mode=serve`: what can be checked at once is, the port opens, the model is loaded behind it, and it answers.

A signal ends it: nothing more is taken, what waits is refused (503), what runs is finished within `drain_seconds`; exit
code 0. A second one ends it at once.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lladax.config import Config
from lladax.devices import distributed, interrupts, sharding
from lladax.inference.llada import LLaDA
from lladax.inference.load import asked, load, saved_model
from lladax.inference.slots import Slots
from lladax.mistake import Mistake
from lladax.serving import orders
from lladax.serving.scheduler import Scheduler
from lladax.serving.settings import ServeConfig
from lladax.storage.writing import reason
from lladax.terminal import visible

log = logging.getLogger(__name__)


def run(config: Config, workdir: Path, settings: ServeConfig) -> None:
  """Serves the workdir's last checkpoint, sampled as its config says where a request says nothing; until a signal.

  Raises:
    Mistake: the port is taken, or there are no keys, or the model cannot be served; the extra is not installed.
  """
  from lladax.serving.app import make_app, make_server  # an extra; it says so
  from lladax.serving.gate import is_loopback

  _ = settings.keys  # before anything takes long
  model, text = saved_model(workdir)
  if not model.objective.fills:
    raise Mistake(f"--workdir={workdir}: a causal model is not served: use --mode=sample")
  if text is None:
    raise Mistake(f"--workdir={workdir}: this model has no tokenizer, and so no text to answer with")
  if not distributed.is_first():
    return _follow(config, workdir)
  options = dataclasses.asdict(config.sample)
  del options["early_stop"]  # on, unless a request says otherwise
  with contextlib.closing(_listen(settings.host, settings.port)) as listener:
    gate = make_app(None, None, settings, workdir.absolute().name, options)
    server = make_server(gate)
    failed: list[BaseException] = []

    def prepare() -> None:
      """In a thread: the model, and its queue."""
      try:
        llada = load(workdir, mesh=sharding.make_mesh(config.mesh), **asked(config.model))
        slots = orders.Leader(llada.engine) if interrupts.many() else Slots(llada.engine)
        if settings.warmup:
          _warm(slots, llada, options, settings.rows)
        gate.serving.open(Scheduler(llada, rows=settings.rows, waiting=settings.queue, slots=slots), llada, options)
        print(visible(f"lladax: {gate.serving.name} is served at {_url(listener)}"), flush=True)
      except BaseException as error:
        failed.append(error)
        server.should_exit = True

    if not settings.api_key_file and not is_loopback(settings.host):
      log.warning("--host=%s is heard by other machines, and nobody needs a key: see --api_key_file", settings.host)
    loader = threading.Thread(target=prepare, name="loader", daemon=True)
    with _signals(server, gate.serving, settings.drain_seconds):
      loader.start()
      server.run(sockets=[listener])
    if failed:
      raise failed[0]
    scheduler = gate.serving.scheduler
    if interrupts.many():
      orders.end(scheduler and scheduler.slots)
    if loader.is_alive() or (scheduler and scheduler.stats["running"]):  # a thread in a library cannot be ended
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(0)


def _listen(host: str, port: int) -> socket.socket:
  """A socket that listens there."""
  try:
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(place[:2], family=family, backlog=1024)
  except socket.gaierror as error:
    raise Mistake(f"--host={host}: there is no such address: {error.strerror}") from None
  except OSError as error:
    raise Mistake(f"--port={port}: cannot listen at {host}: {reason(error)}; name another, or 0 for any") from None


def _url(listener: socket.socket) -> str:
  host, port = listener.getsockname()[:2]
  return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _warm(slots: Slots, llada: LLaDA, options: dict[str, Any], rows: int) -> None:
  """Compiles all that requests without options of their own can need, and says what."""
  c = dataclasses.replace(llada, defaults={**llada.defaults, **options, "early_stop": True}).settings({})
  began, console = time.monotonic(), distributed.console()
  with console.status("compiling") as status:
    n = slots.warm(c, rows, llada.model.max_length, lambda what: status.update(f"compiling for {what}"))
  console.print(f"lladax: compiled {n} programs in {time.monotonic() - began:.0f} s", highlight=False)


def _follow(config: Config, workdir: Path) -> None:
  """Another process than the first one: its part of the model, and whatever the first one does."""

  def note(number: int, frame: Any) -> None:
    for x in interrupts.SIGNALS:
      signal.signal(x, signal.SIG_DFL)  # a second one ends it at once
    orders.stop_all()

  llada = load(workdir, mesh=sharding.make_mesh(config.mesh), **asked(config.model))
  for number in interrupts.SIGNALS:
    signal.signal(number, note)
  orders.follow(Slots(llada.engine))


@contextlib.contextmanager
def _signals(server: Any, serving: Any, seconds: float):
  """SIGINT and SIGTERM drain the server, and then end it; a second one ends the process."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  seen = []

  def drain() -> None:
    if serving.scheduler:
      serving.scheduler.drain(seconds)
    server.should_exit = True

  def note(number: int, frame: Any) -> None:
    if seen:
      print("lladax: a second signal: ended at once", file=sys.stderr, flush=True)
      os._exit(128 + number)
    seen.append(number)
    name = signal.Signals(number).name
    print(f"lladax: {name}: finishing what runs, {seconds:g} s at most", file=sys.stderr, flush=True)
    threading.Thread(target=drain, name="drain", daemon=True).start()

  if interrupts.many():
    orders.stop_with(lambda: signal.raise_signal(signal.SIGTERM))
  old = {number: signal.signal(number, note) for number in interrupts.SIGNALS}
  try:
    yield
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
