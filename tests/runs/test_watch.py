"""`lamda watch` shows what happens to a run, in a terminal and without one, and ends as the run does."""

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console

from lamda.config.errors import UserError
from lamda.runs import watch as module
from lamda.runs.watch import LinePrinter, Snapshot, main, render, watch
from lamda.storage.metrics import MetricsFile
from lamda.storage.run_directory import RunDirectory, RunStatus
from tests.runs.conftest import leave_lock, leave_status, make_run, save_checkpoint

FIGURES = {"lr": 1e-3, "tokens_per_second": 5000.0, "step_seconds": 2.0, "mfu": None}
COMMAND = [sys.executable, "-c", "import sys; from lamda.cli import main; sys.exit(main())", "watch"]


def between_looks(monkeypatch, *events):
    """Each event happens while the watcher sleeps; one look more than there are events."""
    left = list(events)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: left.pop(0)())


def test_lines_tell_every_step_and_all_that_happens(tmp_path, monkeypatch, capsys):
    directory = RunDirectory(tmp_path / "run")

    def start():
        directory.create()
        leave_status(directory, "running", step=0, steps=4)
        leave_lock(directory, process=os.getpid())

    def write(first, last, loss):
        with MetricsFile(directory.metrics, discarded=directory.discarded_metrics, step=first - 1) as file:
            for step in range(first, last + 1):
                held_out = {"eval/loss": 3.5} if step == 4 else {}
                file.write({"step": step, "loss": loss - step / 10, **FIGURES, **held_out})

    def end():
        write(2, 4, 3.0)
        leave_status(directory, "finished", step=4, steps=4)

    between_looks(monkeypatch, lambda: None, start, lambda: write(1, 2, 4.0), lambda: write(3, 3, 4.0), end)
    assert watch(directory, LinePrinter()) == 0
    step = "lr 1.00e-03  5,000 tokens/s"
    assert capsys.readouterr().out.splitlines() == [
        "not started",
        "running",
        f"step 1/4  loss 3.9000  {step}  ETA 4s",
        f"step 2/4  loss 3.8000  {step}  ETA 4s",
        f"step 3/4  loss 3.7000  {step}  ETA 2s",
        "rolled back to step 1",
        f"step 2/4  loss 2.8000  {step}  ETA -",
        f"step 3/4  loss 2.7000  {step}  ETA -",
        f"step 4/4  loss 2.6000  {step}  eval/loss 3.5000  ETA -",
        "finished",
    ]


def test_of_the_steps_before_only_the_last_is_reported(tmp_path, capsys):
    directory = make_run(tmp_path / "run", losses=[3.0, 2.0, float("nan")], **FIGURES)
    leave_status(directory, "preempted", step=3, steps=9, reason="SIGTERM")
    assert watch(directory, LinePrinter()) == 75
    assert capsys.readouterr().out.splitlines() == [
        "step 3/9  loss nan  lr 1.00e-03  5,000 tokens/s  ETA -",
        "preempted: SIGTERM",
    ]


def test_a_failed_run_shows_its_last_log_lines_and_exits_with_1(tmp_path, capsys):
    directory = make_run(tmp_path / "run", losses=[3.0])
    directory.log.write_text("".join(f"line {n}\n" for n in range(20)))
    leave_status(directory, "failed", reason="rank 1: it broke")
    assert watch(directory, LinePrinter()) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        *(f"line {n}" for n in range(14, 20)),
        "failed: rank 1: it broke",
    ]


def test_a_run_whose_process_is_gone_has_died(tmp_path, dead_process):
    directory = make_run(tmp_path / "run", losses=[3.0])
    leave_status(directory, "running", steps=5)
    leave_lock(directory, process=dead_process)
    assert watch(directory, lambda look: None) == 1


def test_a_misspelt_run_names_the_nearest_and_is_waited_for(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "second", losses=[3.0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main([str(tmp_path / "secnd")])
    assert "no run here yet; did you mean 'second'?; waiting for it" in capsys.readouterr().out


def test_a_folder_of_runs_is_no_run(tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name, losses=[3.0])
    with pytest.raises(UserError, match=r"is a folder of runs; watch one of a, b$"):
        main([str(tmp_path)])


def test_a_metrics_file_that_is_none_is_reported(tmp_path):
    directory = make_run(tmp_path / "run")
    directory.metrics.write_text("hello\n")
    with pytest.raises(UserError, match="line 1: is no row of metrics"):
        watch(directory, LinePrinter())


def shown(look, *, height):
    """The lines of the picture in a terminal of 70 columns."""
    console = Console(width=70, height=height, record=True, file=io.StringIO())
    console.print(render(look, width=70, height=height))
    return console.export_text().splitlines()


@pytest.mark.parametrize("height", [16, 24, 60])
@pytest.mark.parametrize("steps", [1, 2, 7, 500])
def test_the_picture_fits_the_terminal(tmp_path, weights, steps, height):
    directory = make_run(tmp_path / "run", losses=[9 / n for n in range(1, steps + 1)], grad_norm=1.5, **FIGURES)
    directory.log.write_text("a warning, longer than the terminal is wide: " + "x" * 100 + "\n")
    save_checkpoint(directory.path, 1, weights(0))
    rows = [{"step": n, "loss": 9 / n, "grad_norm": 1.5, **FIGURES} for n in range(1, steps + 1)]
    lines = shown(Snapshot(directory, RunStatus("running", steps=500), rows, 0), height=height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= 70
    assert f"step {steps}/500" in lines[0]
    assert any("gradient norm" in line and "1.500" in line for line in lines)
    assert any("step-00000001" in line for line in lines)
    assert any(0x2800 < ord(character) <= 0x28FF for line in lines for character in line)
    assert any(line.split()[:2] == ["step", "1"] and line.endswith(str(steps)) for line in lines)


@pytest.mark.parametrize("losses", [[], [None], [None, 2.0, None]])
def test_there_is_a_picture_before_the_first_step_and_of_losses_that_were_not_finite(tmp_path, losses):
    rows = [{"step": n, "loss": loss} for n, loss in enumerate(losses, 1)]
    assert "running" in shown(Snapshot(RunDirectory(tmp_path), RunStatus("running"), rows, 0), height=24)[0]


def test_the_picture_of_a_failure_says_why(tmp_path):
    look = Snapshot(RunDirectory(tmp_path), RunStatus("failed", reason="rank 1: " + "it broke " * 12), [], 0)
    assert " ".join(shown(look, height=24)[1:]).split() == ["rank", "1:", *(["it", "broke"] * 12)]


@pytest.fixture
def finished(tmp_path):
    directory = make_run(tmp_path / "run", losses=[3.0, 2.5, 2.0], **FIGURES)
    leave_status(directory, "finished", step=3, steps=3)
    return directory


def test_a_terminal_gets_the_curve(finished):
    ours, theirs = pty.openpty()
    variables = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    done = subprocess.run([*COMMAND, str(finished.path)], stdout=theirs, stderr=theirs, env=variables)
    os.close(theirs)
    message = b""
    while chunk := _read(ours):
        message += chunk
    os.close(ours)
    assert done.returncode == 0, message
    text = message.decode()
    assert any(0x2800 < ord(character) <= 0x28FF for character in text)
    assert "finished" in text


def _read(descriptor):
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux says so where the other end is closed
        return b""


def test_a_pipe_gets_plain_lines(finished):
    done = subprocess.run([*COMMAND, str(finished.path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["step 3/3  loss 2.0000  lr 1.00e-03  5,000 tokens/s  ETA -", "finished"]
