"""The report of an audit as one self-contained HTML page that loads nothing from a network and runs no script."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lamda import __version__
from lamda.audit.report import found, lengths, place
from lamda.config.errors import UserError
from lamda.config.resources import templates
from lamda.console import visible
from lamda.runs.curves import short
from lamda.runs.report import source_hash
from lamda.runs.svg_chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis

TEMPLATES = templates("audit/templates", is_html=True)
TEMPLATES.filters["place"] = "{:.1f}".format
TEMPLATES.filters["visible"] = visible
LABELS = 12
"""Labels below a histogram."""
MAX_ROWS = 50
"""Rows of a table, and bars."""


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the page. Raises UserError if it cannot be written."""
    try:
        path.write_text(page(report), "utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror})") from error


def page(report: dict[str, Any]) -> str:
    """The page: all text of the corpus in it is escaped."""
    tables = report["tables"]
    style = files("lamda.runs").joinpath("static/report.css").read_text("utf-8") + "rect { fill: var(--c0); }\n"
    charts = [
        ("Length", "documents by bytes", bars([(row[0], int(row[1].replace(",", ""))) for row in lengths(report)])),
        ("Repeated lines", "documents by tenths of them", bars(_tenths(tables.get("repeated lines", {})))),
        *(
            (title, "megabytes", bars([(name, row[1] / 1e6) for name, row in list(tables[table].items())[:MAX_ROWS]]))
            for table, title in (("sources", "Sources"), ("languages", "Languages"))
            if table in tables
        ),
    ]
    return TEMPLATES.get_template("audit.html.jinja").render(
        report=report,
        style=style,
        hash=source_hash,
        found=list(found(report)),
        charts=charts,
        place=place,
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM},
        max_rows=MAX_ROWS,
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def _tenths(rows: dict[str, list[int]]) -> list[tuple[str, float]]:
    return [(f"{10 * int(tenth)}%", row[0]) for tenth, row in rows.items()]


def bars(rows: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """The shapes of a bar chart: bars with names, labels and ticks, in the coordinates of `lamda.runs.svg_chart`."""
    axis = Axis(0.0, max([value for _, value in rows], default=0.0) or 1.0, BOTTOM, TOP)
    width = (RIGHT - LEFT) / max(1, len(rows))
    every = max(1, -(-len(rows) // LABELS))
    named = [(LEFT + number * width, axis.position(value), name, value) for number, (name, value) in enumerate(rows)]
    return {
        "bars": [(x + 1, y, max(1.0, width - 2), BOTTOM - y, f"{name}: {value:,.6g}") for x, y, name, value in named],
        "labels": [(x + width / 2, name.partition(" ")[0][:9]) for x, _, name, _ in named[::every]],
        "ticks": [(axis.position(value), short(value)) for value in axis.ticks(5)],
    }
