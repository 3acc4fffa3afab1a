"""A mirror on this machine that serves a file rightly and in every wrong way that is known of public hosts."""

import contextlib
import gzip
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = (
    b"<!DOCTYPE html>\n<html><head><title>Are you a robot?</title></head><body>"
    + b"Please enable JavaScript. " * 200
    + b"</body></html>"
)
ETAG = '"version-1"'


@dataclass
class Host:
    """One running server.

    Attributes
    ----------
    address
        http://127.0.0.1:port
    content
        The file that it has.
    asked
        How often each path was asked for a body.
    sent
        Bytes of the file that were sent, per path.
    requests
        (path, headers) of every request, in order.
    elsewhere
        Address of another host, for redirects.
    pace
        Seconds between two pieces of the slow path.
    """

    content: bytes
    address: str = ""
    elsewhere: str = ""
    pace: float = 0.01
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    asked: Counter = field(default_factory=Counter)
    sent: Counter = field(default_factory=Counter)
    requests: list = field(default_factory=list)

    def forget(self) -> None:
        """Be as at the start."""
        self.dice.seed(0)
        for memory in (self.asked, self.sent, self.requests):
            memory.clear()


def fault(method: Callable) -> Callable:
    """Mark a method that answers a request, rightly or wrongly."""
    method.is_fault = True
    return method


