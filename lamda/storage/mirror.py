"""A second place for a run's checkpoints: a folder or an object store, reached through fsspec.

`ADDRESS/RUN/step-NNNNNNNN/` holds a checkpoint's files under their own names, `ADDRESS/RUN/` also copies of the files
that describe the run so far. A checkpoint's manifest is written last and deleted first: a copy without it is torn, and
never used.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lamda.best_effort import reason_of
from lamda.config.errors import UserError
from lamda.durable import Progress, open_regular, replace_file, sync_file, sync_folder
from lamda.storage import manifest
from lamda.storage.commit import free_name, make_fresh
from lamda.storage.manifest import MANIFEST
from lamda.storage.reading import UnreadableError
from lamda.storage.run_directory import RunDirectory

LOOK_SECONDS = 30.0
"""How long a start that has checkpoints of its own waits for the mirror's list."""
CHUNK = 1 << 24
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 4}, "s3a": {"max_concurrency": 4}}
"""For file systems that would hold more than four parts of a file (50 MiB each) in memory."""

log = logging.getLogger(__name__)


class Mirror:
    """The copies of one run. Methods raise any error of the file system's library, most of them OSError."""

    def __init__(self, address: str, run: Path) -> None:
        """address: `checkpoint.mirror`; the run's copies are in a folder below it, named as the run directory.

        Raises UserError where no installed library knows the address.
        """
        self.address = f"{address.rstrip('/')}/{run.resolve().name}"
        scheme = address.partition("://")[0] if "://" in address else "file"
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.address, **_OPTIONS.get(scheme, {}))
        except (ImportError, ValueError) as error:
            hint = "; for S3, `pip install 'lamda-pytorch[s3]'`" if scheme in _OPTIONS else ""
            raise UserError(f"checkpoint.mirror {address}: cannot be opened ({error}){hint}") from error
        self._is_local = isinstance(self._fs, LocalFileSystem)
        if self._is_local and Path(self._root).resolve().is_relative_to(run.resolve()):
            raise UserError(f"checkpoint.mirror {address}: is inside run.dir; choose another place")

    def prepare(self) -> None:
        """Make the folder, in a file system that has folders."""
        if self._is_local:
            Path(self._root).mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        """Write a small file, and remove it again."""
        self.prepare()
        probe = f"{self._root}/.writable"
        self._fs.pipe_file(probe, b"")
        self._fs.rm_file(probe)

    def require_own(self, directory: RunDirectory) -> None:
        """Raises UserError if the copies are those of another run: the first start, or the branch, is another."""
        if (theirs := self._first_line(directory.starts)) is None:
            return
        if (ours := _first_line(directory.starts)) is not None:
            is_own = ours == theirs
        else:
            is_empty_disk = not manifest.complete(directory.checkpoints)
            is_own = is_empty_disk or _first_line(directory.branch) == self._first_line(directory.branch)
        if not is_own:
            raise UserError(
                f"checkpoint.mirror: {self.address} holds the copies of another run; choose another checkpoint.mirror, "
                "or a run.dir of another name"
            )

    def _first_line(self, file: Path) -> bytes | None:
        """The first line of the mirror's version of a file of the run directory, if it is a record."""
        self._fs.invalidate_cache()
        try:
            with self._fs.open(f"{self._root}/{file.name}", "rb") as stream:
                return _record(stream.readline())
        except FileNotFoundError:
            return None

    def checkpoints(self) -> dict[str, bool]:
        """The names of checkpoints there, oldest first, and whether each is complete."""
        names = filter(manifest.is_checkpoint_name, self._names(self._root))
        ordered = sorted(names, key=manifest.step_in_name)
        return {name: MANIFEST in self._names(f"{self._root}/{name}") for name in ordered}

    def holds(self, path: Path) -> bool:
        """Whether a complete copy of this checkpoint is there."""
        if MANIFEST not in self._names(f"{self._root}/{path.name}"):
            return False
        return bool(self._fs.cat_file(f"{self._root}/{path.name}/{MANIFEST}") == (path / MANIFEST).read_bytes())

    def upload(self, path: Path, *, before_manifest: Callable[[], object] = lambda: None) -> None:
        """Copy a complete checkpoint. before_manifest: called before the copy counts as one."""
        text, folder = (path / MANIFEST).read_bytes(), f"{self._root}/{path.name}"
        self.remove(path.name)
        for name in json.loads(text)["files"]:
            self._put(path / name, f"{folder}/{name}")
        before_manifest()
        self._fs.pipe_file(f"{folder}/{MANIFEST}", text)

    def upload_beside(self, file: Path) -> None:
        """Copy a file that grows, as it is now, to the folder of the run."""
        snapshot = file.with_name(f".{file.name}.mirror.tmp")
        try:
            shutil.copyfile(file, snapshot)
            self._put(snapshot, f"{self._root}/{file.name}")
        finally:
            snapshot.unlink(missing_ok=True)

    def download(self, name: str, target: Path, *, progress: Progress) -> None:
        """Copy the files of a checkpoint that its manifest names into an empty folder. Raises ValueError for damage."""
        self._get(f"{name}/{MANIFEST}", target / MANIFEST, progress)
        if (problem := manifest.problem_of(target, only=())) is not None:
            raise ValueError(problem)
        content = manifest.read(target)
        if manifest.name_of(content["step"]) != name:
            raise ValueError(f"its {MANIFEST} is of step {content['step']}")
        for file in content["files"]:
            if not manifest.is_inside(target, file):
                raise ValueError(f"{MANIFEST} lists {file!r}, which is not a file inside the checkpoint")
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                self._get(f"{name}/{file}", target / file, progress)
            except FileNotFoundError as error:
                raise ValueError(f"{file} is missing") from error
        if (problem := manifest.problem_of(target, progress=progress)) is not None:
            raise ValueError(problem)

    def download_beside(self, file: Path) -> None:
        """Copy the mirror's version of a file of the run directory to its place."""
        temporary = file.with_name(f".{file.name}.mirror.tmp")
        try:
            self._get(file.name, temporary, lambda: None)
            temporary.replace(file)
        except FileNotFoundError:
            pass  # of a run that had none
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Delete a checkpoint or a torn copy, its manifest first."""
        names = self._names(f"{self._root}/{name}")
        if MANIFEST in names:
            self._fs.rm_file(f"{self._root}/{name}/{MANIFEST}")
        if names - {MANIFEST}:
            self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _names(self, folder: str) -> set[str]:
        self._fs.invalidate_cache()
        try:
            return {path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(folder, detail=False)}
        except FileNotFoundError:
            return set()

    def _put(self, file: Path, place: str) -> None:
        if self._is_local:  # the folder of the run is never made here: its disk may have gone
            for folder in reversed(Path(place).relative_to(self._root).parents[:-1]):
                (Path(self._root) / folder).mkdir(exist_ok=True)
        self._fs.put_file(str(file), place)
        if (size := self._fs.info(place)["size"]) != file.stat().st_size:
            raise OSError(f"{place} has {size} bytes after it was written, not {file.stat().st_size}")

    def _get(self, name: str, file: Path, progress: Progress) -> None:
        with self._fs.open(f"{self._root}/{name}", "rb") as source, file.open("wb") as target:
            while piece := source.read(CHUNK):
                target.write(piece)
                progress()


def _first_line(file: Path) -> bytes | None:
    """The first line of a file, if it is a record."""
    try:
        with open_regular(file) as stream:
            return _record(stream.readline())
    except OSError:
        return None


def _record(line: bytes) -> bytes | None:
    try:
        return line if isinstance(json.loads(line), dict) else None
    except (ValueError, RecursionError):
        return None


def beside(directory: RunDirectory) -> tuple[Path, ...]:
    """The files of a run directory that its mirror has, too."""
    return directory.metrics, directory.starts, directory.stages, directory.branch


def restore_newer(
    mirror: Mirror, directory: RunDirectory, *, all_damaged: bool = False, progress: Progress = lambda: None
) -> bool:
    """Fetch the newest good checkpoint of the mirror, if it is newer than those of the run directory.

    all_damaged: those of the run directory are, so any is wanted. Returns whether one was fetched. Raises
    UnreadableError if there is none here and the mirror cannot be read (or written, where it is empty, too), and
    UserError if its checkpoints are all damaged, or another run's: a run never starts over by itself.
    """
    here = [] if all_damaged else manifest.complete(directory.checkpoints)
    if (found := _look(mirror, directory, has_own=bool(here))) is None:
        return False
    newest, void = manifest.step_of(here[-1]) if here else -1, manifest.rolled_back(directory.checkpoints)
    problems = []
    for name in reversed(found):
        if name in void or manifest.step_in_name(name) <= newest:
            continue
        try:
            _fetch(mirror, name, directory, progress)
            return True
        except ValueError as error:
            problems.append(f"{name}: {error}")
            log.warning("%s/%s is damaged: %s; trying the one before it", mirror.address, name, error)
        except Exception as error:
            reason = f"{name} cannot be fetched from {mirror.address} to {directory.checkpoints} ({reason_of(error)})"
            if not here:
                raise UnreadableError(f"{reason}, and there is none here: start again when it can") from error
            log.warning("%s: continuing with the checkpoints here", reason)
            return False
    if problems and not here:
        raise UserError(
            f"{mirror.address}: every checkpoint is damaged ({'; '.join(problems)}), and the run does not start over "
            "by itself; use another checkpoint.mirror, or another run.dir, to start over"
        )
    return False


def require_empty(mirror: Mirror, directory: RunDirectory) -> None:
    """Raises UserError if a run that does not begin with its own checkpoints has some on the mirror."""
    if not manifest.complete(directory.checkpoints) and (found := _look(mirror, directory, has_own=False)):
        raise UserError(
            f"checkpoint.mirror: {mirror.address} already holds a run ({found[-1]}); choose another mirror, or a "
            "run.dir of another name"
        )


def _look(mirror: Mirror, directory: RunDirectory, *, has_own: bool) -> list[str] | None:
    """The complete checkpoints of the mirror, None if it does not answer.

    Raises UserError if they are another run's, and UnreadableError unless `has_own`.
    """
    answers: list[dict[str, bool] | Exception] = []

    def look() -> None:
        try:
            mirror.require_own(directory)
            if has_own and not directory.starts.exists():
                mirror.download_beside(directory.starts)
            found = mirror.checkpoints()
            if not has_own and not any(found.values()):
                mirror.check()
            answers.append(found)
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=look, name="mirror", daemon=True)
    thread.start()
    thread.join(LOOK_SECONDS if has_own else None)
    answer = answers[0] if answers else TimeoutError(f"no answer within {LOOK_SECONDS:g} s")
    if isinstance(answer, UserError):
        raise answer
    if isinstance(answer, Exception):
        if not has_own:
            raise _unreadable(mirror, answer) from answer
        log.warning(
            "%s cannot be read now (%s): continuing with the checkpoints here", mirror.address, reason_of(answer)
        )
        return None
    if torn := [name for name, is_complete in answer.items() if not is_complete]:
        log.info("%s: not used, because copying was cut short: %s", mirror.address, ", ".join(torn))
    return [name for name, is_complete in answer.items() if is_complete]


def _fetch(mirror: Mirror, name: str, directory: RunDirectory, progress: Progress) -> None:
    """Copy a checkpoint to its place. Raises ValueError for a damaged one."""
    final = directory.checkpoints / name
    temporary = final.with_name(f".{name}.tmp")
    log.info("fetching %s from %s", name, mirror.address)
    try:
        make_fresh(temporary)
        mirror.download(name, temporary, progress=progress)
        for file in filter(Path.is_file, temporary.rglob("*")):
            sync_file(file, progress=progress)
        for folder in (*filter(Path.is_dir, temporary.rglob("*")), temporary):
            sync_folder(folder)
        for file in beside(directory):
            mirror.download_beside(file)
        if not directory.tokenizer.exists():
            replace_file(directory.tokenizer, (temporary / "tokenizer.model").read_bytes())
        if final.exists():
            final.rename(free_name(final, suffix=manifest.DAMAGED))
        temporary.rename(final)
        sync_folder(final.parent)
        replace_file(final.parent / "LATEST", name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    directory.note_checkpoint(manifest.step_of(final))


def _unreadable(mirror: Mirror, error: Exception) -> UnreadableError:
    return UnreadableError(
        f"checkpoint.mirror: {mirror.address} cannot be used now ({reason_of(error)}), and there is no checkpoint "
        "here. Start again when it can be used, or leave out checkpoint.mirror to start over"
    )
