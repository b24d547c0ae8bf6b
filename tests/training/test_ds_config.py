"""DeepSpeed's file and the configuration each own their keys; every wrong one is told at once."""

import json
import re

import pytest

from lamda.config import Config
from lamda.config.ds_config import OWNED_BY_CONFIG, REFUSED, build, is_bf16, zero_stage
from lamda.config.errors import UserError
from lamda.config.loading import KEYS, load_config
from lamda.engines.deepspeed.framework import require_valid

TRAIN = {"steps": 10, "global_batch_size": 48, "micro_batch_size": 4, "gradient_clipping": 0.5}
SHIPPED = {
    "ds_config.json": 1,
    "deepspeed/fp32.json": 0,
    "deepspeed/stage3.json": 3,
    "deepspeed/offload-cpu.json": 2,
}
"""The ZeRO stage of each file."""


@pytest.fixture
def build_from(tmp_path):
    """Builds from a file that holds `own`, which is text or becomes JSON."""

    def build_from(own, *, world_size=1, optimizer="adamw"):
        path = tmp_path / "ds.json"
        path.write_text(own if isinstance(own, str) else json.dumps(own))
        train = {**TRAIN, "optimizer": optimizer}
        return build(Config(train=train, deepspeed={"config": str(path)}), world_size=world_size)

    return build_from


def problems(build_from, own):
    with pytest.raises(UserError) as caught:
        build_from(own)
    lines = str(caught.value).splitlines()
    return [line.partition("ds.json")[2].lstrip(": ") for line in lines]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 12), (3, 4), (12, 1)])
def test_the_file_is_joined_with_what_the_configuration_owns(build_from, world, accumulation):
    own = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    assert build_from(own, world_size=world) == {
        **own,
        "train_batch_size": 48,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
    }


@pytest.mark.parametrize("key", OWNED_BY_CONFIG)
def test_a_key_that_the_configuration_owns_is_refused_with_its_name_there(build_from, key):
    (problem,) = problems(build_from, {key: 1})
    assert problem.startswith(f"{key}: set in the run's configuration as {OWNED_BY_CONFIG[key]}")


def test_keys_of_the_configuration_that_are_named_exist():
    named = {name for name in OWNED_BY_CONFIG.values() if not name.startswith("nothing")}
    assert named <= set(KEYS)


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_model_does_not_do_is_refused_with_the_reason(build_from, key):
    assert problems(build_from, {key: {"enabled": True}}) == [f"{key}: {REFUSED[key]}; remove it"]


def test_tensor_and_sequence_parallelism_are_refused():
    assert {"tensor_parallel", "sequence_parallel_size", "data_parallel_size"} <= REFUSED.keys()


def test_a_typo_names_the_nearest_key(build_from):
    (problem,) = problems(build_from, {"zero_optimisation": {"stage": 1}})
    assert problem.startswith("zero_optimisation: ")
    assert problem.endswith("did you mean 'zero_optimization'?")


@pytest.mark.parametrize("stage", [4, -1, 1.5, "auto", None, "1", True])
def test_a_stage_that_is_none_is_reported(build_from, stage):
    (problem,) = problems(build_from, {"zero_optimization": {"stage": stage}})
    assert problem == f"zero_optimization.stage: {stage} must be 0, 1, 2 or 3"


@pytest.mark.parametrize("zero", [{}, {"zero_optimization": {"stage": 0}}])
def test_stage_0_cannot_accumulate_bf16_in_fp32(build_from, zero):
    own = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, **zero}
    (problem,) = problems(build_from, own)
    assert problem.startswith("data_types: ")
    assert "remove data_types, or use stage 1" in problem
    assert build_from({"bf16": {"enabled": True}, **zero})
    assert build_from({**own, "zero_optimization": {"stage": 1}})


def test_all_problems_are_reported_at_once(build_from):
    found = problems(build_from, {"fp16": {}, "optimizer": {}, "bf61": {}, "zero_optimization": {"stage": 7}})
    assert [line.partition(":")[0] for line in found] == ["fp16", "optimizer", "bf61", "zero_optimization.stage"]


FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("optimizer", "stage", "bf16", "more", "message"),
    [
        ("adafactor", 1, True, FP32_SUMS, "use stage 0"),
        ("adafactor", 3, False, {}, "use stage 0"),
        ("muon", 0, True, {}, "ds_config.json"),
        ("muon", 1, True, {}, "ds_config.json"),
        ("muon", 1, False, {}, "ds_config.json"),
        ("muon", 2, True, FP32_SUMS, "ds_config.json"),
        ("muon", 3, True, FP32_SUMS, "ds_config.json"),
    ],
)
def test_an_optimizer_is_refused_where_it_would_not_see_whole_matrices(
    build_from, optimizer, stage, bf16, more, message
):
    own = {"bf16": {"enabled": bf16}, "zero_optimization": {"stage": stage}, **more}
    with pytest.raises(UserError, match=f"train.optimizer {optimizer}.*{message}"):
        build_from(own, optimizer=optimizer)
    assert build_from(own)


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [("muon", "ds_config.json"), ("muon", "deepspeed/fp32.json"), ("adafactor", "deepspeed/stage0.json")],
)
def test_a_shipped_file_suits_every_optimizer(optimizer, name):
    assert build(Config(train={**TRAIN, "optimizer": optimizer}, deepspeed={"config": name}), world_size=1)


