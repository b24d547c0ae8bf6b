"""A server that fails on purpose loses no byte, and one that cannot give the file is an error."""

import contextlib
import hashlib
import io
import random
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamda.config.errors import DataError, DataUnavailableError, UserError
from lamda.data import identity, remote, resolving
from lamda.data.card import Checksum, Source
from lamda.data.files import File, read_all, read_lines
from lamda.data.parquet import read_rows
from lamda.data.remote import RemoteFile, RetryPolicy, Version
from lamda.data.resolving import resolve

CONTENT = random.Random(1).randbytes(300_000)
QUICK = RetryPolicy(attempts=4, first_wait=0.0, max_wait=0.0, timeout=0.3)


class Server(ThreadingHTTPServer):
    """Serves `content`; the fault of request n is `faults[n]`, a kind and a number; later ones are sound."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reset()

    def reset(self, content=CONTENT, faults=(), *, ranges=True, tags=(), versions=()):
        """versions: the content and headers of request n; the last of them also of all later ones."""
        self.content, self.faults, self.ranges, self.tags = content, list(faults), ranges, list(tags)
        self.versions = list(versions)
        self.requests: list[tuple[str, dict[str, str]]] = []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/shard"

    def file(self, retry=QUICK, **fields):
        return RemoteFile("shard", self.address, retry=retry, **fields)

    @property
    def starts(self):
        """The first byte that each request asked for."""
        return [int(headers.get("Range", "bytes=0-")[6:-1]) for _, headers in self.requests]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, number = self.server, len(self.server.requests)
        server.requests.append((self.path, dict(self.headers)))
        kind, amount = server.faults[number] if number < len(server.faults) else ("none", 0)
        if kind == "status":
            return self.answer(amount, {"Content-Length": "0", "Retry-After": "0"})
        if kind == "redirect":
            return self.answer(302, {"Content-Length": "0", "Location": f"http://localhost:{server.server_port}/cdn"})
        content, said = server.content, {}
        if server.versions:
            content, said = server.versions[min(number, len(server.versions) - 1)]
        ranges = server.ranges and kind != "unmeasured" and "Range" in self.headers
        start, stop = self.headers["Range"][6:].split("-") if ranges else (None, "")
        start, stop = int(start) if ranges else None, int(stop) + 1 if stop else len(content)
        body = content[start or 0 : stop]
        headers = {"Content-Length": str(len(body))}
        if start is not None:
            shift = amount if kind == "other range" else 0
            headers["Content-Range"] = f"bytes {start + shift}-{stop - 1}/{len(content)}"
        if number < len(server.tags):
            headers["ETag"] = server.tags[number]
        headers |= said
        if kind == "unmeasured":
            headers = {"Connection": "close"}
        self.answer(200 if start is None else 206, headers)
        cut = len(body) if kind in ("none", "other range") else min(amount, len(body))
        try:
            self.wfile.write(body[:cut])
            self.wfile.flush()
            if kind == "slow":
                time.sleep(0.05)
                self.wfile.write(body[cut:])
            if kind == "stall":
                time.sleep(0.5)
        except OSError:
            pass  # the client has seen enough
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if kind not in ("none", "slow", "other range"):
            self.close_connection = True
            self.connection.close() if kind == "reset" else None
        return None

    def answer(self, status, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def _server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def server(_server):
    _server.reset()
    return _server


FAULT = st.one_of(
    st.tuples(st.sampled_from(["reset", "short", "unmeasured", "slow"]), st.integers(0, len(CONTENT))),
    st.tuples(st.just("status"), st.sampled_from([408, 429, 500, 502, 503, 504])),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(FAULT, max_size=12), start=st.integers(0, len(CONTENT)), ranges=st.booleans())
def test_no_byte_is_lost_or_repeated_whatever_fails(server, faults, start, ranges):
    server.reset(faults=faults, ranges=ranges)
    patient = RetryPolicy(attempts=14, first_wait=0.0, timeout=5.0)
    assert b"".join(server.file(patient).read(size=len(CONTENT), start=start)) == CONTENT[start:]


def test_each_request_continues_at_the_very_byte_and_retries_are_reported(server, caplog):
    faults = [("reset", 1000), ("short", 70_001), ("status", 429), ("status", 503)]
    server.reset(faults=faults)
    assert b"".join(server.file().read(size=len(CONTENT))) == CONTENT
    starts = server.starts
    assert len(starts) == 5
    assert starts[0] == 0
    assert starts[1] <= 1000  # a reset may throw away what was on its way
    assert starts[2:] == [starts[1] + 70_001] * 3
    assert len(caplog.records) == 4
    assert "shard" in caplog.text


def test_a_stalled_connection_is_opened_again(server):
    server.reset(faults=[("stall", 5000)])
    assert b"".join(server.file().read(size=len(CONTENT))) == CONTENT
    assert server.starts == [0, 5000]


def test_progress_starts_the_count_of_attempts_again(server):
    server.reset(faults=[("short", 10)] * 50)
    assert b"".join(server.file().read(size=len(CONTENT))) == CONTENT
    assert server.starts == [10 * n for n in range(51)]


def test_a_server_without_progress_is_left_with_the_file_and_the_last_cause(server):
    server.reset(faults=[("short", 500)] + [("status", 500)] * 2 + [("status", 503)] * 9)
    with pytest.raises(DataUnavailableError, match=r"shard: no byte from 500 on in 4 attempts.*503"):
        list(server.file().read(size=len(CONTENT)))
    assert len(server.requests) == 4
    with pytest.raises(DataUnavailableError, match="refused"):
        list(RemoteFile("gone", "http://127.0.0.1:9/x", retry=QUICK).read(size=1))


@pytest.mark.parametrize("status", [401, 403, 404, 410, 416])
def test_a_permanent_error_is_reported_at_once(server, status):
    server.reset(faults=[("short", 10), ("status", status)])
    with pytest.raises(DataError, match=f"shard.*{status}"):
        list(server.file().read(size=len(CONTENT)))
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"content": CONTENT[:-1]}, "299999 bytes on the server now, but had 300000"),
        ({"content": CONTENT[:-1], "ranges": False}, "299999 bytes on the server now"),
        ({"content": CONTENT + b"x", "faults": [("unmeasured", 1 << 30)]}, "more than the file's 300000"),
        ({"faults": [("short", 9)], "tags": ['"a"', '"b"']}, r'changed.*ETag "a", now "b"'),
        ({"faults": [("other range", 3)]}, "asked for bytes from 0"),
    ],
)
def test_another_file_than_the_one_begun_is_an_error(server, setting, message):
    server.reset(**setting)
    with pytest.raises(DataError, match=message):
        list(server.file().read(size=len(CONTENT)))


TAGS = {
    "strong": ({"ETag": '"a"'}, {"ETag": '"b"'}),
    "weak": ({"ETag": 'W/"a"'}, {"ETag": 'W/"b"'}),
    "time": ({"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, {"Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(1, len(CONTENT) - 1), min_size=1, max_size=4),
    switch=st.integers(1, 4),
    kinds=st.sets(st.sampled_from(sorted(TAGS)), min_size=1),
    ranges=st.booleans(),
)
def test_halves_of_two_versions_are_never_joined(server, cuts, switch, kinds, ranges):
    before, after = ({k: v for kind in kinds - {"weak"} or kinds for k, v in TAGS[kind][n].items()} for n in (0, 1))
    other = CONTENT[::-1]
    switch = min(switch, len(cuts))
    versions = [(CONTENT, before)] * switch + [(other, after)]
    server.reset(faults=[("short", cut) for cut in cuts], ranges=ranges, versions=versions)
    read, output = bytearray(), None
    try:
        for chunk in server.file(RetryPolicy(attempts=9, first_wait=0.0)).read(size=len(CONTENT)):
            read += chunk
    except DataError as error:
        output = str(error)
    assert CONTENT.startswith(read)
    assert "changed on the server" in output if output else len(read) == len(CONTENT)


@pytest.mark.parametrize(
    ("before", "now", "differs"),
    [
        (Version('"a"', "x"), Version('"a"', "y"), False),  # the tag stands for the bytes
        (Version('W/"a"', "x"), Version('W/"a"', "y"), True),
        (Version('W/"a"', "x"), Version('W/"b"', "x"), True),
        (Version('"a"'), Version('W/"b"'), False),
        (Version('"a"', "x"), Version(None, "y"), True),
        (Version('"a"', "x"), Version(), False),  # an answer that says nothing: the size is compared all the same
        (Version(), Version('"a"', "x"), False),
    ],
)
def test_what_two_answers_say_of_one_file(before, now, differs):
    assert (before.difference(now) is not None) == differs


def test_a_file_that_was_changed_since_it_was_looked_up_is_not_read(server):
    address = f"{server.address}.jsonl"
    server.reset(versions=[(CONTENT, TAGS["time"][0]), (CONTENT[::-1], TAGS["time"][1])])
    (file,) = resolve(Source(name="s", license="none", files=(address,)))
    assert file.content == "Last-Modified Mon, 01 Jan 2024 00:00:00 GMT"
    with pytest.raises(DataError, match=r"\.jsonl: was changed on the server \(Last-Modified Mon.*, now Tue"):
        read_all(file)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(("start", "stop"), [(0, 5), (70_000, 200_001), (299_999, 300_000), (9, 9)])
def test_a_part_is_asked_for_by_its_end(server, start, stop, ranges):
    server.reset(faults=[("short", 3)], ranges=ranges)
    assert b"".join(server.file().read(size=len(CONTENT), start=start, stop=stop)) == CONTENT[start:stop]
    ends = [int(headers["Range"].rpartition("-")[2] or len(CONTENT) - 1) for _, headers in server.requests]
    assert set(ends) <= {stop - 1}


@pytest.mark.parametrize(("encoding", "name", "refused"), [
    ("gzip", "a.jsonl", True), ("br", "a.jsonl.gz", True), ("gzip", "a.jsonl.gz", False),
    ("Identity", "a.jsonl", False), ("zstd", "a.jsonl.zst", False), ("gzip", "a.jsonl.zst", True),
])  # fmt: skip
def test_an_encoding_that_was_not_asked_for_is_refused(server, encoding, name, refused):
    server.reset(versions=[(CONTENT, {"Content-Encoding": encoding})])
    file = RemoteFile(name, server.address, retry=QUICK)
    if not refused:
        assert b"".join(file.read(size=len(CONTENT))) == CONTENT
        return
    for call in (file.look_up, lambda: list(file.read(size=len(CONTENT)))):
        with pytest.raises(DataError, match=rf"{name}: the server sends Content-Encoding {encoding}"):
            call()
    assert len(server.requests) == 2


@pytest.mark.parametrize("length", ["12abc", "-5", "+5", ""])
def test_a_length_that_is_no_number_is_no_size(server, length):
    server.reset(versions=[(b"", {"Content-Length": length})])
    with pytest.raises(DataError, match="does not send the size"):
        server.file().look_up()


@pytest.mark.parametrize("address", [
    "http://127.0.0.1:9/a b", "http://127.0.0.1:port/a", "http://[::1/a", "http://127.0.0.1:9/\u00fc", "http:///a",
])  # fmt: skip
def test_an_address_that_is_none_is_refused_without_a_wait(address, monkeypatch):
    monkeypatch.setattr(remote, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(DataError, match="is not a valid address"):
        RemoteFile(address, address, retry=QUICK).look_up()


def test_a_remote_parquet_file_is_read_through_a_failing_server(server, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(remote, "sleep", lambda seconds: None)
    stored, address = io.BytesIO(), f"{server.address}.parquet"
    texts = [CONTENT[n * 1000 : (n + 1) * 1000].hex() for n in range(60)]
    pq.write_table(pa.table({"text": texts, "other": texts[::-1]}), stored, row_group_size=20)
    faults = [("none", 0), ("status", 503), ("none", 0), ("reset", 3_000), ("status", 500), ("short", 777)]
    server.reset(stored.getvalue(), faults=faults)
    (file,) = resolve(Source(name="s", license="none", files=(address,)))
    rows = list(read_rows(file, first=25, columns=["text"]))
    assert rows == [(number, 60, {"text": texts[number]}) for number in range(25, 60)]
    server.reset(stored.getvalue(), faults=[("status", 404)])
    with pytest.raises(DataError, match=r"\.parquet: the server answers 404"):
        list(read_rows(file, first=0, columns=["text"]))


def test_waits_double_within_bounds_and_heed_the_server(server, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(remote, "_wait", lambda seconds, on_wait: waits.append(seconds))
    server.reset(faults=[("status", 500)] * 8)
    retry = RetryPolicy(attempts=9, first_wait=1.0, max_wait=16.0)
    assert b"".join(server.file(retry).read(size=len(CONTENT))) == CONTENT
    for wait, longest in zip(waits, [1, 2, 4, 8, 16, 16, 16, 16], strict=True):
        assert longest / 2 <= wait <= longest
    monkeypatch.setattr(remote, "_retry_after", lambda error: {429: 40.0, 503: 9999.0}[error.code])
    server.reset(faults=[("status", 429), ("status", 503)])
    waits.clear()
    list(server.file(retry).read(size=len(CONTENT)))
    assert waits == [40.0, retry.max_retry_after]


def test_whoever_waits_for_a_server_is_reported_in_every_second_of_it(server, monkeypatch):
    """A server may ask for more time than a watchdog gives."""
    moments: list[float] = []
    monkeypatch.setattr(remote, "sleep", moments.append)
    monkeypatch.setattr(remote, "_retry_after", lambda error: 25.0)
    server.reset(faults=[("status", 503)] * 2)
    file = server.file(RetryPolicy(first_wait=0.0), on_wait=lambda: moments.append(0))
    assert b"".join(file.read(size=len(CONTENT))) == CONTENT
    assert sum(moments) == 50
    longest = max(len(list(group)) for waits, group in groupby(moments, bool) if waits)
    assert (longest, max(moments)) == (1, 1.0), "never more than a second without a word"


def test_retry_after_is_read_as_seconds_or_as_a_date():
    def demanded(value):
        return remote._retry_after(remote.HTTPError("", 429, "", {"Retry-After": value}, None))

    assert demanded("17") == 17
    assert demanded("soon") == demanded("") == 0
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 90 < demanded(later) <= 100


def test_a_token_is_not_sent_to_the_host_that_a_redirect_names(server):
    server.reset(faults=[("redirect", 0)])
    file = server.file(headers={"authorization": "Bearer secret"})
    assert b"".join(file.read(size=len(CONTENT), start=7)) == CONTENT[7:]
    (first, before), (second, after) = server.requests
    assert (first, second) == ("/shard", "/cdn")
    assert "Bearer secret" in before.values()
    assert "Bearer secret" not in after.values()
    assert after["Range"] == "bytes=7-"


def test_compressed_lines_come_through_a_failing_server(server, monkeypatch):
    monkeypatch.setattr(remote, "sleep", lambda seconds: None)
    lines = [CONTENT[n * 1000 : (n + 1) * 1000].hex().encode() for n in range(300)]
    stored = zstandard.compress(b"\n".join(lines))
    address = f"{server.address}.jsonl.zst"
    server.reset(stored, faults=[("status", 503), ("none", 0), ("reset", 30_000), ("status", 500), ("short", 77_777)])
    (file,) = resolve(Source(name="s", license="none", files=(address,)))
    assert file == File(address, len(stored))
    assert [line.data for line in read_lines(file)] == lines
    assert len(server.requests) >= 5


def test_a_card_states_sizes_and_hashes(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="lamda")
    content = b'{"text": "a"}\n' * 9
    paths = [tmp_path / folder / "0.jsonl" for folder in ("train", "other")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(content)
    right = Checksum(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    wrong = Checksum(size=len(content), sha256=hashlib.sha256(b"").hexdigest())

    def files(checksums):
        return resolve(Source(name="s", license="none", files=(f"{tmp_path}/*/*",), checksums=checksums))

    _, train = files({"train/0.jsonl": right})
    assert read_all(train) == content
    assert train.identity == ("0.jsonl", len(content), right.sha256)
    assert "not yet verified" not in caplog.text
    with pytest.raises(DataError, match=r"other/0\.jsonl: its sha256 is"):  # before a row of it is used
        files({"train/0.jsonl": right, "other/0.jsonl": wrong})
    monkeypatch.setattr(identity, "VERIFIED_AT_START", len(content) - 1)
    other, _ = files({"other/0.jsonl": wrong})
    assert "not yet verified: the sha256 of 1 files (the first is" in caplog.text
    with pytest.raises(DataError, match=r"other/0\.jsonl: its sha256 is"):
        list(read_lines(other))
    assert len(list(read_lines(other, number=8, byte=14 * 8))) == 1  # what is before is not read for its hash
    with pytest.raises(DataError, match=r"train/0\.jsonl: has 126 bytes, but the card says 125"):
        files({"train/0.jsonl": Checksum(size=125)})
    for name, count in (("0.jsonl", 2), ("1.jsonl", 0)):
        with pytest.raises(UserError, match=f"'{name}' matches {count} of its files"):
            files({name: right})


def test_a_hub_file_is_read_from_the_hub_with_the_users_token(server, monkeypatch):
    import huggingface_hub
    import huggingface_hub.utils

    monkeypatch.setattr(huggingface_hub.HfFileSystem, "url", lambda self, path: f"{server.address}?{path}")
    monkeypatch.setattr(huggingface_hub.utils, "build_hf_headers", lambda: {"authorization": "Bearer secret"})
    server.reset(faults=[("short", 1234)])
    file = File("hf://datasets/a/b@0/c.txt", len(CONTENT))
    monkeypatch.setattr(remote, "sleep", lambda seconds: None)
    assert read_all(file) == CONTENT
    assert server.starts == [0, 1234]
    assert all(headers["Authorization"] == "Bearer secret" for _, headers in server.requests)


def test_ctrl_c_leaves_no_thread_asking_a_server_that_wants_patience(monkeypatch):
    waits, ended = threading.Event(), threading.Event()

    def look_up(url, on_wait):
        if url == "interrupted":
            waits.wait()
            raise KeyboardInterrupt
        waits.set()
        try:
            while True:
                on_wait()
                time.sleep(0.01)
        finally:
            ended.set()

    monkeypatch.setattr(resolving, "stat_file", look_up)
    with pytest.raises(KeyboardInterrupt):
        resolving.resolve_files(["interrupted", "patient"], lambda: None)
    assert ended.wait(60)


def test_what_is_no_http_is_reported_in_one_short_line(caplog):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"\x1b[31m no\0HTTP " + b"x" * 5000 + b"\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/shard"
        retry = RetryPolicy(attempts=2, first_wait=0.0, max_wait=0.0, timeout=5.0)
        with pytest.raises(DataUnavailableError) as raised:
            RemoteFile("shard", address, retry=retry).look_up()
    for output in (str(raised.value), *caplog.messages):
        assert output.isprintable()
        assert len(output) < 400
