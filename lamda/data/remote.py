"""Reading files from HTTP servers, with retries.

A read that breaks is resumed with a range request at the byte where it stopped. Decompressors work on top of this, so
they see one unbroken stream that ends only at the end of the file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, InvalidURL
from random import Random
from ssl import SSLCertVerificationError
from time import sleep
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from lamda.config.errors import DataError, DataUnavailableError
from lamda.console import one_line

CHUNK = 1 << 18
LONGEST_CAUSE = 200
"""Characters of the cause of a failure in messages: it may quote the answer of a server that is not HTTP."""

TRANSIENT = {408, 425, 429}
"""Client errors that are retried, like every 5xx."""

STORED_ENCODINGS = {"gzip": ".gz", "x-gzip": ".gz", "zstd": ".zst"}
"""Content-Encoding that some servers send for files stored in that format; the bytes are used as they are."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """Retries with exponential backoff; times in seconds.

    attempts: consecutive failures, without a byte between them, that end the read. Waits double from `first_wait` to
    `max_wait`, each with random jitter down to half. Retry-After is respected up to `max_retry_after`. timeout: for
    connecting, and for each read.
    """

    attempts: int = 12
    first_wait: float = 0.5
    max_wait: float = 60.0
    max_retry_after: float = 300.0
    timeout: float = 60.0


class Version(NamedTuple):
    """The version of a file on a server: its ETag, strong or weak (`W/"..."`), and Last-Modified."""

    etag: str | None = None
    modified: str | None = None

    @property
    def is_strong(self) -> bool:
        """Whether the ETag identifies the exact bytes."""
        return self.etag is not None and not self.etag.startswith("W/")

    @property
    def tag(self) -> str | None:
        """The best part, for messages and fingerprints: a strong ETag, else Last-Modified, else a weak ETag."""
        if self.modified is not None and not self.is_strong:
            return f"Last-Modified {self.modified}"
        return None if self.etag is None else f"ETag {self.etag}"

    def difference(self, now: Version) -> str | None:
        """Why the two versions differ, or None; parts that only one of them has are ignored."""
        tags, times = ("ETag", self.etag, now.etag), ("Last-Modified", self.modified, now.modified)
        if self.is_strong and now.is_strong:
            pairs = [tags]
        else:
            pairs = [times] if self.is_strong or now.is_strong else [tags, times]
        found = (f"{name} {old}, now {new}" for name, old, new in pairs if None not in (old, new) and old != new)
        return next(found, None)


@dataclass(frozen=True)
class RemoteFile:
    """A file at an http(s) address. name: in messages. headers: sent to the first host only, not after redirects.

    version: of the file when it was resolved; every read must return the same one. on_wait: called on each attempt, and
    about once per second while waiting.
    """

    name: str
    address: str
    headers: Mapping[str, str] = field(default_factory=dict)
    retry: RetryPolicy = RetryPolicy()
    version: Version | None = None
    on_wait: Callable[[], object] = field(default=lambda: None, compare=False, repr=False)

    def look_up(self) -> tuple[int, Version]:
        """Size and version of the file. Raises DataError if the server sends no size, and as `read`."""
        attempts = _Attempts(self)
        while True:
            try:
                with self._open(None) as response:
                    length = response.headers.get("Content-Length", "")
                    version = _version(response)
            except (OSError, HTTPException) as error:
                attempts.failed(error, 0)
                continue
            if not re.fullmatch(r"[0-9]+", length):
                said = f" (Content-Length: {length})" if length else ""
                raise DataError(f"{self.name}: the server does not send the size of the file{said}")
            return int(length), version

    def read(self, *, size: int, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to `stop`, or to the end, of a file of `size` bytes.

        Resets, timeouts, early ends, 429 and 5xx are retried from the byte where they occurred. Raises DataError for
        any other answer and for a changed file, DataUnavailableError if retries are exhausted.
        """
        position, version, attempts = start, self.version or Version(), _Attempts(self)
        stop = size if stop is None else min(stop, size)
        while position < stop:
            try:
                with self._open(position, None if stop == size else stop) as response:
                    self._require_range(response, position, size)
                    version = self._require_version(response, version)
                    for chunk in _body(response, skip=position if response.status != 206 else 0):
                        attempts.failures = 0
                        position += len(chunk)
                        if position > stop and (stop == size or response.status == 206):
                            raise DataError(f"{self.name}: the server sends more than the file's {size} bytes")
                        yield chunk[: len(chunk) + min(0, stop - position)]
                        if position >= stop < size:
                            return
                if position < stop:
                    raise ConnectionError("the answer ended early")
            except (OSError, HTTPException) as error:
                attempts.failed(error, position)

    def _open(self, position: int | None, stop: int | None = None) -> HTTPResponse:
        try:
            response = self._answer(position, stop)
        except (InvalidURL, ValueError) as error:
            if isinstance(error, OSError):  # a certificate's error is both
                raise
            raise DataError(
                f"{self.name}: is not a valid address ({error}); write spaces and letters outside ASCII as %XX"
            ) from error
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        suffix = STORED_ENCODINGS.get(encoding)
        if encoding not in ("identity", "") and (suffix is None or not self.name.endswith(suffix)):
            response.close()
            raise DataError(
                f"{self.name}: the server sends Content-Encoding {encoding}, which was not asked for: its bytes are "
                "not the file's. Turn the compression off there, or name the compressed file"
            )
        return response

    def _answer(self, position: int | None, stop: int | None) -> HTTPResponse:
        request = Request(self.address, headers={"User-Agent": "lamda", "Accept-Encoding": "identity"})
        if position is not None:
            request.add_header("Range", f"bytes={position}-{'' if stop is None else stop - 1}")
        for key, value in self.headers.items():
            # A redirect may lead to another host, which must not see the token.
            request.add_unredirected_header(key, value)
        try:
            return urlopen(request, timeout=self.retry.timeout)
        except HTTPError as error:
            error.close()
            if error.code in TRANSIENT or error.code >= 500:
                raise
            raise DataError(f"{self.name}: the server answers {error.code} ({error.reason})") from error
        except URLError as error:
            if isinstance(error.reason, SSLCertVerificationError):
                raise DataError(f"{self.name}: the server's certificate is refused ({error.reason})") from error
            if isinstance(error.reason, str):  # from urllib itself: no host, or an unknown scheme
                raise ValueError(error.reason) from error
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

    def _require_version(self, response: HTTPResponse, before: Version) -> Version:
        now = _version(response)
        if (difference := before.difference(now)) is not None:
            raise DataError(f"{self.name}: was changed on the server ({difference}); put the former file back")
        return Version(now.etag or before.etag, now.modified or before.modified)


