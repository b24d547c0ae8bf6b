"""A disk that is full ten times over: the run trains on, the last checkpoint stays, nothing is left lying about."""

import os
import subprocess
import time

import pytest

from tests.faults.harness import Place

STEPS, TIMES = 60, 10


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "lamda-test", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted (no root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_ten_saves_fail_and_nothing_is_lost(small_disk, tmp_path, tokenizer_path):
    place = Place.make(tmp_path, tokenizer_path)
    run = small_disk / "run"
    flags = ("--run.dir", str(run), "--train.steps", str(STEPS), "--checkpoint.keep", "2")
    place.finish("roomy", "--train.steps", str(STEPS), "--checkpoint.keep", "2")
    processes = place.start("cramped", *flags)
    first = run / "checkpoints" / "step-00000003" / "manifest.json"
    while not first.exists():
        assert processes[0].poll() is None, place.log("cramped")
        time.sleep(0.01)
    filler = small_disk / "filler"
    _fill(filler)
    log = place.folder / "cramped-0.log"
    while log.read_text("utf-8").count("training goes on") < TIMES:
        assert processes[0].poll() is None, place.log("cramped")
        _fill(filler)
        names = {path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith(".")}
        assert "LATEST" in names
        assert len(names) >= 2, "a complete checkpoint is there at every moment"
        time.sleep(0.02)
    filler.unlink()
    assert [process.wait(600) for process in processes] == [0, 0], place.log("cramped")
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    (place.folder / "cramped").symlink_to(run)
    assert place.difference("roomy", "cramped", step=STEPS) is None


def _fill(filler):
    """Take what is free, whatever was given back."""
    with filler.open("ab", buffering=0) as file:
        try:
            while file.write(os.urandom(65536)):
                pass
        except OSError:
            return
