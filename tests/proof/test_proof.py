"""`lamda prove-gpu`: what is cut off costs only itself, what fails is reported, and a bare machine is enough."""

import errno
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lamda.config.errors import UserError
from lamda.proof import attention, command, devices, kernels, parts, runs, step
from lamda.proof.command import JSON, PAGE, Proof, main
from lamda.proof.findings import Findings, LeftOutError
from lamda.proof.page import page
from lamda.proof.parts import FINDINGS, PARTS, Part
from lamda.proof.plain_loop import PlainLoop
from lamda.proof.sizes import REHEARSAL
from tests.launch import ENVIRONMENT, ROOT

ABSENT = ("deepspeed", "datasets", "pyarrow", "pandas", "huggingface_hub", "fsspec", "aiohttp", "wandb", "hjson",
          "charset_normalizer")  # fmt: skip
"""What a bare machine and the carried wheels lack, deepspeed being carried but not needed."""


def read(folder):
    return json.loads((folder / JSON).read_text())


def proof(folder, **more):
    (folder / FINDINGS).mkdir(exist_ok=True)
    return Proof(folder, **{"text": None, "seconds": 60, "rehearse": True, **more})


def test_every_part_is_imported_without_what_a_bare_machine_lacks():
    functions = sorted({each.function for each in PARTS.values()})
    code = f"""
import importlib, sys
for name in {ABSENT}: sys.modules[name] = None
for name in {functions}:
    module, function = name.split(".")
    assert callable(getattr(importlib.import_module("lamda.proof." + module), function))
"""
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_kit_has_what_lamda_requires_but_what_it_can_do_without():
    (listed,) = re.findall(r"^KIT_PACKAGES := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", each)[0] for each in required} - {"torch", "numpy"}
    assert {name.replace("-", "_") for name in names} <= {*listed.replace("-", "_").split(), *ABSENT}


def test_a_part_that_takes_too_long_is_cut_off_and_keeps_what_it_found(tmp_path, monkeypatch):
    made = proof(tmp_path, rehearse=False)
    findings = Findings(parts.findings_file(tmp_path, "environment"))

    def session(words, out, **more):
        findings.record("host", {"cores": 3})
        return real([sys.executable, "-c", "import time; time.sleep(60)"], out, **more)

    real = command._session
    monkeypatch.setattr(command, "_session", session)
    monkeypatch.setitem(PARTS, "environment", Part("Environment", "environment.measure", 0.3))
    began = time.monotonic()
    made.run("environment")
    assert time.monotonic() - began < 30
    part = read(tmp_path)["parts"]["environment"]
    assert part["status"] == "cut off after 0 s"
    assert part["found"] == {"host": {"cores": 3}}
    assert "cut off after 0 s" in (tmp_path / PAGE).read_text()
    assert not made.is_complete(["environment"])


PART = """
import subprocess, time
from lamda.proof.parts import die_with_parent
die_with_parent()
run = subprocess.Popen(["sleep", "600"])
print(run.pid, flush=True)
time.sleep(600)
"""
PROOF = f"""
import sys
from lamda.proof import command
with open(sys.argv[1], "wb") as out, command._session([sys.executable, "-c", {PART!r}], out, on_cpu=True) as part:
    print(part.pid, flush=True)
    part.wait()
"""


