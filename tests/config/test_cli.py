"""The command `lamda`: what it says, and its exit codes."""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lamda import cli
from lamda.cli import COMMANDS, OLD_NAMES, Command, main
from lamda.config.errors import UserError
from lamda.config.help import ConfigParser
from lamda.config.loading import KEYS


@pytest.fixture
def replace(monkeypatch):
    """Replaces the `main` of a command."""

    def replace(name, main):
        module = SimpleNamespace(main=main, parser=COMMANDS[name].parser)
        monkeypatch.setitem(sys.modules, "replaced_command", module)
        monkeypatch.setitem(cli.COMMANDS, name, Command("replaced_command", COMMANDS[name].summary))

    return replace


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    message = capsys.readouterr().out
    assert all(f"lamda {name} " in message and command.summary in message for name, command in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_shows_its_usage_and_runs_nothing(name, capsys, replace):
    command = COMMANDS[name]
    parser = command.parser()
    replace(name, lambda argv: pytest.fail("was run"))
    assert main([*name.split(), "--help"]) == 0
    message = capsys.readouterr().out
    assert message.startswith(f"usage: lamda {name} ")
    assert " ".join(command.summary.split()) in " ".join(message.split())
    assert all(flag in message for action in parser._actions for flag in action.option_strings)
    assert (
        (f"--{next(iter(KEYS))} " in message) == isinstance(parser, ConfigParser) == ("[--section.key VALUE" in message)
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_of_a_command_is_explained(name):
    assert not [action.dest for action in COMMANDS[name].parser()._actions if not action.help]


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_an_earlier_name_of_a_command_works_and_is_not_shown(old, new, capsys, replace):
    seen = []
    replace(new, lambda argv: seen.append(argv) or 7)
    assert main([*old.split(), "RUN", "--json"]) == 7
    assert seen == [["RUN", "--json"]]
    assert main([*old.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: lamda {new} ")
    assert main(["--help"]) == 0
    assert f"lamda {old} " not in capsys.readouterr().out


def test_sampling_options_default_to_the_librarys_values():
    from lamda.dialog.options import reply_options_of
    from lamda.dialog.speaker import ReplyOptions
    from lamda.inference.sampling import Sampling

    assert reply_options_of(COMMANDS["chat"].parser().parse_args(["RUN"])) == ReplyOptions()
    assert reply_options_of(COMMANDS["serve"].parser().parse_args(["RUN"])) == ReplyOptions()
    given = vars(COMMANDS["generate"].parser().parse_args(["RUN", "--prompt", ""]))
    assert all(given[name] == value for name, value in vars(Sampling()).items() if name != "stop_ids")


def test_a_type_that_export_offers_is_one_that_it_writes():
    from lamda.interop.huggingface.weights import DTYPES

    (action,) = [each for each in COMMANDS["export"].parser()._actions if each.dest == "dtype"]
    assert sorted(action.choices) == sorted(DTYPES)


def test_a_command_gets_the_words_after_its_name_and_gives_the_exit_code(replace):
    seen = []
    replace("tokenizer train", lambda argv: seen.append(argv) or 7)
    assert main(["tokenizer", "train", "--a", "b"]) == 7
    assert seen == [["--a", "b"]]


@pytest.mark.parametrize(("error", "code"), [(UserError("mend this"), 2), (KeyboardInterrupt(), 130)])
def test_what_a_user_can_mend_ends_without_a_traceback(error, code, replace, capsys):
    def fail(argv):
        raise error

    replace("plan", fail)
    assert main(["plan"]) == code
    assert capsys.readouterr().err == (f"{error}\n" if code == 2 else "")


def test_a_defect_of_ours_is_not_hidden(replace):
    replace("plan", lambda argv: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["plan"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretain", "--config", "x"], "`lamda pretain`; did you mean 'pretrain'?"),
        (["config", "shwo"], "`lamda config shwo`; did you mean 'config show'?"),
        (["zzz"], "`lamda zzz`; `lamda --help` lists all"),
        (["--hepl"], "no command `lamda --hepl`"),
    ],
)
def test_an_unknown_command_names_the_nearest(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_group_lists_its_commands(capsys):
    assert main(["tokenizer"]) == 0
    message = capsys.readouterr().out
    assert "lamda tokenizer train" in message
    assert "pretrain" not in message


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
    assert sorted(name for names in cli.GROUPS.values() for name in names) == sorted(COMMANDS)


def seconds_of_help(name):
    """Processor time, which other work on the machine hardly changes."""
    code = (
        f"import sys; from lamda.cli import main; main([*{name.split()}, '--help']); "
        "assert not {'torch', 'deepspeed', 'datasets', 'matplotlib', 'wandb', 'transformers'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_needs_neither_torch_nor_a_second():
    assert seconds_of_help("") < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_needs_no_slow_library(name):
    assert seconds_of_help(name) < 2


def test_a_reader_that_leaves_a_command_early_ends_it_quietly():
    """As `lamda list DIR | head -1`: the code is what a shell gives to whoever a closed pipe ends."""
    code = """\
import sys
from lamda import cli
from lamda.runs import listing
listing.main = lambda argv: [print("row", number) for number in range(100_000)] and 0
sys.exit(cli.main(["list"]))"""
    reader, writer = os.pipe()
    command = subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert os.read(reader, 5).startswith(b"row")
    os.close(reader)
    assert command.communicate(timeout=300)[1] == ""
    assert command.returncode == 141


def test_a_broken_connection_is_not_taken_for_a_reader_that_left(replace):
    def fail(argv):
        raise BrokenPipeError("the connection to the hub")

    replace("list", fail)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), pytest.raises(BrokenPipeError):
        main(["list"])


def test_a_file_that_the_system_refuses_is_one_sentence(replace, capsys):
    def read(argv):
        Path("/" + "x" * 300).stat()

    replace("list", read)
    assert main(["list"]) == 1
    assert capsys.readouterr().err == f"/{'x' * 300}: File name too long\n"


def test_an_error_that_is_not_the_systems_keeps_its_traceback(replace):
    def connect(argv):
        raise ConnectionResetError(104, "Connection reset by peer")

    replace("list", connect)
    with pytest.raises(ConnectionResetError):
        main(["list"])
