"""The commit protocol alone: SIGKILL at any moment leaves complete checkpoints, and every damage to one is found.

20 kills and 100 damages in `make faults`; 200 and 1,000 in `make faults-full`.
"""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lamda.storage import commit, manifest
from tests.faults.harness import IS_FULL

KILLS, DAMAGES = (200, 1000) if IS_FULL else (20, 100)

ENDLESS_SAVES = """
import sys
from pathlib import Path
from lamda.storage.commit import commit, make_fresh, sweep, sync_and_describe
from lamda.storage.manifest import complete, step_of
folder = Path(sys.argv[1])
sweep(folder)
step = max(map(step_of, complete(folder)), default=0)
while True:
    step += 1
    temporary = folder / f".step-{step:08d}.tmp"
    make_fresh(temporary)
    for name in ("model.safetensors", "optimizer-00000-of-00001.safetensors", "run_state.json"):
        (temporary / name).write_bytes(f"{name} of step {step}".encode() * 20_000)
    files = {file.name: sync_and_describe(file) for file in temporary.iterdir()}
    commit(temporary, folder / f"step-{step:08d}", {"step": step, "files": files}, keep=2)
"""


def test_a_killed_save_leaves_complete_checkpoints_alone(tmp_path):
    draw = random.Random(5)
    newest = 0
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS_SAVES, str(tmp_path)])
        deadline = time.monotonic() + 600
        while len(_complete(tmp_path)) < 2 or _newest(tmp_path) == newest:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.random() / 20)
        process.kill()
        process.wait()
        there = _complete(tmp_path)
        assert len(there) >= 2, "two are kept; each crash may leave one that was about to go"
        assert [manifest.problem_of(path) for path in there] == [None] * len(there)
        named = int((tmp_path / "LATEST").read_text().removeprefix("step-"))
        assert named in (_newest(tmp_path), _newest(tmp_path) - 1), "a crash may come before LATEST, never between"
        assert _newest(tmp_path) > newest
        newest = _newest(tmp_path)


@pytest.fixture
def checkpoints(tmp_path, world):
    """Three small checkpoints of real files."""
    for step in (1, 2, 3):
        temporary = tmp_path / f".step-{step:08d}.tmp"
        commit.make_fresh(temporary)
        for name in ("model.safetensors", "optimizer-00000-of-00001.safetensors", "run_state.json"):
            (temporary / name).write_bytes(random.Random(f"{name}{step}").randbytes(3000))
        files = {file.name: commit.sync_and_describe(file) for file in temporary.iterdir()}
        commit.commit(temporary, tmp_path / f"step-{step:08d}", {"step": step, "files": files}, keep=9)
    return tmp_path


def test_every_damage_is_found_and_the_one_before_is_taken(checkpoints, world):
    draw = random.Random(7)
    whole = checkpoints / "step-00000003"
    contents = {file: file.read_bytes() for file in whole.iterdir()}
    for _ in range(DAMAGES):
        message = draw.choice([_flip, _truncate, _swap, _vanish])(draw, contents)
        assert commit.find_valid(checkpoints, world=world).name == "step-00000002", message
        (damaged,) = checkpoints.glob("*.damaged")
        damaged.rename(whole)
        for file, content in contents.items():
            file.write_bytes(content)
        assert commit.find_valid(checkpoints, world=world) == whole


def _flip(draw: random.Random, contents: dict[Path, bytes]) -> str:
    file = draw.choice(list(contents))
    changed = bytearray(contents[file])
    place = draw.randrange(len(changed))
    changed[place] ^= 1 << draw.randrange(8)
    file.write_bytes(changed)
    return f"flip at {place} of {file.name}"


def _truncate(draw: random.Random, contents: dict[Path, bytes]) -> str:
    file = draw.choice(list(contents))
    length = draw.randrange(len(contents[file]))
    file.write_bytes(contents[file][:length])
    return f"{file.name} cut to {length}"


def _swap(draw: random.Random, contents: dict[Path, bytes]) -> str:
    one, other = draw.sample(list(contents), 2)
    one.write_bytes(contents[other])
    other.write_bytes(contents[one])
    return f"{one.name} and {other.name} exchanged"


def _vanish(draw: random.Random, contents: dict[Path, bytes]) -> str:
    file = draw.choice(list(contents))
    file.unlink()
    return f"{file.name} gone"


def _complete(folder: Path) -> list[Path]:
    return manifest.complete(folder)


def _newest(folder: Path) -> int:
    return max((manifest.step_of(path) for path in _complete(folder)), default=0)
