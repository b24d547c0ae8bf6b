"""What `mkdocs build` adds: pages generated from the code, and the repository's files that pages link to."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from lamda.cli import COMMANDS, GROUPS
from lamda.config.help import help_text
from lamda.config.loading import KEYS, SECTIONS
from lamda.config.presets import PRESETS
from lamda.config.settings import choices, kind

ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and every file outside docs/ that a page links to."""
    made = {
        "configuration.md": configuration(),
        "commands.md": commands(),
        "changes.md": (ROOT / "CHANGELOG.md").read_text("utf-8").replace("](docs/", "]("),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    linked = {name for page in files.documentation_pages() for name in _OUTSIDE.findall(page.content_string)}
    for name in sorted(linked):
        files.append(File.generated(config, _place(name), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their copies in the site."""
    return _OUTSIDE.sub(lambda found: f"]({_place(found[1])})", markdown)


def configuration() -> str:
    """Every key with its type, default and meaning, from the schema that checks it."""
    parts = [
        "# Configuration",
        "A run is one YAML file, keys nested by section; every key is also a flag, `--section.key VALUE`, which wins. "
        "A preset fills in what neither sets. All errors are reported together, with file, line and the nearest key. "
        "`lamda config show --config FILE` prints the resolved configuration. Lists are written `[a, b]`; `null` means "
        "no value.",
        "This page is generated from `lamda/config/schema.py` when the documentation is built.",
        "```yaml\nrun:\n  dir: runs/mine\nmodel:\n  preset: 110m\ntrain:\n  tokens: 2.2e9\n```",
        f"Shipped files: {', '.join(f'`{path.stem}`' for path in sorted((ROOT / 'configs').glob('*.yaml')))}; a name "
        "without a suffix is looked up among them (`--config tiny`).",
        "## Presets of `model.preset`",
        _table(("preset", *PRESETS["tiny"]), [(name, *shape.values()) for name, shape in PRESETS.items()]),
    ]
    for section, model in SECTIONS.items():
        rows = [
            (f"`{section}.{key}`", _kind(field), f"`{_default(field.default)}`", _escaped(field.description))
            for key, field in model.model_fields.items()
        ]
        parts += [f"## {section}", inspect.getdoc(model) or "", _table(("key", "kind", "default", "meaning"), rows)]
    assert sum(part.count("\n| `") for part in parts) >= len(KEYS)
    return "\n\n".join(parts) + "\n"


def commands() -> str:
    """All commands, as `lamda COMMAND --help` prints them, without the list of configuration keys."""
    os.environ["COLUMNS"] = "100"  # argparse's width
    parts = [
        "# Commands",
        "`lamda --help` prints this list, `lamda COMMAND --help` the text below; `lamda completion bash|zsh|fish` "
        "sets up shell completion. Exit codes: 0 success, 1 failure, 2 an error that you can fix (printed on standard "
        "error, without a traceback), 75 a run that stopped on request, with everything saved, 130 Ctrl-C, 141 the "
        "reader of a pipe has exited. Colors are used only at a terminal (`NO_COLOR` turns them off) and carry no "
        "information of their own.",
    ]
    for title, names in GROUPS.items():
        parts.append(f"## {title}")
        for name in names:
            command = COMMANDS[name]
            summary = command.summary[0].upper() + command.summary[1:]
            usage = command.parser().format_help().replace(help_text(), "").rstrip()
            parts += [f"### lamda {name}", f"{summary}.", f"```text\n{usage}\n```"]
    return "\n\n".join(parts) + "\n"


def _place(name: str) -> str:
    is_shown = Path(name).suffix not in (
        "",
        ".md",
    )  # a browser shows it; Markdown would become a page with its own links
    return f"repository/{name}" if is_shown else f"repository/{name}.txt"


def _kind(field: Any) -> str:
    return ", ".join(f"`{word}`" for word in choices(field)) if kind(field) == "choice" else kind(field)


def _default(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _table(head: tuple[Any, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _escaped(text: str | None) -> str:
    return (text or "").replace("|", "\\|")
