"""DeepSpeed computes what a plain PyTorch loop does, at every ZeRO stage; state moves between stages and ranks."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.muon.original_muon import ns_compute_dtype
from safetensors.torch import load_file

from lamda.config import ModelConfig
from lamda.interop.harness.scoring import LocalDecoder
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights
from tests.distributed.engine_worker import (
    BATCH,
    LENGTH,
    MICRO,
    MODEL,
    RATES,
    Letters,
    asked_prompts,
    asked_rows,
    counted,
    tokens,
)
from tests.launch import run_ranks
from tests.losses import cross_entropy

WORKER = str(Path(__file__).with_name("engine_worker.py"))
CLIPPING = 0.05
STAGES = [(stage, bf16) for bf16 in (True, False) for stage in (0, 1, 2, 3)]


def job(name, stage, bf16, **more):
    return {"name": name, "stage": stage, "bf16": bf16, "steps": 4, **more}


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    files = (checkpoint / "step-00000002").glob("*.safetensors")
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def label(stage, bf16):
    return f"{stage}-{'bf16' if bf16 else 'fp32'}"


OPTIMIZERS = {
    "muon": {"optimizer": "muon", "stage": 1, "bf16": True},
    "muon-fp32": {"optimizer": "muon", "stage": 0, "bf16": False},
    "adafactor": {"optimizer": "adafactor", "stage": 0, "bf16": False},
}
"""The optimizers beside AdamW, where they are allowed; Adafactor in fp32, which adds no bf16 gradients up."""

FORMATS = {f"muon-{dtype}": {**OPTIMIZERS["muon"], "orthogonalize_in": dtype} for dtype in ("float32", "float16")}
"""Muon in either format, of which DeepSpeed takes what the processor has (fp16 from Sapphire Rapids on)."""

OTHERS = {**OPTIMIZERS, "lora": {"stage": 1, "bf16": True, "lora_rank": 3, "model": {"weights": "not read here"}}}

CPU = {"offload_optimizer": {"device": "cpu"}}
OFFLOADS = {
    "offload-2": {"stage": 2, "bf16": True, "zero": CPU},
    "offload-3": {"stage": 3, "bf16": True, "zero": {**CPU, "offload_param": {"device": "cpu"}}},
}

HPZ = {"stage": 3, "bf16": True, "zero": {"zero_hpz_partition_size": 2}}

ASKED = [(1, False), (3, False), (3, True)]

ON_TWO = [
    *(job(f"straight-{label(*case)}", *case) for case in STAGES),
    *(job(f"half-{label(*case)}", *case, steps=2, save=f"from-two-{label(*case)}") for case in STAGES),
    *(job(f"poison-{label(*case)}", *case, poison=2) for case in STAGES),
    *(job(f"two-{label(*case)}", *case, load=f"from-two-{label(*case)}", **{"from": 2}) for case in STAGES),
    *(job(f"straight-{other}", **how) for other, how in OTHERS.items()),
    *(job(f"half-{other}", **{**how, "steps": 2}, save=f"from-two-{other}") for other, how in OTHERS.items()),
    *(job(f"poison-{other}", **how, poison=2) for other, how in OTHERS.items()),
    *(job(f"two-{other}", **how, load=f"from-two-{other}", **{"from": 2}) for other, how in OTHERS.items()),
    job("straight-masked", 1, True, masked=True),
    *(job(f"straight-{how}", **own) for how, own in OFFLOADS.items()),
    *(job(f"half-{how}", **{**own, "steps": 2}, save=f"from-two-{how}") for how, own in OFFLOADS.items()),
    *(job(f"two-{how}", **own, load=f"from-two-{how}", **{"from": 2}) for how, own in OFFLOADS.items()),
    *(
        job(
            f"{how}-to-none",
            own["stage"],
            True,
            load=f"from-two-{how}",
            save=f"{how}-to-none",
            **{"from": 2, "steps": 2},
        )
        for how, own in OFFLOADS.items()
    ),
    *(
        job(
            f"none-to-{how}",
            load=f"from-two-{own['stage']}-bf16",
            save=f"none-to-{how}",
            **{**own, "from": 2, "steps": 2},
        )
        for how, own in OFFLOADS.items()
    ),
    job("straight-hpz", **HPZ),
    job("half-hpz", **{**HPZ, "steps": 2}, save="from-two-hpz"),
    job("two-hpz", **HPZ, load="from-two-hpz", **{"from": 2}),
    *(job(f"asked-{label(*case)}", *case, asked=2) for case in ASKED),
    job("other-stage", 2, True, load="from-two-1-bf16", **{"from": 2}),
    job("other-stage-3", 3, True, load="from-two-1-bf16", **{"from": 2}),
    job("other-stage-1", 1, True, load="from-two-3-bf16", **{"from": 2}),
]
CASES = [*(label(*case) for case in STAGES), *OTHERS]
ON_ONE = [
    job("alone-masked", 1, True, masked=True),
    *(job(f"alone-{label(*case)}", *case) for case in STAGES),
    *(job(f"one-{label(*case)}", *case, load=f"from-two-{label(*case)}", **{"from": 2}) for case in STAGES),
    *(job(f"alone-{other}", **how) for other, how in (OTHERS | FORMATS).items()),
    *(job(f"one-{other}", **how, load=f"from-two-{other}", **{"from": 2}) for other, how in OTHERS.items()),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("engine")
    for world, jobs in ((2, ON_TWO), (1, ON_ONE)):
        (out / "jobs.json").write_text(json.dumps(jobs))
        ranks = run_ranks([WORKER, str(out / "jobs.json"), str(out)], world_size=world)
        assert all(rank.returncode == 0 for rank in ranks), "\n".join(rank.stderr[-2500:] for rank in ranks)
    results = lambda name: load_file(out / f"{name}.safetensors")  # noqa: E731
    results.folder = out
    return results


class PlainMuon(torch.optim.Optimizer):
    """Nesterov momentum, five Newton-Schulz steps in float64 on the whole matrix, an RMS of 0.2 a step."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (weight,) = group["params"]
            buffer = self.state[weight].setdefault("buffer", torch.zeros_like(weight))
            buffer.lerp_(weight.grad, 1 - 0.95)
            update = weight.grad.lerp(buffer, 0.95).double()
            update /= update.norm() + 1e-7
            for _ in range(5):
                gram = update @ update.T
                update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
            update *= 0.2 * max(weight.shape) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)


