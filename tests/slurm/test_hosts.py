"""`lamda submit` for machines over ssh: a link that is cut ends in a named error and a resume, not in a hang."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from lamda.training.watchdog import HANG_EXIT
from tests.launch import ENVIRONMENT, ROOT
from tests.slurm.conftest import STEPS, missing, settings
from tests.slurm.hosts import Hosts

pytestmark = pytest.mark.cluster
HANG_SECONDS = 15


@pytest.fixture
def hosts(tmp_path):
    if reason := missing("ip", "sshd", "ssh", "pdsh"):
        pytest.skip(reason)
    with Hosts(tmp_path) as hosts:
        yield hosts


@pytest.fixture
def site(hosts, tmp_path):
    """The cluster file."""
    cluster = {"scheduler": "hostfile", "ranks_per_node": 1, "gpu": None, "export": ["CUDA_*", "DS_*"]}
    hostfile = {"hosts": hosts.addresses, "ssh_options": hosts.ssh_options}
    path = tmp_path / "site.yaml"
    path.write_text(json.dumps({"cluster": cluster, "hostfile": hostfile}), "utf-8")
    return path


def test_a_cut_link_is_named_and_the_run_continues_when_it_is_mended(place, hosts, site, unbroken, tmp_path):
    run = "hosts"
    submit = [sys.executable, "-c", "import sys; from lamda.cli import main; sys.exit(main())", "submit"]
    flags = ["--cluster", str(site), "--nodes", "2", *settings(place, run)]
    flags += ["--run.hang_timeout_seconds", str(HANG_SECONDS)]
    secrets = {"HF_TOKEN": "canary-token", "WANDB_API_KEY": "canary-key"}
    network = {"GLOO_SOCKET_IFNAME": "eth0"}
    output = tmp_path / "output"

    def wait(until, what, *, seconds=400):
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"waited for {what}\n{output.read_text()}"
            assert process.poll() is None, output.read_text()
            time.sleep(0.2)

    with output.open("wb") as stream:
        process = subprocess.Popen(
            hosts.on_login(*submit, *flags),
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, **network, **secrets},
            stdout=stream,
            stderr=stream,
        )
    try:
        wait(lambda: (place.folder / run / "metrics.jsonl").exists() and len(place.rows(run)) >= 90, "step 90")
        hosts.set_link(2, "down")
        began = time.monotonic()
        wait(lambda: place.status(run)["status"] == "failed", "the watchdog")
        print(f"a cut link: named after {time.monotonic() - began:.0f} s")
        reason = place.status(run)["reason"]
        hosts.set_link(2, "up")
        assert process.wait(600) == 0, output.read_text()
    finally:
        process.kill()
    assert re.match(rf"all 2 ranks have waited for {HANG_SECONDS} s in step \d+, phase \w+", reason), reason
    message = output.read_text()
    for address in hosts.addresses:
        assert f"{address}: WANDB_API_KEY not accepted over ssh" in message, "the nodes take HF_TOKEN alone"
    assert re.search(rf"supervise: restart 1 from step \d+ in .* s: all 2 ranks .*\(exit code {HANG_EXIT}\)", message)
    assert place.difference(unbroken, run, step=STEPS) is None
    written = [file.read_text("utf-8") for file in (place.folder / run / "submit").rglob("*") if file.is_file()]
    assert not any("canary" in text for text in written)
