"""The commands that README and documentation say, with what stands above them.

`<!-- hardware: 8 GPUs -->` above a block marks what cannot be run here; `<!-- exit: 2 -->` what ends with that code.
A command with placeholders (RUN, FILE, [--json]) is a synopsis. All are checked against the code; the others are run.
"""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md", *sorted((ROOT / "docs").glob("*.md")))
PROGRAMS = ("lamda", "deepspeed", "python", "pip", "make", "docker", "touch", "mkdir")

_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```", re.S | re.M)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:    [^\n]*\n)+")
_COMMENT = re.compile(r"<!-- (hardware|exit): ([^>]+?) -->\s*\Z")
_PLACEHOLDER = re.compile(r"(?<![\w/.-])[A-Z][A-Z_]{1,}(?![\w.])|\.\.\.|\[--|\[[A-Z]|(?<= )[A-Z](?= |$)|RUN@|RUN/")


class Said(NamedTuple):
    """A command as it is written. hardware: what it needs, where it is marked; code: its exit code."""

    page: Path
    line: int
    text: str
    hardware: str | None = None
    code: int | None = None
    is_inline: bool = False

    @property
    def is_synopsis(self) -> bool:
        return bool(_PLACEHOLDER.search(self.text))

    def __str__(self):
        return f"{self.page.name}:{self.line}: {self.text}"


def commands(page: Path) -> list[Said]:
    """All that a page says, in its order."""
    return commands_in(page.read_text("utf-8"), page)


def commands_in(text: str, page: Path) -> list[Said]:
    found = []
    rest = text
    for fence in _FENCE.finditer(text):
        if fence[1].strip() in ("", "bash", "sh", "console"):
            found += _of_block(fence[2], text, fence.start(), page)
        rest = _blank(rest, fence)
    for block in _INDENTED.finditer(rest):
        found += _of_block(re.sub(r"^    ", "", block[0], flags=re.M), text, block.start(), page, skip=0)
        rest = _blank(rest, block)
    for inline in re.finditer(r"`([^`]+)`", rest):
        words = " ".join(inline[1].split())
        if _is_command(words) and " " in words:
            found.append(Said(page, _line(text, inline.start()), words, is_inline=True))
    return sorted(found, key=lambda each: each.line)


def _of_block(body: str, text: str, start: int, page: Path, *, skip: int = 1) -> list[Said]:
    mark = _COMMENT.search(text[:start])
    hardware = mark[2] if mark and mark[1] == "hardware" else None
    code = int(mark[2]) if mark and mark[1] == "exit" else None
    shown = re.search(r"^\$ ", body, re.M)
    found = []
    line, lines = _line(text, start) + skip, body.split("\n")
    while lines:
        first, here = lines.pop(0), line
        line += 1
        while first.endswith("\\") and lines:
            first, line = first[:-1] + lines.pop(0).strip(), line + 1
        words = re.sub(r"\s+# .*", "", first.removeprefix("$ ")).strip()
        if _is_command(words) and (first.startswith("$ ") or not shown):
            found.append(Said(page, here, re.sub(r"  +", " ", words), hardware, code))
    return found


def _is_command(words: str) -> bool:
    first = re.sub(r"^([A-Z_]+=\S* )+", "", words).partition(" ")[0]
    return first in PROGRAMS or (first.startswith(".venv/bin/") and Path(first).name in PROGRAMS)


def _blank(text: str, found: re.Match) -> str:
    return text[: found.start()] + re.sub(r"[^\n]", " ", found[0]) + text[found.end() :]


def _line(text: str, start: int) -> int:
    return text.count("\n", 0, start) + 1
