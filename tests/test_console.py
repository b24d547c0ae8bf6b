"""A console that is lost ends a command as a shell expects, and a run not at all."""

import logging
import os
import subprocess
import sys

import pytest

from lamda import console

PRELUDE = "import sys, logging; from lamda import console; "
SAYS = """\
from lamda import cli
from lamda.runs import listing
listing.main = lambda argv: print(sys.argv[1]) or 0
sys.exit(cli.main(["list"]))"""
MISTAKE = "from lamda import cli; sys.exit(cli.main(['nonsense']))"
OUTLIVES = """\
logging.getLogger("lamda").addHandler(logging.FileHandler(sys.argv[1])); console.outlive()
for line in range(3): print("line", line)
print("error", file=sys.stderr)
sys.exit(75)"""


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


def left_terminal():
    main, terminal = os.openpty()
    os.close(main)
    return terminal


def full_pipe():
    """Its reader lives, and sleeps."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, bytes(4096))
        except BlockingIOError:
            break
    os.set_blocking(writer, True)
    full_pipe.readers.append(reader)
    return writer


full_pipe.readers = []


def python(code, *arguments, out, err, **variables):
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONUNBUFFERED", "PYTHONIOENCODING")}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *arguments],
        stdout=out, stderr=err, env={**kept, **variables}, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("lost", "unbuffered", "code", "message"), [
    (closed_pipe, "", 141, b""),
    (closed_pipe, "1", 141, b""),
    (full_disk, "", 1, b"standard output cannot be written (No space left on device)\n"),
    (left_terminal, "", 1, b"standard output cannot be written (Input/output error)\n"),
])  # fmt: skip
def test_a_command_that_cannot_write_its_output_ends_without_a_traceback(lost, unbuffered, code, message):
    out = lost()
    done = python(SAYS, "text", out=out, err=subprocess.PIPE, PYTHONUNBUFFERED=unbuffered)
    os.close(out)
    assert (done.returncode, done.stderr) == (code, message)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_console_shows_any_text_in_any_encoding(encoding):
    text = "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{MATHEMATICAL RIGHT DOUBLE ANGLE BRACKET}"
    done = python(SAYS, text, out=subprocess.PIPE, err=subprocess.PIPE, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == (text + "\n").encode(encoding, "replace")


def test_a_mistake_keeps_its_exit_code_where_standard_error_is_lost():
    err = full_disk()
    assert python(MISTAKE, out=subprocess.PIPE, err=err).returncode == 2
    os.close(err)


@pytest.mark.parametrize(
    ("lost", "unbuffered"),
    [(closed_pipe, ""), (full_disk, ""), (full_disk, "1"), (left_terminal, ""), (full_pipe, "")],
)
def test_a_process_outlives_its_console_and_its_log_says_so_once(tmp_path, lost, unbuffered):
    end = lost()
    code = "console.WRITE_TIMEOUT_SECONDS = 0.1; " + OUTLIVES
    done = python(code, str(tmp_path / "log"), out=end, err=end, PYTHONUNBUFFERED=unbuffered)
    os.close(end)
    assert done.returncode == 75
    message = (tmp_path / "log").read_text("utf-8").splitlines()
    assert [line.partition(" (")[0] for line in message] == ["standard output is lost", "standard error is lost"]


def test_a_console_that_takes_text_again_shows_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(console, "WRITE_TIMEOUT_SECONDS", 0.05)
    writer = full_pipe()
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        console.outlive()
        lasting = sys.stdout
        with caplog.at_level(logging.WARNING):
            print("dropped", file=lasting)
        os.read(full_pipe.readers[-1], 1 << 20)
        print("shown", file=lasting)
        assert os.read(full_pipe.readers[-1], 100) == b"shown\n"
    assert len(caplog.records) == 1
