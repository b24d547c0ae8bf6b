"""What the doctor says of a machine. What is not to be had here (GPUs, other clocks) is faked where it is read."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lamda.cluster import doctor
from lamda.cluster.checks import environment, hardware, ranks, software
from lamda.cluster.checks.finding import Check, Finding, Subject, failure, ok, warning
from lamda.config import Config
from lamda.distributed import World
from lamda.model.attention.backends import missing_for_triton
from tests.conftest import make_text, write_shard
from tests.launch import ENVIRONMENT, ROOT, free_port

PLACES = [f"rank {rank} (host h{rank // 2})" for rank in range(4)]


@pytest.fixture
def subject(tmp_path):
    """A small run of four ranks on two nodes, seen from rank 0."""
    write_shard(tmp_path / "text" / "0.jsonl.zst", [make_text(1, 40)])
    config = Config.model_validate(
        {
            "run": {"dir": str(tmp_path / "run")},
            "data": {"files": f"{tmp_path}/text/*", "corpus": "standard_library"},
            "train": {"steps": 4, "global_batch_size": 32, "micro_batch_size": 2},
            "wandb": {"mode": "disabled"},
        }
    )
    (tmp_path / "run").mkdir()
    return Subject(config, World(world_size=4, local_world_size=2, launched=True), torch.device("cpu"))


def test_a_mirror_is_written_and_nothing_stays_there(subject, tmp_path):
    assert environment.mirror(subject).text.startswith("checkpoint.mirror is not set")
    address = tmp_path / "mirror"
    finding = environment.mirror(changed(subject, checkpoint={"mirror": str(address)}))
    assert finding == ok(f"{address}/run can be written; no checkpoint yet")
    assert list((address / "run").iterdir()) == []
    (tmp_path / "file").touch()
    run = Path(subject.config.run.dir)
    for folder, began in ((run, 1.0), (address / run.name, 2.0)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "starts.jsonl").write_text(json.dumps({"time": began}))
    finding = environment.mirror(changed(subject, checkpoint={"mirror": str(address)}))
    assert finding.text == f"checkpoint.mirror: {address}/{run.name} holds the copies of another run"
    finding = environment.mirror(changed(subject, checkpoint={"mirror": f"{tmp_path}/file/mirror"}))
    assert (finding.level, finding.text) == ("failure", f"{tmp_path}/file/mirror/run cannot be used (Not a directory)")


def changed(subject, **sections):
    """The subject with another configuration."""
    values = subject.config.model_dump()
    for section, keys in sections.items():
        values[section] |= keys
    return Subject(Config.model_validate(values), subject.world, subject.device)


def test_python_is_the_tested_one_or_a_warning_names_it(subject, monkeypatch):
    monkeypatch.setattr(software, "tested_python", lambda: "{}.{}".format(*sys.version_info))
    assert software.python(subject).level == "ok"
    monkeypatch.setattr(software, "tested_python", lambda: "3.9")
    assert software.python(subject).level == "warning"
    assert "tested with 3.9" in software.python(subject).text


def test_packages_are_judged_by_what_the_project_needs_and_what_was_tested(subject, monkeypatch):
    tested = software.tested_packages()
    versions = {each.name: tested[each.name] for each in software.requirements()}
    monkeypatch.setattr(software, "installed", versions.get)
    assert software.packages(subject).level == "ok"
    versions["numpy"] = "2.4.0"
    assert software.packages(subject) == warning(
        f"numpy 2.4.0 (tested with {tested['numpy']})", f"{software.INSTALL} installs the tested versions"
    )
    versions["torch"] += "+cpu"
    assert "torch" not in software.packages(subject).text, "a build for another device is the same version"
    versions |= {"deepspeed": "0.19.7", "einops": None}
    found = software.packages(subject)
    assert found.level == "failure"
    assert "deepspeed==0.19.8 is needed, 0.19.7 is installed" in found.text
    assert re.search("einops.* is needed, it is not installed", found.text)


def test_a_driver_whose_gpus_torch_does_not_see_is_a_failure_and_no_gpu_a_warning(subject, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "driver_version", lambda: "570.1")
    assert hardware.gpu(subject).level == "failure"
    monkeypatch.setattr(hardware, "driver_version", lambda: None)
    assert hardware.gpu(subject).level == "warning"


def test_a_gpu_that_is_missing_or_shared_is_named(subject, monkeypatch):
    for name, value in {"is_available": True, "device_count": 1, "get_device_name": "H9"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 1))
    monkeypatch.setattr(hardware, "driver_version", lambda: "570.1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (79e9, 80e9))
    assert hardware.gpu(subject) == ok(f"H9, driver 570.1, CUDA {torch.version.cuda}, NCCL 2.30.1, 80 GB")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40e9, 80e9))
    assert "40 of 80 GB are in use" in hardware.gpu(subject).text
    second = Subject(subject.config, World(rank=1, local_rank=1, world_size=4, local_world_size=2), subject.device)
    assert "torch sees 1" in hardware.gpu(second).text


def test_a_device_that_multiplies_wrongly_is_a_failure(subject, monkeypatch):
    assert hardware.bf16(subject).level == "ok"
    right = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda one, other: right(one, other) * (1.1 if one.dtype == torch.bfloat16 else 1)
    )
    assert hardware.bf16(subject).level == "failure"


def test_one_core_for_two_ranks_is_a_warning(subject, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert hardware.cores(subject).level == "ok"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert hardware.cores(subject).text.startswith("1 for 2 ranks on this node; each needs 3")


def test_a_containers_small_shared_memory_is_a_failure_for_gpus_alone(subject, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=64 << 20))
    assert hardware.shared_memory(subject).level == "ok"
    on_gpu = Subject(subject.config, subject.world, torch.device("cuda"))
    assert hardware.shared_memory(on_gpu).level == "failure"


def test_a_host_without_room_for_what_is_offloaded_is_a_failure(subject, monkeypatch):
    assert hardware.offload(subject).text == "not needed: nothing is offloaded"
    offloading = changed(subject, deepspeed={"config": "deepspeed/offload-cpu.json"})
    assert hardware.offload(offloading).level == "ok"
    monkeypatch.setattr(hardware, "available_memory", lambda: 10**6)
    assert "0.0 GB of host memory are free" in hardware.offload(offloading).text
    assert hardware.offload(offloading).level == "failure"


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


@pytest.mark.parametrize(
    ("version", "groups", "free"),
    [
        (V2, {}, 8000 << 10),
        (V2, {"job": ("max", 5)}, 8000 << 10),
        (V2, {".": ("max", 5), "job": (5000, 2000)}, 3007),
        (V2, {".": (4000, 3000), "job": (5000, 2000)}, 1007),
        (V2, {"job": (1000, 2000)}, 0),
        (V1, {"memory": (4000, 1000), "memory/job": (2**63 - 4096, 1000)}, 3007),
    ],
)
def test_the_free_memory_of_a_container_or_job_is_within_its_limits(tmp_path, monkeypatch, version, groups, free):
    """Control groups of both versions, and those above them."""
    monkeypatch.setattr(hardware, "PROC", tmp_path)
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path / "groups")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("4:memory:/job\n3:cpu:/x\n0::/job\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    for name, figures in groups.items():
        (tmp_path / "groups" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name / "memory.stat").write_text("cache 9\ninactive_file 7\n")
        for file, figure in zip(version, figures, strict=True):
            (tmp_path / "groups" / name / file).write_text(f"{figure}\n")
    assert hardware.available_memory() == free


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Makes a script the C compiler; None: there is none."""

    def choose(script):
        missing_for_triton.cache_clear()
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path / "gcc") if script and name == "gcc" else None)
        (tmp_path / "gcc").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "gcc").chmod(0o755)

    monkeypatch.setattr("lamda.model.attention.backends.find_spec", lambda _: True)
    yield choose
    missing_for_triton.cache_clear()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "which is not installed"),
        (
            "echo 'fatal error: Python.h: No such file' >&2; exit 1",
            r"gcc does not \(fatal error: Python.h: No such file",
        ),
        ("exit 3", r"gcc does not \(exit code 3\)"),
    ],
)
def test_a_compiler_that_builds_nothing_matters_where_kernels_are_built(subject, compiler, script, message):
    compiler(script)
    assert hardware.compiler(subject).level == "ok"
    on_gpu = Subject(subject.config, subject.world, torch.device("cuda"))
    assert hardware.compiler(on_gpu).level == "warning"
    assert re.search(message, hardware.compiler(on_gpu).text)
    fused = changed(on_gpu, model={"attention": "fused"})
    assert hardware.compiler(fused).level == "failure"


