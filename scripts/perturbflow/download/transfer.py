"""One file over HTTP: the bytes that arrived are kept and continued, whatever interrupts the transfer."""

import contextlib
import gzip
import http.client
import itertools
import json
import logging
import random
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
import urllib3
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from perturbflow import __version__
from perturbflow.download.verification import A_WEB_PAGE, BLOCK_BYTES, HEAD_BYTES, is_web_page
from perturbflow.io.files import full_disk, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long to wait for a host, in seconds."""

    connect: float = 20
    stall: float = 60
    """Without a byte."""
    first_wait: float = 2
    """Before the second attempt; doubled with every further one that brings nothing, up to `longest_wait`."""
    longest_wait: float = 60
    longest_retry_after: float = 300
    """A host may ask for more patience than this, and does not get it."""
    fruitless_attempts: int = 6
    """In a row that bring not one byte more; then it is the next mirror's turn."""
    attempts: int = 1000
    report_every: float = 30
    """Between two lines in a log."""


PATIENCE = Patience()
HEADERS = {"User-Agent": f"perturbflow/{__version__}", "Accept-Encoding": "identity"}
# Answers of a host that may give the file later. Some answer 403 to too many requests.
LATER = {202, 403, 408, 425, 429, *range(500, 600)}
REDIRECTS = 10


class LaterError(Exception):
    """The transfer broke off, and may continue."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class RefusedError(Exception):
    """A mirror does not give the file."""


# --- the arrived bytes ---------------------------------------------------------------------------------------------


class Partial:
    """The bytes of a file that have arrived so far, with a note of their source beside them.

    Parameters
    ----------
    path
        Hidden, and named after the expected content, so that other content never continues it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.note_path = path.with_name(f"{path.name}.json")
        self.decoded_path = path.with_name(f"{path.name}.decoded")

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def note(self) -> dict:
        """url, validator (ETag or date) and encoding of the arrived bytes; empty if unknown."""
        try:
            return json.loads(self.note_path.read_text())
        except (OSError, ValueError):
            return {}

    def begin(self, note: dict) -> None:
        """Start anew."""
        self.discard()
        write_json(self.note_path, note)
        self.path.touch()

    def discard(self) -> None:
        """Delete the arrived bytes."""
        for path in (self.path, self.note_path, self.decoded_path):
            path.unlink(missing_ok=True)

    def decoded(self) -> Path | None:
        """Return the content without the host's gzip encoding; None where it has none, or is no valid one."""
        if not self.note.get("encoding"):
            return None
        try:
            with gzip.open(self.path) as source, self.decoded_path.open("wb") as copy:
                shutil.copyfileobj(source, copy, BLOCK_BYTES)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            return None
        return self.decoded_path


# --- progress -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bar(name: str, total: int | None, n_bytes: int) -> Iterator[tqdm]:
    """Show a progress bar on a terminal."""
    is_terminal = sys.stderr.isatty()
    bar = tqdm(
        desc=name, total=total, initial=n_bytes, unit="B", unit_scale=True, disable=not is_terminal, dynamic_ncols=True
    )
    with logging_redirect_tqdm() if is_terminal else contextlib.nullcontext(), bar:
        yield bar


class _Report:
    """A line in the log every so often: share, bytes, rate and remaining time."""

    def __init__(self, name: str, total: int | None, n_bytes: int) -> None:
        self.name, self.total, self.initial = name, total, n_bytes
        self.start = self.last = time.monotonic()

    def __call__(self, n_bytes: int) -> None:
        now = time.monotonic()
        if now - self.last < PATIENCE.report_every:
            return
        self.last = now
        form = (
            "{percentage:.0f} %, {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
            if self.total
            else "{n_fmt}, {rate_fmt}"
        )
        elapsed = now - self.start
        line = tqdm.format_meter(
            n_bytes, self.total, elapsed, unit="B", unit_scale=True, initial=self.initial, bar_format=form
        )
        logger.info("%s: %s", self.name, line)


# --- one attempt ----------------------------------------------------------------------------------------------------


