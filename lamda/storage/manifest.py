"""Checkpoints on disk: list them, and verify them by their manifests.

manifest.json lists every file of a checkpoint with its size and sha256, and ends with its own hash. Only listed files
are read. A wrong size or hash, or a missing file, is damage; a file that cannot be read now is not.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any

from lamda.config.errors import UserError
from lamda.durable import Progress, hash_file, read_regular
from lamda.storage.reading import reading, unreadable
from lamda.storage.state import RunState

MANIFEST = "manifest.json"
STATE = "run_state.json"
START = "start.json"
"""The record of the start that wrote the checkpoint (`lamda.training.provenance`)."""
DAMAGED, ROLLED_BACK = ".damaged", ".spoilt"
"""Suffixes of checkpoints set aside: a hash did not match; the run rolled back from it."""


def name_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint. Raises ValueError for other names."""
    return step_in_name(path.name)


def step_in_name(name: str) -> int:
    """The step in the name of a checkpoint. Raises ValueError for other names."""
    step = int(name.removeprefix("step-"))
    if name != name_of(step):
        raise ValueError(f"{name!r} is no checkpoint's name")
    return step


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint of a run, rather than a copy made by a user."""
    return re.fullmatch(r"step-\d{8,}", name) is not None and name == name_of(int(name[5:]))


def complete(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first. Raises UnreadableError if the folder cannot be listed."""
    return sorted(_entries(folder, is_checkpoint_name), key=step_of)


def set_aside(folder: Path) -> list[Path]:
    """Checkpoints that were set aside. Raises UnreadableError."""
    return sorted(_entries(folder, lambda name: name.startswith("step-") and name.endswith((DAMAGED, ROLLED_BACK))))


def rolled_back(folder: Path) -> set[str]:
    """Names of checkpoints that a run rolled back from and has not saved again. Raises UnreadableError."""
    names = {path.name.partition(".")[0] for path in set_aside(folder) if path.suffix == ROLLED_BACK}
    return names - {path.name for path in complete(folder)}


def _entries(folder: Path, is_wanted: Callable[[str], bool]) -> list[Path]:
    """Folders with wanted names, including broken links."""
    try:
        with os.scandir(folder) as entries:
            return [Path(each) for each in entries if is_wanted(each.name) and (each.is_symlink() or each.is_dir())]
    except FileNotFoundError:
        return []
    except OSError as error:
        if isinstance(error, NotADirectoryError) and not folder.exists():
            return []  # its parent is a file
        raise unreadable(folder, error.strerror or str(error)) from error


def find(path: Path) -> Path | None:
    """The checkpoint meant by a folder, by RUN (its newest one), or by RUN@STEP; None if there is none.

    Raises UserError for a step that the run does not have, and UnreadableError.
    """
    run, separator, step = path.name.rpartition("@")
    if run and separator and not path.exists():
        by_step = {step_of(each): each for each in complete(path.with_name(run) / "checkpoints")}
        if by_step and (not step.isdecimal() or int(step) not in by_step):
            steps = ", ".join(map(str, by_step))
            raise UserError(f"{path}: {path.with_name(run)} has no checkpoint of step {step}; it has {steps}")
        return by_step[int(step)] if by_step else None
    if checkpoints := complete(path / "checkpoints"):
        return checkpoints[-1]
    return path if path.is_dir() and (is_checkpoint_name(path.name) or (path / MANIFEST).exists()) else None


def problem_of(
    path: Path,
    *,
    part: int = 0,
    parts: int = 1,
    only: Collection[str] | None = None,
    progress: Progress = lambda: None,
) -> str | None:
    """The damage of a checkpoint, or None. Checks the files with index `part` modulo `parts`.

    only: check only these files, which must all be listed. progress: called repeatedly. Raises UnreadableError, and
    UserError for a checkpoint under the name of another step.
    """
    try:
        text = _manifest_text(path)
        if text is None:
            return f"{MANIFEST} is missing"
        content = json.loads(text)
        del content["sha256"]
        entries = sorted(content["files"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if text != sealed(content):
        return f"{MANIFEST} has changed since it was written"
    if is_checkpoint_name(path.name) and content.get("step") != step_of(path):
        raise UserError(
            f"{path}: is the checkpoint of step {content.get('step')} under another name; rename it to its step, "
            "or move it elsewhere"
        )
    if only is not None:
        if unnamed := sorted(set(only) - content["files"].keys()):
            return f"{MANIFEST} does not list {unnamed[0]}"
        entries = [(name, entry) for name, entry in entries if name in only]
    checked = (_check(path, name, entry, progress) for name, entry in entries[part::parts])
    return next(filter(None, checked), None)


def read(path: Path) -> dict[str, Any]:
    """The manifest of a verified checkpoint. Raises UnreadableError."""
    with reading(path / MANIFEST):
        content: dict[str, Any] = json.loads(read_regular(path / MANIFEST))
    return content


def named(path: Path, name: str) -> Path:
    """The path of a file of a checkpoint. Raises UserError if the manifest does not list it."""
    if name not in read(path)["files"]:
        raise UserError(f"{path}: {MANIFEST} does not list {name}, so it is not read; use another checkpoint")
    return path / name


def read_state(path: Path) -> RunState:
    """The state in a verified checkpoint. Raises UserError if the manifest does not list it or has another step."""
    state = RunState.read(named(path, STATE))
    if state.step != (step := read(path).get("step")):
        raise UserError(f"{path / STATE}: is of step {state.step}, but {MANIFEST} says {step}; use another checkpoint")
    return state


def step_in(path: Path) -> int | None:
    """The step in the manifest of a checkpoint, None if it cannot be read."""
    try:
        step = read(path).get("step")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def framework_of(manifest: dict[str, Any]) -> str:
    """The framework that wrote the checkpoint."""
    name: str = manifest.get("framework", "deepspeed")  # older manifests name none
    return name


def sealed(manifest: dict[str, object]) -> str:
    """The text of a manifest, which ends with its own hash."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1)


def _manifest_text(path: Path) -> str | None:
    """The content of manifest.json, None if it is missing."""
    try:
        with reading(path / MANIFEST):
            return read_regular(path / MANIFEST).decode()
    except FileNotFoundError:
        if path.is_symlink() and not path.exists():
            raise unreadable(path, "a broken link") from None
        return None


def _check(path: Path, name: str, entry: Any, progress: Progress) -> str | None:
    file = path / name
    try:
        size, sha256 = entry["size"], entry["sha256"]
    except (TypeError, KeyError):
        return f"{MANIFEST} has no size and sha256 of {name}"
    try:
        if not is_inside(path, name):
            return f"{MANIFEST} lists {name!r}, which is not a file inside the checkpoint"
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is missing"
        if status.st_size != size:
            return f"{name} has {status.st_size} bytes instead of {size}"
        if hash_file(file, progress=progress) != sha256:
            return f"{name} has changed since it was written (sha256)"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return f"{name} is missing"
        raise unreadable(file, error.strerror or str(error)) from error
    return None


def is_inside(path: Path, name: str) -> bool:
    """Whether a name is a normalized relative path to a place below `path`, with links resolved."""
    parts = PurePosixPath(name)
    if str(parts) != name or not parts.name or parts.is_absolute() or ".." in parts.parts or "\\" in name:
        return False
    try:
        return (path / name).resolve().is_relative_to(path.resolve())
    except (RuntimeError, ValueError):  # circular links, an invalid file name
        return False
