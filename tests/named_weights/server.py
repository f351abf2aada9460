"""A server on the loopback address: files with ranges, a hub's paths, and faults on demand."""

import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Reply:
    """What is sent, and how much of it."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    cut: int | None = None  # bytes of the body that are sent before the connection is closed
    stall: threading.Event | None = None  # waited for, in the place of closing


Fault = Callable[[Reply, BaseHTTPRequestHandler], Reply]


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        """Connections that clients close are none."""


class Server:
    """Serves `files` by path; `faults` are taken one a GET of a file, then there are none.

    Attributes:
        url: http://127.0.0.1:PORT; it is a hub's address too.
        files: {path, such as /files/a.bin or /OWNER/NAME/a.bin: content}.
        faults: of the GETs to come.
        requests: (method, path, Range or None) of those that came.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.ended = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer._answer(self)

            def do_HEAD(self):
                outer._answer(self)

            def log_message(self, *arguments):
                pass

        self._http = _HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def close(self) -> None:
        """Ends it, and what stalls."""
        self.ended.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path, _, _ = request.path.partition("?")
        self.requests.append((request.command, path, request.headers.get("Range")))
        reply = self._reply(request, path)
        if request.command == "GET" and reply.status in (200, 206) and self.faults:
            reply = self.faults.pop(0)(reply, request)
        with contextlib.suppress(ConnectionError):
            self._send(request, reply)

    def _reply(self, request: BaseHTTPRequestHandler, path: str) -> Reply:
        owner_name, at_hub, rest = path.partition("/resolve/")
        commit, _, name = rest.partition("/")
        content = self.files.get(f"{owner_name}/{name}" if at_hub else path)
        if content is None:
            code = "EntryNotFound" if self._has_repo(owner_name) else "RepoNotFound"
            return Reply(404, {"X-Error-Code": code} if at_hub else {})
        if at_hub and commit not in ("main", COMMIT):
            return Reply(404, {"X-Error-Code": "RevisionNotFound"})
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if at_hub:
            headers |= {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{digest}"'}
            headers["X-Linked-Size"] = str(len(content))
        wanted, condition = request.headers.get("Range"), request.headers.get("If-Range")
        if wanted and condition in (None, headers["ETag"]):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            if start >= len(content):
                return Reply(416, {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return Reply(206, headers, content[start:])
        return Reply(200, headers, content)

    def _has_repo(self, owner_name: str) -> bool:
        return any(path.startswith(f"{owner_name}/") for path in self.files)

    def _send(self, request: BaseHTTPRequestHandler, reply: Reply) -> None:
        request.send_response(reply.status)
        for name, value in ({"Content-Length": str(len(reply.body))} | reply.headers).items():
            if value:
                request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        request.wfile.write(reply.body[: reply.cut])
        request.wfile.flush()
        if reply.stall is not None:
            reply.stall.wait()
        if reply.cut is not None or reply.stall is not None:
            request.close_connection = True


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server that runs until the block ends."""
    server = Server()
    server.start()
    try:
        yield server
    finally:
        server.close()


# Faults.


def cut(place: int) -> Fault:
    """The connection closes after so many bytes of the body."""
    return lambda reply, request: dataclasses.replace(reply, cut=place)


def stalled(place: int, ended: threading.Event) -> Fault:
    """Nothing comes after so many bytes, until `ended`."""
    return lambda reply, request: dataclasses.replace(reply, cut=place, stall=ended)


def page(reply: Reply, request: BaseHTTPRequestHandler) -> Reply:
    """A login page, as some networks send in the place of everything."""
    return Reply(200, {"Content-Type": "text/html; charset=utf-8"}, b"<!DOCTYPE html><title>Hi")


def quiet_page(reply: Reply, request: BaseHTTPRequestHandler) -> Reply:
    """The same, called a file."""
    return Reply(200, reply.headers | {"Content-Range": ""}, b"<html><body>not found</body></html>")


def status(code: int) -> Fault:
    """An error."""
    return lambda reply, request: Reply(code, {})


def redirect(address: str) -> Fault:
    """To another address."""
    return lambda reply, request: Reply(302, {"Location": address})


def range_from(shift: int, *, honest: bool = True) -> Fault:
    """Bytes from `shift` further on than asked; `honest`: and says so."""

    def fault(reply: Reply, request: BaseHTTPRequestHandler) -> Reply:
        if reply.status != 206:
            return reply
        start, rest = reply.headers["Content-Range"].removeprefix("bytes ").split("-", 1)
        told = int(start) + (shift if honest else 0)
        headers = reply.headers | {"Content-Range": f"bytes {told}-{rest}"}
        return dataclasses.replace(reply, headers=headers, body=reply.body[shift:])

    return fault


def declared(difference: int) -> Fault:
    """The header says another length than the body has."""

    def fault(reply: Reply, request: BaseHTTPRequestHandler) -> Reply:
        length = max(0, len(reply.body) + difference)
        headers = reply.headers | {"Content-Length": str(length)}
        return dataclasses.replace(reply, headers=headers, cut=length)

    return fault


def without_length(reply: Reply, request: BaseHTTPRequestHandler) -> Reply:
    """No header says how long the body is: it ends where the connection does."""
    headers = reply.headers | {"Content-Length": "", "ETag": ""}
    return dataclasses.replace(reply, headers=headers, cut=len(reply.body) // 2)


def flipped(place: int) -> Fault:
    """A byte of the body is another."""

    def fault(reply: Reply, request: BaseHTTPRequestHandler) -> Reply:
        body = bytearray(reply.body)
        body[place % len(body)] ^= 0x40
        return dataclasses.replace(reply, body=bytes(body))

    return fault