def scale_of(name: str) -> float:
    """The rate of a parameter / the run's."""
    if name.endswith("query.weight"):
        return MODEL["d_head"] ** -0.5
    kinds = {"embedding.weight": "embedding", "norm.scale": "norm", "relative_bias": "bias"}
    return next((RATES[kind] for end, kind in kinds.items() if name.endswith(end)), 1.0)


def plain_optimizers(groups: list[dict], optimizer: str) -> list[torch.optim.Optimizer]:
    """What moves the groups, one a parameter, in plain PyTorch."""
    if optimizer == "adafactor":
        alike = [group | {"scale": 1.0, "weight_decay": group["scale"] * group["weight_decay"]} for group in groups]
        return [torch.optim.Adafactor(alike, eps=(2.0**-63, 1e-3))]
    matrices = [group for group in groups if optimizer == "muon" and group["weight_decay"]]
    rest = [group for group in groups if not any(group is matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.99), eps=1e-8)
    return [adamw, PlainMuon(matrices, {})] if matrices else [adamw]


def clipping_factor(norm: torch.Tensor, stage: int) -> torch.Tensor:
    """What DeepSpeed multiplies gradients with, so that their norm is at most CLIPPING.

    The two forms, the second in float64 at stage 3, differ by a rounding, which changes a few bf16 weights.
    """
    if stage < 2:
        return (CLIPPING / (norm + 1e-6)).clamp(max=1.0)
    return 1.0 / ((norm + 1e-6) / CLIPPING).clamp(min=1.0)