def test_a_compiler_that_builds_a_module_is_enough(subject, compiler):
    path = shutil.which("gcc")
    compiler(f'exec {path} "$@"')
    on_gpu = Subject(subject.config, subject.world, torch.device("cuda"))
    assert hardware.compiler(on_gpu) == ok("builds Python modules, as Triton does")


def test_the_room_for_checkpoints_is_judged_by_their_size(subject, monkeypatch):
    size = environment.checkpoint_bytes(subject)
    for share, level in ((0.9, "failure"), (2, "warning"), (5, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=share * size: SimpleNamespace(free=free))
        assert environment.free_space(subject).level == level


def test_the_size_of_a_checkpoint_is_that_of_a_real_one(subject):
    """2 bytes of bf16 weights and 12 of fp32 weights and moments, or 16 in fp32."""
    count = sum(each.numel() for each in _model(subject).parameters())
    assert environment.checkpoint_bytes(subject) == 14 * count
    assert environment.checkpoint_bytes(changed(subject, deepspeed={"config": "deepspeed/fp32.json"})) == 16 * count


def _model(subject):
    from lamda.model import LaMDA

    with torch.device("meta"):
        return LaMDA(subject.config.model)


def test_a_disk_too_slow_for_the_time_limit_is_a_warning(subject, monkeypatch):
    assert environment.write_speed(subject).level == "ok"
    size = environment.checkpoint_bytes(subject)
    monkeypatch.setattr(environment, "writing_rate", lambda _: size / 4 / 200)  # four ranks write
    assert "a checkpoint takes 200.0 s" in environment.write_speed(subject).text
    assert environment.write_speed(subject).level == "warning"
    assert not list(Path(subject.config.run.dir).iterdir())


@pytest.mark.parametrize(("skew", "level"), [(0, "ok"), (10, "warning"), (-100, "failure")])
def test_a_file_server_with_another_clock_is_found(subject, monkeypatch, skew, level):
    now = time.time
    monkeypatch.setattr(environment.time, "time", lambda: now() + skew)
    assert environment.file_clock(subject).level == level


def test_text_that_is_missing_or_cut_off_is_a_failure(subject, tmp_path):
    assert environment.data(subject).text.startswith("1 files, ")
    (shard,) = (tmp_path / "text").iterdir()
    shard.write_bytes(shard.read_bytes()[:-5])
    assert "is truncated" in environment.data(subject).text
    shard.unlink()
    assert environment.data(subject).level == "failure"


def test_a_server_that_never_answers_does_not_hold_up_the_doctor(subject, monkeypatch):
    monkeypatch.setattr(environment, "TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr("lamda.data.corpus.open_corpus", lambda _: time.sleep(30))
    assert environment.data(subject) == failure("no answer for 0.1 s", environment.data(subject).advice)


def test_a_check_that_fails_with_anything_costs_no_other_finding(subject, monkeypatch):
    class ConnectError(Exception):
        """As of a library whose errors are no OSError."""

    def look(subject):
        raise ConnectError("no\n  route")

    checks = [Check("first", "main", look), Check("second", "main", lambda subject: ok("fine"))]
    monkeypatch.setattr(doctor, "checks", lambda: checks)
    found = doctor.check_one_rank(subject)
    assert found["first"] == failure("the check itself failed (ConnectError: no route)", "")
    assert found["second"].level == "ok"


def test_a_run_without_wandb_is_warned_and_not_failed(subject, monkeypatch):
    monkeypatch.setattr("lamda.training.wandb_logger.is_installed", lambda: False)
    message = environment.weights_and_biases(changed(subject, wandb={"mode": "offline"}))
    assert message.level == "warning"
    assert "pip install wandb" in message.advice
    installed = software.installed
    monkeypatch.setattr(software, "installed", lambda name: None if name == "wandb" else installed(name))
    assert "wandb" not in software.packages(subject).text


def test_wandb_is_asked_only_where_the_run_will_and_never_fails_it(subject, monkeypatch):
    assert environment.weights_and_biases(subject) == ok("wandb.mode is disabled")
    online = changed(subject, wandb={"mode": "online"})
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers 501 to everything
    threading.Thread(target=server.handle_request, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("lamda.training.wandb_logger.sign_in", lambda: address)
    assert environment.weights_and_biases(online) == ok(f"{address} is reachable, and an API key is set")
    server.server_close()
    assert environment.weights_and_biases(online).level == "warning"

    def without_key():
        import wandb

        raise wandb.errors.AuthenticationError("no W&B key")

    monkeypatch.setattr("lamda.training.wandb_logger.sign_in", without_key)
    assert environment.weights_and_biases(online).text == "no W&B key"


def test_ranks_that_cannot_share_the_batch_are_reported_by_the_doctor_as_well(subject):
    (check,) = (check for check in doctor.checks() if check.name == "batch")
    odd = Subject(subject.config, World(world_size=3), subject.device)
    assert doctor.run_check(check, subject).level == "ok"
    assert doctor.run_check(check, odd).text.startswith("3 ranks cannot share 16 micro-batches")


def test_the_odd_rank_is_named():
    same = {"code": "c0de", "torch": "2.13.0"}
    assert ranks.same_facts([same] * 4, PLACES).level == "ok"
    found = ranks.same_facts([same, same, {**same, "torch": "2.12.0"}, same], PLACES)
    assert found.level == "failure"
    assert found.text == "torch: rank 2 (host h1) has 2.12.0, 3 of 4 ranks 2.13.0"


def test_a_clock_that_is_off_is_named():
    assert ranks.clocks([100.0, 100.2, 100.1, 100.0], PLACES) == ok("all within 0.2 s")
    late = ranks.clocks([100.0, 100.0, 110.0, 100.0], PLACES)
    assert late.text == "rank 2 (host h1) differs by +10.0 s from the others"
    assert ranks.clocks([100.0, 100.0, 10.0, 100.0], PLACES).level == "failure"


def test_ranks_that_do_not_see_the_run_directory_are_named():
    assert ranks.shared_directory([True] * 4, PLACES, "run").level == "ok"
    message = ranks.shared_directory([True, True, False, False], PLACES, "run").text
    assert message.startswith("rank 2 (host h1), rank 3 (host h1) did not see a file that rank 0 (host h0) wrote")


def test_a_slow_network_between_gpus_is_a_warning_and_a_wrong_sum_a_failure(subject):
    on_gpu = Subject(subject.config, subject.world, torch.device("cuda"))
    assert ranks.bandwidth(1e9, right=True, subject=subject).level == "ok"
    assert ranks.bandwidth(1e9, right=True, subject=on_gpu).level == "warning"
    assert ranks.bandwidth(200e9, right=True, subject=on_gpu).level == "ok"
    assert ranks.bandwidth(200e9, right=False, subject=on_gpu).level == "failure"


def test_findings_of_many_ranks_become_one_that_names_those_concerned():
    fine = ok("fine")
    assert doctor.merged([fine, None, fine, None], PLACES) == fine
    found = doctor.merged([fine, fine, fine, failure("broken", "mend")], PLACES)
    assert found == Finding("failure", "rank 3 (host h1): broken", "mend")
    assert doctor.merged([warning("w", "a")] * 4, PLACES).text == "every rank: w"
    slow = doctor.merged([ok("fast", rate=rate) for rate in (10.0, 10.1, 6.0, 9.9)], PLACES)
    assert slow.level == "warning"
    assert slow.text.startswith("rank 2 (host h1) is slow")


def test_the_exit_code_is_that_of_the_worst_and_json_says_the_same(subject, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("lamda.cluster.doctor.read_world", World)
    (tmp_path / "run.yaml").write_text(json.dumps(subject.config.model_dump(mode="json")))
    arguments = ["--config", str(tmp_path / "run.yaml"), "--json"]
    levels = {0: "ok", 1: "warning", 2: "failure"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = doctor.main(arguments)
    message = json.loads(capsys.readouterr().out)
    assert message["worst"] == levels[code] == "warning"
    monkeypatch.setattr(environment, "checkpoint_bytes", lambda _: 1 << 60)
    assert doctor.main(arguments[:-1]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "run directory" in line).startswith("failure  run directory")


def test_the_image_holds_what_the_doctor_looks_for():
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    assert re.search(r"^FROM python:(\d+\.\d+)-", dockerfile, re.MULTILINE)[1] == software.tested_python()
    assert "--constraint constraints.txt" in dockerfile
    assert " gcc " in dockerfile
    assert "lamda doctor" in dockerfile


def test_two_ranks_name_the_one_that_has_another_directory(subject, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(subject.config.model_dump(mode="json")))
    (tmp_path / "elsewhere").mkdir()
    port, processes = str(free_port()), []
    for rank, run in enumerate(("run", "elsewhere")):
        place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        variables = {name: str(value) for name, value in place.items()}
        command = [sys.executable, "-m", "lamda.cluster.doctor", f"--local_rank={rank}", "--json"]
        processes.append(
            subprocess.Popen(
                [*command, "--config", str(tmp_path / "run.yaml"), "--run.dir", str(tmp_path / run)],
                env={**os.environ, **ENVIRONMENT, **variables, "MASTER_ADDR": "127.0.0.1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    (out, err), (silent, _) = (process.communicate(timeout=900) for process in processes)
    assert [process.returncode for process in processes] == [2, 2], err
    assert not silent.strip()
    checks = json.loads(out[out.index("{") :])["checks"]
    assert checks["shared"]["level"] == "failure"
    assert re.match(r"rank 1 \(host .*\) did not see a file that rank 0 ", checks["shared"]["text"])
    assert checks["same"]["level"] == checks["clocks"]["level"] == checks["all-reduce"]["level"] == "ok"


def test_without_a_configuration_the_doctor_looks_at_the_tiny_run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "checks", lambda: [Check("seen", "main", lambda subject: ok(subject.config.run.dir))])
    assert doctor.main([]) == 0
    assert "runs/tiny" in capsys.readouterr().out
    assert doctor.main(["--config=tiny", "--run.dir", "runs/mine"]) == 0
    assert "runs/mine" in capsys.readouterr().out
