"""The scripts that `lamda submit` writes, run by bash with stand-ins for SLURM and for the launcher."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lamda.cluster.submit import main
from lamda.storage.run_directory import RunDirectory
from tests.launch import ROOT

# A step trains until it is told to stop, or until the file `failed` is there.
SRUN = """#!/bin/bash
touch {folder}/started
for try in $(seq 200); do
  [ -e {run}/STOP ] && {{ cp {folder}/stopped.json {run}/status.json; echo 75 > {state}/exit-0; exit 75; }}
  [ -e {folder}/failed ] && {{ echo 1 > {state}/exit-0; exit 1; }}
  [ -e {folder}/finished ] && {{ cp {folder}/finished.json {run}/status.json; echo 0 > {state}/exit-0; exit 0; }}
  sleep 0.05
done
"""
SCONTROL = """#!/bin/bash
case "$*" in
  "show hostnames "*) echo n1; echo n2;;
  *"show node n1") echo "NodeName=n1 CPUTot=4 NodeAddr=10.1.2.3 NodeHostName=n1";;
  "requeue 7") touch {folder}/requeued; kill -TERM $PPID;;
  *) exit 1;;
esac
"""
# What the pod starts instead of DeepSpeed's launcher.
LAUNCHER = """#!/bin/bash
echo "$*" > {folder}/arguments
cp "${{@: -1}}" {folder}/config.yaml
touch {folder}/started
for try in $(seq 200); do [ -e {run}/STOP ] && exit 75; sleep 0.05; done
"""


class Job:
    """A script at work."""

    def __init__(self, folder, scheduler, capsys):
        self.folder, self.run = folder, folder / "a run"
        (self.run / "submit").mkdir(parents=True)
        for status in ("stopped", "finished"):
            message = {"status": "preempted" if status == "stopped" else status, "reason": "STOP was there"}
            (folder / f"{status}.json").write_text(json.dumps(message))
        (folder / "run.yaml").write_text("train: {steps: 4, global_batch_size: 16, micro_batch_size: 1}\n")
        own = f"kubernetes: {{image: i, claim: c, mount: {folder}}}\n" if scheduler == "kubernetes" else ""
        python = str(folder / "launcher") if scheduler == "kubernetes" else sys.executable
        (folder / "site.yaml").write_text(f"cluster: {{scheduler: {scheduler}, python: {python}}}\n{own}")
        files = ["--cluster", str(folder / "site.yaml"), "--config", str(folder / "run.yaml")]
        main([*files, "--nodes", "2", "--run.dir", str(self.run), "--dry-run"])
        self.script = capsys.readouterr().out

    def stand_in(self, name, text, **names):
        quoted = {key: f"'{value}'" for key, value in {"folder": self.folder, "run": self.run, **names}.items()}
        (self.folder / name).write_text(text.format(**quoted))
        (self.folder / name).chmod(0o755)

    def start(self, **variables):
        environment = {"PATH": f"{self.folder}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), **variables}
        self.log = self.folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(["bash", "-c", self.script], env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not (self.folder / "started").exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self):
        code = self.process.wait(600)
        return code, (self.folder / "requeued").exists()


@pytest.fixture
def batch(tmp_path, capsys):
    """A batch script whose step runs."""
    job = Job(tmp_path, "slurm", capsys)
    state = next(line for line in job.script.splitlines() if line.startswith("state=")).removeprefix("state=")
    state = Path(state.replace("'", "").replace("$SLURM_JOB_ID", "7"))
    job.stand_in("srun", SRUN, state=state)
    job.stand_in("scontrol", SCONTROL)
    job.start(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_NUM_NODES="2")
    assert (state / "hosts").read_text() == "n1 slots=8\nn2 slots=8\n"
    yield job
    job.process.kill()


def test_a_warning_stops_the_run_and_puts_the_job_back_into_the_queue(batch):
    batch.process.send_signal(signal.SIGUSR1)
    assert batch.end() == (-signal.SIGTERM, True), batch.log.read_text()
    assert "job: stopped" in batch.log.read_text()


def test_a_job_that_slurm_ends_itself_is_not_put_back_by_the_script(batch):
    """Cancelled, it must not come back; requeued or preempted, SLURM brings it back."""
    batch.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert batch.process.poll() is None, "it waits for the save"
    (batch.run / "STOP").touch()
    assert batch.end() == (75, False), batch.log.read_text()


def test_a_stop_by_hand_ends_the_job(batch):
    (batch.run / "STOP").touch()
    assert batch.end() == (75, False), batch.log.read_text()
    assert "stopped by RUN/STOP" in batch.log.read_text()


def test_a_failed_step_puts_the_job_back_into_the_queue(batch):
    (batch.folder / "failed").touch()
    assert batch.end() == (-signal.SIGTERM, True), batch.log.read_text()


def test_a_finished_run_ends_the_job_well(batch):
    RunDirectory(batch.run).write_status("running")
    (batch.folder / "finished").touch()
    assert batch.end() == (0, False), batch.log.read_text()


@pytest.fixture
def pod(tmp_path, capsys):
    """A pod's script whose launcher runs."""
    job = Job(tmp_path, "kubernetes", capsys)
    (document,) = (each for each in yaml.safe_load_all(job.script) if each["kind"] == "TrainJob")
    job.script = document["spec"]["trainer"]["command"][2]
    job.stand_in("launcher", LAUNCHER)
    job.start(PET_NNODES="2", PET_NODE_RANK="1", PET_MASTER_ADDR="node-0.job", PET_MASTER_PORT="29400")
    yield job
    job.process.kill()


def test_a_pod_that_is_reported_to_end_saves_and_fails_so_that_the_job_starts_again(pod):
    pod.process.send_signal(signal.SIGTERM)
    assert pod.end()[0] == 75, pod.log.read_text()
    assert "--node_rank 1 " in (pod.folder / "arguments").read_text()
    assert "--master_addr node-0.job --master_port 29400 " in (pod.folder / "arguments").read_text()
    assert yaml.safe_load((pod.folder / "config.yaml").read_text())["train"]["global_batch_size"] == 16


def test_a_stop_by_hand_ends_all_pods_well(pod):
    (pod.run / "STOP").touch()
    assert pod.end()[0] == 0, pod.log.read_text()
