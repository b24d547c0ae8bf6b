"""`lamda dialog convert`: published dialogue datasets to conversations, one JSON object per line."""

from __future__ import annotations

import argparse
import codecs
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import zstandard

from lamda.config.errors import DataError, UserError, nearest
from lamda.data.files import File, read_all, read_lines
from lamda.dialog.conversation import Conversation, parse_conversation, to_line
from lamda.dialog.formats import FORMATS, Numbered
from lamda.durable import replace_file

SHOWN_PROBLEMS = 20
"""Bad records that are listed; the others are counted."""

_LINES = (".jsonl", ".jsonl.zst", ".jsonl.gz")


def parser() -> argparse.ArgumentParser:
    """The options of `lamda dialog convert`."""
    parser = argparse.ArgumentParser(prog="lamda dialog convert", allow_abbrev=False)
    parser.add_argument("format", metavar="FORMAT", help=f"{', '.join(FORMATS)} (chat: messages of role and content)")
    parser.add_argument("files", metavar="IN", nargs="+", type=Path, help=".jsonl, .jsonl.zst, .jsonl.gz or .json")
    parser.add_argument(
        "-o", dest="target", metavar="OUT", type=Path, required=True, help=".jsonl, .jsonl.zst or .jsonl.gz"
    )
    parser.add_argument("--json", action="store_true", help="print the count as one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """`FORMAT IN... -o OUT`; raises UserError that lists bad records, before anything is written."""
    options = parser().parse_args(argv)
    count = convert(options.format, options.files, options.target)
    report = {"file": str(options.target), "conversations": count}
    print(json.dumps(report) if options.json else f"{options.target}: {count:,} conversations")
    return 0


def convert(name: str, files: list[Path], target: Path) -> int:
    """Convert all records of all files to `target` (.jsonl, .jsonl.zst or .jsonl.gz); the number of conversations."""
    if name not in FORMATS:
        raise UserError(f"there is no format {name!r} among {', '.join(FORMATS)}{nearest(name, FORMATS)}")
    check_target(target, files)
    problems, lines = [], []
    for file in files:
        for number, found in FORMATS[name](read_records(file)):
            if isinstance(found, ValueError):
                problems.append(f"{file}, line {number}: {found}")
            else:
                lines.append(to_line(found))
    if problems:
        if len(problems) > SHOWN_PROBLEMS:
            problems[SHOWN_PROBLEMS:] = [f"and {len(problems) - SHOWN_PROBLEMS:,} more"]
        raise UserError("\n".join([*problems, "nothing was written: fix these records, or remove them"]))
    if not lines:
        raise UserError(f"{', '.join(map(str, files))}: there are no conversations")
    write_lines(target, lines)
    return len(lines)


def check_target(target: Path, files: Sequence[Path]) -> None:
    """Raises UserError if `write_lines` cannot write there, or would replace one of the files."""
    if not target.name.endswith(_LINES):
        raise UserError(f"-o {target}: name a file that ends in {', '.join(_LINES)}")
    if any(target.exists() and file.exists() and target.samefile(file) for file in files):
        raise UserError(f"-o {target}: is a file that is read; name another one")


def write_lines(target: Path, lines: Sequence[bytes]) -> None:
    """Write lines to a .jsonl, .jsonl.zst or .jsonl.gz, whole or not at all. Raises UserError."""
    packed = {".zst": zstandard.compress, ".gz": lambda data: gzip.compress(data, mtime=0)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, packed.get(target.suffix, bytes)(b"".join(lines)))
    except OSError as error:
        raise UserError(f"-o {target}: cannot be written ({error.strerror})") from error


def read_conversations(files: Iterable[Path]) -> Iterator[Conversation]:
    """The conversations of files. Raises UserError with file and line for the first record that is none."""
    for file in files:
        for line, record in read_records(file):
            try:
                if isinstance(record, ValueError):
                    raise record
                yield parse_conversation(record)
            except ValueError as error:
                raise UserError(f"{file}, line {line}: {error}") from error


def read_records(path: Path) -> Iterator[Numbered]:
    """The records of a JSON-lines file, or of a JSON file with a list or an object of them, numbered from 1.

    A line that is not JSON gives a ValueError as its record. Raises UserError for a file that cannot be read.
    """
    if not path.is_file() or not path.name.endswith((*_LINES, ".json")):
        raise UserError(f"{path}: no such file; records come from {', '.join((*_LINES, '.json'))}")
    file = File(str(path), path.stat().st_size)
    try:
        if path.suffix == ".json":
            whole = _parsed(read_all(file))
            records = list(whole.values()) if isinstance(whole, dict) else whole
            if not isinstance(records, list):
                why = f": {records}" if isinstance(records, ValueError) else ""
                raise UserError(f"{path}: is neither a list nor an object of records{why}")
            yield from map(Numbered._make, enumerate(records, start=1))
            return
        for line in read_lines(file):
            if line.data and not line.data.isspace():
                yield Numbered(line.number + 1, _parsed(line.data))
    except DataError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _parsed(data: bytes) -> Any:
    """The JSON value, or a ValueError if it cannot be parsed. A byte order mark is ignored."""
    try:
        return orjson.loads(data.removeprefix(codecs.BOM_UTF8))
    except orjson.JSONDecodeError as error:
        return ValueError(f"not JSON ({error})")
