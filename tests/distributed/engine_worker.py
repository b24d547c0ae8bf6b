"""Runs a list of short trainings on this rank; `test_engine.py` starts it and compares.

A job: {"name", "stage", "bf16", "from": step, "steps": to step, "load": folder or null, "save": folder
or null, "poison": step or null, "asked": step or null, "orthogonalize_in": dtype of Muon or null}.
Results go to OUT/<name>.safetensors (plain weights and losses) from rank 0, and to OUT/<name>.wrong.json what each rank
finds wrong with its initial weights.
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero.muon import original_muon
from deepspeed.utils import groups
from safetensors.torch import save_file

from lamda import distributed
from lamda.config.schema import Config
from lamda.data.loader import MicroBatch, StepBatch
from lamda.data.windows import SourceOrder
from lamda.engines.deepspeed import checkpoint, lora
from lamda.engines.deepspeed.checkpoint import model_weights
from lamda.engines.deepspeed.engine import DeepSpeedEngine, DeepSpeedStep
from lamda.engines.deepspeed.fragments import fragments
from lamda.inference.sampling import Sampling
from lamda.interop.harness.in_training import RanksDecoder
from lamda.interop.harness.scoring import Prompt, ScoredRow
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights
from lamda.storage.state import RunState
from lamda.training.saver import Saver

BATCH, MICRO, LENGTH, VOCABULARY = 8, 2, 12, 61
MODEL = {"vocab_size": VOCABULARY, "d_model": 24, "n_layers": 2, "n_heads": 3, "d_head": 8, "d_ff": 40}
RATES = {"embedding": 10.0, "norm": 2.0, "bias": 5.0}
"""Of these parts / the run's. Milder than the defaults, with which four large steps would lead into chaos."""


def tokens(step: int) -> np.ndarray:
    """The rows [B, L+1] of a step."""
    return np.random.default_rng(step).integers(0, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.uint32)


def counted(step: int) -> np.ndarray:
    """Which targets [B, L] of a step count where a job is masked: of some rows hardly any, of one row none."""
    draw = np.random.default_rng(100 + step)
    return draw.random((BATCH, LENGTH)) < draw.permutation(BATCH)[:, None] / BATCH


def config(job: dict, folder: Path, rank: int) -> Config:
    """The configuration of a job, with a DeepSpeed file of its own."""
    own = {"communication_data_type": "fp32", "zero_optimization": {"stage": job["stage"], **job.get("zero", {})}}
    if "zero" in job:
        own["zero_force_ds_cpu_optimizer"] = False
    if job["bf16"]:
        own["bf16"] = {"enabled": True}
        if job["stage"]:
            own["data_types"] = {"grad_accum_dtype": "fp32"}
    path = folder / f"ds-{job['stage']}-{job['bf16']}-{rank}.json"
    path.write_text(json.dumps(own))
    return Config.model_validate(
        {
            "run": {"seed": 3},
            "model": MODEL | job.get("model", {}),
            "data": {"sequence_length": LENGTH},
            "train": {
                "steps": 9,
                "global_batch_size": BATCH,
                "micro_batch_size": MICRO,
                "gradient_clipping": 0.05,
                "optimizer": job.get("optimizer", "adamw"),
                "embedding_lr_scale": RATES["embedding"],
                "norm_lr_scale": RATES["norm"],
                "bias_lr_scale": RATES["bias"],
                "lora_rank": job.get("lora_rank", 0),
            },
            "deepspeed": {"config": str(path)},
        }
    )


def batch(step: int, world: distributed.World, *, masked: bool = False) -> StepBatch:
    """This rank's part of a step."""
    share = BATCH // world.world_size
    own = np.arange(world.rank * share, (world.rank + 1) * share)
    rows = tokens(step)[own]
    scored = counted(step)[own] if masked else np.ones((share, LENGTH), bool)
    parts = [
        MicroBatch(ids, mask, np.zeros((MICRO, LENGTH), np.int16))
        for ids, mask in zip(rows.reshape(-1, MICRO, LENGTH + 1), scored.reshape(-1, MICRO, LENGTH), strict=True)
    ]
    return StepBatch(tuple(parts), own, np.zeros((share, 32), np.uint8), BATCH * step)


class Letters:
    """A tokenizer whose ids are letters."""

    def utf8(self, id: int) -> bytes:
        return bytes([32 + id])


def asked_rows(count: int) -> list[ScoredRow]:
    """Rows of different lengths."""
    return [ScoredRow(tokens(n)[0, : 4 + n].tolist(), 2 + n) for n in range(count)]


def asked_prompts(count: int) -> list[Prompt]:
    """Prompts of different lengths."""
    return [
        Prompt(tokens(n)[1, : 2 + n].tolist(), Sampling(max_new_tokens=5, temperature=0.0), ()) for n in range(count)
    ]


