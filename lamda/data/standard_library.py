"""A corpus that needs no download: the sources of Python's standard library.

It is written in the format of The Pile: JSON lines {"text", "meta": {"pile_set_name"}}, zstd, one frame per file. Each
source file is a document, for either training or held-out evaluation.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
import tempfile
import tokenize
from pathlib import Path, PurePath

import orjson
import zstandard

from lamda.config.errors import UserError
from lamda.durable import write_file

_HELD_OUT = 32  # one file in so many is held out
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_INSTALLED = {"site-packages", "dist-packages"}


def write_corpus(folder: str | Path, *, shards: int = 8) -> None:
    """Write `train/00.jsonl.zst` and so on, `val.jsonl.zst` and `manifest.json` into `folder`.

    The folder is created atomically; an existing one is kept, whatever interpreter wrote it. Several processes may call
    this concurrently; the first to finish creates the folder. shards: number of training files, of similar size and
    content. Raises UserError if `folder` is something else, or this interpreter has no sources.
    """
    folder = Path(folder)
    if (folder / "manifest.json").exists():
        return
    if folder.exists():
        raise UserError(f"{folder} exists and is not a corpus: move it, or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        partial = Path(beside) / folder.name
        _write(partial, shards=shards)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "manifest.json").exists():
                raise


def _write(folder: Path, *, shards: int) -> None:
    (folder / "train").mkdir(parents=True)
    train, held_out = _split(_sources(Path(sysconfig.get_path("stdlib"))))
    documents = {f"train/{shard:02}.jsonl.zst": train[shard::shards] for shard in range(shards)}
    documents["val.jsonl.zst"] = held_out
    for name, lines in documents.items():
        write_file(folder / name, zstandard.ZstdCompressor().compress(b"".join(lines)))
    files = {name: {"documents": len(lines), "bytes": sum(map(len, lines))} for name, lines in documents.items()}
    manifest = {"python": sys.version, "files": files}
    write_file(folder / "manifest.json", orjson.dumps(manifest, option=orjson.OPT_INDENT_2))


def _sources(library: Path) -> dict[PurePath, str]:
    """Text of every source file that can be decoded and is not empty, by path relative to `library`."""
    sources: dict[PurePath, str] = {}
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if _INSTALLED.intersection(name.parts):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # the tests of the library include invalid files on purpose
            continue
        if text:
            sources[name] = text
    if not sources:
        raise UserError(f"no sources of the standard library are in {library}: give text with data.files")
    return sources


def _split(sources: dict[PurePath, str]) -> tuple[list[bytes], list[bytes]]:
    """Lines of training and held-out documents, each ordered by a hash of its path."""
    train: list[bytes] = []
    held_out: list[bytes] = []
    for name, text in sorted(sources.items(), key=lambda source: _digest(source[0])):
        domain = "Python tests" if _TEST_FOLDERS.intersection(name.parts[:-1]) else "Python library"
        line = orjson.dumps({"text": text, "meta": {"pile_set_name": domain}}) + b"\n"
        (train if _digest(name)[-1] % _HELD_OUT else held_out).append(line)
    return train, held_out


def _digest(name: PurePath) -> bytes:
    return hashlib.sha256(name.as_posix().encode()).digest()
