"""The command `lamda`: what it says, and its exit codes."""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lamda import cli
from lamda.cli import COMMANDS, Command, main
from lamda.config.completion import options
from lamda.config.errors import UserError

WITH_A_PARSER = [
    name
    for name, command in COMMANDS.items()
    if "--config" not in command.usage and name not in ("completion", "supervise")
]
"""The other commands read their words themselves."""


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"lamda {name} " in told and command.summary in told for name, command in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_shows_its_usage_and_runs_nothing(name, capsys, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, name, COMMANDS[name]._replace(call=lambda argv: pytest.fail("was run")))
    assert main([*name.split(), "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: lamda {name} {COMMANDS[name].usage}\n")
    assert COMMANDS[name].details in told


def test_a_command_gets_the_words_after_its_name_and_gives_the_exit_code(monkeypatch):
    seen = []
    monkeypatch.setitem(cli.COMMANDS, "tokenizer train", Command(lambda argv: seen.append(argv) or 7, "", ""))
    assert main(["tokenizer", "train", "--a", "b"]) == 7
    assert seen == [["--a", "b"]]


@pytest.mark.parametrize(("error", "code"), [(UserError("mend this"), 2), (KeyboardInterrupt(), 130)])
def test_what_a_user_can_mend_ends_without_a_traceback(error, code, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "plan", Command(fail, "", ""))
    assert main(["plan"]) == code
    assert capsys.readouterr().err == (f"{error}\n" if code == 2 else "")


def test_a_defect_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "plan", Command(lambda argv: 1 // 0, "", ""))
    with pytest.raises(ZeroDivisionError):
        main(["plan"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pretain", "--config", "x"], "`lamda pretain`; did you mean 'pretrain'?"),
        (["config", "shwo"], "`lamda config shwo`; did you mean 'config show'?"),
        (["zzz"], "`lamda zzz`; `lamda --help` lists all"),
        (["--hepl"], "no command `lamda --hepl`"),
    ],
)
def test_an_unknown_command_names_the_nearest(words, told, capsys):
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_a_group_lists_its_commands(capsys):
    assert main(["tokenizer"]) == 0
    told = capsys.readouterr().out
    assert "lamda tokenizer train" in told
    assert "pretrain" not in told


def test_wrong_configuration_exits_with_2_and_plain_lines():
    command = [sys.executable, "-c", "import sys; from lamda.cli import main; sys.exit(main())"]
    done = subprocess.run([*command, "config", "show", "--train.lrr", "3"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "--train.lrr: there is no such key; did you mean 'train.lr'?",
        "--train.tokens: the run has no length: set train.steps or train.tokens "
        "(there is no --config FILE; a first run is --config tiny)",
    ]


def test_a_reader_that_leaves_early_causes_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; from lamda.cli import main; sys.exit(main())", "pretrain", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_config_show_prints_what_is_read_back(capsys, tmp_path):
    assert main(["config", "show", "--train.steps", "7", "--train.lr", "1e-4"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(first)
    assert main(["config", "show", "--config", str(tmp_path / "shown.yaml")]) == 0
    assert capsys.readouterr().out == first
    assert "lr: 0.0001" in first


def test_the_map_has_each_command_in_one_place():
    assert sorted(name for names in cli.MAP.values() for name in names) == sorted(COMMANDS)


def test_help_needs_neither_torch_nor_a_second():
    code = (
        "import sys; from lamda.cli import main; main(['--help']); "
        "assert not {'torch', 'deepspeed', 'matplotlib', 'wandb', 'transformers'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The time of the processor, which others who work on this machine do not change.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_a_reader_that_leaves_a_command_early_ends_it_quietly():
    """As `lamda runs DIR | head -1`: the code is what a shell gives to whoever a closed pipe ends."""
    code = """\
import sys
from lamda import cli
cli.COMMANDS["runs"] = cli.Command(lambda argv: [print("row", number) for number in range(100_000)] and 0, "", "")
sys.exit(cli.main(["runs"]))"""
    reader, writer = os.pipe()
    command = subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert os.read(reader, 5).startswith(b"row")
    os.close(reader)
    assert command.communicate(timeout=300)[1] == ""
    assert command.returncode == 141


def test_a_broken_connection_is_not_taken_for_a_reader_that_left(monkeypatch):
    def fail(argv):
        raise BrokenPipeError("the connection to the hub")

    monkeypatch.setitem(cli.COMMANDS, "runs", Command(fail, "", ""))
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), pytest.raises(BrokenPipeError):
        main(["runs"])


@pytest.mark.parametrize("name", WITH_A_PARSER)
def test_help_tells_each_option_that_the_command_takes_and_no_other(name, capsys):
    """The table is read without importing the commands; here their own parsers are asked."""
    with pytest.raises(SystemExit):
        COMMANDS[name].call(["--help"])
    known = {word for word in options(capsys.readouterr().out) if word not in ("-h", "--help")}
    assert set(options(f"{COMMANDS[name].usage}\n{COMMANDS[name].details}")) == known


def test_a_file_that_the_system_refuses_is_one_sentence(monkeypatch, capsys):
    def read(argv):
        Path("/" + "x" * 300).stat()

    monkeypatch.setitem(cli.COMMANDS, "runs", COMMANDS["runs"]._replace(call=read))
    assert main(["runs"]) == 1
    assert capsys.readouterr().err == f"/{'x' * 300}: File name too long\n"


def test_an_error_that_is_not_the_systems_keeps_its_traceback(monkeypatch):
    def connect(argv):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setitem(cli.COMMANDS, "runs", COMMANDS["runs"]._replace(call=connect))
    with pytest.raises(ConnectionResetError):
        main(["runs"])
