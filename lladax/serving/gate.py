"""Before all routes: who may ask, from where, by which name; behind them: headers, counters, a line in the log."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from lladax.mistake import Mistake
from lladax.serving.protocol import Refused
from lladax.serving.replies import Asked
from lladax.serving.scheduler import Scheduler
from lladax.serving.settings import ServeConfig
from lladax.terminal import visible

try:
  import prometheus_client as prometheus
  from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
  from starlette.responses import JSONResponse, Response
  from starlette.types import ASGIApp, Message, Receive, Scope, Send
  from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
  raise Mistake(f"--mode=serve needs an extra ({error}): pip install 'lladax[serve]'") from error

log = logging.getLogger(__name__)

POLICY = (
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none';"
  " form-action 'none'; frame-ancestors 'none'"
)
OPEN = ("/", "/page.css", "/page.js", "/healthz")  # to those without a key
PATIENCE = 60.0  # seconds in which a request has to come, and a part of an answer has to be read
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
  """What is counted, in a registry of its own."""

  def __init__(self):
    self.registry = registry = prometheus.CollectorRegistry()
    self.scheduler: Scheduler | None = None
    self.requests = prometheus.Counter(
      "lladax_requests", "Requests that were answered.", ["endpoint", "status"], registry=registry
    )
    self.refusals = prometheus.Counter(
      "lladax_queue_refusals", "Requests that found the queue full.", registry=registry
    )
    self.disconnects = prometheus.Counter(
      "lladax_disconnects", "Requests whose client left before the answer.", registry=registry
    )
    self.first = prometheus.Histogram(
      "lladax_first_text_seconds", "From a request to the first of its text that stays.", buckets=_SECONDS,
      registry=registry,
    )  # fmt: skip
    self.seconds = prometheus.Histogram(
      "lladax_request_seconds", "From a request to the end of its answer.", ["endpoint"], buckets=_SECONDS,
      registry=registry,
    )  # fmt: skip
    registry.register(self)

  def collect(self):
    """What the scheduler counts, as the library asks for it."""
    stats = self.scheduler.stats if self.scheduler else {}
    for name, what in (("waiting", "Rows that wait."), ("running", "Rows that run.")):
      yield GaugeMetricFamily(f"lladax_rows_{name}", what, stats.get(name, 0))
    for name, what in (("passes", "Forward passes."), ("tokens", "Tokens that were generated."),
                       ("crashes", "Batches that have crashed.")):  # fmt: skip
      yield CounterMetricFamily(f"lladax_{name}", what, stats.get(name, 0))


class Connection(H11Protocol):
  """A connection that is cut where no request comes, or nobody reads its answer; it speaks HTTP alone."""

  _late: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:
    """As asyncio asks, like the others."""
    super().connection_made(transport)
    self._watch()

  def connection_lost(self, exc: Exception | None) -> None:
    """..."""
    self._watch(on=False)
    super().connection_lost(exc)

  def data_received(self, data: bytes) -> None:
    """..."""
    super().data_received(data)
    if self._busy() and not self.flow.write_paused:
      self._watch(on=False)

  def pause_writing(self) -> None:
    """..."""
    super().pause_writing()
    self._watch()

  def resume_writing(self) -> None:
    """..."""
    super().resume_writing()
    self._watch(on=not self._busy())

  def on_response_complete(self) -> None:
    """As uvicorn asks."""
    super().on_response_complete()
    self._watch(on=not self._busy() or self.flow.write_paused)

  def _busy(self) -> bool:
    return self.cycle is not None and not self.cycle.response_complete

  def _should_upgrade(self) -> bool:
    return False

  def _watch(self, *, on: bool = True) -> None:
    if self._late:
      self._late.cancel()
    self._late = self.loop.call_later(PATIENCE, self.transport.abort) if on else None


class Gate:
  """Before all routes: who asks and from where, on which name; behind them: the headers, the log, the counters."""

  def __init__(self, app: ASGIApp, serving: Any, settings: ServeConfig, metrics: Metrics):
    self.app, self.serving, self.settings, self.metrics = app, serving, settings, metrics
    self.keys = [hashlib.sha256(key).digest() for key in settings.keys]
    self.loopback = is_loopback(settings.host)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """As ASGI asks."""
    if scope["type"] != "http":
      return
    began, scope["lladax"] = time.monotonic(), {}
    headers, path = _headers(scope), scope["path"]
    status, own = 0, [("x-content-type-options", "nosniff"), ("cache-control", "no-store"),
                      ("content-security-policy", POLICY), ("referrer-policy", "no-referrer")]  # fmt: skip
    if self.settings.cors:
      own.append(("vary", "Origin"))
      if headers.get("origin") == self.settings.cors:
        own.append(("access-control-allow-origin", self.settings.cors))

    async def told(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
        more = [(name.encode(), value.encode()) for name, value in own]
        message = {**message, "headers": [*message.get("headers", ()), *more]}
      await send(message)

    try:
      try:
        self._check(scope["method"], path, headers)
        if self.settings.cors and scope["method"] == "OPTIONS" and "origin" in headers:
          allowed = {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600",
                     "access-control-allow-headers": "Authorization, Content-Type"}  # fmt: skip
          await Response(status_code=204, headers=allowed)(scope, receive, told)
        else:
          await self.app(scope, receive, told)
      except Refused as error:
        await refusal(error)(scope, receive, told)
    finally:
      self._note(scope, status, time.monotonic() - began)

  def _check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
    """Raises Refused if this request is none of ours."""
    host, origin = headers.get("host"), headers.get("origin")
    if self.loopback and host is not None and not is_loopback(_name(host)):
      message = f"Host: {host!r:.80}: this server answers to localhost alone; start it with --host for other names"
      raise Refused(message, status=421)
    if origin is not None and origin not in (self.settings.cors or None, f"http://{host}", f"https://{host}"):
      message = f"Origin: {origin!r:.80}: pages of another origin may not ask, unless the server is started with --cors"
      raise Refused(message, status=403)
    if self.keys and path not in OPEN and method != "OPTIONS":
      kind, _, key = headers.get("authorization", "").partition(" ")
      digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
      known = [hmac.compare_digest(digest, x) for x in self.keys]
      if kind.lower() != "bearer" or not any(known):
        message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
        raise Refused(message, status=401, code="invalid_api_key")

  def _note(self, scope: Scope, status: int, seconds: float) -> None:
    route = scope.get("route")
    endpoint, seen = route.path if route else "other", scope["lladax"]
    status = status or 499  # the client left before the first byte
    self.metrics.requests.labels(endpoint, str(status)).inc()
    self.metrics.seconds.labels(endpoint).observe(seconds)
    asked: Asked | None = seen.get("asked")
    used = asked.used() if asked else {}
    if endpoint in ("/healthz", "/metrics") and status < 400:
      return  # asked all the time
    line = f"{scope['method']} {scope['path']:.200} {status}"
    line += "".join(f" {name}={used[name]}" for name in ("prompt_tokens", "completion_tokens", "passes") if used)
    line += f" {seconds:.3f} s" + " (the client left)" * bool(seen.get("left"))
    log.info("%s", visible(line).replace("\n", "␊"))
    if self.settings.log_text and asked:
      for x in asked.choices:
        log.info("%s -> %s", *(visible(json.dumps(t, ensure_ascii=False)) for t in (seen.get("text", ""), x.text)))


def refusal(error: Refused, headers: Mapping[str, str] | None = None) -> Response:
  """A refusal as HTTP says it."""
  more = {"www-authenticate": "Bearer"} if error.status == 401 else {}
  more |= {"retry-after": str(error.retry_after)} if error.retry_after else {}
  return JSONResponse(error.json(), error.status, {**more, **(headers or {})})


def _headers(scope: Scope) -> dict[str, str]:
  return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _name(host: str) -> str:
  """The name in a Host header, without its port; "" if it is none."""
  try:
    return urlsplit(f"//{host}").hostname or ""
  except ValueError:
    return ""


def is_loopback(host: str) -> bool:
  """Whether a name or an address is this machine's alone."""
  if host == "localhost" or host.endswith(".localhost"):
    return True
  try:
    return ipaddress.ip_address(host.strip("[]")).is_loopback
  except ValueError:
    return False
