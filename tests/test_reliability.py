"""A run of two ranks that is killed or stopped ends like the unbroken one; `make faults` has many more ways."""

import pytest

from lamda.storage.manifest import complete, problem_of
from tests.faults.harness import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_path):
    place = Place.make(tmp_path_factory.mktemp("reliability"), tokenizer_path)
    place.finish("straight")
    return place


def test_a_rank_killed_in_the_middle_of_a_save_costs_no_bit(place):
    codes = place.run("killed", fault="save.written:kill:1:6")
    assert codes[1] == -9
    assert codes[0] != 0
    assert all(problem_of(path) is None for path in complete(place.folder / "killed" / "checkpoints"))
    place.finish("killed")
    assert place.difference("straight", "killed") is None


def test_a_signal_to_one_rank_stops_all_with_everything_saved(place):
    """On the way a rank refuses a NaN, and a disk that is full stops a save and not the run."""
    fault = "loss:nan:1:2,save.written:full:1:3,forward:term:1:5"
    assert place.run("stopped", fault=fault) == [75, 75], place.log("stopped")
    status = place.status("stopped")
    assert (status["status"], status["reason"]) == ("preempted", "SIGTERM")
    rows = place.rows("stopped")
    assert len(rows) == status["step"] < 10
    assert [row["skipped_steps"] for row in rows] == [0, *[1] * (len(rows) - 1)]
    assert place.checkpoints("stopped") == ["LATEST", f"step-{status['step']:08d}"]
    place.finish("stopped")
    digests = [[row["batch_digest"] for row in place.rows(run)] for run in ("straight", "stopped")]
    assert digests[0] == digests[1]


def test_a_turned_bit_ends_the_run_and_names_its_rank(place):
    assert place.run("flip", "--run.weight_check_every", "2", fault="update:flip:1:4") == [1, 1], place.log("flip")
    assert "the weights of rank 1 of 2" in place.status("flip")["reason"]
