"""`lamda doctor --smoke`: what it shows of ranks that work, die, hang, or resume otherwise than they were."""

import errno
import json
import time
from pathlib import Path

import pytest

from lamda.cluster import doctor, rank_group, resume_test
from lamda.cluster.compare import FirstDifference
from lamda.cluster.rank_group import Ended, RankGroup
from lamda.cluster.resume_test import ResumeTest
from lamda.cluster.smoke import FIRST, Part, Smoke
from lamda.config import Config
from lamda.config.errors import UserError
from lamda.distributed import World
from tests.conftest import make_text
from tests.launch import run_ranks

RANK = "import os, signal, sys, time; rank = int(os.environ['RANK']); "


@pytest.fixture
def group():
    return RankGroup(World(), size=2)


def run(group, tmp_path, script, *, limit_seconds=60.0, **more):
    return group.run(
        ["-S", "-c", RANK + script], name="part", run=tmp_path / "run", limit_seconds=limit_seconds, **more
    )


def test_ranks_that_end_well_have_the_variables_of_a_launcher(group, tmp_path):
    shown = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR"
    ended = run(group, tmp_path, f"print(*(os.environ[name] for name in {shown.split()}))")
    assert (ended.codes, ended.failure()) == ({0: 0, 1: 0}, "")
    assert [log.read_text() for log in ended.logs.values()] == [f"{rank} {rank} 2 2 127.0.0.1\n" for rank in (0, 1)]


DYING = """
pid = __import__("pathlib").Path("PID")
if rank:
    while not pid.exists(): time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
pid.with_suffix(".new").write_text(str(os.getpid()))
pid.with_suffix(".new").rename(pid)
time.sleep(600)
"""


def test_a_rank_that_is_killed_ends_the_others_and_is_named(group, tmp_path):
    ended = run(group, tmp_path, DYING.replace("PID", f"{tmp_path}/pid"))
    assert ended.codes == {0: None, 1: -9}
    assert ended.failure().startswith("rank 1: signal SIGKILL")
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_of_ranks_that_fail_the_one_that_says_why_is_shown(group, tmp_path):
    ended = run(group, tmp_path, "time.sleep(rank / 2); sys.exit(2 if not rank else 'no route to the store')")
    assert ended.failure().endswith("no route to the store")
    assert ended.failure().startswith("rank 1: exit code 1")


def test_an_exit_code_that_is_no_failure_leaves_the_others_all_their_time(group, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_group, "SETTLE_SECONDS", 0.0)
    ended = run(group, tmp_path, "time.sleep(rank); sys.exit(1 + rank)", well=(1, 2))
    assert (ended.codes, ended.failure()) == ({0: 1, 1: 2}, "")


def test_ranks_that_hang_end_when_their_time_is_up(group, tmp_path):
    began = time.monotonic()
    ended = run(group, tmp_path, "print('at work', flush=True); time.sleep(600 * rank)", limit_seconds=1.0)
    assert time.monotonic() - began < 30
    assert ended.codes == {0: 0, 1: None}
    assert ended.failure().startswith("no end after 1 s")
    assert ended.failure().endswith("at work")


@pytest.fixture
def smoke(group, tmp_path):
    """Nothing has run yet; a configuration that needs no text."""
    config = {"run": {"dir": str(tmp_path)}, "train": {"steps": 9, "global_batch_size": 8, "micro_batch_size": 2}}
    return Smoke([], Config.model_validate(config), group, folder=tmp_path)


def test_what_follows_a_part_that_failed_is_not_run(smoke, monkeypatch):
    ended = Ended({0: 0, 1: -9}, {0: Path("/dev/null"), 1: Path("/dev/null")}, seconds=1.0)
    monkeypatch.setattr(Smoke, "check", lambda _: [Part("checks", "ok", ""), Part("all-reduce", "ok", "")])
    monkeypatch.setattr(Smoke, "_start", lambda *_, **__: ended)
    verdicts = {part.name: part.verdict for part in smoke.run()}
    assert verdicts == {
        "checks": "ok", "all-reduce": "ok", "training": "failed", "kill": "not run", "resume": "not run"
    }  # fmt: skip


