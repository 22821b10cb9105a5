"""An HTTP server on this machine that misbehaves as told, and one that answers as the Hugging Face hub does."""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Page:
    """What the server does when a path is asked for."""

    body: bytes = b""
    etag: str = '"one"'
    type: str = "application/octet-stream"
    status: int = 200
    failures: int = 0  # answers of 503 before the first good one
    cut_at: int | None = None  # ends the connection after so many bytes of an answer
    cuts: int = 10**6  # that often
    extra_length: int = 0  # added to the true Content-Length
    ranges: bool = True  # honours Range
    ignores_condition: bool = False  # honours Range even if If-Range names another version
    redirect: str | None = None
    delay: float = 0.0  # seconds before the second half
    headers: dict[str, str] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, *, send_body: bool) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path, dict(self.headers)))
        page = self.server.pages.get(path, Page(status=404, headers=self.server.absent))
        self.close_connection = True
        if page.failures:
            page.failures -= 1
            self._head(503, 0, {})
            return
        if page.redirect is not None:
            self._head(302, 0, {"Location": page.redirect})
            return
        asked, status, headers = self.headers.get("Range"), page.status, dict(page.headers)
        body, start = page.body, 0
        if asked and page.ranges and (page.ignores_condition or self.headers.get("If-Range") in (None, page.etag)):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
            if not body:
                status, headers["Content-Range"] = 416, f"bytes */{len(page.body)}"
        headers |= {"Content-Type": page.type} | ({"ETag": page.etag} if page.etag else {})
        self._head(status, len(body) + page.extra_length, headers)
        if not send_body:
            return
        if page.cut_at is not None and page.cuts:
            page.cuts -= 1
            body = body[: page.cut_at]
        self.wfile.write(body[: len(body) // 2])
        if page.delay:
            self.wfile.flush()
            time.sleep(page.delay)
        self.wfile.write(body[len(body) // 2 :])

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages: dict[str, Page] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.absent: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *arguments: object) -> None:
        pass  # a client that hangs up is part of the play


@contextmanager
def serve(pages: dict[str, Page]) -> Iterator[Server]:
    server = Server()
    server.pages = pages
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_pages(repository: str, files: dict[str, bytes], revision: str = "main") -> dict[str, Page]:
    """Pages of a hub with one repository."""
    commit = hashlib.sha1(repository.encode()).hexdigest()
    pages = {}
    for name, content in files.items():
        page = Page(content, etag=f'"{hashlib.sha256(content).hexdigest()}"', headers={"X-Repo-Commit": commit})
        pages[f"/{repository}/resolve/{revision}/{name}"] = pages[f"/{repository}/resolve/{commit}/{name}"] = page
    return pages


ABSENT_FILE = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40}
