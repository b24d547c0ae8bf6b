"""Patterns, addresses and data sets to files, each with what says that its text is the same later.

`datasets` and `huggingface_hub` resolve the names, revisions and globs of the hub and of other stores.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any

from lamda.config.errors import DataError, UserError
from lamda.data.card import HubDataset, Source
from lamda.data.files import HTTP, File, address_of, foreign, nothing
from lamda.data.identity import Stored, cannot_open, content_of, verify_some
from lamda.data.remote import RemoteFile
from lamda.data.standard_library import write_corpus

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt")
OPENED_TOGETHER = 16

log = logging.getLogger(__name__)


def resolve(source: Source, *, on_wait: Callable[[], object] = nothing) -> list[File]:
    """All files of a source, sorted by address, each with what says that its text is the same later.

    on_wait: called while a server is waited for, now and when the files are read.
    Raises UserError where a pattern names none, and DataError where a size or a sha256 is not the card's.
    """
    if source.dataset is not None:
        return _checked(_looked_up(_hub_files(source.dataset, source.name), on_wait), source)
    if source.standard_library is not None:
        write_corpus(Path(source.standard_library))
    found = set(chain.from_iterable(_matching(pattern, source.name) for pattern in source.files))
    unknown = sorted(url for url in found if not url.endswith(SUFFIXES))
    if unknown:
        raise UserError(f"source {source.name!r}: cannot read {unknown[0]}; files end in {', '.join(SUFFIXES)}")
    return _checked(_looked_up(sorted(found), on_wait), source)


def _matching(pattern: str, source: str) -> list[str]:
    """The addresses that a pattern stands for; an http(s) address stands for itself."""
    if pattern.startswith(HTTP):
        return [pattern]
    if "://" not in pattern:
        found = local_files(pattern)
    else:
        from datasets.data_files import resolve_pattern

        with foreign(f"source {source!r}: {pattern}"):
            try:
                found = resolve_pattern(pattern, base_path="")
            except FileNotFoundError:
                found = []
    if not found:
        where = "" if "://" in pattern else f" (from {Path.cwd()})"
        raise UserError(f"source {source!r}: no file matches {pattern!r}{where}")
    return found


def local_files(pattern: str) -> list[str]:
    """Absolute paths of the files that a pattern stands for: one that is there by this very name, or a glob.

    `~` is the home folder. A link whose file is missing counts, and cannot be opened later. Hidden files, and folders
    with names like `__this__`, are found where the pattern names their like.
    """
    pattern = os.path.expanduser(pattern)  # noqa: PTH111 - a pattern is no path
    if Path(pattern).is_file():
        return [os.path.abspath(pattern)]  # noqa: PTH100 - a link stays a link
    wants_special = any(part.startswith("__") for part in Path(pattern).parts)
    return [
        os.path.abspath(hit)  # noqa: PTH100
        for hit in glob.glob(pattern, recursive=True)  # noqa: PTH207 - may be absolute
        if (Path(hit).is_file() or _leads_nowhere(Path(hit)))
        and Path(hit).name not in _NO_TEXT
        and (wants_special or not any(part.startswith("__") for part in Path(hit).parent.parts))
    ]


def _leads_nowhere(path: Path) -> bool:
    """Whether it is a link without a file, as an unmounted disk or a store that was not fetched leaves it.

    It is one of the files, so that opening it says so: left out, its text would be missing without a word.
    """
    return path.is_symlink() and not path.exists()


_NO_TEXT = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
"""What folders of data sets hold beside their data."""


def _hub_files(dataset: HubDataset, source: str) -> list[str]:
    from datasets import load_dataset_builder

    with foreign(f"source {source!r}: data set {dataset.path}"):
        builder = load_dataset_builder(dataset.path, name=dataset.name, revision=dataset.revision)
        files = builder.config.data_files
    if dataset.split not in files:
        raise UserError(f"source {source!r}: {dataset.path} has no split {dataset.split!r} among {', '.join(files)}")
    return sorted(files[dataset.split])


def _looked_up(urls: list[str], on_wait: Callable[[], object]) -> list[File]:
    """The files with their sizes and contents, many at a time."""
    has_left = Event()

    def waiting() -> None:
        if has_left.is_set():
            raise _LeftError
        on_wait()

    pool = ThreadPoolExecutor(OPENED_TOGETHER)
    try:
        files = [replace(file, on_wait=on_wait) for file in pool.map(lambda url: _look_up(url, waiting), urls)]
    finally:  # Ctrl-C, or another file's error: no thread goes on asking a server that wants patience
        has_left.set()
        pool.shutdown(wait=False, cancel_futures=True)
    if unknown := [file.url for file in files if file.content is None]:
        log.info(
            "%s: the server gives neither an ETag nor a time of modification of %d files, so that text changed between "
            "a stop and a resume is found only where reading continues",
            unknown[0],
            len(unknown),
        )
    return files


class _LeftError(Exception):
    """Nobody waits for the answer any more."""


def require_here(files: Iterable[File]) -> None:
    """Raise DataError where this machine does not have one of the local files, or one of another size."""
    for file in files:
        if file.is_remote:
            continue
        try:
            size = Path(file.url).stat().st_size
        except OSError as error:
            raise cannot_open(file.url, error) from error
        if size != file.size:
            raise DataError(f"{file.url}: has {size} bytes here, but {file.size} where rank 0 runs")


def _look_up(url: str, on_wait: Callable[[], object]) -> File:
    if url.startswith(HTTP):
        size, version = RemoteFile(url, url, on_wait=on_wait).look_up()
        return File(url, size, address=url, content=version.told, version=version)
    if "://" in url:
        return _in_a_store(url)
    try:
        with Path(url).open("rb") as stream:
            size = Stored.of(stream).size
            return File(url, size, content=content_of(stream, size))
    except OSError as error:
        raise cannot_open(url, error) from error


def _in_a_store(url: str) -> File:
    import fsspec

    with foreign(url):
        try:
            info: dict[str, Any] = fsspec.core.url_to_fs(url)[0].info(url)
        except FileNotFoundError as error:
            raise DataError(f"{url}: there is no such file") from error
    size = info.get("size")
    if size is None:
        raise DataError(f"{url}: the server does not say how long the file is")
    return File(url, int(size), address=address_of(url), content=_tag(url, info))


def _tag(url: str, info: dict[str, Any]) -> str | None:
    """What a store says of a file's content; a commit in the address of the hub fixes it."""
    if pinned := re.match(r"hf://[^@]+@([0-9a-f]{40})/", url):
        return f"commit {pinned[1]}"
    lfs = info.get("lfs")
    if lfs:
        return f"sha256 {lfs['sha256']}"
    names = ("blob_id", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated")
    return next((f"{name} {info[name]}" for name in names if info.get(name)), None)


def _checked(files: list[File], source: Source) -> list[File]:
    """The files with the card's hashes, their sizes compared with the card's, and hashes as far as that is cheap."""
    known = dict.fromkeys(files)
    for name, stated in source.checksums.items():
        named = [file for file in known if f"/{file.url}".endswith(f"/{name}")]
        if len(named) != 1:
            raise UserError(f"source {source.name!r}: its checksums name {name!r}, which is {len(named)} of its files")
        (file,) = named
        if file.size != stated.size:
            raise DataError(f"{file.url}: has {file.size} bytes, but the card says {stated.size}")
        known[file] = replace(file, sha256=stated.sha256)
    checked = [checked or file for file, checked in known.items()]
    _verify(checked)
    return checked


def _verify(files: list[File]) -> None:
    """Compare the sha256 of local files with the card's, and say of which files that is still to come."""
    stated = [file for file in files if file.sha256 is not None]
    left = [file.url for file in stated if file.is_remote]
    left += verify_some([(file.url, file.size, str(file.sha256)) for file in stated if not file.is_remote])
    if left:
        log.info(
            "not yet verified: the card's sha256 of %d files (the first is %s); each is compared if one lane reads the "
            "file from its first byte to its last",
            len(left),
            sorted(left)[0],
        )