def _version(response: HTTPResponse) -> Version:
    return Version(response.headers.get("ETag") or None, response.headers.get("Last-Modified") or None)


class _Attempts:
    """Counts consecutive failures, and waits after each."""

    def __init__(self, file: RemoteFile) -> None:
        self.failures = 0
        self._file = file
        self._random = Random()  # separate from the generators of the run

    def failed(self, error: Exception, position: int) -> None:
        """Wait before the next attempt; raise DataUnavailableError if none is left."""
        retry, self.failures = self._file.retry, self.failures + 1
        cause = one_line(f"{type(error).__name__}: {str(error)[:LONGEST_CAUSE]}")
        if self.failures >= retry.attempts:
            raise DataUnavailableError(
                f"{self._file.name}: no byte from {position} on in {self.failures} attempts; the last: {cause}"
            ) from error
        wait = min(retry.max_wait, retry.first_wait * 2 ** (self.failures - 1))
        wait = max(wait * self._random.uniform(0.5, 1), min(_retry_after(error), retry.max_retry_after))
        log.warning("%s: %s at byte %d; again in %.1f s", self._file.name, cause, position, wait)
        _wait(wait, self._file.on_wait)


def _wait(seconds: float, on_wait: Callable[[], object]) -> None:
    on_wait()
    while seconds > 0:
        sleep(min(seconds, 1.0))
        seconds -= 1.0
        on_wait()


def _retry_after(error: Exception) -> float:
    """Seconds of the server's Retry-After."""
    value = error.headers.get("Retry-After", "") if isinstance(error, HTTPError) else ""
    if value.isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()


def _body(response: HTTPResponse, *, skip: int) -> Iterator[bytes]:
    """The body as it arrives, without the first `skip` bytes (for servers without range requests)."""
    while chunk := response.read1(CHUNK):
        if skip < len(chunk):
            yield chunk[skip:] if skip else chunk
        skip = max(0, skip - len(chunk))
