"""`lamda prove-gpu`: what is cut off costs only itself, what fails is reported, and a bare machine is enough."""

import json
import os
import subprocess
import sys
import time

import pytest

from lamda.config.errors import UserError
from lamda.proof import command, parts, runs, step
from lamda.proof.command import JSON, PAGE, Proof, main
from lamda.proof.findings import Findings, LeftOutError
from lamda.proof.page import page
from lamda.proof.parts import PARTS, Part
from lamda.proof.plain_loop import PlainLoop
from lamda.proof.sizes import REHEARSAL
from tests.launch import ENVIRONMENT, ROOT

ABSENT = ("deepspeed", "datasets", "pyarrow", "pandas", "huggingface_hub", "fsspec", "aiohttp", "wandb", "hjson")
"""What a bare machine and the carried wheels lack, deepspeed being carried but not needed."""


def read(folder):
    return json.loads((folder / JSON).read_text())


def proof(folder, **more):
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
    for module in (step, runs):
        monkeypatch.setattr(module, "has_deepspeed", lambda: False)
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
        ([], "there is no GPU here; `lamda prove-gpu --rehearse`"),
        (["--rehearse", "--text", "/nowhere"], "has no val.jsonl.zst"),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        main([*words, "--to", str(tmp_path)])