def plain_loop(
    *,
    bf16: bool,
    optimizer: str = "adamw",
    masked: bool = False,
    norms: torch.Tensor | None = None,
    stages: Sequence[int] = (1, 1, 1, 1),
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of four steps and the weights after, on fp32 masters, gradients added up in fp32.

    norms: of the gradients, as the engine found them. The last digit of such a sum depends on the processor and on how
    the state is cut, and through the clipping every weight depends on that digit. stages: ZeRO's in each step, whose
    clipping factors differ in the last digit too.
    """
    model = LaMDA(ModelConfig(**MODEL))
    initialize_weights(model, seed=3)
    if bf16:
        model.bfloat16()
    named = list(model.named_parameters())
    masters = [parameter.detach().float().clone().requires_grad_() for _, parameter in named]
    groups = [
        {
            "params": [master],
            "scale": scale_of(name),
            "weight_decay": 0.1 / scale_of(name) if name.startswith("layers.") and name.endswith(".weight") else 0.0,
        }
        for master, (name, _) in zip(masters, named, strict=True)
    ]
    optimizers = plain_optimizers(groups, optimizer)
    losses = []
    for step in range(1, 5):
        for group in (group for each in optimizers for group in each.param_groups):
            group["lr"] = 1e-2 * step * group["scale"]
        gradients = [torch.zeros_like(master) for master in masters]
        total = 0.0
        weights = torch.from_numpy(counted(step)).float() if masked else torch.ones(BATCH, LENGTH)
        rows = torch.from_numpy(tokens(step).astype("int64"))
        for ids, own in zip(rows.split(MICRO), weights.split(MICRO), strict=True):
            nats, squares = cross_entropy(model(ids[:, :-1]), ids[:, 1:], own)
            ((nats + 1e-4 * squares) / weights.sum()).backward()
            total += nats.item()
            for gradient, (_, parameter) in zip(gradients, named, strict=True):
                gradient += parameter.grad
                parameter.grad = None
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient
        norm = torch.nn.utils.get_total_norm(gradients)
        if norms is not None:
            allowed = 1e-6 if step == 1 or stages[step - 1] == 1 else 1e-3  # see `assert_rounded_alike`
            torch.testing.assert_close(norms[step - 1].float(), norm, rtol=allowed, atol=0)
            norm = norms[step - 1] if stages[step - 1] == 3 else norms[step - 1].float()
        for master in masters:
            master.grad.mul_(clipping_factor(norm, stages[step - 1]))
        for each in optimizers:
            each.step()
        with torch.no_grad():
            for master, (_, parameter) in zip(masters, named, strict=True):
                parameter.copy_(master)
        losses.append(total / weights.sum().item())
    return losses, model.export_weights()


@pytest.mark.parametrize("ranks", ["alone", "straight"])
@pytest.mark.parametrize("case", [*(label(*case) for case in STAGES), *OTHERS])
def test_the_shards_of_a_fresh_engine_are_those_of_a_model_that_one_process_draws(results, case, ranks):
    wrong = json.loads((results.folder / f"{ranks}-{case}.wrong.json").read_text())
    assert wrong == [[]] * (1 if ranks == "alone" else 2)


@pytest.mark.parametrize("ranks", ["alone", "straight"])
def test_masked_targets_are_normalized_by_their_number_over_ranks_and_micro_batches(results, ranks):
    """Rows have from none to most of their targets; a mean of micro-batches' means would differ."""
    found = results(f"{ranks}-masked")
    losses, weights = plain_loop(bf16=True, masked=True, norms=found["norms"])
    torch.testing.assert_close(found["losses"], torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-4)


@pytest.mark.parametrize("ranks", ["alone", "straight"])
@pytest.mark.parametrize(("stage", "bf16"), STAGES)
def test_steps_equal_a_plain_pytorch_loop(results, stage, bf16, ranks):
    """To rounding in bf16 with fp32 accumulation; at stage 0 DeepSpeed adds bf16 gradients up in bf16."""
    found = results(f"{ranks}-{label(stage, bf16)}")
    exact, loose = bf16 and stage > 0, bf16 and stage == 0
    losses, weights = plain_loop(bf16=bf16, norms=None if loose else found["norms"], stages=[stage] * 4)
    losses = torch.tensor(losses, dtype=torch.float64)
    torch.testing.assert_close(found["losses"], losses, rtol=0, atol=5e-3 if loose else 1e-6)
    if exact:
        assert_rounded_alike(found, weights, stages=[stage])
        return
    for name, weight in weights.items():
        scale = 10 if name == "embedding.weight" else 1  # it moves by a rate ten times larger
        torch.testing.assert_close(found[name], weight, rtol=0, atol=scale * (4e-2 if loose else 2e-5))


@pytest.mark.parametrize(
    ("ranks", "other"),
    [
        *((ranks, other) for ranks in ("alone", "straight") for other in OPTIMIZERS),
        *(("alone", how) for how in FORMATS),
    ],
)
def test_other_optimizers_see_whole_matrices(results, other, ranks):
    """The losses of three steps say so to their last digit; later, bf16 weights that round the other way tell.

    Where Muon orthogonalizes in fp16 its updates alone are bounded: half an epsilon grows by 3.4445 in each of five
    Newton-Schulz steps, to a quarter of an update. Halves of matrices would be off by more than a half.
    """
    how = (OPTIMIZERS | FORMATS)[other]
    rounded = _rounding_of_muon(how) if how["optimizer"] == "muon" else 0.0
    found, (losses, weights) = results(f"{ranks}-{other}"), plain_loop(bf16=how["bf16"], optimizer=how["optimizer"])
    start = LaMDA(ModelConfig(**MODEL))
    initialize_weights(start, seed=3)
    expected = torch.tensor(losses[:3], dtype=torch.float64)
    allowed = 1e-6 if rounded < 1e-3 else rounded * expected.diff().abs().max().item()
    torch.testing.assert_close(found["losses"][:3], expected, rtol=0, atol=allowed)
    for name, before in start.export_weights().items():
        way = weights[name].float() - before
        assert (found[name].float() - weights[name].float()).norm() < (0.05 + rounded) * way.norm(), name


def _rounding_of_muon(how: dict) -> float:
    """By how much of itself an update may be off."""
    dtype = getattr(torch, how["orthogonalize_in"]) if "orthogonalize_in" in how else ns_compute_dtype()
    return 3.4445**5 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bit_identical_on_the_same_ranks(results, case):
    straight, resumed = results(f"straight-{case}"), results(f"two-{case}")
    assert_same_weights(straight, resumed)
    assert straight["losses"][2:].tolist() == resumed["losses"].tolist()


def test_a_second_copy_of_the_weights_changes_nothing(results):
    """`zero_hpz_partition_size`: the copy is made again after weights were drawn or loaded."""
    straight = results("straight-3-bf16")
    for name, losses in (("straight-hpz", straight["losses"]), ("two-hpz", straight["losses"][2:])):
        assert_same_weights(straight, results(name))
        assert torch.equal(results(name)["losses"], losses)


@pytest.mark.parametrize("case", CASES)
def test_a_run_continues_with_another_number_of_ranks(results, case):
    straight, resumed = results(f"straight-{case}"), results(f"one-{case}")
    tolerance = 5e-3 if case == "0-bf16" else 1e-6
    torch.testing.assert_close(straight["losses"][2:], resumed["losses"], rtol=0, atol=tolerance)
    if case in ("1-bf16", "2-bf16", "3-bf16"):
        assert_plain_loops_weights(results(f"half-{case}"), resumed, stages=[int(case[0])] * 4)
    if case in ("muon", "lora"):
        assert_same_weights(straight, resumed)


@pytest.mark.parametrize(
    ("half", "resumed", "stages"),
    [
        ("half-1-bf16", "other-stage", (1, 1, 2, 2)),
        ("half-1-bf16", "other-stage-3", (1, 1, 3, 3)),
        ("half-3-bf16", "other-stage-1", (3, 3, 1, 1)),
    ],
)
def test_a_run_continues_at_another_zero_stage(results, half, resumed, stages):
    assert_plain_loops_weights(results(half), results(resumed), stages=stages)


@pytest.mark.parametrize("how", OFFLOADS)
def test_offload_computes_the_same_and_its_state_moves_to_none_and_back_bit_for_bit(results, how):
    """The norm of the gradients is added up in another order, so its last digit may differ."""
    none = f"{OFFLOADS[how]['stage']}-bf16"
    straight, resumed, plain = (results(name) for name in (f"straight-{how}", f"two-{how}", f"straight-{none}"))
    assert_same_weights(straight, resumed)
    torch.testing.assert_close(straight["losses"], plain["losses"], rtol=0, atol=1e-6)
    torch.testing.assert_close(straight["norms"], plain["norms"], rtol=1e-6, atol=0)
    for source, moved in ((f"from-two-{how}", f"{how}-to-none"), (f"from-two-{none}", f"none-to-{how}")):
        before, after = tensors(results.folder / source), tensors(results.folder / moved)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("case", CASES)
def test_a_non_finite_step_is_refused_on_all_ranks(results, case):
    found = results(f"poison-{case}")
    assert found["updates"].item() == 3
    assert torch.isfinite(found["losses"][2:]).all()
    assert all(torch.isfinite(tensor).all() for name, tensor in found.items() if name not in ("losses", "norms"))


def assert_plain_loops_weights(half, resumed, *, stages):
    """A run in two parts ends with the weights of one plain loop."""
    _, weights = plain_loop(bf16=True, norms=torch.cat([half["norms"], resumed["norms"]]), stages=stages)
    assert_rounded_alike(resumed, weights, stages=stages)


def assert_rounded_alike(found, weights, *, stages):
    """Bit for bit at stage 1. Stages 2 and 3 update flat pieces of many parameters.

    PyTorch's CPU kernels round the elements after the last full vector differently, and which ones these are depends
    on the processor and on how the state is cut. The next steps multiply them.
    """
    if max(stages) == 1:
        assert_same_weights(weights, found)
        return
    different = sum((found[name] != weight).sum().item() for name, weight in weights.items())
    assert different < 0.1 * sum(weight.numel() for weight in weights.values())
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=2**-6, atol=1e-3)


def assert_same_weights(one, other):
    for name, tensor in one.items():
        if name not in ("losses", "norms", "updates"):
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("case", ASKED, ids=lambda case: label(*case))
def test_tasks_between_two_steps_are_computed_by_all_ranks_and_change_nothing(results, case):
    straight, asked = (results(f"{name}-{label(*case)}") for name in ("straight", "asked"))
    assert straight.keys() == asked.keys()
    assert all(torch.equal(straight[name], asked[name]) for name in straight)
    scores, texts = json.loads((results.folder / f"asked-{label(*case)}.json").read_text())
    weights = load_file(results.folder / f"asked-{label(*case)}.weights")
    model = LaMDA(ModelConfig(**MODEL)).to(weights["embedding.weight"].dtype)
    model.load_weights(weights)
    alone = LocalDecoder(model.eval(), Letters(), batch=99)
    expected = alone.score(asked_rows(5))
    assert [nats for nats, _ in scores] == pytest.approx([nats for nats, _ in expected], abs=0.1 if case[1] else 1e-4)
    if not case[1]:
        assert texts == alone.generate(asked_prompts(3))
    assert len(texts) == 3
