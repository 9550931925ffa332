"""Object stores on this machine: emulators of S3 and of Google's storage, and a proxy that fails and dawdles."""

import contextlib
import http.client
import http.server
import itertools
import os
import socket
import subprocess
import sys
import threading
import time

BUCKET = "bucket"


def free_port():
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


class Store:
  """A server as a process of its own, and the environment that leads there."""

  def __init__(self, kind, folder):
    self.port, self.kind = free_port(), kind
    code = {
      "s3": f"from moto.moto_server.threaded_moto_server import ThreadedMotoServer as S; import time;"
      f"S('127.0.0.1', {self.port}).start(); time.sleep(9999)",
      "gs": "import http.server as h; h.HTTPServer = h.ThreadingHTTPServer;"  # one connection at a time else,
      "h.HTTPServer.request_queue_size = 128;"  # and five that wait
      f"from gcp_storage_emulator.server import create_server as s;"
      f"s('127.0.0.1', {self.port}, True, default_bucket='{BUCKET}').run()",
    }[kind]
    with (folder / f"{kind}.log").open("wb") as log:
      self._process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
    for _ in range(300):
      with socket.socket() as asked:
        if asked.connect_ex(("127.0.0.1", self.port)) == 0:
          break
      time.sleep(0.1)
    if kind == "s3":
      asked = http.client.HTTPConnection("127.0.0.1", self.port)
      asked.request("PUT", f"/{BUCKET}")
      assert asked.getresponse().status == 200
      asked.close()
    self.environment = environment(kind, self.port)

  def close(self):
    self._process.kill()
    self._process.wait()


def environment(kind, port):
  where = f"http://127.0.0.1:{port}"
  if kind == "gs":
    own = {"GOOGLE_CLOUD_PROJECT": "p", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true"}
    return own | {"STORAGE_EMULATOR_HOST": where, "TENSORSTORE_GCS_HTTP_URL": where}
  own = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
  return own | {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": where, "AWS_EC2_METADATA_DISABLED": "true"}


class Unreliable:
  """Stands before a server: every `fails`-th request is answered 503, every `waits`-th after 0.2 seconds.

  While it `refuses`, each is answered 403.
  """

  def __init__(self, port, fails, waits):
    count, self.refuses, self.failed = itertools.count(1), False, 0
    outside = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def log_message(self, *args):
        pass

      def pass_on(self):
        body, number = self.rfile.read(int(self.headers.get("Content-Length") or 0)), next(count)
        if number % waits == 0:
          time.sleep(0.2)
        status, headers, content = 503, [], b"busy"
        if outside.refuses:
          status, content = 403, b"no"
        elif number % fails:
          asked = http.client.HTTPConnection("127.0.0.1", port)
          asked.request(self.command, self.path, body, dict(self.headers))
          found = asked.getresponse()
          status, headers, content = found.status, found.getheaders(), found.read()
          asked.close()
        else:
          outside.failed += 1
        length = dict(headers).get("Content-Length") if self.command == "HEAD" else len(content)
        with contextlib.suppress(ConnectionError):  # who asked may have ended meanwhile
          self.send_response(status)
          for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
              self.send_header(name, value)
          self.send_header("Content-Length", str(length or 0))
          self.end_headers()
          self.wfile.write(content)

      do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = pass_on

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.port = self._server.server_address[1]
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def close(self):
    self._server.shutdown()
    self._server.server_close()


def clean(environ=os.environ):
  """The environment without what might lead to a store elsewhere."""
  return {name: x for name, x in environ.items() if not name.startswith(("AWS_", "GOOGLE_", "STORAGE_"))}
