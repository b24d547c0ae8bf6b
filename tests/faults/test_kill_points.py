"""SIGKILL at every moment of a step and of a save: the resumed run ends like the unbroken one, to the last bit.

`make faults` kills one of two ranks in turn at 12 moments; `make faults-full` both ranks, at two ZeRO stages, and
rank 0 at the moments of the commit as well.
"""

import pytest

from lamda.storage.manifest import complete, problem_of
from lamda.training.fault_injection import COMMIT_POINTS, SAVE_POINTS, STEP_POINTS
from tests.faults.harness import IS_FULL

MOMENTS = [*((point, 5) for point in STEP_POINTS), *((point, 6) for point in SAVE_POINTS)]
FEW = [(point, step, number % 2, 1) for number, (point, step) in enumerate(MOMENTS)]
ALL = [
    *((point, step, rank, stage) for point, step in MOMENTS for rank in (0, 1) for stage in (1, 3)),
    *((point, 6, 0, stage) for point in COMMIT_POINTS for stage in (1, 3)),
]


@pytest.mark.parametrize(("point", "step", "rank", "stage"), ALL if IS_FULL else FEW)
def test_a_killed_run_ends_like_the_unbroken_one(place, straight, point, step, rank, stage):
    run = f"killed-{point}-{rank}-{stage}"
    codes = place.run(run, fault=f"{point}:kill:{rank}:{step}", stage=stage)
    assert codes[rank] == -9, place.log(run)
    assert codes[1 - rank] != 0, "the other rank must not take this for an end"
    for path in complete(place.folder / run / "checkpoints"):
        assert problem_of(path) is None
    place.finish(run, stage=stage)
    assert place.difference(straight(stage), run) is None
    assert not any(name.startswith(".") for name in place.checkpoints(run))
