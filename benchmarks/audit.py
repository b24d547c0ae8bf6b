"""`benchmark.py audit`: megabytes per processor second of the parts of `lamda data audit`, on one core.

Every part reads the text, hashes each document and finds exact duplicates; it is timed with that. All parts take turns,
for several rounds; the report has the median. Seconds are those of the processor, so that other load counts little.
"""

from __future__ import annotations

import json
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import new_parser, report
from benchmarks.data import one_core
from benchmarks.texts import library_documents, short_documents
from lamda.audit.evaluation_overlap import EvaluationNgrams
from lamda.audit.findings import find
from lamda.audit.options import scan_into
from lamda.audit.records import Shards
from lamda.audit.scan import Parts

ROUNDS = 5
HELD_OUT = 200
"""Documents of evaluation text, of 200 words each."""
PACKAGES = ("numpy", "orjson", "py3langid", "rensa")
NOTHING: dict[str, Any] = {"near": False, "pii": False, "lines": False, "language": False}


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    parser = new_parser("audit")
    parser.add_argument("--files", metavar="GLOB", help="text to measure; default: the standard library's sources")
    parser.add_argument("--megabytes", metavar="N", type=float, default=20.0, help="of that default (%(default)s)")
    options = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, one_core():
            files = options.files or _write_library(Path(folder), options.megabytes * 1e6)
            return measure(Path(folder), files)

    return report(options, ["audit", *argv], PACKAGES, measured, markdown)


def _write_library(folder: Path, size: float) -> str:
    path = folder / "library.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for document in short_documents(library_documents(folder / "library")):
            file.write(json.dumps({"text": document}) + "\n")
            size -= len(document.encode())
            if size <= 0:
                break
    return str(path)


def measure(folder: Path, files: str) -> dict[str, Any]:
    """Rates of each part. folder: for temporary files."""
    options = Namespace(files=[files], corpus=None, against=[], memory=2.0)
    texts = (" ".join(f"held{n} out{word}" for word in range(100)) for n in range(HELD_OUT))
    evaluation = EvaluationNgrams(texts, memory=1 << 30)
    parts = {
        "exact": Parts(**NOTHING),
        "MinHash": Parts(**{**NOTHING, "near": True}),
        "overlap": Parts(**NOTHING, evaluation=evaluation),
        "repeated lines": Parts(**{**NOTHING, "lines": True}),
        "personal data": Parts(**{**NOTHING, "pii": True}),
        "languages": Parts(**{**NOTHING, "language": True}),
        "all but overlap": Parts(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    found: dict[str, Any] = {}
    for number in range(ROUNDS + 1):
        for name, part in parts.items():
            began = time.process_time()
            target = folder / f"{number}-{name.replace(' ', '-')}"
            scan_into(target, options, part)
            shards = Shards.read([target], memory=2 << 30)
            counts = find(shards, {"exact", *(["near"] if part.near else [])}).counts()
            if number:  # the first round does not count
                seconds[name].append(time.process_time() - began)
            found = {
                "documents": len(shards.documents),
                "bytes": int(shards.documents["size"].sum()),
                "exact_duplicates": counts["exact"][0],
                "near_duplicates": counts["near"][0],
            }
    size = found["bytes"] / 1e6
    rates = {name: [size / each for each in taken] for name, taken in seconds.items()}
    medians = {name: {"megabytes_per_second": median(each), "rounds": each} for name, each in rates.items()}
    return {"text": found, "parts": medians}


def markdown(report: dict[str, Any]) -> str:
    """The table of a report with its environment."""
    text = report["text"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    rows = [
        f"| {name} | {each['megabytes_per_second']:.1f} | {min(each['rounds']):.1f} to {max(each['rounds']):.1f} |"
        for name, each in report["parts"].items()
    ]
    return "\n".join(
        [
            f"`{report['command']}` at {report['commit']}, {report['cpu']} ({report['cores']} cores), {versions}.",
            f"Text: {text['documents']:,} documents, {text['bytes']:,} bytes, {text['exact_duplicates']:,} exact and "
            f"{text['near_duplicates']:,} near duplicates.",
            "",
            "| on one core | MB per processor second | rounds |",
            "| --- | ---: | ---: |",
            *rows,
        ]
    )