@pytest.mark.parametrize("key", ["zero_optimization", "bf16", "data_types"])
@pytest.mark.parametrize("value", [True, None, []])
def test_a_section_that_is_no_object_is_reported(build_from, key, value):
    assert problems(build_from, {"amp": {}, key: value})[1] == f"{key}: is not a JSON object"


def test_bf16_that_deepspeed_would_read_otherwise_is_reported(build_from):
    """DeepSpeed takes "false" as false: bf16 weights would be trained without fp32 masters."""
    assert problems(build_from, {"bf16": {"enabled": "false"}}) == ["bf16.enabled: 'false' must be true or false"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"zero_optimization": {"stage": 1, "reduce_buckets": 5}}, "reduce_buckets: Extra inputs"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "DeepSpeedConfigError: MiCS"),
        ({"aio": 5}, "AttributeError: 'int' object"),
    ],
)
def test_what_deepspeed_itself_rejects_names_the_file_and_the_key(tmp_path, own, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(own))
    with pytest.raises(UserError, match=f"ds.json: DeepSpeed rejects it: {message}.*; correct it, or remove the key$"):
        require_valid(Config(train=TRAIN, deepspeed={"config": str(path)}))


@pytest.mark.parametrize("name", [*SHIPPED, "deepspeed/stage0.json"])
def test_the_shipped_files_are_valid(name):
    require_valid(Config(train=TRAIN, deepspeed={"config": name}))


def test_a_file_that_is_not_json_is_reported_with_its_line(build_from):
    (problem,) = problems(build_from, '{\n "bf16": {"enabled": true},\n}')
    assert problem.startswith("3: not JSON")
    assert problems(build_from, "[1]") == ["is not a JSON object, which DeepSpeed's file must be"]


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_accepts_the_shipped_files_for_2b(name):
    config = load_config(["--config", "configs/lamda_2b.yaml", "--deepspeed.config", name])
    built = build(config, world_size=1)
    from deepspeed.runtime.config import DeepSpeedConfig

    theirs = DeepSpeedConfig(built)
    assert theirs.zero_optimization_stage == zero_stage(built) == SHIPPED[name]
    assert theirs.bfloat16_config.enabled == is_bf16(built) == (name != "deepspeed/fp32.json")
    assert theirs.train_batch_size == 256
    assert theirs.gradient_accumulation_steps == 32
    assert theirs.gradient_clipping == config.train.gradient_clipping


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("zero", "more", "message"),
    [
        ({"stage": 2, **OFFLOAD}, {}, "zero_force_ds_cpu_optimizer: must be false with zero_optimization.offload_opt"),
        ({"stage": 1, **OFFLOAD}, {"zero_force_ds_cpu_optimizer": False}, "zero_optimization.offload_optimizer: at "),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, {}, "zero_optimization.offload_param: needs .* 3, not 2"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, "zero_optimization.offload_param.device: nvme is not"),
        ({"stage": 2, "zenflow": {}}, {}, "zero_optimization.zenflow: "),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}},
            {"zero_force_ds_cpu_optimizer": False},
            "zero_optimization.offload_optimizer.super_offload: ",
        ),
        ({"stage": 2, "offload_optimizer": "cpu"}, {}, "zero_optimization.offload_optimizer: is not a JSON object"),
        ({"stage": 2, "offload_param": []}, {}, "zero_optimization.offload_param: is not a JSON object"),
        ({"stage": 3, "zero_quantized_weights": True}, {}, "zero_optimization.zero_quantized_weights: rounds what"),
        ({"stage": 3, "zero_quantized_gradients": True}, {}, "zero_optimization.zero_quantized_gradients: rounds"),
        ({"stage": 2, "cpu_offload": True}, {}, "zero_optimization.cpu_offload: DeepSpeed has renamed it; use "),
    ],
)  # fmt: skip
def test_zero_that_does_not_resume_exactly_is_refused_with_its_key(build_from, zero, more, message):
    (problem,) = problems(build_from, {"bf16": {"enabled": True}, "zero_optimization": zero, **more})
    assert re.match(message, problem)


def test_a_second_copy_is_shared_by_ranks_that_divide_all(build_from):
    own = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3, "zero_quantized_weights": False}}
    assert build_from(own, world_size=1)
    with pytest.raises(UserError, match="zero_hpz_partition_size: 3 does not divide the 4 ranks"):
        build_from(own, world_size=4)


def test_an_offload_device_of_none_is_none(build_from):
    assert build_from(
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}, "offload_param": None}}
    )