def test_a_doctor_that_finds_a_failure_or_says_nothing_fails_the_checks(smoke, tmp_path, monkeypatch):
    log = tmp_path / "checks-rank-0.log"
    monkeypatch.setattr(Smoke, "_start", lambda *_, **__: Ended({0: 2, 1: 2}, {0: log, 1: log}, 1.0, well=(0, 1, 2)))
    found = {"gpu": ("warning", None), "same": ("failure", None), "all-reduce": ("ok", 4e9)}
    checks = {name: {"level": level, "text": f"of {name}", "rate": rate} for name, (level, rate) in found.items()}
    log.write_text("a library warns\n" + json.dumps({"checks": checks}, indent=2) + "\nand once more\n")
    first, link = smoke.check()
    assert (first.verdict, first.text) == ("failed", "same: of same; 0 of 2 ok; warnings: gpu")
    assert (link.verdict, link.text, link.figures) == ("ok", "of all-reduce", {"bytes_per_second": 4e9})
    log.write_text("Traceback: no gloo\n")
    assert [part.verdict for part in smoke.run()] == ["failed", *["not run"] * 4]


@pytest.mark.parametrize(
    ("rewritten", "differences", "text"),
    [
        (False, {"loss": None, "weights": None}, None),
        (
            False,
            {"loss": None, "weights": FirstDifference(3, 1e-7)},
            "loss: equal; weights: differs from step 3 by 1e-07",
        ),
        (True, {"loss": None}, f"did not resume from {FIRST}"),
    ],
)
def test_a_resume_counts_only_from_the_checkpoint_and_bit_for_bit(smoke, monkeypatch, rewritten, differences, text):
    manifest = smoke.resumed.checkpoints / FIRST / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")

    def finish(*_, **__):
        if rewritten:
            manifest.unlink()
            manifest.write_text("{ }")
        return Ended({0: 0, 1: 0}, {}, seconds=1.0)

    monkeypatch.setattr(Smoke, "_finish", finish)
    monkeypatch.setattr("lamda.cluster.compare.compare_runs", lambda *_: differences)
    if text is None:
        assert [part.verdict for part in smoke.resume()] == ["ok"]
    else:
        with pytest.raises(Exception, match=text):
            smoke.resume()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "2"], "is only for --smoke"),
        (["--smoke", "--ranks", "0"], "must be at least 1"),
        (["--smoke", "--train.stepz", "3"], "did you mean 'train.steps'"),
        (["--smoke", "--ranks", "2", "--run.dir", "/proc/no/run"], "/proc/no: cannot be written to"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(flags, message):
    with pytest.raises(UserError, match=message):
        doctor.main(flags)


TINY = ["--config", "tiny", "--train.global_batch_size", "8"]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("command", "flags", "run"), [(doctor, ["--smoke"], Smoke), (resume_test, TINY, ResumeTest)])
def test_a_full_disk_is_named_and_no_folder_stays_behind(tmp_path, monkeypatch, command, flags, run):
    flags = [*flags, "--ranks", "2", "--run.dir", str(tmp_path / "run")]
    monkeypatch.setattr(run, "run", full_disk)
    with pytest.raises(OSError, match="No space left"):
        command.main(flags)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UserError, match=r"cannot be written to \(No space left"):
        command.main(flags)
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_of_a_launcher_pass_and_leave_nothing(tmp_path, shards, tokenizer_path):
    settings = {
        "run": {"dir": str(tmp_path / "run"), "hang_timeout_seconds": 1800},
        "model": {"vocab_size": 400, "d_model": 32, "n_layers": 1, "n_heads": 2, "d_head": 16, "d_ff": 64},
        "tokenizer": {"path": str(tokenizer_path)},
        "data": {
            "corpus": "standard_library", "files": f"{shards([[make_text(n, 60) for n in range(24)]])}/*",
            "sequence_length": 32,
        },
        "train": {"steps": 100, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-2},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    arguments = ["-m", "lamda.cluster.doctor", "--smoke", "--json", "--config", str(tmp_path / "run.yaml")]
    main, other = run_ranks(arguments, world_size=2)
    assert (main.returncode, other.returncode, other.stdout) == (0, 0, ""), main.stdout + main.stderr
    report = json.loads(main.stdout)
    assert (report["passed"], report["ranks"], report["kept"]) == (True, 2, None)
    figures = {part["name"]: part["figures"] for part in report["parts"]}
    assert list(figures) == ["checks", "all-reduce", "training", "kill", "resume"]
    assert figures["all-reduce"]["bytes_per_second"] > 0
    assert figures["training"]["tokens_per_second"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml", "text"]
