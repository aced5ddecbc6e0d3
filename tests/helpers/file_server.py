"""A web server on this machine that can misbehave as real ones do."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Serves `files`, a dict of paths ("/models/x.pth") to bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []  # path, Range header
        self.supports_ranges = True
        self.tells_length = True
        self.close_after: int | None = None  # body bytes; then the connection is closed
        self.stall = threading.Event()  # set: the server may go on after `close_after` bytes
        self.stall.set()


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        partial = wanted is not None and self.server.supports_ranges
        if partial:
            body = body[int(wanted.removeprefix("bytes=").removesuffix("-")) :]
        self.send_response(206 if partial else 200)
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has heard enough
            self.wfile.write(body[: self.server.close_after])
            self.wfile.flush()
        self.server.stall.wait()

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@contextlib.contextmanager
def running() -> Iterator[FileServer]:
    """A server that runs in a thread of its own."""
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.stall.set()
            server.shutdown()
            thread.join()
