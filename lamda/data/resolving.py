"""Resolving patterns, addresses and datasets to files, with sizes and identities of their content.

`datasets` and `huggingface_hub` resolve the names, revisions and globs of the hub and of other stores.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from lamda.config.errors import DataError, DataUnavailableError, UserError
from lamda.data.card import HubDataset, Source
from lamda.data.documents import Form
from lamda.data.file_formats import READABLE, format_of
from lamda.data.files import HTTP, File, address_of, no_op, wrap_library_errors
from lamda.data.folders import LeftOut, described, is_special, problem_of, walk
from lamda.data.identity import Stored, cannot_open, content_of, verify_some
from lamda.data.lanes import RAW_TEXT
from lamda.data.remote import RemoteFile
from lamda.data.standard_library import write_corpus

OPENED_TOGETHER = 16

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """The files of a source, and what was found beside them."""

    files: list[File]
    left_out: LeftOut


def resolve(source: Source, *, form: Form = RAW_TEXT, on_wait: Callable[[], object] = no_op) -> list[File]:
    """All files of a source, sorted by address; see `find`."""
    return find(source, form=form, on_wait=on_wait).files


def find(
    source: Source, *, form: Form = RAW_TEXT, on_wait: Callable[[], object] = no_op, whole_texts: bool = False
) -> Found:
    """All files of a source that hold text, sorted by address, with the identity of their content.

    Files of unknown kinds are left out. So is what cannot be read in a folder; named by itself or by a pattern, it is
    an error. on_wait: called while waiting for a server, now and when the files are read. whole_texts: as versions
    before sections and encodings read files. Raises UserError if a pattern matches no file or there is none of a known
    kind, DataError if a size or sha256 differs from the card.
    """
    left_out = LeftOut()
    if source.dataset is not None:
        files = resolve_files(_hub_files(source.dataset, source.name), on_wait)
        return Found(apply_checksums(files, source), left_out)
    if source.standard_library is not None:
        write_corpus(Path(source.standard_library))
    named: set[str] = set()
    walked: set[str] = set()
    for pattern in source.files:
        folder = os.path.expanduser(pattern)  # noqa: PTH111 - a pattern is not a path
        if "://" not in pattern and Path(folder).is_dir():
            walked.update(walk(os.path.abspath(folder), left_out))  # noqa: PTH100 - a link stays a link
        else:
            named.update(_matching(pattern, source.name))
    walked -= named
    for url in sorted(walked | named):
        if format_of(url) is None:
            left_out.add_unknown(url)
    readable = _readable(sorted(url for url in walked if format_of(url)), left_out, source, form, on_wait, whole_texts)
    files = resolve_files(sorted(url for url in named if format_of(url)), on_wait)
    files = sorted(
        [*readable, *(described(file, whole_texts=whole_texts) for file in files)], key=lambda file: file.url
    )
    for file in files:
        if not file.is_remote:
            left_out.add_members(file)
    if not files:
        nothing = (
            f"none of its {left_out.counts.total():,} files can be read: {left_out}" if left_out.counts else "no file"
        )
        raise UserError(f"source {source.name!r}: {', '.join(source.files)}: {nothing}. {READABLE}")
    return Found(apply_checksums(files, source), left_out)


def report(source: Source, found: Found) -> None:
    """Log once what a source reads and what it leaves out."""
    encodings = Counter(file.encoding for file in found.files if file.encoding is not None)
    if encodings:
        others = ", ".join(f"{count:,} in {name}" for name, count in sorted(encodings.items()))
        log.info("source %r: %s files, of which not UTF-8: %s", source.name, f"{len(found.files):,}", others)
    if found.left_out.counts:
        log.warning(
            "source %r: reads %s files and leaves out %s: %s",
            source.name,
            f"{len(found.files):,}",
            f"{found.left_out.counts.total():,}",
            found.left_out,
        )


def _readable(
    paths: list[str],
    left_out: LeftOut,
    source: Source,
    form: Form,
    on_wait: Callable[[], object],
    whole_texts: bool,  # noqa: FBT001
) -> Iterator[File]:
    """The files of folders that hold text. Raises DataUnavailableError for a disk or server that fails."""
    for path in paths:
        on_wait()
        if is_special(path):
            left_out.add(path, "not a file")
            continue
        try:
            file = described(stat_file(path, on_wait), whole_texts=whole_texts)
        except DataUnavailableError:
            raise
        except DataError as error:
            left_out.add(path, str(error).removeprefix(f"{path}: "))
            continue
        problem = problem_of(file, source, form)
        if problem is None:
            yield file
        else:
            left_out.add(path, problem)


def _matching(pattern: str, source: str) -> list[str]:
    """The addresses that match a pattern; an http(s) address matches itself, a folder in a store all below it."""
    if pattern.startswith(HTTP):
        return [pattern]
    if "://" not in pattern:
        found = local_files(pattern)
    else:
        from datasets.data_files import resolve_pattern

        with wrap_library_errors(f"source {source!r}: {pattern}"):
            found = []
            for each in (pattern, f"{pattern.rstrip('/')}/**"):
                with suppress(FileNotFoundError):
                    found = found or resolve_pattern(each, base_path="")
    if not found:
        where = "" if "://" in pattern else f" (from {Path.cwd()})"
        raise UserError(f"source {source!r}: no file matches {pattern!r}{where}")
    return found


def local_files(pattern: str) -> list[str]:
    """Absolute paths of the files that match a pattern: a file of exactly this name, or a glob.

    `~` is the home folder. Hidden files, and folders with names like `__this__`, match only if the pattern names such.
    Broken links (to an unmounted disk, or a store that was not downloaded) are included, so that opening them fails:
    otherwise their text would be missing silently.
    """
    pattern = os.path.expanduser(pattern)  # noqa: PTH111 - a pattern is not a path
    if Path(pattern).is_file():
        return [os.path.abspath(pattern)]  # noqa: PTH100 - a link stays a link
    wants_special = any(part.startswith("__") for part in Path(pattern).parts)
    hits = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 - may be absolute
    return [
        os.path.abspath(hit)  # noqa: PTH100
        for hit in hits
        if (hit.is_file() or (hit.is_symlink() and not hit.exists()))
        and hit.name not in _NO_TEXT
        and (wants_special or not any(part.startswith("__") for part in hit.parent.parts))
    ]


_NO_TEXT = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
"""Files in dataset folders that are not data."""


def _hub_files(dataset: HubDataset, source: str) -> list[str]:
    from datasets import load_dataset_builder

    with wrap_library_errors(f"source {source!r}: data set {dataset.path}"):
        builder = load_dataset_builder(dataset.path, name=dataset.name, revision=dataset.revision)
        files = builder.config.data_files
    if dataset.split not in files:
        raise UserError(f"source {source!r}: {dataset.path} has no split {dataset.split!r} among {', '.join(files)}")
    return sorted(files[dataset.split])


def resolve_files(urls: list[str], on_wait: Callable[[], object]) -> list[File]:
    """The files at these addresses, with their sizes and content identities, looked up concurrently."""
    has_left = Event()

    def waiting() -> None:
        if has_left.is_set():
            raise _LeftError
        on_wait()

    pool = ThreadPoolExecutor(OPENED_TOGETHER)
    try:
        files = [replace(file, on_wait=on_wait) for file in pool.map(lambda url: stat_file(url, waiting), urls)]
    finally:  # on Ctrl-C or an error of another file, no thread keeps retrying
        has_left.set()
        pool.shutdown(wait=False, cancel_futures=True)
    if unknown := [file.url for file in files if file.content is None]:
        log.info(
            "%s: the server sends neither ETag nor Last-Modified for %d files, so a change of text between stop and "
            "resume is detected only at the positions where reading resumes",
            unknown[0],
            len(unknown),
        )
    return files


class _LeftError(Exception):
    """The caller no longer waits for the result."""


def require_here(files: Iterable[File]) -> None:
    """Raise DataError if a local file is missing on this machine or has another size."""
    for file in files:
        if file.is_remote:
            continue
        try:
            size = Path(file.url).stat().st_size
        except OSError as error:
            raise cannot_open(file.url, error) from error
        if size != file.size:
            raise DataError(f"{file.url}: has {size} bytes here, but {file.size} where rank 0 runs")


def stat_file(url: str, on_wait: Callable[[], object]) -> File:
    """A file with its size and content identity. Raises DataError if there is none."""
    if url.startswith(HTTP):
        size, version = RemoteFile(url, url, on_wait=on_wait).look_up()
        return File(url, size, address=url, content=version.tag, version=version)
    if "://" in url:
        return _stat_in_store(url)
    try:
        with Path(url).open("rb") as stream:
            size = Stored.of(stream).size
            return File(url, size, content=content_of(stream, size))
    except OSError as error:
        raise cannot_open(url, error) from error


def _stat_in_store(url: str) -> File:
    import fsspec

    with wrap_library_errors(url):
        try:
            info: dict[str, Any] = fsspec.core.url_to_fs(url)[0].info(url)
        except FileNotFoundError as error:
            raise DataError(f"{url}: no such file") from error
    size = info.get("size")
    if size is None:
        raise DataError(f"{url}: the server does not send the size of the file")
    return File(url, int(size), address=address_of(url), content=_tag(url, info))


def _tag(url: str, info: dict[str, Any]) -> str | None:
    """The content identity of a file in a store; on the hub, a commit in the address is enough."""
    if pinned := re.match(r"hf://[^@]+@([0-9a-f]{40})/", url):
        return f"commit {pinned[1]}"
    lfs = info.get("lfs")
    if lfs:
        return f"sha256 {lfs['sha256']}"
    names = ("blob_id", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated")
    return next((f"{name} {info[name]}" for name in names if info.get(name)), None)


def apply_checksums(files: list[File], source: Source) -> list[File]:
    """The files with the sha256 of the card; checks their sizes, and hashes as far as that is fast."""
    by_url = {file.url: file for file in files}
    for name, stated in source.checksums.items():
        named = [file for url, file in by_url.items() if f"/{url}".endswith(f"/{name}")]
        if len(named) != 1:
            raise UserError(f"source {source.name!r}: checksum {name!r} matches {len(named)} of its files, not one")
        (file,) = named
        if file.size != stated.size:
            raise DataError(f"{file.url}: has {file.size} bytes, but the card says {stated.size}")
        by_url[file.url] = replace(file, sha256=stated.sha256)
    verify_checksums(by_url.values())
    return list(by_url.values())


def verify_checksums(files: Iterable[File]) -> None:
    """Check the sha256 of local files, and log the files that are not checked yet."""
    stated = [file for file in files if file.sha256 is not None]
    left = [file.url for file in stated if file.is_remote]
    left += verify_some([(file.url, file.size, str(file.sha256)) for file in stated if not file.is_remote])
    if left:
        log.info(
            "not yet verified: the sha256 of %d files (the first is %s); a file is verified when one lane reads it "
            "from the first byte to the last",
            len(left),
            sorted(left)[0],
        )
