"""Steps of a small model, each with a NaN in a random place on a random rank; the weights must not move."""

import json
import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lamda import distributed
from lamda.engines.deepspeed.checkpoint import model_weights
from lamda.engines.deepspeed.engine import DeepSpeedEngine
from lamda.engines.deepspeed.fragments import fragments
from tests.distributed.engine_worker import batch, config

OUT, STEPS = Path(sys.argv[1]), int(sys.argv[2])


def state(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """Everything that an update would change on this rank."""
    own = [tensor.clone() for fragment in fragments(engine.deepspeed) for tensor in fragment.tensors.values()]
    counts = [kept["step"].clone() for kept in engine.deepspeed.basic_optimizer.state.values()]
    return [*own, *counts, *(weight.clone() for _, weight in model_weights(engine.deepspeed))]


def main() -> None:
    """Prints how many of the steps changed anything, for each ZeRO stage."""
    world = distributed.read_world()
    device = distributed.start(world, threads=1)
    message = {}
    for stage in (1, 2, 3):
        engine = DeepSpeedEngine(config({"stage": stage, "bf16": True}, OUT, world.rank), world=world, device=device)
        engine.initialize_weights()
        engine.train_step(batch(0, world), lr=1e-2)
        before, draw = state(engine), random.Random(stage)
        updated = 0
        for step in range(1, STEPS + 1):
            rank, place = draw.randrange(world.world_size), draw.choice(["loss", "features", "gradient"])
            is_mine = rank == world.rank
            hooks = spoil(engine, place, random.Random(step)) if is_mine else []
            at = spoil_loss if is_mine and place == "loss" else nothing
            updated += not engine.train_step(batch(step % 7, world), lr=1e-2, on_phase=at).skipped
            for hook in hooks:
                hook.remove()
        changed = torch.tensor(sum(not torch.equal(one, two) for one, two in zip(before, state(engine), strict=True)))
        dist.all_reduce(changed)
        clean = not engine.train_step(batch(1, world), lr=1e-2).skipped
        message[stage] = {"steps": STEPS, "updated": updated, "tensors_changed": changed.item(), "then_updates": clean}
    if world.is_main_process:
        print(json.dumps(message))
    distributed.stop()


def spoil_loss(point: str, tensor: torch.Tensor | None) -> None:
    """The loss itself is not a number."""
    if point == "loss":
        tensor.mul_(torch.nan)


def nothing(point: str, tensor: torch.Tensor | None) -> None:
    """A step as it should be."""


def spoil(engine: DeepSpeedEngine, place: str, draw: random.Random) -> list:
    """One element that is not finite, in what the logits are made of or in the gradient of a random layer's output."""
    bad = draw.choice([float("nan"), float("inf"), -float("inf")])

    def in_features(module, inputs, features):
        spoiled = features.clone()
        spoiled.view(-1)[draw.randrange(spoiled.numel())] = float("nan")
        return spoiled

    def in_gradient(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), bad))

    if place == "features":
        return [engine.model.final_norm.register_forward_hook(in_features)]
    if place == "gradient":
        return [draw.choice(list(engine.model.layers)).register_forward_hook(in_gradient)]
    return []


if __name__ == "__main__":
    main()
