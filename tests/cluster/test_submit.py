"""What `lamda submit` would start: scripts, hostfiles and manifests; and what it refuses before."""

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml
from kubeflow_trainer_api import models

from lamda.cluster.job import passed_on
from lamda.cluster.submit import main
from lamda.config.errors import UserError

SITES = {
    "slurm": "slurm: {partition: gpu, account: us, time: 1-00:00:00, cpus_per_node: 96, options: [--constraint=a b]}",
    "hostfile": "hostfile: {hosts: [a, b, c], ssh_options: [-p 2222]}",
    "kubernetes": "kubernetes: {image: 'r/lamda:1', claim: runs, mount: /data, secrets: [keys]}",
}
CONFIG = "train: {steps: 4, global_batch_size: 32, micro_batch_size: 2}\n"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in passed_on(os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", "canary-key")
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0 'x'")
    monkeypatch.setenv("FI_PROVIDER", "efa")
    monkeypatch.setenv("https_proxy", "http://user:canary-password@proxy:3128")
    monkeypatch.setenv("UNRELATED", "canary-unrelated")


@pytest.fixture
def submit(tmp_path, capsys):
    """Runs `lamda submit --dry-run` and returns what it prints."""

    def run(scheduler, *flags, site="", config=CONFIG, run="/data/runs/a b", gpu="h100"):
        (tmp_path / "run.yaml").write_text(config, "utf-8")
        setup = f"setup: [module load cuda/12.8], export: [FI_*], ranks_per_node: 8, gpu: {gpu}"
        (tmp_path / "site.yaml").write_text(
            f"cluster: {{scheduler: {scheduler}, {setup}}}\n{site or SITES[scheduler]}\n", "utf-8"
        )
        files = ["--cluster", str(tmp_path / "site.yaml"), "--config", str(tmp_path / "run.yaml")]
        assert main([*files, "--dry-run", "--run.dir", run, *flags]) == 0
        return capsys.readouterr().out

    return run


def options(script):
    """What the script tells sbatch, without quotes."""
    return [line.removeprefix("#SBATCH ").strip("'") for line in script.splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.parametrize("scheduler", SITES)
def test_no_value_of_a_secret_or_of_an_unrelated_variable_is_written(submit, scheduler):
    message = submit(scheduler, "--nodes", "2")
    assert "canary" not in message
    assert "FI_PROVIDER" in message
    assert "NCCL_SOCKET_IFNAME" in message


def test_the_batch_script_says_everything_that_slurm_must_know(submit):
    script = submit("slurm", "--nodes", "2", "--run.stop_margin_seconds", "200")
    assert set(options(script)) >= {
        "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=96", "--partition=gpu",
        "--account=us", "--time=1-00:00:00", "--exclusive", "--requeue", "--open-mode=append",
        "--signal=B:USR1@200", "--constraint=a b", "--job-name=a-b",
        "--export=FI_PROVIDER,HF_TOKEN,NCCL_SOCKET_IFNAME,WANDB_API_KEY,https_proxy",
    }  # fmt: skip
    assert "module load cuda/12.8" in script.splitlines()
    for words in ("--kill-on-bad-exit=1", '--no_ssh --node_rank "$SLURM_NODEID"', "slots=8", '/STOP"'):
        assert words in script


def test_a_percent_sign_of_the_path_is_none_of_slurms(submit):
    script = submit("slurm", run="/data/runs/%j 50%")
    (output,) = [each for each in options(script) if each.startswith("--output=")]
    assert output.startswith("--output=/data/runs/%%j 50%%/submit/")
    assert output.endswith("/%j.log")
    assert "srun --export=ALL" in script
    assert '--output="${state//%/%%}/node-%n.log"' in script


def test_nodes_without_gpus_ask_for_none(submit):
    script = submit("slurm", site="slurm: {}", config=CONFIG + "run: {seed: 1}\n")
    assert "--gpus-per-node=8" in options(script)
    script = submit("slurm", site="slurm: {exclusive: false}\n", config=CONFIG).replace("\n", " ")
    assert "--exclusive" not in script


@pytest.mark.parametrize("flags", [(), ("--doctor",)])
def test_the_scripts_are_shell(submit, flags):
    """bash reads them, and so does shellcheck where it is installed."""
    pod = next(iter(yaml.safe_load_all(submit("kubernetes", *flags))))
    (job,) = [each for each in yaml.safe_load_all(submit("kubernetes", *flags)) if each["kind"] == "TrainJob"]
    assert pod["kind"] == "TrainingRuntime"
    scripts = [submit("slurm", *flags), job["spec"]["trainer"]["command"][2]]
    for script in scripts:
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
        if shutil.which("shellcheck"):
            checked = subprocess.run(
                ["shellcheck", "-s", "bash", "-S", "warning", "-"],
                input=script,
                text=True,
                capture_output=True,
                check=False,
            )
            assert checked.returncode == 0, checked.stdout


def test_the_doctor_is_a_job_that_never_starts_again(submit):
    script = submit("slurm", "--doctor")
    assert "--module lamda.cluster.doctor" in script
    assert "--no-requeue" in options(script)
    assert "lamda.cluster.restarts" not in script


@pytest.mark.parametrize("scheduler", SITES)
def test_the_smoke_test_is_the_doctors_on_every_scheduler(submit, scheduler):
    assert "--module lamda.cluster.doctor --smoke --config" in " ".join(
        submit(scheduler, "--smoke").replace("\\\n", "").split()
    )


def test_the_hostfile_way_names_as_many_hosts_as_nodes_and_sends_secrets_by_name(submit):
    message = submit("hostfile", "--nodes", "2")
    assert "a slots=8\nb slots=8\n" in message
    assert "c slots" not in message
    assert "export NCCL_SOCKET_IFNAME='eth0 '\"'\"'x'\"'\"''\n" in message
    assert "-o SendEnv=HF_TOKEN -o SendEnv=WANDB_API_KEY -o SendEnv=https_proxy" in message
    assert "-p 2222" in message
    with pytest.raises(UserError, match=r"--nodes 4: hostfile.hosts names 3"):
        submit("hostfile", "--nodes", "4")


KINDS = {"TrainingRuntime": models.TrainerV1alpha1TrainingRuntime, "TrainJob": models.TrainerV1alpha1TrainJob}


@pytest.mark.parametrize("flags", [("--nodes", "2"), ("--doctor",)])
def test_the_manifest_is_one_that_kubeflows_own_models_read_whole(submit, monkeypatch, flags):
    documents = list(yaml.safe_load_all(submit("kubernetes", *flags)))
    assert [document["kind"] for document in documents] == list(KINDS)
    for document in documents:
        read = KINDS[document["kind"]].from_dict(document)
        assert read.to_dict() == document, "the models drop what they do not know"
    runtime, job = documents
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert re.fullmatch("[a-z0-9]([-a-z0-9]{,61}[a-z0-9])?", job["metadata"]["name"])
    assert job["spec"]["trainer"]["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 8}}


def test_a_secret_without_a_place_is_refused_for_kubernetes(submit):
    with pytest.raises(UserError, match=r"HF_TOKEN, WANDB_API_KEY, https_proxy: not allowed in a manifest"):
        submit("kubernetes", site="kubernetes: {image: i, claim: c}")


def test_a_run_directory_beside_the_volume_is_refused_for_kubernetes(submit):
    with pytest.raises(UserError, match=r"not on the volume.*set --run.dir /data/x$"):
        submit("kubernetes", run="/elsewhere/x")


def test_everything_wrong_is_reported_before_anything_is_submitted(submit):
    with pytest.raises(UserError) as error:
        submit("slurm", "--train.lr", "-1", site="slurm: {partitoin: x}")
    assert "--train.lr: " in str(error.value)
    assert "slurm.partitoin: there is no such key; did you mean 'slurm.partition'?" in str(error.value)
    with pytest.raises(UserError) as error:
        submit("slurm", "--nodes", "3", site="slurm: {time: 3}")
    assert "24 ranks cannot share 16 micro-batches" in str(error.value)
    assert "; with 8 ranks per node, --nodes 1 or --nodes 2" in str(error.value)
    assert "slurm.time 3: the run stops 180 s before its limit" in str(error.value)


def test_no_number_of_nodes_is_named_where_a_node_has_more_ranks_than_the_batch(submit):
    with pytest.raises(UserError, match=r"no number of nodes with 8 ranks$"):
        submit("slurm", config="train: {steps: 4, global_batch_size: 4, micro_batch_size: 2}\n")


def test_a_machine_without_the_scheduler_says_so(submit, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for scheduler, tool in (("slurm", "sbatch"), ("kubernetes", "kubectl"), ("hostfile", "pdsh")):
        submit(scheduler)
        run = "/data/x" if scheduler == "kubernetes" else str(tmp_path / "run")
        with pytest.raises(UserError, match=f"there is no {tool}"):
            main(["--cluster", str(tmp_path / "site.yaml"), "--config", str(tmp_path / "run.yaml"), "--run.dir", run])


@pytest.mark.parametrize(("scheduler", "tool", "job"), [("slurm", "sbatch", "4711"), ("kubernetes", "kubectl", None)])
def test_a_program_is_reported_the_job_that_waits_in_the_queue(
    submit, monkeypatch, capsys, tmp_path, scheduler, tool, job
):
    """sbatch answers JOB;CLUSTER; kubectl has the name from the manifest that it gets."""
    submit(scheduler)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / tool).write_text(f"#!/bin/sh\ncat > {tmp_path}/given\necho '4711;main'\n", "utf-8")
    (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr("lamda.storage.run_directory.RunDirectory.create", lambda self: None)
    monkeypatch.setattr("lamda.cluster.job.Job.write", lambda self, **files: None)
    files = ["--cluster", str(tmp_path / "site.yaml"), "--config", str(tmp_path / "run.yaml")]
    assert main([*files, "--nodes", "2", "--run.dir", "/data/x", "--json"]) == 0
    message = json.loads(capsys.readouterr().out)
    name = job or [*yaml.safe_load_all((tmp_path / "given").read_text("utf-8"))][1]["metadata"]["name"]
    assert message == {"scheduler": scheduler, "job": name, "run": "/data/x", "nodes": 2, "ranks": 16}


def test_over_ssh_there_is_no_job_to_tell_a_program_of(submit):
    with pytest.raises(UserError, match=r"--json: over ssh .*status\.json"):
        submit("hostfile", "--json")


def test_a_model_that_does_not_fit_is_reported_with_what_would(submit):
    large = "model: {preset: 8b}\ntrain: {steps: 4, global_batch_size: 64, micro_batch_size: 1}\n"
    with pytest.raises(UserError, match=r"does not fit: a rank needs .* of its h100; what would fit: ZeRO stage"):
        submit("slurm", "--nodes", "4", config=large)
    assert "#SBATCH" in submit("slurm", "--nodes", "4", "--doctor", config=large), "the doctor takes no memory"


def test_an_unknown_gpu_is_reported_with_the_known_ones(submit):
    with pytest.raises(UserError, match=r"cluster\.gpu: there is no 'h1oo' among .*; did you mean 'h100'"):
        submit("slurm", site="", config=CONFIG, gpu="h1oo")
