"""The closed forms of memory and traffic against what DeepSpeed allocates and sends, on two ranks.

`python -m tests.cluster.test_memory 110m` prints the same comparison for another size.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lamda.cluster.memory import (
    STEP,
    MemorySetting,
    by_phase,
    items,
    model_states,
    optimizer_state,
    parameter_sizes,
    snapshot_bytes,
)
from lamda.cluster.zero import Sharding, traffic
from lamda.config import Config, ModelConfig
from lamda.engines.deepspeed.checkpoint import state_sizes
from tests.cluster.memory_worker import ACCUMULATION, LENGTH, model_of
from tests.launch import run_ranks

WORKER = str(Path(__file__).with_name("memory_worker.py"))
RANKS = 2
SHIPPED, SECOND = "bf16, fp32 accumulation", "with a second copy"
STATES = {"weights": "weights", "masters": "fp32 master weights", "moments": "optimizer state"}


CASES = [(0, "bf16"), (1, SHIPPED), (2, SHIPPED), (3, SHIPPED), (1, "fp32"), (3, SECOND)]
by_name = pytest.mark.parametrize("case", CASES, ids=[f"stage {stage}, {precision}" for stage, precision in CASES])


def deepspeed_of(preset, case):
    """A bucket holds the largest parameter, as the default one does, which would be a gigabyte for any model."""
    stage, precision = case
    zero = {"stage": stage, "reduce_bucket_size": max(parameter_sizes(ModelConfig(**model_of(preset))))}
    zero |= {"zero_hpz_partition_size": RANKS} if precision == SECOND else {}
    precisions = {
        "fp32": {},
        "bf16": {"bf16": {"enabled": True}},
        SHIPPED: {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    }
    return {
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        **precisions[SHIPPED if precision == SECOND else precision],
    }


def measure(preset, folder, *, timeout=900):
    """A dict of figures for each case, in order."""
    (folder / "cases.json").write_text(json.dumps([deepspeed_of(preset, case) for case in CASES]))
    arguments = [WORKER, preset, str(folder / "cases.json"), str(folder / "found.json")]
    ranks = run_ranks(arguments, world_size=RANKS, timeout=timeout)
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(rank.stderr[-2500:] for rank in ranks)
    return dict(zip(CASES, json.loads((folder / "found.json").read_text()), strict=True))


def expected(preset, case):
    """The same figures by closed forms."""
    sharding = Sharding.of(deepspeed_of(preset, case), ranks=RANKS)
    model, batch = ModelConfig(**model_of(preset)), {"rows": 1, "length": LENGTH, "accumulation": ACCUMULATION}
    setting = MemorySetting(model, "sdpa", sharding, **batch)
    found = items(setting)
    named = {item.name: item.bytes for item in found}
    sent = traffic(parameter_sizes(setting.model), sharding, accumulation=ACCUMULATION)
    # Beside the states the bucket is still there, and at stage 3 the embedding, which the first layer has used last.
    embedding = setting.model.vocab_size * setting.model.d_model * sharding.weight
    others = named.get("reduction bucket", 0) + (embedding if sharding.stage == 3 else 0)
    return {
        **{name: named.get(item, 0) for name, item in STATES.items()},
        "snapshot": snapshot_bytes(setting),
        "backward": model_states(found) + others,
        "start": max(by_phase(found).values()),
        "peak": max(by_phase(found)[phase] for phase in STEP),
        "sent": {each.kind: each.tensors for each in sent},
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return measure("wider", tmp_path_factory.mktemp("memory"))


@by_name
def test_model_states_are_within_5_percent_of_what_deepspeed_allocates(measured, case):
    found, plan = measured[case], expected("wider", case)
    assert [plan[name] for name in STATES] == pytest.approx([found[name] for name in STATES], rel=0.05)
    assert plan["backward"] == pytest.approx(found["backward"], rel=0.05)


@by_name
def test_the_host_memory_for_a_checkpoint_is_within_5_percent(measured, case):
    assert expected("wider", case)["snapshot"] == pytest.approx(measured[case]["snapshot"], rel=0.05)


@by_name
def test_the_peak_of_a_step_is_within_5_percent(measured, case):
    assert expected("wider", case)["peak"] == pytest.approx(measured[case]["peak"], rel=0.05)


@by_name
def test_a_start_needs_no_more_than_planned(measured, case):
    assert measured[case]["start"] <= expected("wider", case)["start"]


@by_name
def test_the_bytes_of_each_collective_are_those_that_deepspeed_gives_it(measured, case):
    sent = measured[case]["sent"]
    plan = expected("wider", case)["sent"]
    assert plan == pytest.approx({kind: sent[kind] for kind in plan}, rel=0.001)
    assert sum(sent.values()) == pytest.approx(sum(plan.values()), rel=0.001)


def main(preset):
    with TemporaryDirectory() as folder:
        measured = measure(preset, Path(folder), timeout=3600)
    for case, found in measured.items():
        plan = expected(preset, case)
        message = [f"{key} {plan[key] / 1e6:,.1f} of {found[key] / 1e6:,.1f} MB" for key in ("backward", "peak")]
        print(f"stage {case[0]}, {case[1]}: {', '.join(message)}")


if __name__ == "__main__":
    main(sys.argv[1])


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_an_optimizers_state_is_what_a_checkpoint_holds_beside_the_weights(optimizer):
    config = Config(model={"preset": "tiny"}, train={"steps": 1, "optimizer": optimizer})
    saved = sum(size for (_, kind), size in state_sizes(config).items() if kind != "weight")
    assert optimizer_state(config.model, optimizer) == saved
