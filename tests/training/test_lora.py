"""Adapters start as the model they are given, learn what LoRA's formula says, and come back to the last bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from lamda.config import Config, ds_config
from lamda.config.errors import UserError
from lamda.distributed import World
from lamda.engines.deepspeed import checkpoint, lora
from lamda.engines.deepspeed.checkpoint import model_weights
from lamda.engines.deepspeed.engine import DeepSpeedEngine
from lamda.engines.deepspeed.weight_check import corrupted_ranks
from lamda.launch.pretrain import main
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training.resume import find_resume_point
from lamda.training.saver import Saver
from tests.distributed.engine_worker import BATCH, LENGTH, MODEL, batch, config, tokens
from tests.losses import cross_entropy

RANK, RATE = 3, 1e-2
STAGES = [(0, False), (0, True), (1, False), (1, True)]
of_each_stage = pytest.mark.parametrize(("stage", "bf16"), STAGES)


def step(engine: DeepSpeedEngine, number: int) -> float:
    return engine.train_step(batch(number, World()), lr=RATE).wait().loss()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Weights to begin with, in fp32."""
    model = LaMDA(Config(model=MODEL, train={"steps": 1}).model)
    initialize_weights(model, seed=7)
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    save_file({name: weight.contiguous() for name, weight in model.export_weights().items()}, path)
    return path


@pytest.fixture
def config_of(base, tmp_path):
    def make(stage: int, *, bf16: bool, **train) -> Config:
        job = {"stage": stage, "bf16": bf16, "lora_rank": RANK, "model": {"weights": str(base)}}
        own = config(job, tmp_path, 0).model_dump(exclude_unset=True)
        return Config.model_validate({**own, "train": own["train"] | train})

    return make


@pytest.fixture
def engine_of(config_of, base, device):
    def make(stage: int, *, bf16: bool, loaded: bool = True, **train) -> DeepSpeedEngine:
        engine = DeepSpeedEngine(config_of(stage, bf16=bf16, **train), world=World(), device=device)
        if loaded:
            engine.load_weights(base)
        return engine

    return make


def loaded(path, *, dtype=torch.float32, device) -> LaMDA:
    model = LaMDA(Config(model=MODEL, train={"steps": 1}).model)
    with torch.no_grad():
        model.load_weights(load_file(path))
    return model.to(device, dtype)


def adapters_of(model) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if lora.is_adapter(name)}


@of_each_stage
def test_before_the_first_step_the_model_is_the_one_it_began_with(engine_of, base, device, stage, bf16):
    engine = engine_of(stage, bf16=bf16)
    ids = torch.from_numpy(tokens(0).astype("int64")).to(device)
    plain = loaded(base, dtype=torch.bfloat16 if bf16 else torch.float32, device=device)
    with torch.no_grad():
        assert torch.equal(engine.model(ids), plain(ids))


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("stage", [0, 1])
def test_steps_are_those_of_adamw_on_the_two_factors_alone(engine_of, base, device, stage, recompute):
    """The reference adds B A to each matrix and knows no module of ours; the second step is the first that moves A."""
    engine = engine_of(stage, bf16=False, recompute=recompute, gradient_clipping=0.05)
    train, plain = engine.config.train, loaded(base, device=device)
    frozen = {name: each.detach().clone() for name, each in plain.named_parameters()}
    factors = {name: each.requires_grad_() for name, each in adapters_of(engine.model).items()}
    matrices = [name for name in frozen if name.startswith("layers.") and name.endswith(".weight")]
    assert len(factors) == 2 * len(matrices) == 2 * 7 * MODEL["n_layers"]
    optimizer = torch.optim.AdamW(
        factors.values(), lr=RATE, betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=train.weight_decay
    )
    begun = {name: each.detach().clone() for name, each in factors.items()}
    for number in (1, 2, 3):
        ids = torch.from_numpy(tokens(number).astype("int64")).to(device)
        weights = dict(frozen)
        for name in matrices:
            place = name.removesuffix("weight")
            weights[name] = frozen[name] + factors[f"{place}lora_b.weight"] @ factors[f"{place}lora_a.weight"]
        nats, squares = cross_entropy(functional_call(plain, weights, (ids[:, :-1],)), ids[:, 1:])
        optimizer.zero_grad()
        ((nats + train.z_loss * squares) / (BATCH * LENGTH)).backward()
        assert torch.nn.utils.clip_grad_norm_(factors.values(), 0.05) > 0.05
        optimizer.step()
        assert step(engine, number) == pytest.approx(nats.item() / (BATCH * LENGTH), rel=1e-5)
    for name, found in engine.model.named_parameters():
        if lora.is_adapter(name):
            torch.testing.assert_close(found.detach(), factors[name].detach(), rtol=0, atol=5e-6, msg=name)
            assert not torch.equal(found, begun[name]), name
        else:
            assert torch.equal(found, frozen[name]), name
    assert corrupted_ranks(engine.deepspeed) == []


