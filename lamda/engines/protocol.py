"""The interface between the training loop and a framework; it imports neither.

`lamda.engines.deepspeed` and `lamda.engines.flax` implement it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lamda.config.schema import Config
    from lamda.data.loader import StepBatch
    from lamda.distributed import World
    from lamda.durable import Progress
    from lamda.inference.sampling import Sampling

PhaseHook = Callable[[str, "torch.Tensor | None"], None]
"""Called at "forward", "loss", "backward" and "update" of a step, some with a tensor for fault injection to change."""


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step over all ranks, on the host.

    sums: [2, domains], summed cross-entropy in nats and number of target tokens. grad_norm: before clipping.
    batch_digest: see `lamda.data.loader.batch_digest`. counters: sums over the ranks of those given to `train_step`.
    """

    sums: NDArray[np.float64]
    grad_norm: float
    batch_digest: str
    counters: Sequence[float]

    def loss(self) -> float:
        """Cross-entropy in nats per target token; NaN where there are none."""
        nats, targets = self.sums.sum(axis=1).tolist()
        return nats / targets if targets else nan

    def by_domain(self) -> list[tuple[float, int]]:
        """(loss, number of target tokens) of each domain; the loss is NaN where there are none."""
        return [(nats / targets if targets else nan, int(targets)) for nats, targets in self.sums.T.tolist()]


class PendingStep(Protocol):
    """A step that the device may still be computing."""

    @property
    def skipped(self) -> bool:
        """Whether the loss or the gradient was not finite on any rank, so that no rank changed its weights."""

    def wait(self) -> StepMetrics:
        """Wait for the step and copy its metrics to the host."""


class Scorer(Protocol):
    """A model for evaluation. Where ranks share a model, every rank makes the same calls."""

    def logits(self, inputs_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, V] for token ids [B, L]."""

    def nll(
        self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor, documents_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, L], the cross-entropy of each target. documents_BL: document ids; attention stays inside."""


class Engine(Scorer, Protocol):
    """A model, its optimizer and the devices that share them. Every rank has one and makes the same calls.

    It has no weights until one of `initialize_weights`, `load_checkpoint` and `load_weights` is called.
    device: of the training loop's collectives and of a `Scorer`'s inputs. is_compiled: whether the first step compiles.
    peak_flops: FLOP/s of one device; None if unknown (then MFU is not reported). num_devices: those of all
    ranks that share the work of a batch.
    """

    config: Config
    world: World
    device: torch.device
    is_compiled: bool
    peak_flops: float | None
    num_devices: int

    def enter_stage(self, config: Config, *, domains: int) -> None:
        """Continue with the configuration of a stage, whose batch and rows may have other sizes.

        Weights and optimizer state stay, as if the run had resumed with it. domains: as in `Framework.engine`.
        """

    def train_step(self, batch: StepBatch, *, lr: float, counters: Sequence[int], on_phase: PhaseHook) -> PendingStep:
        """Train on a step's micro-batches. counters: integers to be summed over the ranks. on_phase: as PhaseHook."""

    def eval_mode(self) -> AbstractContextManager[None]:
        """Wraps calls of `logits` and `nll`: no gradients; training mode afterwards."""

    def generate(self, ids: Sequence[int], sampling: Sampling) -> list[int]:
        """Continue `ids`; the same result on every rank."""

    def initialize_weights(self) -> None:
        """Draw the weights from `run.seed`; the optimizer state is fresh."""

    def load_checkpoint(self, path: Path) -> None:
        """Load weights and optimizer state from a verified checkpoint. Raises UserError before anything is changed."""

    def load_weights(self, path: Path) -> None:
        """Load the weights of a safetensors file by plain name; the optimizer state is fresh."""

    def corrupted_ranks(self) -> list[int]:
        """Ranks whose weights do not match what the optimizer computed."""

    def checkpoint_bytes(self) -> int:
        """Bytes that this rank would write; the first call makes the host memory for `snapshot`."""

    def snapshot(self, folder: Path) -> Callable[[], list[Path]]:
        """Copy this rank's state to host memory; the next steps may then change it. A copy is valid until the next one.

        Returns a function, for a thread, that writes the copy into `folder`, which must exist and have room,
        and returns the files that this rank wrote, possibly in subfolders. Among all ranks' files,
        `model.safetensors` has the weights that the model computes with.
        """

    def manifest_entries(self) -> dict[str, Any]:
        """The engine's entries in a checkpoint's manifest: the name of the framework, and its settings."""


class Framework(Protocol):
    """Makes the engine of a run; imports its libraries only when needed. name: in checkpoints' manifests."""

    name: str

    def world(self) -> World:
        """Rank and world size of this process. Raises UserError where the launcher's variables are wrong."""

    def check(self, config: Config, world: World) -> None:
        """Raise UserError for mistakes that can be found without importing torch or JAX."""

    def start(self, config: Config, world: World) -> torch.device:
        """Join the process group (`lamda.distributed`) and return this rank's `Engine.device`. Raises UserError."""

    def engine(self, config: Config, *, world: World, device: torch.device, domains: int, progress: Progress) -> Engine:
        """An engine without weights. Raises UserError.

        domains: number of domains with a loss of their own. progress: called as weights are made or loaded, and for
        each generated token.
        """
