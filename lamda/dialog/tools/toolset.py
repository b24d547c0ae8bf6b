"""TS, the toolset: one string in, a list of results out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lamda.config.errors import UserError
from lamda.dialog.tools.calculator import Calculator
from lamda.dialog.tools.result import Result, Tool
from lamda.dialog.tools.retrieval import Retrieval
from lamda.dialog.tools.translator import Argos, Glossary, Translator

NAMES = ("calculator", "translator", "retrieval")
"""The paper's order, in which results are joined."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Toolset:
    """Tries every tool on the same string (section 6.2 of the paper) and keeps no state between calls."""

    tools: tuple[Tool, ...]

    def __call__(self, query: str, *, again: int = 0) -> list[Result]:
        """The results of all tools, in their order; `again` is how often the query was repeated.

        A tool that lacks something (a package, a language) or fails is logged; the others still answer.
        """
        results: list[Result] = []
        for tool in self.tools:
            try:
                results += tool(query, again=again)
            except UserError as error:
                _log.warning("%s: %s", tool.name, error)
            except Exception:  # a defect in one tool must not affect the others
                _log.exception("%s: failed on a query of %d characters", tool.name, len(query))
        return results


def open_toolset(names: Sequence[str], *, corpus: Path | None = None, glossary: Path | None = None) -> Toolset:
    """The named tools in the paper's order. Raises UserError for an unknown tool, or one that lacks something."""
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise UserError(f"--tools {','.join(names)}: there is no tool {unknown[0]!r}; there are {', '.join(NAMES)}")
    if (corpus is None) == ("retrieval" in names):
        raise UserError("the tool retrieval and --corpus DIR|FILE go together: give both or neither")
    if glossary is not None and "translator" not in names:
        raise UserError("--glossary is for the tool translator: add it to --tools")
    tools: list[Tool] = []
    if "calculator" in names:
        tools.append(Calculator())
    if "translator" in names:
        tools.append(Translator(Argos() if glossary is None else Glossary(glossary)))
    if corpus is not None:
        tools.append(Retrieval.open(corpus))
    return Toolset(tuple(tools))