def reason(error: BaseException) -> str:
    """Return the reason of a failed connection: the words of the innermost error."""
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {PATIENCE.connect:g} s"
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return f"no byte for {PATIENCE.stall:g} s"
    of_connections = (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError)
    while isinstance(inner := error.__cause__ or error.__context__, of_connections):
        error = inner
    if isinstance(error, urllib3.exceptions.IncompleteRead):
        return f"{error.partial:,} bytes arrived, {error.expected:,} more were announced"
    if isinstance(error, http.client.IncompleteRead):
        return "it ended where more was announced"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _retry_after(response: requests.Response) -> float | None:
    """Return the seconds that a host asks to wait, capped; None without a readable answer."""
    try:
        seconds = urllib3.Retry().get_retry_after(response.raw)
    except urllib3.exceptions.HTTPError:
        return None
    return None if seconds is None else min(seconds, PATIENCE.longest_retry_after)


def content_range(header: str) -> tuple[int | None, int | None]:
    """Return first byte and total of a Content-Range, each None where it is missing."""
    unit, _, rest = header.partition(" ")
    span, _, total = rest.partition("/")
    first = span.split("-")[0]
    if unit.lower() != "bytes":
        return None, None
    return int(first) if first.isdecimal() else None, int(total) if total.isdecimal() else None