class Handler(BaseHTTPRequestHandler):
    """Serves /FAULT/NAME; FAULT is the name of a method below, or once-STATUS or always-STATUS."""

    protocol_version = "HTTP/1.1"
    host: Host  # set per server

    # --- pieces -----------------------------------------------------------------------------------------------------

    def head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def body(self, content: bytes) -> None:
        if self.command != "HEAD":
            for start in range(0, len(content), 4096):
                self.wfile.write(content[start : start + 4096])
                self.host.sent[self.path] += len(content[start : start + 4096])

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.head(status, len(content), **headers)
        self.body(content)

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    @property
    def span(self) -> tuple[int, int] | None:
        """Return the first byte that is asked for, and the one after the last.

        None without a Range, and where If-Range says that the file has changed.
        """
        asked = self.headers.get("Range", "")
        if not asked.startswith("bytes=") or self.headers.get("If-Range", ETAG) != ETAG:
            return None
        first, _, last = asked[6:].partition("-")
        return int(first), int(last) + 1 if last else len(self.host.content)

    def ranged(self, content: bytes, send: Callable[[bytes], None] | None = None, **headers: str) -> None:
        """Answer with what is asked for of a file."""
        first, end = self.span or (0, len(content))
        if first >= len(content):
            self.head(416, 0, Content_Range=f"bytes */{len(content)}", **headers)
        elif self.span:
            self.head(206, end - first, Content_Range=f"bytes {first}-{end - 1}/{len(content)}", **headers)
            (send or self.body)(content[first:end])
        else:
            self.head(200, len(content), **headers)
            (send or self.body)(content)

    @property
    def n_asked(self) -> int:
        return self.host.asked[self.path]

    # --- right ------------------------------------------------------------------------------------------------------

    @fault
    def right(self) -> None:
        """Ranges and an ETag, as most hosts."""
        self.ranged(self.host.content, ETag=ETAG, Accept_Ranges="bytes")

    @fault
    def no_etag(self) -> None:
        """Ranges, and nothing to tell two versions of the file apart."""
        self.ranged(self.host.content, Accept_Ranges="bytes")

    @fault
    def no_range(self) -> None:
        """The whole file whatever is asked for."""
        self.answer(200, self.host.content, ETag=ETAG)

    @fault
    def chunked(self) -> None:
        """Without Content-Length, in chunks."""
        self.head(200, None, Transfer_Encoding="chunked")
        for start in range(0, len(self.host.content), 7000):
            piece = self.host.content[start : start + 7000]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    @fault
    def no_length(self) -> None:
        """Without Content-Length, until the connection is closed."""
        self.head(200, None)
        self.body(self.host.content)

    @fault
    def slow(self) -> None:
        """In small pieces."""

        def send(content: bytes) -> None:
            for start in range(0, len(content), 4096):
                self.body(content[start : start + 4096])
                time.sleep(self.host.pace)

        self.ranged(self.host.content, send, ETag=ETAG)

    @fault
    def encoded(self) -> None:
        """Compressed on the fly, although nobody asked for it."""
        self.answer(200, gzip.compress(self.host.content), Content_Encoding="gzip")

    @fault
    def misnamed_encoding(self) -> None:
        """A .gz file as it is, with its own compression announced as an encoding."""
        self.ranged(self.host.content, Content_Encoding="x-gzip", ETag=ETAG)

    # --- broken connections -----------------------------------------------------------------------------------------

    @fault
    def cut(self) -> None:
        """The connection breaks at a random place of what is left, every time."""

        def send(content: bytes) -> None:
            n = self.host.dice.randrange(len(content))
            self.body(content if len(content) < 2000 else content[:n])
            self.hang_up()

        self.ranged(self.host.content, send, ETag=ETAG)

    @fault
    def cut_no_range(self) -> None:
        """The connection breaks twice, and every answer starts from the first byte."""
        self.head(200, len(self.host.content))
        self.body(
            self.host.content if self.n_asked > 2 else self.host.content[: len(self.host.content) // (4 - self.n_asked)]
        )
        self.hang_up()

    @fault
    def cut_then_gone(self) -> None:
        """Breaks off in the middle, then 404."""
        if self.n_asked > 1:
            self.answer(404, b"no such file")
        else:
            self.head(200, len(self.host.content), ETag=ETAG)
            self.body(self.host.content[: len(self.host.content) // 2])
            self.hang_up()

    @fault
    def cut_at_once(self) -> None:
        """Not one byte arrives, ever."""
        self.hang_up()

    @fault
    def cut_chunked(self) -> None:
        """Breaks off between two chunks, ever."""
        self.head(200, None, Transfer_Encoding="chunked")
        self.wfile.write(b"%x\r\n" % 1000 + self.host.content[:1000] + b"\r\n")
        self.hang_up()

    @fault
    def changed_between(self) -> None:
        """The connection breaks, and meanwhile the file is replaced by another version."""
        old = bytes(256) * (len(self.host.content) // 256)
        if self.n_asked == 1:
            self.head(200, len(self.host.content), ETag='"version-0"')
            self.body(self.host.content[:64] + old[: len(old) // 2])
            self.hang_up()
        else:
            self.ranged(self.host.content, ETag=ETAG)

    @fault
    def changed_unseen(self) -> None:
        """The same, at a host that tells no versions apart."""
        if self.n_asked == 1:
            self.head(200, len(self.host.content))
            self.body(self.host.content[:64] + bytes(len(self.host.content) // 2))
            self.hang_up()
        else:
            self.ranged(self.host.content)

    @fault
    def stall(self) -> None:
        """Half of the file, then nothing for ever; the connection stays open."""
        self.head(200, len(self.host.content))
        self.body(self.host.content[: len(self.host.content) // 2])
        time.sleep(3)
        self.hang_up()

    @fault
    def stall_once(self) -> None:
        """The same, once."""
        if self.n_asked > 1:
            return self.right()
        self.head(200, len(self.host.content), ETag=ETAG)
        self.body(self.host.content[: len(self.host.content) // 2])
        time.sleep(1.5)
        return self.hang_up()

    # --- wrong files ------------------------------------------------------------------------------------------------

    @fault
    def truncated(self) -> None:
        """A whole answer of a truncated file."""
        self.answer(200, self.host.content[: len(self.host.content) // 2], ETag=ETAG)

    @fault
    def announced_longer(self) -> None:
        """All of the file, announced as longer."""
        self.head(200, len(self.host.content) + 1000, ETag=ETAG)
        self.body(self.host.content)
        self.hang_up()

    @fault
    def announced_shorter(self) -> None:
        """All of the file, announced as shorter."""
        self.head(200, len(self.host.content) // 2, ETag=ETAG)
        self.body(self.host.content)

    @fault
    def no_length_cut(self) -> None:
        """Without Content-Length, closed before the end."""
        self.head(200, None)
        self.body(self.host.content[: len(self.host.content) // 2])

    @fault
    def changed(self) -> None:
        """Another file of the same size."""
        self.answer(200, self.host.content[:-1] + bytes([self.host.content[-1] ^ 1]), ETag='"version-2"')

    @fault
    def grown(self) -> None:
        """Another, longer file."""
        self.answer(200, self.host.content + b"more", ETag='"version-2"')

    @fault
    def page(self) -> None:
        """A web page with 200, as of a firewall or a login."""
        self.answer(200, PAGE, Content_Type="text/html; charset=utf-8")

    @fault
    def page_as_data(self) -> None:
        """The same, announced as data."""
        self.answer(200, b"\n  <html>" + PAGE, Content_Type="application/octet-stream")

    @fault
    def page_then_right(self) -> None:
        """The connection breaks, a web page, then the rest of the file."""
        if self.n_asked == 1:
            self.head(200, len(self.host.content), ETag=ETAG)
            self.body(self.host.content[: len(self.host.content) // 2])
            self.hang_up()
        else:
            self.page() if self.n_asked == 2 else self.right()

    @fault
    def text(self) -> None:
        """A sentence with 200."""
        self.answer(200, b"Quota exceeded, come back tomorrow.")

    @fault
    def empty(self) -> None:
        """200 with nothing in it."""
        self.answer(200, b"")

    # --- statuses ---------------------------------------------------------------------------------------------------

    def status(self, code: int, *, is_once: bool, **headers: str) -> None:
        if is_once and self.n_asked > 1:
            self.right()
        else:
            self.answer(code, b"<html>no</html>" if code != 202 else b"", **headers)

    @fault
    def redirect(self) -> None:
        """To another path of this host."""
        self.head(302, 0, Location=self.path.replace("/redirect/", "/right/"))

    @fault
    def redirect_elsewhere(self) -> None:
        """To another host."""
        self.head(302, 0, Location=self.host.elsewhere + self.path.replace("/redirect_elsewhere/", "/right/"))

    @fault
    def redirect_loop(self) -> None:
        """To itself."""
        self.head(302, 0, Location=self.path)

    @fault
    def redirect_nowhere(self) -> None:
        """To something that is no web address."""
        self.head(302, 0, Location="ftp://example.org/file")

    @fault
    def no_head(self) -> None:
        """HEAD is refused."""
        self.head(405, 0) if self.command == "HEAD" else self.right()

    # --- dispatch ---------------------------------------------------------------------------------------------------

    def do_GET(self) -> None:
        self.host.requests.append((self.path, dict(self.headers)))
        self.host.asked[self.path] += 1
        name, _, code = self.path.split("/")[1].partition("-")
        with contextlib.suppress(ConnectionError):
            if code:
                headers = {"Retry_After": "120"} if code == "429" else {}
                self.status(int(code), is_once=name == "once", **headers)
            else:
                getattr(self, name)()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing on the terminal."""


@contextlib.contextmanager
def serving(content: bytes) -> Iterator[Host]:
    """Run a host with a file, and a second one that redirects lead to."""
    with contextlib.ExitStack() as stack:
        hosts = [Host(content), Host(content)]
        for host in hosts:
            server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"host": host}))
            server.daemon_threads, server.block_on_close = True, False
            stack.enter_context(server)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            stack.callback(server.shutdown)
            host.address = f"http://127.0.0.1:{server.server_port}"
        hosts[0].elsewhere = hosts[1].address
        yield hosts[0]
