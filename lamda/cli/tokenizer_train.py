"""`lamda tokenizer train`: the tokenizer of a run, before the run."""

from __future__ import annotations

from lamda.config.help import ConfigParser
from lamda.config.loading import load_config


def parser() -> ConfigParser:
    """The options of `lamda tokenizer train`: those of a configuration."""
    return ConfigParser("lamda tokenizer train")


def main(argv: list[str]) -> int:
    """Train it, and print its path. Raises UserError."""
    config = load_config(argv)
    from lamda.data.tokenizer_training import train_run_tokenizer

    print(train_run_tokenizer(config))
    return 0
