"""Small checkpoints and their copies; `python -m tests.storage.copies RUN MIRROR FILE` stays in the copy of FILE."""

import sys
import time
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from lamda.config.schema import CheckpointConfig
from lamda.storage import commit
from lamda.storage.mirror import Mirror
from lamda.storage.mirror_thread import MirrorThread
from lamda.storage.run_directory import RunDirectory

FILES = ("model.safetensors", "state/0.bin", "tokenizer.model")


def save(directory, step, *, keep=9, salt="", is_used=lambda path: False):
    """A checkpoint of some kilobytes, and the rows up to it."""
    with directory.metrics.open("a") as rows:
        rows.write(f'{{"step": {step}}}\n')
    final = directory.checkpoints / f"step-{step:08d}"
    temporary = directory.checkpoints / f".{final.name}.tmp"
    commit.make_fresh(temporary)
    (temporary / "state").mkdir()
    for name in FILES:
        (temporary / name).write_bytes(f"{name} of step {step} {salt}".encode() * 1000)
    files = {name: commit.sync_and_describe(temporary / name) for name in FILES}
    commit.commit(temporary, final, {"step": step, "files": files}, keep=keep, is_used=is_used)
    directory.note_checkpoint(step)
    return final


def copies(directory, address, *, keep=9, keep_every=None, lock=None):
    settings = CheckpointConfig(keep=keep, keep_every=keep_every)
    return MirrorThread(Mirror(address, directory.path), directory, keep=settings, lock=lock or Always())


class Always:
    """A lock that this process always holds."""

    def require(self):
        pass


def main(run, mirror, name):
    put = LocalFileSystem.put_file

    def stay(self, source, target, **more):
        put(self, source, target, **more)
        time.sleep(60 * target.endswith(f"/{name}"))

    LocalFileSystem.put_file = stay
    directory = RunDirectory(Path(run))
    save(directory, 4)
    with copies(directory, mirror):
        time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
