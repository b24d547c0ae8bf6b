"""The rate of each part of the model, and what the optimisers of both frameworks have in common."""

from __future__ import annotations

from lamda.config.schema import TrainConfig
from lamda.model.weights import Part

MUON_MOMENTUM = 0.95
"""Muon's decay of its momentum, Nesterov's way (Jordan et al., kellerjordan.github.io/posts/muon)."""

ADAMW_RMS = 0.2
"""What Muon's updates are brought to: the usual RMS of AdamW's (Liu et al., arXiv 2502.16982, section 2.2)."""


ADAFACTOR_EPS = (2.0**-63, 1e-3)
"""PyTorch's two epsilons of Adafactor. The first bounds a row's mean square, and its square, the least normal number

of fp32, bounds the variance: weights move alike for gradients down to 1e-9, and one that is always 0 moves nothing.
PyTorch's own, fp32's resolution, stops what has gradients below 1e-7; the paper's 1e-30 has no square in fp32.
"""


def rate_scales(train: TrainConfig, *, d_model: int) -> dict[Part, float]:
    """The rate of each part of the model / the run's; the final norm is one of the others where it has none.

    With `train.base_width` they keep the size of what a step changes the same at every width (muP, arXiv
    2203.03466; heads keep theirs). A matrix adds up D inputs that an AdamW step moves alike, so its rate falls as
    1/D; Muon's and Adafactor's steps have a size of their own, an operator's norm and a share of the weight, which
    leave 1/sqrt(D). The tied embedding and the scales before it keep theirs as inputs; as outputs they
    ask for logits times 1/D instead of the model's 1/sqrt(D), which the final norm takes on.
    """
    width = d_model / (train.base_width or d_model)
    is_adafactor = train.optimizer == "adafactor"
    scales: dict[Part, float] = {
        "embedding": 1.0 if is_adafactor else train.embedding_lr_scale,
        "matrices": width**-1 if train.optimizer == "adamw" else width**-0.5,
        "others": 1.0,
    }
    # A group of its own only where it needs one: ZeRO rounds the gradient's norm group by group.
    return scales if is_adafactor or width == 1 else {**scales, "final_norm": width**-0.5}


def weight_decays(train: TrainConfig, scales: dict[Part, float]) -> dict[Part, float]:
    """The decay of each part at the run's rate times its scale; only the embedding and the matrices have any.

    A rate that follows the width does not take the decay along: rate times decay stays what it was.
    """
    decays: dict[Part, float] = {
        "embedding": train.weight_decay,
        "matrices": train.weight_decay / scales["matrices"],
    }
    return {part: decays.get(part, 0.0) for part in scales}
