"""`lamda report`: one or more runs as a page of its own, for a browser without a network."""

from __future__ import annotations

import argparse
from pathlib import Path

from lamda.config.errors import UserError
from lamda.console import one_line
from lamda.runs.findings import Findings, read_run
from lamda.runs.report_page import page

SUFFIXES = (".html", ".htm")


def parser() -> argparse.ArgumentParser:
    """The options of `lamda report`."""
    parser = argparse.ArgumentParser(prog="lamda report", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "-o",
        dest="file",
        type=Path,
        required=True,
        metavar="FILE",
        help="a self-contained .html page to send or keep",
    )
    return parser


def main(argv: list[str]) -> int:
    """`RUN [RUN ...] -o FILE`; raises UserError."""
    options = parser().parse_args(argv)
    if options.file.suffix not in SUFFIXES:
        raise UserError(f"-o {options.file}: a report is a page, {' or '.join(SUFFIXES)}")
    text = page(read_runs(options.runs))
    try:
        options.file.write_text(text, "utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"-o {options.file}: cannot be written ({error.strerror})") from error
    runs = ", ".join(one_line(str(run)) for run in options.runs)
    print(f"{options.file}: {runs}; {len(text) / 1000:.0f} kB, opens in any browser")
    return 0


def read_runs(paths: list[Path]) -> list[Findings]:
    """What there is to tell of each run, a run that is named twice once. Raises UserError."""
    from lamda.runs.curves import labels_of

    different = list(dict.fromkeys(paths))
    labels = labels_of(different)
    return [read_run(path, label=labels[path]) for path in different]
