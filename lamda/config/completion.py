"""What a shell completes after `lamda`: commands, their options, the keys of a configuration and their words.

The scripts are made once, so that the tab key starts no Python.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lamda.config.loading import KEYS
from lamda.config.settings import choices, kind

SHELLS = ("bash", "zsh", "fish")
_OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*(?![\w-])")


def script(shell: str, commands: Mapping[str, tuple[str, str]]) -> str:
    """The completion script of one of `SHELLS`; commands: (everything that is said of its options, summary) by name."""
    if shell == "fish":
        return _fish(commands)
    begin = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n" if shell == "zsh" else ""
    return begin + _bash(commands)


def options(told: str) -> list[str]:
    """The options that a usage line and its details name, keys of the configuration where it takes one."""
    named = list(dict.fromkeys(_OPTION.findall(told.replace("--section.key", ""))))
    return [*named, *(f"--{key}" for key in KEYS)] if "--config" in named else named


def _words() -> dict[str, list[str]]:
    """The words that a key takes, by flag."""
    booleans = {f"--{key}": ["true", "false"] for key, field in KEYS.items() if kind(field) == "boolean"}
    return booleans | {f"--{key}": list(choices(field)) for key, field in KEYS.items() if kind(field) == "choice"}


def _bash(commands: Mapping[str, tuple[str, str]]) -> str:
    firsts = " ".join(dict.fromkeys(name.split()[0] for name in commands))
    groups: dict[str, list[str]] = {}
    for name in commands:
        first, _, second = name.partition(" ")
        if second:
            groups.setdefault(first, []).append(second)
    seconds = "\n".join(f'        {first}) offered="{" ".join(names)}" ;;' for first, names in groups.items())
    keys = " ".join(f"--{key}" for key in KEYS)
    flags = "\n".join(f'        "{name}") offered="{_own(told)}" ;;' for name, (told, _) in commands.items())
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


def _own(told: str) -> str:
    """The options of a command in the script of bash, where all keys are one variable."""
    own = [word for word in options(told) if word.removeprefix("--") not in KEYS]
    return " ".join([*own, "$keys"] if "--config" in own else own)


def _fish(commands: Mapping[str, tuple[str, str]]) -> str:
    lines = [
        "complete -c lamda -n __fish_use_subcommand -l help",
        "complete -c lamda -n __fish_use_subcommand -l version",
    ]
    seen: set[str] = set()
    takes_keys: list[str] = []
    for name, (told, summary) in commands.items():
        first, _, second = name.partition(" ")
        if first not in seen:
            seen.add(first)
            lines.append(
                f"complete -c lamda -n __fish_use_subcommand -fa {first} -d {_quoted(first if second else summary)}"
            )
        if second:
            others = " ".join(other.split()[1] for other in commands if other.startswith(f"{first} "))
            when = f"__fish_seen_subcommand_from {first}; and not __fish_seen_subcommand_from {others}"
            lines.append(f"complete -c lamda -n {_quoted(when)} -fa {second} -d {_quoted(summary)}")
        when = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        own = [word for word in options(told) if word.removeprefix("--") not in KEYS]
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
