"""`lamda completion`: a script with which a shell completes commands, options, keys and their values.

The script holds all words, so that the tab key starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from lamda.cli import COMMANDS, say
from lamda.config.errors import UserError
from lamda.config.help import ConfigParser
from lamda.config.loading import KEYS
from lamda.config.settings import choices, kind

SHELLS = ("bash", "zsh", "fish")
_INSTALL = """\
bash: lamda completion bash > ~/.local/share/bash-completion/completions/lamda
zsh:  lamda completion zsh > ~/.lamda-completion && echo 'source ~/.lamda-completion' >> ~/.zshrc
fish: lamda completion fish > ~/.config/fish/completions/lamda.fish"""

Parsers = Mapping[str, argparse.ArgumentParser]  # the parser of each command, with its summary as description


def parser() -> argparse.ArgumentParser:
    """The arguments of `lamda completion`."""
    parser = argparse.ArgumentParser(
        prog="lamda completion", epilog=_INSTALL, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=SHELLS, help="your shell")
    return parser


def main(argv: list[str]) -> int:
    """Print the script of a shell. Raises UserError."""
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise UserError(f"lamda completion takes the name of your shell: {', '.join(SHELLS)}")
    say(script(argv[0], {name: command.parser() for name, command in COMMANDS.items()}).rstrip("\n"))
    return 0


def script(shell: str, parsers: Parsers) -> str:
    """The completion script of one of `SHELLS`."""
    if shell == "fish":
        return _fish(parsers)
    begin = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n" if shell == "zsh" else ""
    return begin + _bash(parsers)


def options(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a command without --help; of a configuration, --config alone."""
    own = [flag for action in parser._actions for flag in action.option_strings if flag not in ("-h", "--help")]
    return [*own, "--config"] if isinstance(parser, ConfigParser) else own


def _words() -> dict[str, list[str]]:
    booleans = {f"--{key}": ["true", "false"] for key, field in KEYS.items() if kind(field) == "boolean"}
    return booleans | {f"--{key}": list(choices(field)) for key, field in KEYS.items() if kind(field) == "choice"}


def _bash(parsers: Parsers) -> str:
    firsts = " ".join(dict.fromkeys(name.split()[0] for name in parsers))
    groups: dict[str, list[str]] = {}
    for name in parsers:
        first, _, second = name.partition(" ")
        if second:
            groups.setdefault(first, []).append(second)
    seconds = "\n".join(f'        {first}) offered="{" ".join(names)}" ;;' for first, names in groups.items())
    keys = " ".join(f"--{key}" for key in KEYS)
    flags = "\n".join(f'        "{name}") offered="{_flags(parser)}" ;;' for name, parser in parsers.items())
    values = "\n".join(f'        {flag}) offered="{" ".join(words)}" ;;' for flag, words in _words().items())
    return f"""\
_lamda() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" offered="" name
    local keys="{keys}"
    name="${{COMP_WORDS[1]}}"
    case "$name" in
        {"|".join(groups)}) [[ $COMP_CWORD -gt 2 ]] && name="$name ${{COMP_WORDS[2]}}" ;;
    esac
    case "$before" in
{values}
    esac
    if [[ -n $offered ]]; then
        :
    elif [[ $COMP_CWORD -eq 1 ]]; then
        offered="{firsts} --help --version"
    elif [[ $current == -* ]]; then
        case "$name" in
{flags}
        esac
        offered="$offered --help"
    elif [[ $COMP_CWORD -eq 2 ]]; then
        case "$name" in
{seconds}
        esac
    fi
    COMPREPLY=( $(compgen -W "$offered" -- "$current") )
}}
complete -o default -F _lamda lamda
"""


def _flags(parser: argparse.ArgumentParser) -> str:
    """The options of a command in the bash script, where all keys are one variable."""
    own = options(parser)
    return " ".join([*own, "$keys"] if "--config" in own else own)


def _fish(parsers: Parsers) -> str:
    lines = [
        "complete -c lamda -n __fish_use_subcommand -l help",
        "complete -c lamda -n __fish_use_subcommand -l version",
    ]
    seen: set[str] = set()
    takes_keys: list[str] = []
    for name, parser in parsers.items():
        summary = parser.description or ""
        first, _, second = name.partition(" ")
        if first not in seen:
            seen.add(first)
            lines.append(
                f"complete -c lamda -n __fish_use_subcommand -fa {first} -d {_quoted(first if second else summary)}"
            )
        if second:
            others = " ".join(other.split()[1] for other in parsers if other.startswith(f"{first} "))
            when = f"__fish_seen_subcommand_from {first}; and not __fish_seen_subcommand_from {others}"
            lines.append(f"complete -c lamda -n {_quoted(when)} -fa {second} -d {_quoted(summary)}")
        when = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        own = options(parser)
        lines += [f"complete -c lamda -n {_quoted(when)} {_fish_flag(word)}" for word in [*own, "--help"]]
        if "--config" in own:
            takes_keys.append(f"begin; {when}; end")
    lines += ["function __lamda_takes_keys", f"    {'; or '.join(takes_keys)}", "end"]
    words = _words()
    for key, field in KEYS.items():
        values = f"-xa {_quoted(' '.join(words[f'--{key}']))}" if f"--{key}" in words else "-r"
        meaning = _quoted((field.description or "").partition(";")[0])
        lines.append(f"complete -c lamda -n __lamda_takes_keys -l {key} {values} -d {meaning}")
    return "\n".join(lines) + "\n"


def _fish_flag(word: str) -> str:
    return f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