@of_each_stage
def test_what_is_saved_is_the_model_with_its_adapters_added(engine_of, base, device, stage, bf16):
    engine, dtype = engine_of(stage, bf16=bf16), torch.bfloat16 if bf16 else torch.float32
    for number in (1, 2):
        step(engine, number)
    found = {name: weight.clone() for name, weight in model_weights(engine.deepspeed)}
    before, adapters = load_file(base), adapters_of(engine.model)
    assert found.keys() == before.keys()
    for name, weight in found.items():
        assert weight.dtype == dtype
        whole, stem = before[name].to(device, dtype), name.removesuffix(".weight")
        if f"{stem}.lora_a.weight" in adapters:
            a, b = (adapters[f"{stem}.lora_{letter}.weight"].float() for letter in "ab")
            sum_ = whole.float() + b @ a
            torch.testing.assert_close(weight.float(), sum_.to(dtype).float(), rtol=2**-7 if bf16 else 1e-6, atol=1e-7)
            assert not torch.equal(weight, whole), name
        else:
            assert torch.equal(weight, whole), name


@of_each_stage
def test_a_resumed_run_is_the_straight_one_bit_for_bit(engine_of, tmp_path, stage, bf16):
    straight, first = engine_of(stage, bf16=bf16), engine_of(stage, bf16=bf16)
    for number in (1, 2):
        assert step(first, number) == step(straight, number)
    (tmp_path / "tokenizer.model").touch()
    saver = Saver(tmp_path / "checkpoints", engine=first, tokenizer=tmp_path / "tokenizer.model")
    assert saver.begin(RunState(step=2, updates=2)) is None
    saved = saver.finish()
    assert saved.problem is None
    resumed = engine_of(stage, bf16=bf16, loaded=False)
    resumed.load_checkpoint(saved.path)
    for number in (3, 4):
        assert step(resumed, number) == step(straight, number)
    for state in (lambda engine: dict(checkpoint.local_state(engine.deepspeed)), every_parameter):
        one, other = state(resumed), state(straight)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    stored = load_file(saved.path / "optimizer-00000-of-00001.safetensors")
    moments = {key.split("|")[0] for key in stored if "|exp_avg|" in key}
    assert moments == adapters_of(resumed.model).keys()


def every_parameter(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    return dict(engine.model.named_parameters())


def test_the_first_factor_depends_on_seed_and_name_alone(config_of):
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        own = config_of(1, bf16=False)
        own = own.model_copy(update={"run": own.run.model_copy(update={"seed": seed})})
        return {name: each.draw() for name, each in lora.initial_adapters(own).items() if ".lora_a." in name}

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name]) for name in one)
    assert len({each.flatten()[0].item() for each in one.values()}) == len(one)


def test_all_that_adapters_cannot_go_with_is_reported_at_once(config_of):
    own = config_of(2, bf16=False, fp8=True, optimizer="muon", base_width=8)
    own = own.model_copy(update={"model": own.model.model_copy(update={"weights": None})})
    with pytest.raises(UserError) as caught:
        ds_config.build(own, world_size=1)
    for wrong in ("set model.weights", "train.fp8", "set train.optimizer adamw", "train.base_width", "use stage 1"):
        assert wrong in str(caught.value)
    without = own.train.model_copy(update={"lora_rank": 0, "optimizer": "adamw"})
    assert ds_config.build(own.model_copy(update={"train": without}), world_size=1)
    for stage, bf16 in STAGES:
        assert ds_config.build(config_of(stage, bf16=bf16), world_size=1)


def test_pretraining_from_nothing_with_adapters_ends_before_it_begins(capsys):
    assert main(["--config", "configs/tiny.yaml", "--train.lora_rank", "8"]) == 2
    assert "train.lora_rank 8: adapters on random weights learn nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("saved", "wanted"), [(RANK, 0), (RANK, 8), (0, RANK)])
def test_another_rank_than_the_checkpoints_is_refused_by_name(engine_of, config_of, tmp_path, world, saved, wanted):
    engine = engine_of(1, bf16=True, lora_rank=saved)
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    directory.tokenizer.touch()
    saver = Saver(directory.checkpoints, engine=engine, tokenizer=directory.tokenizer)
    assert saver.begin(RunState(step=1)) is None
    assert saver.finish().problem is None

    def start(rank):
        return find_resume_point(config_of(1, bf16=True, lora_rank=rank), directory, world, framework="deepspeed")

    assert start(saved).state.step == 1
    with pytest.raises(UserError, match=rf"Set train\.lora_rank {saved}, or start from the weights alone: model\.wei"):
        start(wanted)
