"""Choosing the next token: repetition penalty, temperature, top-k, top-p, in that order, then a draw."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from lamda.config.errors import RunError, UserError

TEMPERATURES = (1e-3, 1e3)
"""The smallest and largest temperature other than 0. Lower ones only overflow: probabilities are 0 and 1 anyway."""

PENALTIES = (1e-2, 1e2)
"""The smallest and the largest repetition penalty, for the same reason."""


LONGEST = 1_000_000
"""The largest `max_new_tokens`: each has a random number, drawn at the start."""


class NotFiniteError(RunError):
    """The logits of the model are NaN or infinite, so no token can be chosen or scored."""


def check_finite(*log_probabilities: float) -> None:
    """Raise NotFiniteError unless all log probabilities are finite."""
    if not all(map(isfinite, log_probabilities)):
        raise NotFiniteError("the model's logits are NaN or infinite: its weights are damaged or have diverged")


@dataclass(frozen=True)
class Sampling:
    """Sampling options. Raises UserError naming all invalid values.

    max_new_tokens: maximum length. temperature: divides the logits, 0.001 to 1000; 0 means greedy. top_k: draw only
    from the k most likely tokens (40 in the paper); 0 for all. top_p: draw only from the smallest set of most likely
    tokens with this share of the probability that top-k leaves (Holtzman et al., arXiv 1904.09751). repetition_penalty:
    divides positive and multiplies negative logits of tokens in the prompt or the continuation, except stop_ids (Keskar
    et al., arXiv 1909.05858); 0.01 to 100. seed: the same seed gives the same ids. stop_ids: ids that end a
    continuation.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 40
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        wrong = (
            (self.max_new_tokens < 1, f"max_new_tokens is {self.max_new_tokens}: give at least 1"),
            (self.max_new_tokens > LONGEST, f"max_new_tokens is {self.max_new_tokens}: give at most {LONGEST:,}"),
            (
                self.temperature != 0 and not TEMPERATURES[0] <= self.temperature <= TEMPERATURES[1],
                f"temperature is {self.temperature}: give 0 (likeliest), or {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}",
            ),
            (self.top_k < 0, f"top_k is {self.top_k}: give at least 1, or 0 for all"),
            (not 0 < self.top_p <= 1, f"top_p is {self.top_p}: give more than 0 and at most 1"),
            (
                not PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1],
                f"repetition_penalty is {self.repetition_penalty}: give {PENALTIES[0]} to {PENALTIES[1]}; 1 is none",
            ),
        )
        problems = [message for is_wrong, message in wrong if is_wrong]
        if problems:
            raise UserError("\n".join(problems))


class Sampler:
    """Draws tokens for the candidates 0 to `count` - 1 of one prompt.

    The random numbers of a candidate are a function of (seed, its number), so they depend neither on `count` nor on
    other prompts in the batch.
    """

    def __init__(self, sampling: Sampling, *, prompt: Sequence[int], count: int, logits: Tensor) -> None:
        self._sampling = sampling
        self._draws_NT = torch.stack([_uniform(sampling, number) for number in range(count)])
        self._seen_NV: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen_NV = torch.zeros(count, logits.shape[-1], dtype=torch.bool, device=logits.device)
            self._seen_NV[:, list(prompt)] = True
        self._kept = torch.tensor(sorted(sampling.stop_ids), dtype=torch.long, device=logits.device)

    def choose(self, logits_NV: Tensor, step: int) -> tuple[list[int], list[float]]:
        """Each candidate's id number `step`, and its log probability in the unmodified model. Raises NotFiniteError."""
        wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        chosen_N1 = self._choose(self._penalized(wide_NV), step)
        log_probabilities_N = wide_NV.gather(-1, chosen_N1)[:, 0] - wide_NV.logsumexp(-1)
        if self._seen_NV is not None:
            self._seen_NV.scatter_(-1, chosen_N1, value=True)
        log_probabilities = log_probabilities_N.tolist()
        check_finite(*log_probabilities)
        return chosen_N1[:, 0].tolist(), log_probabilities

    def _penalized(self, logits_NV: Tensor) -> Tensor:
        if self._seen_NV is None:
            return logits_NV
        penalty = self._sampling.repetition_penalty
        penalized_NV = torch.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty)
        return torch.where(self._seen_NV.index_fill(-1, self._kept, value=False), penalized_NV, logits_NV)

    def _choose(self, logits_NV: Tensor, step: int) -> Tensor:
        """One id per row, [N, 1], by inverse transform sampling from the kept probabilities in descending order."""
        if self._sampling.temperature == 0:
            return logits_NV.argmax(dim=-1, keepdim=True)
        vocabulary = logits_NV.shape[-1]
        best = logits_NV.topk(min(self._sampling.top_k or vocabulary, vocabulary), dim=-1)
        shares_NK = (best.values.double() / self._sampling.temperature).softmax(dim=-1).cpu()
        before_NK = shares_NK.cumsum(dim=-1) - shares_NK
        line_NK = shares_NK.where(before_NK < self._sampling.top_p, 0.0).cumsum(dim=-1)
        place_N1 = torch.searchsorted(line_NK, self._draws_NT[:, step, None] * line_NK[:, -1:], right=True)
        # With NaN the place is behind the end; on CUDA, such an index would kill the process.
        place_N1 = place_N1.clamp(max=line_NK.shape[-1] - 1)
        return best.indices.gather(-1, place_N1.to(logits_NV.device))


def _uniform(sampling: Sampling, number: int) -> Tensor:
    """Random numbers of a candidate in [0, 1), one per token, from the CPU generator, the same on all machines."""
    digest = hashlib.sha256(f"{sampling.seed}:{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)
