"""How a step is computed changes none of its results: compiled, computed again, or too large for memory."""

import weakref
from dataclasses import replace
from functools import partialmethod

import pytest
import torch

from lamda.config import Config
from lamda.config.errors import UserError
from lamda.data.loader import MicroBatch
from lamda.distributed import World
from lamda.engines.deepspeed import compile
from lamda.engines.deepspeed import engine as engine_module
from lamda.engines.deepspeed.checkpoint import model_weights
from lamda.engines.deepspeed.engine import DeepSpeedEngine
from lamda.model import decoder
from tests.distributed.engine_worker import BATCH, LENGTH, batch, config


def engine_of(folder, device, *, stage=1, **train) -> DeepSpeedEngine:
    own = config({"stage": stage, "bf16": True}, folder, 0).model_dump(exclude_unset=True)
    engine = DeepSpeedEngine(
        Config.model_validate({**own, "train": own["train"] | train}), world=World(), device=device
    )
    engine.initialize_weights()
    return engine


def steps(engine, count):
    results = [engine.train_step(batch(step, World()), lr=1e-2) for step in range(count)]
    return [result.wait().loss() for result in results], [
        weight.clone() for _, weight in model_weights(engine.deepspeed)
    ]


@pytest.fixture
def quick_compiler(monkeypatch):
    """The graphs of compiled blocks run as they are: generating code for them would take a minute."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend="aot_eager"))


def test_compiled_blocks_give_the_same_steps_and_compile_once(tmp_path, device, quick_compiler):
    """Evaluation in between, of other lengths and without gradients, compiles nothing."""
    eager = engine_of(tmp_path, device, compile="never")
    expected, weights = steps(eager, 3)
    compiled = engine_of(tmp_path, device, compile="always")
    first = compiled.train_step(batch(0, World()), lr=1e-2).wait().loss()
    with compiled.eval_mode():
        compiled.model(torch.zeros(1, 5, dtype=torch.int64))
    losses = [first, *(compiled.train_step(batch(step, World()), lr=1e-2).wait().loss() for step in (1, 2))]
    assert losses == pytest.approx(expected, abs=2e-2)
    for (name, weight), other in zip(model_weights(compiled.deepspeed), weights, strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=0.15 if name == "embedding.weight" else 0.05, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one graph for all blocks"


def test_a_later_step_of_another_shape_is_an_error_and_no_second_compilation(tmp_path, device, quick_compiler):
    engine = engine_of(tmp_path, device, compile="always")
    engine.train_step(batch(0, World()), lr=1e-2)
    halves = [
        MicroBatch(*(None if each is None else each[:1] for each in vars(part).values()))
        for part in batch(1, World()).micro_batches
    ]
    with pytest.raises(RuntimeError, match="recompile"):
        engine.train_step(replace(batch(1, World()), micro_batches=tuple(halves)), lr=1e-2)


@pytest.mark.parametrize("recompute", ["ffn", "block"])
def test_what_is_computed_again_changes_no_bit(tmp_path, device, recompute):
    expected, found = (steps(engine_of(tmp_path, device, recompute=kind), 2) for kind in ("none", recompute))
    assert expected[0] == found[0]
    assert all(torch.equal(one, other) for one, other in zip(expected[1], found[1], strict=True))


@pytest.mark.parametrize(("limit", "message"), [(1, "; 1 fits, or set train.recompute"), (0, ", and so is 1: use ")])
def test_memory_that_runs_out_names_the_micro_batch_that_fits(tmp_path, device, monkeypatch, limit, message):
    engine, forward = engine_of(tmp_path, device), decoder.LaMDA.forward

    def limited(model, tokens_BL, *parts, **more):
        if len(tokens_BL) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nMore lines")
        return forward(model, tokens_BL, *parts, **more)

    monkeypatch.setattr(decoder.LaMDA, "forward", limited)
    with pytest.raises(UserError) as caught:
        engine.train_step(batch(0, World()), lr=1e-2)
    assert "train.micro_batch_size 2 is out of memory (CUDA out of memory. Tried to allocate" in str(caught.value)
    assert message in str(caught.value)
    assert "More lines" not in str(caught.value)


@pytest.mark.parametrize(
    ("owner", "name", "what"),
    [
        (torch.optim.AdamW, "step", "the update of the weights"),
        (engine_module.deepspeed, "initialize", "the start"),
        (engine_module, "reset_state", "the start"),
    ],
)
def test_memory_that_state_needs_is_not_blamed_on_the_micro_batch(tmp_path, device, monkeypatch, owner, name, what):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(owner, name, run_out)
    with pytest.raises(UserError, match=rf"^{what} is out of memory \(CUDA .*\), .*: use a higher ZeRO stage"):
        engine_of(tmp_path, device).train_step(batch(0, World()), lr=1e-2)


@pytest.mark.parametrize("stage", [1, 3])
def test_what_fits_is_measured_after_the_failed_step_is_let_go(tmp_path, device, monkeypatch, stage):
    """The error's frames hold the step's activations; at stage 3 the ranks that failed could not measure alone."""
    engine, failed, alive = engine_of(tmp_path, device, stage=stage), [], []

    def run_out(loss):
        failed.append(weakref.ref(loss))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    def fits(rows):
        alive.extend(each() for each in failed)
        return rows == 1

    monkeypatch.setattr("lamda.engines.deepspeed.engine._or_nan", run_out)
    monkeypatch.setattr(engine, "_fits", fits)
    with pytest.raises(UserError, match="; 1 fits, or set" if stage == 1 else "; use a smaller one, train.recompute"):
        engine.train_step(batch(0, World()), lr=1e-2)
    assert alive == ([None] if stage == 1 else [])


def test_the_length_of_a_run_decides_whether_it_compiles(tmp_path, device):
    def wants(steps, **train):
        own = config({"stage": 1, "bf16": True}, tmp_path, 0).model_dump(exclude_unset=True)
        return Config.model_validate({**own, "train": own["train"] | {"steps": steps} | train})

    flops = compile.run_flops(wants(1))
    assert flops > BATCH * LENGTH * 6 * 61 * 24
    enough = int(compile.WORTH_FLOPS["cpu"] / flops) + 1
    assert compile.is_worthwhile(wants(enough), device.type, stage=1)
    assert not compile.is_worthwhile(wants(enough - 1), device.type, stage=1)
    assert compile.is_worthwhile(wants(1, compile="always"), device.type, stage=1)
    assert not compile.is_worthwhile(wants(enough, compile="never"), device.type, stage=1)
    assert not compile.is_worthwhile(wants(enough), device.type, stage=3)
    with pytest.raises(UserError, match=r"train\.compile is always, but ZeRO stage 3 cannot be compiled"):
        compile.is_worthwhile(wants(1, compile="always"), device.type, stage=3)


@pytest.mark.parametrize(
    ("capability", "bf16", "says"), [("AVX2", True, True), ("AVX2", False, False), ("AVX512", True, False)]
)
def test_a_processor_without_bf16_instructions_is_reported_of_fp32(
    tmp_path, device, monkeypatch, caplog, capability, bf16, says
):
    if device.type != "cpu":
        pytest.skip("bf16 is asked of a CPU here; the test device is a GPU, which has its own")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    DeepSpeedEngine(config({"stage": 1, "bf16": bf16}, tmp_path, 0), world=World(), device=device)
    assert ("no bf16 instructions" in caplog.text) == says
