"""A run whose disk has no more room for its side files trains on."""

import os
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


def test_a_full_disk_from_the_first_step_on_costs_side_files_alone(tmp_path, tokenizer_path):
    """Over text with bad lines: the run trains to its last step, and only its saves fail."""
    place = Place.make(tmp_path, tokenizer_path)
    for file in range(3):
        path = write_shard(tmp_path / "train" / f"{file}.jsonl", [make_text(file, 50) for _ in range(30)])
        path.write_bytes(b"no record\n" + path.read_bytes())
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "lamda-test", str(disk)], check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted (no root)")
    try:
        flags = ["--data.files", f"{tmp_path}/train/*.jsonl", "--data.max_bad_fraction", "0.9"]
        process = start(place, "cramped", *flags, "--run.dir", str(disk / "run"))
        timer = threading.Timer(590, process.kill)
        timer.start()
        assert process.stdout.readline().startswith(b"step 1/10")
        fill(disk / "filler")
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