def test_a_part_and_its_run_end_with_a_proof_that_is_killed(tmp_path):
    log = tmp_path / "log"
    with subprocess.Popen(
        [sys.executable, "-c", PROOF, log], env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE
    ) as killed:
        part = int(killed.stdout.readline())
        wait_until(lambda: log.read_text().strip())
        killed.kill()
    for process in (part, int(log.read_text())):
        wait_until(lambda process=process: is_gone(process))


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(process):
    """Whether it has ended; nobody may have waited for it yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_second_proof_in_the_folder_of_a_running_one_is_refused(tmp_path):
    code = "from pathlib import Path; from lamda.proof import command; import sys\n"
    code += "with command._only_proof(Path(sys.argv[1])): print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as first:
        first.stdout.readline()
        message = rf"--to {tmp_path}: another process writes here \(host .*, process {first.pid}, .*choose another --to"
        with pytest.raises(UserError, match=message):
            main(["--rehearse", "--to", str(tmp_path)])
        assert not (tmp_path / JSON).exists()
        first.kill()
    with command._only_proof(tmp_path):
        pass


def test_a_part_that_crashes_ends_with_its_last_words_and_one_without_time_does_not_begin(tmp_path, monkeypatch):
    made = proof(tmp_path)
    real, crash = command._session, [sys.executable, "-c", "raise SystemExit('no such kernel')"]
    monkeypatch.setattr(command, "_session", lambda words, out, **more: real(crash, out, **more))
    made.run("rate")
    made._ends = time.monotonic() + 5
    made.run("learn")
    found = read(tmp_path)["parts"]
    assert found["rate"]["status"] == "failed with exit code 1:\nno such kernel"
    assert found["learn"]["status"].startswith("left out: ")
    assert "no such kernel" in (tmp_path / PAGE).read_text()


def test_a_later_proof_in_the_folder_keeps_the_parts_of_an_earlier_one_of_its_kind(tmp_path):
    made = proof(tmp_path)
    made._keep("rate", {"status": "done", "seconds": 1.0})
    assert list(proof(tmp_path)._parts) == ["rate"]
    assert proof(tmp_path, rehearse=False)._parts == {}


@pytest.mark.parametrize("content", ['{"rehearsal": true, "par', "[1]", "{}", "\\xff"])
def test_a_file_that_is_no_earlier_proof_is_named(tmp_path, content):
    (tmp_path / JSON).write_bytes(content.encode("latin-1"))
    with pytest.raises(
        UserError, match=r"proof\.json: is not what this command writes; choose another folder with --to"
    ):
        proof(tmp_path)


def test_a_full_disk_costs_a_part_its_last_finding_and_no_other(tmp_path, monkeypatch):
    """The proof reads the file of a part that has just failed to write it."""
    made = proof(tmp_path)
    findings = Findings(parts.findings_file(tmp_path, "environment"))
    findings.record("host", {"cores": 3})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            findings.record("disk", {"written": 1.0})
    made._keep("environment", {"status": "failed", "seconds": 1.0})
    assert read(tmp_path)["parts"]["environment"]["found"] == {"host": {"cores": 3}}


@pytest.mark.parametrize("broken", ["math", "sdpa"])
def test_a_backend_that_fails_is_a_failure_and_the_others_are_timed(tmp_path, monkeypatch, broken):
    """Also `math`, which needs the most memory: the ratios to it are left out then."""
    run = attention.Work.run

    def run_out(work):
        if work._backend.__name__.endswith(broken):
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore lines")
        return run(work)

    monkeypatch.setattr(attention, "BACKENDS", ("math", "sdpa"))
    monkeypatch.setattr(attention.Work, "run", run_out)
    findings = Findings(tmp_path / "kernels.json")
    kernels.measure(replace(REHEARSAL, lengths=(64,), compiled=frozenset()), findings, tmp_path)
    kept = json.loads((tmp_path / "kernels.json").read_text())
    assert kept["failed"] == {f"{broken} at 64, eager": "OutOfMemoryError: CUDA out of memory."}
    (timed,) = kept["found"]["64, eager"]["lengths"].values()
    assert timed["backends"].keys() == {"math", "sdpa"} - {broken}
    assert page({"rehearsal": True, "parts": {"kernels": kept | {"status": "done", "seconds": 1.0}}})


def test_deepspeed_that_cannot_be_imported_counts_as_absent(tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise RuntimeError('CUDA_HOME does not exist')")
    code = "from lamda.proof.devices import loop_name; print(loop_name())"
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "a plain loop: deepspeed cannot be imported (RuntimeError: CUDA_HOME does not exist)\n"


def test_what_a_user_can_correct_ends_a_part_without_a_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "odd").touch()
    assert parts.main(["learn", str(tmp_path), "--rehearse"]) == 1
    assert capsys.readouterr().err == f"{tmp_path}/text exists and is not a corpus: move it, or choose another folder\n"


def test_findings_keep_what_failed_and_what_was_left_out(tmp_path):
    findings = Findings(tmp_path / "part.json")

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access")

    def leave_out():
        raise LeftOutError("there is no GPU")

    assert findings.attempt("good", lambda: 3) == 3
    for name, measure in (("bad", fail), ("absent", leave_out)):
        findings.attempt(name, measure)
    assert json.loads((tmp_path / "part.json").read_text()) == {
        "found": {"good": 3},
        "failed": {"bad": "RuntimeError: CUDA error: an illegal memory access"},
        "left_out": {"absent": "there is no GPU"},
    }


def test_without_deepspeed_a_plain_loop_is_measured_and_the_page_says_so(tmp_path, monkeypatch):
    for module in (devices, step, runs):
        monkeypatch.setattr(module, "deepspeed_obstacle", lambda: "deepspeed is not installed")
    monkeypatch.setattr(PlainLoop, "compile_blocks", lambda self: None)
    findings = Findings(tmp_path / "step.json")
    step.measure_short(REHEARSAL, findings, tmp_path)
    kept = json.loads((tmp_path / "step.json").read_text())
    assert not kept["failed"]
    eager = kept["found"]["eager"]
    assert eager["tokens_per_second"] == pytest.approx(REHEARSAL.step_tokens / eager["step_seconds"])
    assert all(eager["parts"][name] > 0 for name in ("forward", "backward", "optimizer"))
    shown = page({"rehearsal": True, "parts": {"step-1024": kept | {"status": "done", "seconds": 1.0}}})
    assert "a plain loop: deepspeed is not installed" in shown
    assert "no figure says anything about speed" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "equalty"], "equality"),
        (["--minutes", "0"], "more than 0 minutes"),
        (["--minutes", "nan"], "more than 0 minutes"),
        ([], "there is no GPU here; `lamda prove-gpu --rehearse`"),
        (["--rehearse", "--text", "/nowhere"], "has no train and no val.jsonl.zst"),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        main([*words, "--to", str(tmp_path)])
