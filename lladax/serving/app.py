"""The HTTP server of a model: routes, streams, and what is said when something goes wrong."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from lladax.inference.llada import LLaDA
from lladax.mistake import Mistake
from lladax.serving.gate import PATIENCE, Connection, Gate, Metrics, refusal
from lladax.serving.protocol import Protocol, Refused, decode, refused
from lladax.serving.replies import Asked
from lladax.serving.scheduler import Draining, Expired, Failed, Full, Job, Scheduler
from lladax.serving.settings import ServeConfig

try:
  import prometheus_client as prometheus
  import uvicorn
  from starlette.applications import Starlette
  from starlette.exceptions import HTTPException
  from starlette.requests import ClientDisconnect, Request
  from starlette.responses import JSONResponse, Response, StreamingResponse
  from starlette.routing import Route
  from starlette.types import Receive, Scope, Send
except ModuleNotFoundError as error:
  raise Mistake(f"--mode=serve needs an extra ({error}): pip install 'lladax[serve]'") from error

log = logging.getLogger(__name__)

KEEP_ALIVE = 15.0  # seconds of silence in a stream
_PAGE = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"),
         "/page.js": ("page.js", "text/javascript")}  # fmt: skip


class _Events(StreamingResponse):
  """A stream that ends when the client is gone, even while nothing is sent; the job ends with it."""

  job: Job | None = None

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """As ASGI asks."""
    told, gone = (asyncio.ensure_future(x) for x in (self.stream_response(send), _gone(receive)))
    try:
      await asyncio.wait({told, gone}, return_when=asyncio.FIRST_COMPLETED)
      scope["lladax"]["left"] = not told.done()
    finally:
      if self.job:
        self.job.cancel()
      await _end(told, gone)
      await self.body_iterator.aclose()  # pyright: ignore[reportAttributeAccessIssue]


class Serving:
  """The routes, over a model that may still be loading."""

  def __init__(self, settings: ServeConfig, name: str):
    self.settings, self.name, self.metrics = settings, name, Metrics()
    self.scheduler: Scheduler | None = None
    self.protocol: Protocol | None = None

  def open(self, scheduler: Scheduler, llada: LLaDA, options: Mapping[str, Any]) -> None:
    """The model is there: requests are answered from here on."""
    protocol = Protocol(llada, self.name, options, self.settings.rows + self.settings.queue)
    self.metrics.scheduler = self.scheduler = scheduler
    self.protocol = protocol

  @property
  def state(self) -> str:
    """Of the scheduler; "loading" before there is one."""
    return self.scheduler.state if self.scheduler else "loading"

  def ready(self) -> tuple[Scheduler, Protocol]:
    """What answers; raises Draining if nothing does."""
    if self.scheduler is None or self.protocol is None or self.state != "ready":
      raise Draining
    return self.scheduler, self.protocol

  async def chat(self, request: Request) -> Response:
    """POST /v1/chat/completions."""
    return await self._answer(request, chats=True)

  async def completions(self, request: Request) -> Response:
    """POST /v1/completions."""
    return await self._answer(request, chats=False)

  async def models(self, request: Request) -> Response:
    """GET /v1/models, and of one of them."""
    with self._told():
      protocol = self.ready()[1]
      name = request.path_params.get("name")
      return JSONResponse(protocol.models() if name is None else protocol.model(name))

  async def health(self, request: Request) -> Response:
    """GET /healthz."""
    return JSONResponse({"status": self.state}, 200 if self.state == "ready" else 503)

  async def counters(self, request: Request) -> Response:
    """GET /metrics."""
    content = prometheus.generate_latest(self.metrics.registry)
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")

  async def page(self, request: Request) -> Response:
    """GET / and its files."""
    name, kind = _PAGE[request.scope["path"]]
    try:
      return Response((Path(__file__).parent / name).read_bytes(), media_type=kind)
    except FileNotFoundError:
      raise HTTPException(404) from None

  async def _answer(self, request: Request, *, chats: bool) -> Response:
    with self._told():
      kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
      if kind != "application/json":
        raise Refused(f"Content-Type: {kind!r:.80}: send application/json", status=415)
      scheduler, protocol = self.ready()
      seen = request.scope["lladax"]
      try:
        content = await self._body(request)
      except ClientDisconnect:
        seen["left"] = True
        return Response(status_code=499)

      def understood() -> tuple[dict[str, Any], Asked]:
        body = decode(content)
        return body, protocol.chat(body) if chats else protocol.completions(body)

      body, asked = await asyncio.to_thread(understood)  # a long text is encoded for a while
      seen |= {"asked": asked, "text": body.get("messages" if chats else "prompt")}
      job = scheduler.submit(asked.rows, timeout=self._seconds(asked), every=asked.canvas) if asked.rows else None
      chunks = self._chunks(scheduler, protocol, job, asked)
      if asked.stream:
        stream = _Events(self._events(chunks), headers={"x-accel-buffering": "no"}, media_type="text/event-stream")
        stream.job = job
        return stream
      told, gone = (asyncio.ensure_future(x) for x in (_through(chunks), _gone(request.receive)))
      try:
        await asyncio.wait({told, gone}, return_when=asyncio.FIRST_COMPLETED)
        if told.done():
          told.result()
          return JSONResponse(asked.answer())
        seen["left"] = True
        self.metrics.disconnects.inc()
        return Response(status_code=499)
      finally:
        if job:
          job.cancel()
        await _end(told, gone)

  def _seconds(self, asked: Asked) -> float:
    """That an answer may take."""
    return min(asked.timeout or self.settings.timeout, self.settings.timeout)

  async def _chunks(
    self, scheduler: Scheduler, protocol: Protocol, job: Job | None, asked: Asked
  ) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream; rows whose texts are whole are let go."""
    began, waits = time.monotonic(), True
    if asked.scores:
      try:
        async with asyncio.timeout(self._seconds(asked)):
          asked.score(await scheduler.score(asked.prompts), protocol.llada)
      except TimeoutError:
        raise Expired from None
    for chunk in asked.begin() if asked.stream else ():
      yield chunk
    if job:
      async for i, snapshot in job.watch():
        chunk = asked.see(i, snapshot)
        if waits and any(x.text or x.finish for x in asked.choices):
          waits = False
          self.metrics.first.observe(time.monotonic() - began)
        if asked.choices[i].finish:
          job.cancel(i)
        if chunk:
          yield chunk
    for chunk in asked.end() if asked.stream else ():
      yield chunk

  async def _events(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """The bytes of a stream; what goes wrong is an event of it, too."""
    coming, whole = None, False
    try:
      with self._told():
        while True:
          coming = coming or asyncio.ensure_future(anext(chunks, None))
          done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE)
          if not done:
            yield b": keep-alive\n\n"
            continue
          chunk, coming = coming.result(), None
          if chunk is None:
            break
          yield _event(chunk)
      whole = True
      yield b"data: [DONE]\n\n"
    except Refused as error:
      whole = True
      yield _event(error.json())
    finally:
      if not whole:
        self.metrics.disconnects.inc()
      if coming:
        await _end(coming)
      await chunks.aclose()  # pyright: ignore[reportAttributeAccessIssue]

  @contextlib.contextmanager
  def _told(self):
    """Whatever goes wrong is said as HTTP and OpenAI say it: raises Refused."""
    try:
      yield
    except Refused:
      raise
    except Mistake as error:
      raise refused(error) from None
    except Full as error:
      self.metrics.refusals.inc()
      raise _later(str(error), 429, "rate_limit_exceeded", error.retry_after) from None
    except Draining:
      message = "the model is loading" if self.state == "loading" else "the server is going down"
      raise _later(f"{message}: try again later", 503, self.state, 5) from None
    except Expired:
      message = "the answer was not there in time: ask for less, or for a longer timeout"
      raise Refused(message, status=504, code="timeout", kind="server_error") from None
    except Failed:  # which is logged
      raise Refused("the batch of this request has crashed: try again", status=500, kind="server_error") from None
    except HTTPException:
      raise
    except Exception:
      log.exception("an answer has crashed")
      raise Refused("the server has a fault, which its log tells", status=500, kind="server_error") from None

  async def _body(self, request: Request) -> bytes:
    """The bytes of a request, as long as there are not too many."""
    most, content = self.settings.max_body, bytearray()
    said = request.headers.get("content-length", "0")
    large = Refused(f"the body has more than {most} bytes, the most that this server reads", status=413)
    if said.isdecimal() and int(said[:20]) > most:
      raise large
    try:
      async with asyncio.timeout(PATIENCE):
        async for chunk in request.stream():
          content += chunk
          if len(content) > most:
            raise large
    except TimeoutError:
      raise Refused("the body did not come in time", status=408) from None
    return bytes(content)


