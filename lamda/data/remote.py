"""The bytes of a file on an HTTP server, in order and complete, whatever happens on the way.

A read that breaks is opened again at the very byte where it stopped. This lies below any decompressor,
which therefore sees one unbroken stream, and ends only where the file does.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from random import Random
from ssl import SSLCertVerificationError
from time import sleep
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from lamda.data.errors import DataError

CHUNK = 1 << 18
TRANSIENT = {408, 425, 429}
"""Client errors that pass; every 5xx does too."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for; all times in seconds.

    attempts: failures in a row, without a byte between them, that end the read. Waits double from
    `first_wait` to `longest_wait`, each shortened at random by up to a half. A server's Retry-After is
    heeded up to `longest_demand`. timeout: for a connection, and for each byte to come.
    """

    attempts: int = 12
    first_wait: float = 0.5
    longest_wait: float = 60.0
    longest_demand: float = 300.0
    timeout: float = 60.0


@dataclass(frozen=True)
class RemoteFile:
    """A file by its http(s) address; `name` is what errors call it. `headers` stay with the first host."""

    name: str
    address: str
    headers: Mapping[str, str] = field(default_factory=dict)
    patience: Patience = Patience()

    def size(self) -> int:
        """Bytes that the server has. Raises DataError where it does not say, and as `read`."""
        attempts = _Attempts(self)
        while True:
            try:
                with self._open(None) as response:
                    length = response.headers.get("Content-Length")
            except (OSError, HTTPException) as error:
                attempts.failed(error, 0)
                continue
            if length is None:
                raise DataError(f"{self.name}: the server does not say how long the file is")
            return int(length)

    def read(self, *, size: int, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on of a file of `size` bytes.

        Resets, timeouts, early ends, 429 and 5xx are tried again from the byte where they struck. Raises
        DataError for any other answer, a file that changes, and a server that stays silent.
        """
        position, tag, attempts = start, None, _Attempts(self)
        while position < size:
            try:
                with self._open(position) as response:
                    self._require_range(response, position, size)
                    tag = self._require_version(response, tag)
                    for chunk in _body(response, skip=position if response.status != 206 else 0):
                        attempts.failures = 0
                        position += len(chunk)
                        if position > size:
                            raise DataError(f"{self.name}: the server sends more than the file's {size} bytes")
                        yield chunk
                if position < size:
                    raise ConnectionError("the answer ended early")
            except (OSError, HTTPException) as error:
                attempts.failed(error, position)

    def _open(self, position: int | None) -> HTTPResponse:
        request = Request(self.address, headers={"User-Agent": "lamda", "Accept-Encoding": "identity"})
        if position is not None:
            request.add_header("Range", f"bytes={position}-")
        for key, value in self.headers.items():
            # A redirect leads to another host, which neither needs nor may see the token.
            request.add_unredirected_header(key, value)
        try:
            return urlopen(request, timeout=self.patience.timeout)
        except HTTPError as error:
            error.close()
            if error.code in TRANSIENT or error.code >= 500:
                raise
            raise DataError(f"{self.name}: the server answers {error.code} ({error.reason})") from error
        except URLError as error:
            if isinstance(error.reason, SSLCertVerificationError):
                raise DataError(f"{self.name}: the server's certificate is refused ({error.reason})") from error
            raise

    def _require_range(self, response: HTTPResponse, position: int, size: int) -> None:
        if response.status == 206:
            stated = response.headers.get("Content-Range", "")
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", stated)
            if found is None or int(found[1]) != position:
                raise DataError(f"{self.name}: asked for bytes from {position}, the server sends {stated!r}")
            total = found[2]
        else:
            total = response.headers.get("Content-Length", "*")
        if total not in ("*", str(size)):
            raise DataError(f"{self.name}: has {total} bytes on the server now, but had {size}; it was changed")

    def _require_version(self, response: HTTPResponse, before: str | None) -> str | None:
        tag = response.headers.get("ETag")
        if tag is None or tag.startswith("W/"):
            return before
        if before not in (None, tag):
            raise DataError(f"{self.name}: was changed on the server while it was read (ETag {before}, now {tag})")
        return tag


class _Attempts:
    """Failures in a row, and the wait after each."""

    def __init__(self, file: RemoteFile) -> None:
        self.failures = 0
        self._file = file
        self._random = Random()  # apart from the run's own generators

    def failed(self, error: Exception, position: int) -> None:
        """Wait before the next attempt; raise DataError where there is none left."""
        patience, self.failures = self._file.patience, self.failures + 1
        cause = f"{type(error).__name__}: {error}"
        if self.failures >= patience.attempts:
            raise DataError(
                f"{self._file.name}: no byte from {position} on in {self.failures} attempts; the last: {cause}"
            ) from error
        wait = min(patience.longest_wait, patience.first_wait * 2 ** (self.failures - 1))
        wait = max(wait * self._random.uniform(0.5, 1), min(_demanded(error), patience.longest_demand))
        log.warning("%s: %s at byte %d; again in %.1f s", self._file.name, cause, position, wait)
        sleep(wait)


def _demanded(error: Exception) -> float:
    """Seconds that the server asks to be left alone."""
    value = error.headers.get("Retry-After", "") if isinstance(error, HTTPError) else ""
    if value.isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()


def _body(response: HTTPResponse, *, skip: int) -> Iterator[bytes]:
    """What the server sends, as it comes, but for the first `skip` bytes (of a server that knows no ranges)."""
    while chunk := response.read1(CHUNK):
        if skip < len(chunk):
            yield chunk[skip:] if skip else chunk
        skip = max(0, skip - len(chunk))
