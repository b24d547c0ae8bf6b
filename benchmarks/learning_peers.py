"""The models of `benchmark.py learning`, each as large as the LaMDA of a configuration, and how each is trained.

PEERS has a model a line: what builds it, which parameters are what, its usual recipe, and rates to sweep. A name that
ends in `+` is the same peer by LaMDA's own recipe, wherever it has what that treats: optimizer and schedule of the
configuration, rates of norms and bias tables, no decay of the embedding, and in x-transformers the weights' start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks import learning_models
from benchmarks.learning_nanochat import Muon
from lamda.config.errors import UserError
from lamda.config.schema import Config, TrainConfig
from lamda.engines.deepspeed.optimizer import make_muon, make_optimizer, set_learning_rate
from lamda.model import LaMDA
from lamda.model.counts import flops_per_token, parameters_by_part
from lamda.training.lr_schedule import learning_rate

Part = Literal["embedding", "head", "matrices", "norms", "bias_table", "others"]

TOLERANCE = 0.01
"""Share by which a peer's matrices and FLOPs may differ from LaMDA's."""

WARM_UP = 20
"""Steps, where a recipe says nothing else."""

NANOCHAT_RATES: Mapping[Part, float] = {"embedding": 0.2, "head": 0.004, "matrices": 0.02}
NANOCHAT_WIDTH = 768
"""Rates of nanochat's first release, AdamW's (embedding and head) for this width: they go with D^-0.5."""
NANOCHAT_MOMENTUM = (0.85, 0.95, 300)
"""Muon's at the first step and from so many steps on."""
NANOCHAT_WARMDOWN = 0.5
"""Last part of the run in which rates fall to 0; 0.2 in the first release, 0.4 to 0.65 in later ones."""

PEER_KEYS = (
    "optimizer", "beta1", "beta2", "eps", "gradient_clipping", "schedule", "warmup_steps", "decay_fraction",
    "min_lr_ratio", "z_loss",
)  # fmt: skip
NO_RECIPE = frozenset({
    "steps", "tokens", "lr", "global_batch_size", "micro_batch_size", "recompute", "compile", "fp8", "profile",
    "lora_rank", "max_skipped_steps", "spike_threshold", "spike_window", "max_rollbacks",
})  # fmt: skip
"""Keys of `train` that change nothing of what a token teaches, or that stand elsewhere in a record."""


EMBEDDING_SCALE = 5.0
"""A peer's embedding starts with a deviation of 0.02, LaMDA's with 0.5: its own rate is a factor of its own."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. scales: a part's rate / the run's, default 1. decays: of a part, default 0.

    momentum: of nanochat's Muon, at the first step, in the end, and from which step on.
    """

    train: TrainConfig
    facts: dict[str, Any]
    scales: Mapping[Part, float] = field(default_factory=dict)
    decays: Mapping[Part, float] = field(default_factory=dict)
    momentum: tuple[float, float, int] | None = None


@dataclass(frozen=True)
class Peer:
    """A model of the table. has_wide_heads: whether its attention is H K wide as LaMDA's, and not D.

    build: from a configuration, its seed included. named: the part that a parameter belongs to by a piece of its name,
    the first that fits; any other is of the matrices, or of the others where it has one dimension. recipe: by the
    configuration, a rate, and the embedding's scale for a `+`. restart: gives a `+` its weights' start.
    """

    build: Callable[[Config], nn.Module]
    named: Mapping[str, Part]
    recipe: Callable[[Config, float, float | None], Recipe]
    rates: tuple[float, float, float]
    has_wide_heads: bool = True
    restart: Callable[[nn.Module], None] = lambda _: None

    def part(self, name: str, parameter: nn.Parameter) -> Part:
        """What a parameter is."""
        for piece, part in self.named.items():
            if piece in name:
                return part
        return "matrices" if parameter.ndim == 2 else "others"