def asked_after(engine: DeepSpeedEngine, step: int, file: Path) -> Callable[..., DeepSpeedStep]:
    """`engine.train_step`, and after the step of that number what `eval.tasks` asks of the ranks."""
    compute, count = engine.train_step, itertools.count(1)

    def stepped(*parts: Any, **how: Any) -> DeepSpeedStep:
        result = compute(*parts, **how)
        if next(count) == step:
            decoder = RanksDecoder(engine, Letters(), mark=lambda: None)
            with engine.eval_mode():
                if engine.world.is_main_process:
                    scores, texts = decoder.score(asked_rows(5)), decoder.generate(asked_prompts(3))
                    decoder.dismiss()
                    file.write_text(json.dumps([scores, texts]))
                else:
                    decoder.serve()
            save = {name: weight.clone() for name, weight in model_weights(engine.deepspeed)}
            if engine.world.is_main_process:
                save_file(save, file.with_suffix(".weights"))
        return result

    return stepped


def wrong_at_start(engine: DeepSpeedEngine) -> list[str]:
    """What of this rank's is not as in a model that one process initializes: values, elements, state."""
    model, dtype = LaMDA(engine.config.model), torch.bfloat16 if engine.is_bf16 else torch.float32
    initialize_weights(model, seed=engine.config.run.seed)
    drawn = {name: weight.to(dtype) for name, weight in model.export_weights().items()}
    drawn |= {name: each.draw().to(dtype) for name, each in lora.initial_adapters(engine.config).items()}
    wrong, count = [], 0
    for part in fragments(engine.deepspeed):
        expected = drawn[part.name].flatten()[part.start :][: part.weight.numel()]
        others = [*(part.tensors.keys() - {"weight", "frozen"}), *part.factors]
        is_fresh = not any((part.tensors | part.factors)[kind].any() for kind in others)
        if not torch.equal(part.weight, expected.to(part.weight.dtype)) or not is_fresh:
            wrong.append(part.name)
        count += part.weight.numel() if part.is_owner else 0
    if sum(distributed.gather(count)) != sum(weight.numel() for weight in drawn.values()):
        wrong.append("elements are missing")
    with engine.gathered_parameters():
        for name, parameter in engine.model.named_parameters():
            if parameter.dtype != dtype or not torch.equal(parameter, drawn[name]):
                wrong.append(f"{name} of the model")
    return wrong


def run(job: dict, world: distributed.World, device: torch.device, out: Path) -> None:
    """Train from one step to another and save what `test_engine.py` looks at."""
    engine = DeepSpeedEngine(config(job, out, world.rank), world=world, device=device)
    state = RunState()
    if job.get("load"):
        state = checkpoint.load(out / job["load"] / f"step-{job['from']:08d}", engine.deepspeed, config=engine.config)
    else:
        engine.initialize_weights()
        wrong = distributed.gather(wrong_at_start(engine))
        if world.is_main_process:
            (out / f"{job['name']}.wrong.json").write_text(json.dumps(wrong))
    losses, norms = [], []
    if "asked" in job:
        engine.train_step = asked_after(engine, job["asked"], out / f"{job['name']}.json")
    for step in range(state.step + 1, job["steps"] + 1):
        poisoned = job.get("poison") == step and world.rank == world.world_size - 1
        hook = engine.model.final_norm.register_forward_hook(lambda *parts: parts[-1] * torch.nan) if poisoned else None
        result = engine.train_step(batch(step, world, masked=job.get("masked", False)), lr=1e-2 * step)
        if hook is not None:
            hook.remove()
        metrics = result.wait()
        losses.append(metrics.loss())
        norms.append(metrics.grad_norm)
        state = state.after(consumed=step, rows=BATCH, updated=not result.skipped).with_targets(BATCH * LENGTH)
    if job.get("save"):
        model = out / "tokenizer.model"
        model.touch()
        distributed.barrier()
        order = {"order": (SourceOrder(measured=(3, 1)),)}
        saver = Saver(out / job["save"], engine=engine, tokenizer=model)
        ended = saver.begin(RunState(**{**vars(state), **order})) or saver.finish()
        assert ended.problem is None, ended.problem
    weights = {name: weight.clone() for name, weight in model_weights(engine.deepspeed)}
    if world.is_main_process:
        extra = {"losses": torch.tensor(losses, dtype=torch.float64), "norms": torch.tensor(norms, dtype=torch.float64)}
        save_file({**weights, **extra, "updates": torch.tensor(state.updates)}, out / f"{job['name']}.safetensors")


def main() -> None:
    """`engine_worker.py JOBS.json OUT`."""
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    world = distributed.read_world()
    device = distributed.start(world, threads=1)
    native = original_muon.ns_compute_dtype
    for job in jobs:
        dtype = getattr(torch, job["orthogonalize_in"]) if "orthogonalize_in" in job else None
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of an earlier job; a run has one engine
        original_muon.ns_compute_dtype = native if dtype is None else lambda *_, dtype=dtype: dtype
        run(job, world, device, out)
    distributed.stop()


if __name__ == "__main__":
    main()
