"""Help for configuration keys, parsers of commands that take them, and a configuration as YAML."""

import argparse
import inspect
import textwrap
from typing import Any

import yaml

from lamda.config.loading import KEYS, SECTIONS
from lamda.config.schema import Config
from lamda.config.settings import choices, kind

_WIDTH = 100
_USAGE = """\
--config FILE          YAML, keys nested by section; searched here, then in the package
--section.key VALUE    any key below; overrides the file; also --section.key=VALUE

A list `stages` in the file changes keys in the course of the run (docs/stages.md).
A preset sets what neither file nor flags do. Lists are written [a, b] or a,b; null means unset.
"""


class ConfigParser(argparse.ArgumentParser):
    """The parser of a command that also takes a configuration.

    It declares the command's own options; `parse_known_args` leaves --config and --section.key to `load_config`.
    """

    def __init__(self, prog: str, *, epilog: str | None = None) -> None:
        super().__init__(prog=prog, allow_abbrev=False, add_help=False, epilog=epilog)

    def format_usage(self) -> str:
        """The usage with the flags of a configuration."""
        return f"{super().format_usage().rstrip()} --config FILE [--section.key VALUE ...]\n"

    def format_help(self) -> str:
        """The help with every key."""
        options = super().format_help().removeprefix(super().format_usage())
        return f"{self.format_usage()}{options}\n{help_text()}\n"


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
    left_out = set() if config.stages else {"stages"}
    return yaml.safe_dump(config.model_dump(mode="json", exclude=left_out), sort_keys=False)


def _shown(default: Any) -> str:
    return "-" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