def make_app(
  scheduler: Scheduler | None, llada: LLaDA | None, settings: ServeConfig, name: str, options: Mapping[str, Any]
) -> Gate:
  """The app of a model; without one it says that it is loading until its `serving.open` is called."""
  serving = Serving(settings, name)
  if scheduler is not None and llada is not None:
    serving.open(scheduler, llada, options)
  routes = [
    Route("/v1/chat/completions", serving.chat, methods=["POST"]),
    Route("/v1/completions", serving.completions, methods=["POST"]),
    Route("/v1/models", serving.models), Route("/v1/models/{name}", serving.models),
    Route("/healthz", serving.health), Route("/metrics", serving.counters),
    *(Route(path, serving.page) for path in _PAGE),
  ]  # fmt: skip

  async def other(request: Request, error: Any) -> Response:  # an HTTPException, where starlette is installed to say so
    what = {404: "there is nothing here", 405: "this method has no meaning here"}.get(error.status_code, error.detail)
    told = Refused(f"{request.method} {request.scope['path']:.80}: {what}", status=error.status_code)
    return refusal(told, error.headers)

  app = Starlette(routes=routes, exception_handlers={HTTPException: other, Refused: _refused})
  app.router.redirect_slashes = False
  return Gate(app, serving, settings, serving.metrics)