@dataclass(frozen=True)
class Learner:
    """A model, its optimizers and its sizes. Frozen parameters count nowhere."""

    module: nn.Module
    recipe: Recipe
    optimizers: tuple[torch.optim.Optimizer, ...]
    sizes: dict[str, int]

    def logits(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of the token after each token."""
        found = self.module(tokens_BL)
        return getattr(found, "logits", found)

    def set_rate(self, step: int, *, steps: int) -> None:
        """Bring the optimizers to step `step` (the first is 1) of `steps`."""
        rate = learning_rate(step, train=self.recipe.train, steps=steps)
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, rate)
            for group in optimizer.param_groups:
                if "momentum_ramp" in group:
                    first, last, ramp = group["momentum_ramp"]
                    group["momentum"] = first + (last - first) * min(1.0, (step - 1) / ramp)


def make_learner(
    name: str, config: Config, *, rate: float, device: torch.device, embedding_scale: float = EMBEDDING_SCALE
) -> Learner:
    """The model of that name with the sizes, seed and length of a configuration. Raises UserError."""
    peer, recipe = PEERS[name.removesuffix("+")], recipe_of(name, config, rate, embedding_scale)
    module = peer.build(config)
    if name.endswith("+"):
        peer.restart(module)
    module = module.to(device)
    parts: dict[Part, list[nn.Parameter]] = {}
    for full_name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(peer.part(full_name, parameter), []).append(parameter)
    sizes = _sizes(config, parts, has_wide_heads=peer.has_wide_heads)
    require_alike(name, sizes, config, flops_too=peer.has_wide_heads)
    if isinstance(module, LaMDA):
        return Learner(module, recipe, (make_optimizer(module, recipe.train),), sizes)
    return Learner(module, recipe, _optimizers(parts, recipe), sizes)


def recipe_of(name: str, config: Config, rate: float, embedding_scale: float) -> Recipe:
    """How the model of that name (one of MODELS) is trained."""
    peer = PEERS[name.removesuffix("+")]
    return peer.recipe(config, rate, embedding_scale if name.endswith("+") else None)


def _sizes(config: Config, parts: Mapping[Part, list[nn.Parameter]], *, has_wide_heads: bool) -> dict[str, int]:
    """Parameters of the blocks' matrices and in all, and FLOPs per token as `flops_per_token` counts them."""
    model = config.model
    matrices = sum(parameter.numel() for parameter in parts["matrices"])
    width = model.n_heads * model.d_head if has_wide_heads else model.d_model
    return {
        "matrices": matrices,
        "parameters": sum(parameter.numel() for found in parts.values() for parameter in found),
        "flops_per_token": 6 * (matrices + model.vocab_size * model.d_model)
        + 6 * model.n_layers * config.data.sequence_length * width,
    }


def require_alike(name: str, sizes: Mapping[str, int], config: Config, *, flops_too: bool) -> None:
    """Raise UserError where a model is not as large as the configuration's LaMDA."""
    part = parameters_by_part(config.model)
    wanted = {"matrices": part["attention"] + part["feed_forward"]}
    if flops_too:
        wanted["flops_per_token"] = flops_per_token(config.model, config.data.sequence_length)
    for what, size in wanted.items():
        if abs(sizes[what] - size) > TOLERANCE * size:
            raise UserError(f"{name} cannot be made as large as this model: {what} {sizes[what]:,}, not {size:,}")


def _optimizers(parts: Mapping[Part, list[nn.Parameter]], recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """AdamW, LaMDA's Muon where that is LaMDA's, or nanochat's where the recipe says so. Rates start at 0."""
    train, scales, decays = recipe.train, recipe.scales, recipe.decays
    groups = {
        part: {"params": found, "lr_multiplier": scales.get(part, 1.0), "weight_decay": decays.get(part, 0.0)}
        for part, found in parts.items()
    }
    if train.optimizer == "muon" and recipe.momentum is None:
        return (make_muon([groups.pop("matrices")], list(groups.values()), train),)
    muon: list[torch.optim.Optimizer] = []
    if recipe.momentum is not None:
        muon = [Muon([{**groups.pop("matrices"), "momentum_ramp": recipe.momentum}])]
    betas = (train.beta1, train.beta2)
    return (torch.optim.AdamW(list(groups.values()), lr=0.0, betas=betas, eps=train.eps, fused=True), *muon)


def _lamda_recipe(config: Config, rate: float, _: float | None) -> Recipe:
    """The configuration's own."""
    facts = config.train.model_dump(mode="json", exclude=set(NO_RECIPE))
    facts["bias_per_layer"] = config.model.bias_per_layer
    return Recipe(config.train.model_copy(update={"lr": rate}), facts)


def _adamw_recipe(config: Config, rate: float, embedding_scale: float | None) -> Recipe:
    """nanoGPT's and most others': decay 0.1 of all matrices, embedding and head among them."""
    if embedding_scale is not None:
        own = config.train.model_copy(update={"lr": rate})
        decay = own.weight_decay
        scales: dict[Part, float] = {
            "norms": own.norm_lr_scale, "embedding": embedding_scale, "bias_table": own.bias_lr_scale,
        }  # fmt: skip
        return _recipe(own, scales, {"head": decay, "matrices": decay})
    train = TrainConfig(
        steps=config.steps, lr=rate, beta2=0.95, z_loss=0.0, schedule="cosine", warmup_steps=WARM_UP, min_lr_ratio=0.1
    )
    return _recipe(train, {}, {"embedding": 0.1, "head": 0.1, "matrices": 0.1})


def _nanochat_recipe(config: Config, rate: float, embedding_scale: float | None) -> Recipe:
    """Muon at `rate`, AdamW in proportion. It has no norm to scale, no decay, and an embedding's rate already."""
    train = TrainConfig(
        steps=config.steps,
        lr=rate,
        optimizer="muon",
        beta1=0.8,
        beta2=0.95 if embedding_scale is None else config.train.beta2,
        eps=1e-10,
        z_loss=0.0,
        schedule="wsd",
        warmup_steps=0,
        decay_fraction=NANOCHAT_WARMDOWN,
        min_lr_ratio=0.0,
    )
    width = (config.model.d_model / NANOCHAT_WIDTH) ** -0.5
    of_adamw: tuple[Part, Part] = ("embedding", "head")
    scales = {part: NANOCHAT_RATES[part] / NANOCHAT_RATES["matrices"] * width for part in of_adamw}
    return _recipe(train, scales, {}, momentum=NANOCHAT_MOMENTUM)


def _recipe(
    train: TrainConfig,
    scales: Mapping[Part, float],
    decays: Mapping[Part, float],
    *,
    momentum: tuple[float, float, int] | None = None,
) -> Recipe:
    facts = {
        **train.model_dump(mode="json", include=set(PEER_KEYS)),
        **{f"{part} scale": scale for part, scale in scales.items()},
        **{f"{part} decay": decay for part, decay in decays.items()},
    }
    if momentum is not None:
        facts["momentum"] = list(momentum)
    return Recipe(train, facts, scales, decays, momentum)


ADAMW_RATES = (1e-3, 2e-3, 4e-3)

PEERS = {
    "lamda": Peer(
        learning_models.lamda,
        {"embedding.weight": "embedding", "_norm.scale": "norms", "relative_bias": "bias_table"},
        _lamda_recipe,
        ADAMW_RATES,
    ),
    "llama": Peer(
        learning_models.llama,
        {"embed_tokens": "embedding", "lm_head": "head", "norm": "norms"},
        _adamw_recipe,
        ADAMW_RATES,
    ),
    "gpt2": Peer(
        learning_models.gpt2,
        {"wte": "embedding", "wpe": "embedding", ".ln_": "norms"},
        _adamw_recipe,
        ADAMW_RATES,
        has_wide_heads=False,
    ),
    "x-transformers": Peer(
        learning_models.x_transformers,
        {"token_emb": "embedding", "to_logits": "head", "gamma": "norms", "relative_attention_bias": "bias_table"},
        _adamw_recipe,
        ADAMW_RATES,
        restart=learning_models.restart_x_transformers,
    ),
    "nanochat": Peer(
        learning_models.nanochat, {"embedding": "embedding", "head": "head"}, _nanochat_recipe, (0.01, 0.02, 0.04)
    ),
}

MODELS = ("lamda", *(f"{name}{mark}" for name in PEERS if name != "lamda" for mark in ("", "+")))
