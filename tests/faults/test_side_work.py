"""A run that loses its console, its caches or the room for its side files trains on to the same end."""

import os
import shutil
import subprocess
import sys
import threading

import pytest

from tests.conftest import make_text, write_shard
from tests.faults.harness import Place
from tests.launch import ENVIRONMENT, ROOT


def start(place, run, *flags, out=subprocess.PIPE, **variables):
    command = [sys.executable, "scripts/pretrain.py", "--config", str(place.folder / "run.yaml")]
    return subprocess.Popen(
        [*command, "--run.dir", str(place.folder / run), *flags],
        cwd=ROOT, env={**os.environ, **ENVIRONMENT, **variables}, stdout=out, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    """Its standard output and standard error; the end must be a good one."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err.decode()
    return (out or b"").decode("utf-8", "replace"), err.decode()


@pytest.fixture(scope="module")
def alone(place):
    """The run on one rank that nothing happens to."""
    finish(start(place, "alone"))
    return "alone"


def lost(place, run):
    """What train.log says of the console."""
    text = (place.folder / run / "train.log").read_text("utf-8")
    assert "step 10/10" in text, "the log has what the console lost"
    return [line.partition("WARNING ")[2] for line in text.splitlines() if "standard output is lost" in line]


def test_a_full_disk_under_the_console_costs_its_lines_alone(place, alone):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        finish(start(place, "full-console", out=full))
    (line,) = lost(place, "full-console")
    assert "No space left on device" in line
    assert place.difference(alone, "full-console") is None


def read_first_step(process):
    """Read the console up to the line of the first step."""
    assert any(line.startswith(b"step 1/10") for line in process.stdout)


def test_a_reader_that_leaves_after_a_line_costs_the_others_alone(place, alone):
    process = start(place, "head")
    read_first_step(process)
    process.stdout.close()
    process.stdout = None
    finish(process)
    (line,) = lost(place, "head")
    assert "Broken pipe" in line
    assert place.difference(alone, "head") is None


def test_a_console_of_another_encoding_shows_the_sample_all_the_same(place, alone):
    out, err = finish(start(place, "latin", PYTHONIOENCODING="latin-1"))
    assert "sample:\n" in out
    assert "everything is in" in out
    assert [line for line in err.splitlines() if "no bf16 instructions" not in line] == []


def test_a_home_and_a_cache_that_cannot_be_written_cost_nothing(place, alone):
    finish(start(place, "homeless", HOME="/proc", HF_HOME="/proc/cache", XDG_CACHE_HOME="/proc/cache"))
    assert place.difference(alone, "homeless") is None


@pytest.mark.parametrize("blocks", [False, True])
def test_a_full_disk_from_the_first_step_on_costs_side_files_alone(tmp_path, tokenizer_path, blocks):
    """Over text with bad lines. Only saves fail; where the ready blocks alone have no room, not even they."""
    place = Place.make(tmp_path, tokenizer_path)
    for file in range(3):
        # few, so that rows of further epochs are made while the run goes
        path = write_shard(tmp_path / "train" / f"{file}.jsonl", [make_text(file, 50) for _ in range(3)])
        path.write_bytes(b"no record\n" + path.read_bytes())
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "lamda-test", str(disk)], check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted (no root)")
    try:
        flags = ["--data.files", f"{tmp_path}/train/*.jsonl", "--data.max_bad_line_fraction", "0.9"]
        where = ["--data.cache_dir", str(disk / "blocks")] if blocks else ["--run.dir", str(disk / "run")]
        process = start(place, "cramped", *flags, *where)
        timer = threading.Timer(590, process.kill)
        timer.start()
        read_first_step(process)
        shutil.rmtree(disk / "blocks", ignore_errors=True)
        fill(disk / "filler")
        if blocks:
            _, err = finish(process)
            assert "not all blocks are kept" in err
        else:
            out, err = process.communicate()
            assert process.returncode == 1, err.decode()
            assert b"step 10/10" in out
            assert b"quarantine.jsonl cannot be updated (No space left on device)" in err
            assert b"No checkpoint is complete yet" in err
        assert "Traceback" not in str(err)
        timer.cancel()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(file):
    """Take every byte that is free."""
    with file.open("ab", buffering=0) as stream:
        for size in (65536, 1):
            try:
                while stream.write(bytes(size)):
                    pass
            except OSError:
                continue
