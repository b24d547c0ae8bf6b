"""`lamda config show`: the configuration that file and flags resolve to."""

from __future__ import annotations

from lamda.cli import say
from lamda.config.help import ConfigParser, to_yaml
from lamda.config.loading import load_config


def parser() -> ConfigParser:
    """The options of `lamda config show`: those of a configuration."""
    return ConfigParser("lamda config show")


def main(argv: list[str]) -> int:
    """Print YAML that `--config` reads back. Raises ConfigError."""
    say(to_yaml(load_config(argv)).rstrip("\n"))
    return 0
