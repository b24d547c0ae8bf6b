"""What trains a model: the calls by which the loop knows a framework, and nothing of the framework itself.

`lamda.engines.deepspeed.framework` is DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from lamda.config.schema import Config
    from lamda.data.loader import Step
    from lamda.distributed import World
    from lamda.durable import Progress
    from lamda.inference.sampling import Sampling


class StepResult(Protocol):
    """A step's figures, which its device may still be computing: reading them waits for it.

    grad_norm: of the gradient before it was clipped. updated: whether the weights have changed; a step whose loss
    or gradient is not finite is refused on all ranks alike.
    """

    grad_norm: float | torch.Tensor
    updated: bool

    def loss(self) -> float:
        """Cross-entropy in nats a target, over all ranks."""
        ...

    def by_domain(self) -> list[tuple[float, int]]:
        """(loss, targets) of each domain; the loss of none is NaN."""
        ...

    def batch_digest(self) -> str:
        """16 hex digits that name the batch (`lamda.data.loader.batch_digest`)."""
        ...

    def signals(self) -> list[float]:
        """The ranks' sums of the numbers that they told with the step."""
        ...


class Scorer(Protocol):
    """A model as evaluations see it. Where ranks share a model, every rank makes the same calls."""

    def logits(self, inputs_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, V] of token ids."""
        ...

    def nats(
        self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor, documents_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, L], the cross-entropy of each target; the logits need not leave the device.

        documents: an id an input, where attention stays inside a document.
        """
        ...


class Engine(Scorer, Protocol):
    """A model, its optimiser and the devices that share them. Every rank has one and makes the same calls.

    device: where the host's collectives keep their tensors, and what a `Scorer` is given. is_compiled: whether the
    first step compiles. peak_flops: of one device (None: not known, then there is no MFU). devices: those of all
    ranks that share a batch's work.
    """

    config: Config
    world: World
    device: torch.device
    is_compiled: bool
    peak_flops: float | None
    devices: int

    def step(
        self,
        batch: Step,
        *,
        learning_rate: float,
        signals: tuple[int, ...],
        at: Callable[[str, torch.Tensor | None], None],
    ) -> StepResult:
        """Train on this rank's micro-batches of a step.

        signals: numbers of this rank whose sums over the ranks come with the result. at: told of the moments
        `faults.STEP_POINTS` from "forward" to "update", and of a tensor there that a fault may spoil, if there is one.
        """
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Around calls of `logits` and `nats`: without gradients, and back to training after."""
        ...

    def generate(self, ids: Sequence[int], sampling: Sampling) -> list[int]:
        """What the model writes after `ids`, the same on every rank."""
        ...

    def load(self, path: Path) -> None:
        """Take weights and the optimiser's state from a verified checkpoint.

        Raises UserError before anything is changed.
        """
        ...

    def load_weights(self, path: Path) -> None:
        """Take the weights of a safetensors file by plain name; the optimiser's state is that of none."""
        ...

    def odd_ranks(self) -> list[int]:
        """The ranks whose weights are not what the optimiser computed."""
        ...

    def checkpoint_bytes(self) -> int:
        """What this rank would write."""
        ...

    def copy(self, folder: Path) -> Callable[[], list[Path]]:
        """Copy this rank's state to host memory; the next steps may change it at once.

        Returns what writes the copy into `folder`, which stands and has room: a thread calls it, while training goes
        on, and gets the files that this rank has written, in subfolders or not. Of all ranks' files `model.safetensors`
        has the weights that the model computes with. The copy is valid until the next one is made.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the engine adds to a checkpoint's manifest: "framework", its name, and what it tells of itself."""
        ...


class Framework(Protocol):
    """What is handed to `lamda.training.main.launch`. It loads its libraries where it needs them.

    name: as in checkpoints' manifests.
    """

    name: str

    def world(self) -> World:
        """This process among all of the run."""
        ...

    def check(self, config: Config, world: World) -> None:
        """Raise UserError for what can be known wrong before anything heavy is loaded."""
        ...

    def start(self, config: Config, world: World) -> torch.device:
        """Join the process group (`lamda.distributed`) and return this rank's `Engine.device`. Raises UserError."""
        ...

    def engine(self, config: Config, *, world: World, device: torch.device, domains: int, progress: Progress) -> Engine:
        """An engine with fresh weights. domains: those whose losses are told apart. Raises UserError.

        progress: called by the engine as it makes or loads weights, and for each token that it writes.
        """
        ...