def _validator(response: requests.Response) -> str | None:
    """Return the mark of a version of the file, in a form that If-Range takes: no weak ETag."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _may_go_on(partial: Partial, url: str, file: dict) -> bool:
    """Return whether the next bytes of this URL belong after the arrived ones.

    With a declared checksum the bytes of all mirrors are the same, and a mistake is found. Without one, only the host
    knows, by an ETag or a date, whether it still has the same file.
    """
    note = partial.note
    if not note or note.get("encoding") or partial.size == 0:
        return False
    return "checksum" not in file or bool(note["url"] == url and note["validator"])


def _asked(session: requests.Session, url: str, headers: dict) -> requests.Response:
    try:
        return session.get(url, headers=headers, stream=True, timeout=(PATIENCE.connect, PATIENCE.stall))
    except requests.TooManyRedirects as error:
        raise RefusedError("it redirects in a circle") from error
    except (
        requests.exceptions.InvalidURL,
        requests.exceptions.InvalidSchema,
        requests.exceptions.MissingSchema,
    ) as error:
        raise RefusedError(f"it redirects to an address that cannot be: {error}") from error
    except requests.RequestException as error:
        raise LaterError(reason(error)) from error


def _check_status(response: requests.Response) -> None:
    """Raise unless an answer has a body that can be the file, or a part of it."""
    if response.status_code in LATER:
        remark = ", without the file" if response.status_code == 202 else ""
        raise LaterError(f"HTTP {response.status_code} {response.reason}{remark}", _retry_after(response))
    if response.status_code not in (200, 206):
        raise RefusedError(f"HTTP {response.status_code} {response.reason}")
    if (encoding := _encoding(response)) not in (None, "gzip", "x-gzip"):
        raise RefusedError(f"it insists on a Content-Encoding that is not understood: {encoding}")


def _check_size(response: requests.Response, file: dict) -> None:
    """Raise if a host announces another size than the declared one; the size of an encoded body does not count."""
    total, declared = total_bytes(response), file.get("bytes")
    if _encoding(response) is None and None not in (total, declared) and total != declared:
        raise RefusedError(
            f"it announces {total:,} bytes, {declared:,} are declared: the file is truncated or has changed at the "
            "source"
        )


def _encoding(response: requests.Response) -> str | None:
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return None if encoding in ("", "identity") else encoding


def total_bytes(response: requests.Response) -> int | None:
    """Return the size of the whole file by an answer (encoded, if it is), or None."""
    if response.status_code == 206:
        return content_range(response.headers.get("Content-Range", ""))[1]
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _body(response: requests.Response) -> Iterator[bytes]:
    """Yield the bytes of a body as they come over the wire, without decoding."""
    try:
        while block := response.raw.read1(BLOCK_BYTES, decode_content=False):
            yield block
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise LaterError(f"the connection broke off: {reason(error)}") from error


def _head(blocks: Iterator[bytes]) -> bytes:
    """Return enough of a body to recognize a web page.

    It raises an error for a web page, and for an empty body.
    """
    head = b""
    for block in blocks:
        head += block
        if len(head) >= HEAD_BYTES:
            break
    if is_web_page(head):
        raise RefusedError(A_WEB_PAGE)
    if not head:
        raise LaterError("an empty answer")
    return head


def _attempt(session: requests.Session, url: str, partial: Partial, file: dict) -> bool:
    """Ask once for the missing bytes; return, once all are there, whether they came in one piece.

    The arrived bytes are dropped only when others replace them.
    """
    if not _may_go_on(partial, url, file) or partial.size > file.get("bytes", partial.size):
        partial.discard()
    have, note = partial.size, partial.note
    if have and have == file.get("bytes"):
        return False
    headers = dict(HEADERS)
    if have:
        headers["Range"] = f"bytes={have}-"
        if note["url"] == url and note["validator"]:
            headers["If-Range"] = note["validator"]
        logger.info("%s: going on after %s bytes", url, f"{have:,}")
    with _asked(session, url, headers) as response:
        if response.status_code == 416 and have:
            if content_range(response.headers.get("Content-Range", ""))[1] == have:
                return False
            partial.discard()
            raise LaterError("it has no such part of the file; the arrived bytes are dropped")
        _check_status(response)
        blocks = _body(response)
        head = _head(blocks) if response.status_code == 200 else b""
        _check_size(response, file)
        if response.status_code == 206:
            is_other = note.get("url") == url and None is not _validator(response) != note["validator"]
            if content_range(response.headers.get("Content-Range", ""))[0] != have or is_other:
                partial.discard()
                raise LaterError(
                    "it went on with another part or another version of the file; the arrived bytes are dropped"
                )
        else:
            if have:
                logger.info("%s starts from the first byte again", url)
            partial.begin({"url": url, "validator": _validator(response), "encoding": _encoding(response)})
        total = total_bytes(response)
        missing = (total or 0) - partial.size
        if missing > shutil.disk_usage(partial.path.parent).free:
            raise full_disk(partial.path.parent, f"the {missing:,} bytes of {file['name']} that are missing")
        _store(head, blocks, partial, file["name"], total)
        expected = total if _encoding(response) else file.get("bytes", total)
    if expected is not None and partial.size < expected:
        raise LaterError(f"the connection ended after {partial.size:,} of {expected:,} bytes")
    return response.status_code == 200


def _store(head: bytes, blocks: Iterator[bytes], partial: Partial, name: str, total: int | None) -> None:
    """Append the coming bytes to the partial file, and show the progress."""
    have = partial.size
    report = _Report(name, total, have)
    with _bar(name, total, have) as bar, partial.path.open("ab", buffering=0) as file:
        for block in itertools.chain([head], blocks):
            file.write(block)
            have += len(block)
            bar.update(len(block))
            report(have)


# --- until it is there ----------------------------------------------------------------------------------------------


def fetch(url: str, partial: Partial, file: dict) -> bool:
    """Bring a file from one mirror into `partial`, with as many attempts as bring bytes.

    Returns
    -------
    Whether all of it came in one piece; otherwise a wrong checksum may be that of parts that do not belong together.

    Raises
    ------
    RefusedError
        If this mirror does not give the file.
    InputError
        If it does not fit on the disk.
    """
    most, fruitless = partial.size, 0
    with requests.Session() as session:
        session.max_redirects = REDIRECTS
        for attempt in range(1, PATIENCE.attempts + 1):
            try:
                return _attempt(session, url, partial, file)
            except LaterError as error:
                fruitless = 0 if partial.size > most else fruitless + 1
                most = max(most, partial.size)
                if fruitless == PATIENCE.fruitless_attempts or attempt == PATIENCE.attempts:
                    raise RefusedError(f"{error}, after {attempt} attempts") from error
                wait = min(PATIENCE.first_wait * 2 ** max(fruitless - 1, 0), PATIENCE.longest_wait) * random.uniform(
                    0.5, 1
                )
                wait = wait if error.wait is None else error.wait
                logger.warning("%s: %s; again in %.0f s", url, error, wait)
                time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")
