"""Every key with its type, default and meaning, and a configuration as YAML."""

import inspect
import textwrap
from typing import Any

import yaml

from lamda.config.loading import KEYS, SECTIONS
from lamda.config.schema import Config
from lamda.config.settings import choices, kind

_WIDTH = 100
_USAGE = """\
--config FILE          YAML, keys nested by section; looked for from here, then in the package
--section.key VALUE    any key below, over the file's value; also --section.key=VALUE

A preset fills in what neither file nor flags set. Lists are written [a, b] or a,b; null is nothing.
"""


def help_text() -> str:
    """All keys by section, aligned, 100 columns wide."""
    names = max(map(len, KEYS)) + 6
    kinds = max(len(kind(field)) for field in KEYS.values()) + 2
    defaults = max(len(_shown(field.default)) for field in KEYS.values()) + 2
    indent = names + kinds + defaults
    parts = [_USAGE]
    for section, model in SECTIONS.items():
        parts += textwrap.wrap(f"{section}: {inspect.getdoc(model)}", _WIDTH)
        for key, field in model.model_fields.items():
            words = choices(field) if kind(field) == "choice" else ()
            meaning = f"{field.description} ({', '.join(words)})" if words else field.description or ""
            head = (
                f"  --{section}.{key}".ljust(names) + kind(field).ljust(kinds) + _shown(field.default).ljust(defaults)
            )
            parts += textwrap.wrap(
                meaning, _WIDTH, initial_indent=head, subsequent_indent=" " * indent, break_on_hyphens=False
            )
        parts.append("")
    return "\n".join(parts[:-1])


def to_yaml(config: Config) -> str:
    """The whole resolved configuration as a file that `load_config` reads back to an equal one."""
    # Escapes instead of `allow_unicode`: PyYAML writes U+0085 bare and reads it back as a space.
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _shown(default: Any) -> str:
    return "-" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
