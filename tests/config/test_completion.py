"""What the tab key offers, asked of the shells themselves where they are installed."""

import argparse
import shutil
import subprocess

import pytest

from lamda.cli import COMMANDS, OLD_NAMES, main
from lamda.cli.completion import options
from lamda.config.loading import KEYS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        with pytest.MonkeyPatch.context() as patch, (folder / shell).open("w") as file:
            patch.setattr("sys.stdout", file)
            assert main(["completion", shell]) == 0
    return folder


def offered(shell, scripts, *words):
    """What the shell offers for the last of the words."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    if shell == "fish":
        code = f"source {scripts / 'fish'}; complete -C 'lamda {' '.join(words)}'"
        found = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True)
        return {line.split("\t")[0] for line in found.stdout.splitlines()}
    quoted = " ".join(f"'{word}'" for word in ("lamda", *words))
    body, prepare = (scripts / shell).read_text(), ""
    if shell == "zsh":  # what its bashcompinit does around the function, without a terminal
        body = body.split("\n", 1)[1]
        prepare = (
            "emulate -R sh; complete() { :; }; "
            "compgen() { for word in $2; do case $word in $4*) echo $word ;; esac; done; }"
        )
    code = f'{prepare}\n{body}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _lamda; echo "${{COMPREPLY[@]}}"'
    found = subprocess.run([shell, "-c", code], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("words", "expected", "absent"),
    [
        (("pre",), {"pretrain", "prepare"}, {"plan"}),
        (("checkpoint", ""), {"ls", "show", "verify", "diff"}, {"convert"}),
        (("checkpoint", "show", "--j"), {"--json"}, {"--config"}),
        (("pretrain", "--train.w"), {"--train.warmup_steps", "--train.weight_decay"}, {"--train.lr"}),
        (("plan", "--gp"), {"--gpus", "--gpu"}, {"--json"}),
        (("pretrain", "--wandb.mode", "o"), {"online", "offline"}, {"disabled"}),
    ],
)
def test_a_shell_offers_what_the_command_takes(shell, words, expected, absent, scripts):
    given = offered(shell, scripts, *words)
    assert expected <= given
    assert not absent & given


def test_every_option_that_a_parser_declares_is_offered(scripts):
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("-o", required=True)
    parser.add_argument("--top-k", "-k")
    assert options(parser) == ["-o", "--top-k", "-k"]
    assert "--config" in options(COMMANDS["pretrain"].parser())
    assert {f"--{key}" for key in KEYS} < offered("bash", scripts, "pretrain", "--")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_an_earlier_name_of_a_command_is_not_offered(shell, scripts):
    assert not {name.split()[0] for name in OLD_NAMES if " " not in name} & offered(shell, scripts, "")
    assert "research-data" not in offered(shell, scripts, "dialog", "")


def test_an_unknown_shell_is_reported_which_there_are(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