def make_server(gate: Gate) -> uvicorn.Server:
  """What speaks HTTP; its `run(sockets=...)` ends when `should_exit` is set. Signals are not its own."""
  server = uvicorn.Server(uvicorn.Config(
    gate, http=Connection, ws="none", loop="asyncio", lifespan="off", log_config=None, access_log=False,
    server_header=False, proxy_headers=False, limit_concurrency=gate.settings.connections, timeout_keep_alive=30,
    timeout_graceful_shutdown=5, h11_max_incomplete_event_size=2**16,
  ))  # fmt: skip
  server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
  return server


async def _refused(request: Request, error: Exception) -> Response:
  assert isinstance(error, Refused)
  return refusal(error)


def _later(message: str, status: int, code: str, seconds: int) -> Refused:
  kind = "rate_limit_error" if status == 429 else "server_error"
  error = Refused(message, status=status, code=code, kind=kind)
  error.retry_after = max(1, int(seconds))
  return error


def _event(told: dict[str, Any]) -> bytes:
  return b"data: " + json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _through(chunks: AsyncIterator[Any]) -> None:
  async for _ in chunks:
    pass


async def _gone(receive: Receive) -> None:
  """Returns when the client is gone; called when its whole request has been read."""
  while (await receive())["type"] != "http.disconnect":
    pass


async def _end(*tasks: asyncio.Future) -> None:
  """Cancels what still runs, and waits for it."""
  for task in tasks:
    task.cancel()
  await asyncio.gather(*tasks, return_exceptions=True)
