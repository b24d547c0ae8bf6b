"""What a cluster file may say, and what is answered where it is wrong."""

from pathlib import Path

import pytest

from lamda.cluster.site import SCHEMA, load_site, seconds
from lamda.config.errors import UserError

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "cluster").glob("*.yaml"))


@pytest.fixture
def refuse(tmp_path):
    """Loads a text, which must be refused, and returns the lines of the error."""

    def load(text):
        path = tmp_path / "site.yaml"
        path.write_text(text, "utf-8")
        with pytest.raises(UserError) as error:
            load_site(str(path))
        return str(error.value).replace(f"{path}:", "").splitlines()

    return load


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_cluster_file_is_read(path):
    assert load_site(str(path)).cluster.scheduler == path.stem


def test_every_key_says_what_it_means():
    assert all(field.description for field in SCHEMA.keys.values())


def test_everything_wrong_is_reported_at_once_with_line_and_nearest_key(refuse):
    assert refuse(
        "cluster:\n  scheduler: slurm\n  ranks_per_nod: 8\nslurm:\n  partitoin: gpu\n  time: 1 day\n"
        "  options: [--requeue]\nslrm:\n  qos: high\n"
    ) == [
        "3: cluster.ranks_per_nod: there is no such key; did you mean 'cluster.ranks_per_node'?",
        "5: slurm.partitoin: there is no such key; did you mean 'slurm.partition'?",
        "6: slurm.time: '1 day' is not a SLURM time; write minutes, hours:minutes:seconds or days-hours",
        "7: slurm.options: --requeue is set by `lamda submit` itself",
        "8: slrm: there is no such section; did you mean 'slurm'?",
    ]


def test_a_key_of_another_scheduler_would_be_read_by_nobody(refuse):
    message = refuse("cluster:\n  scheduler: slurm\nkubernetes:\n  image: x\n")
    assert message == ["4: kubernetes.image: is not read for scheduler slurm; remove it"]


def test_a_scheduler_says_what_it_needs(refuse):
    message = refuse("cluster:\n  scheduler: kubernetes\nkubernetes:\n  image: x\n")
    assert message == ["3: kubernetes.claim: is required for scheduler kubernetes"]
    message = refuse("cluster:\n  scheduler: hostfile\n")
    assert message == [" hostfile.hosts: is required for scheduler hostfile"]
    assert refuse("slurm: {qos: a}\n")[0].startswith(" cluster.scheduler: ")


def test_a_host_that_stands_there_twice_would_be_two_nodes_to_deepspeed(refuse):
    message = refuse("cluster: {scheduler: hostfile}\nhostfile: {hosts: [a, b, a]}\n")
    assert message == ["2: hostfile.hosts: a is listed twice"]


def test_a_file_that_is_not_there_names_those_that_are():
    with pytest.raises(UserError, match=r"--cluster: there is no file .*configs/cluster/slurm.yaml"):
        load_site("configs/cluster/slrum.yaml")


@pytest.mark.parametrize(
    ("time", "expected"),
    [("30", 1800), ("30:10", 1810), ("2:00:00", 7200), ("1-12", 129600), ("1-0:30", 88200), ("2-01:00:05", 176405)],
)
def test_times_are_read_as_slurm_reads_them(time, expected):
    assert seconds(time) == expected
