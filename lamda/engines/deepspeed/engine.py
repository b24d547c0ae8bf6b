"""The model under DeepSpeed: one step over the whole world's batch, and the weights as they stand."""

from __future__ import annotations

import gc
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lamda.config import ds_config
from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.loader import MicroBatch, Step, batch_digest
from lamda.distributed import World
from lamda.durable import Progress
from lamda.engines.deepspeed import checkpoint, compile, fp8, lora, weight_check
from lamda.engines.deepspeed.fragments import publish_weights, reset_state
from lamda.engines.deepspeed.optimizer import eager_kernels, make_optimizer, set_learning_rate
from lamda.engines.deepspeed.snapshot import Snapshots
from lamda.inference.generation import prefill, sample
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA
from lamda.model.counts import peak_flops
from lamda.model.initialization import initialise
from lamda.model.loss import token_nats
from lamda.model.weights import weight_shapes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """A step's figures, still on the device: reading them waits for the step to end.

    sums: [2, domains] float64, nats and targets of all ranks by domain. rows: [B, 32] int32, the sha256
    of each row in global order. told: float64, the sums of the ranks' own numbers.
    """

    sums: torch.Tensor
    rows: torch.Tensor
    grad_norm: float | torch.Tensor
    updated: bool
    told: torch.Tensor

    def loss(self) -> float:
        """Cross-entropy in nats a target, over all ranks."""
        nats, targets = self.sums.sum(dim=1).tolist()
        return nats / targets

    def by_domain(self) -> list[tuple[float, int]]:
        """(loss, targets) of each domain; the loss of none is NaN."""
        return [(nats / targets if targets else math.nan, int(targets)) for nats, targets in self.sums.T.tolist()]

    def batch_digest(self) -> str:
        """16 hex digits that name the batch."""
        return batch_digest(self.rows.to(torch.uint8).cpu().numpy())

    def signals(self) -> list[float]:
        """The ranks' sums of the numbers that they told with the step."""
        return self.told.tolist()


class Engine:
    """A LaMDA, its optimiser and the ranks that share them (`lamda.engines.protocol.Engine`)."""

    def __init__(
        self,
        config: Config,
        *,
        world: World,
        device: torch.device,
        domains: int = 1,
        progress: Progress = lambda: None,
    ) -> None:
        self.progress = progress
        self.config, self.world, self.device, self.domains = config, world, device, domains
        self.peak_flops = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.devices = world.size
        own = ds_config.build(config, world=world.size)
        self.stage, self.is_bf16 = ds_config.zero_stage(own), ds_config.is_bf16(own)
        if self.is_bf16 and world.is_main and _emulates_bf16(device):
            log.warning(
                "this processor has no bf16 instructions: a step takes several times as long as in fp32, which "
                "--deepspeed.config deepspeed/fp32.json trains in"
            )
        # Without ZeRO and in fp32 DeepSpeed neither tells the gradient's norm nor refuses one that is not finite.
        self._is_unguarded = self.stage == 0 and not self.is_bf16
        if self._is_unguarded:
            own["gradient_clipping"] = 0.0
        model = LaMDA(config.model, recompute=config.train.recompute)
        initialise(model, seed=config.run.seed, base_width=config.train.base_width, progress=progress)
        if config.train.lora_rank:
            lora.adapt(model, rank=config.train.lora_rank, seed=config.run.seed)
            if self.is_bf16:
                model.bfloat16()  # as DeepSpeed would, but only after the device had held all of it in fp32
        model.to(device)
        if config.train.fp8:
            fp8.check(model, device)
            fp8.convert(model)
        self.is_compiled = compile.is_worthwhile(config, device, stage=self.stage)
        if self.is_compiled:
            compile.compile_blocks(model)
        self._is_first = True
        with _quiet(), eager_kernels(config.train):
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=make_optimizer(model, config.train), config=own, dist_init_required=False
            )
        reset_state(self.deepspeed, optimizer=config.train.optimizer, updates=0)
        self._snapshots = Snapshots(self)

    @property
    def model(self) -> LaMDA:
        """The module that computes."""
        return self.deepspeed.module

    def step(
        self,
        batch: Step,
        *,
        learning_rate: float,
        signals: tuple[int, ...] = (),
        at: Callable[[str, torch.Tensor | None], None] = lambda point, tensor: None,
    ) -> StepResult:
        """Forward, backward and update over this rank's micro-batches.

        The loss is the sum over targets divided by the global number of targets; it is scaled by the
        number of ranks, because DeepSpeed averages gradients over them. signals: numbers of this rank
        whose sums over the ranks come with the result. at: told of each moment of the step.
        """
        try:
            with compile.compiled_once(compiled=self.is_compiled, first=self._is_first):
                result = self._step(batch, learning_rate, signals, at)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        else:
            self._is_first = False
            return result
        # Only here, where the error is gone: its traceback holds the failed step's frames, and they its activations.
        gc.collect()
        raise UserError(self._too_large(reason))

    def _step(
        self,
        batch: Step,
        learning_rate: float,
        signals: tuple[int, ...],
        at: Callable[[str, torch.Tensor | None], None],
    ) -> StepResult:
        set_learning_rate(self.deepspeed.optimizer, learning_rate)
        parts = [_Part.of(micro_batch, self.device) for micro_batch in batch.micro_batches]
        targets = sum(part.scored_BL.sum() for part in parts)
        dist.all_reduce(targets)
        sums = torch.zeros(2, self.domains, dtype=torch.float64, device=self.device)
        for part in parts:
            at("forward", None)
            nats_BL, partition_BL = self.deepspeed(part.inputs_BL, part.documents_BL, targets_BL=part.targets_BL)
            losses_BL = nats_BL + self.config.train.z_loss * partition_BL.square()
            loss = (losses_BL * part.scored_BL).sum() * (self.world.size / targets)
            at("loss", loss)
            self.deepspeed.backward(_or_nan(loss), scale_wrt_gas=False)
            at("backward", None)
            own_norm = self._clip_and_refuse() if self._is_unguarded else None
            with eager_kernels(self.config.train):
                self.deepspeed.step()
            sums += part.sums(nats_BL.detach(), domains=self.domains)
        at("update", next(self.model.parameters()))
        summed = torch.cat([sums.flatten(), torch.tensor(signals, dtype=sums.dtype, device=self.device)])
        dist.all_reduce(summed)
        sums, told = summed[: sums.numel()].view_as(sums), summed[sums.numel() :]
        if own_norm is not None:
            return StepResult(sums, self._rows(batch), own_norm, bool(torch.isfinite(own_norm)), told)
        norm = self.deepspeed.get_global_grad_norm()
        return StepResult(sums, self._rows(batch), norm, self.deepspeed.was_step_applied(), told)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model without gradients, and back to training after."""
        self.model.eval()
        with torch.no_grad(), compile.eagerly(compiled=self.is_compiled):
            yield
        self.model.train()

    def logits(self, inputs_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, V]; every rank calls it."""
        return self.deepspeed(inputs_BL)

    def nats(
        self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor, documents_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, L], the cross-entropy of each target; every rank calls it."""
        return token_nats(self.deepspeed(inputs_BL, documents_BL), targets_BL)

    def generate(self, ids: Sequence[int], sampling: Sampling) -> list[int]:
        """What the model writes after `ids`; every rank calls it."""
        with self.evaluating(), self.whole(*self.model.parameters()):
            written = sample(self.model, prefill(self.model, ids), sampling=sampling, on_token=self._on_token)
        return written.ids[0]

    def _on_token(self, candidate: int, token: int) -> None:
        self.progress()

    @contextmanager
    def whole(self, *parameters: torch.nn.Parameter) -> Iterator[None]:
        """These parameters whole on every rank (gathered at stage 3, where a rank holds a part)."""
        with deepspeed.zero.GatheredParameters(list(parameters)) if self.stage == 3 else nullcontext():
            yield

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """On rank 0 the weights that the model computes with, by name; gathered one at a time at stage 3.

        Adapters (`lamda.engines.deepspeed.lora`) are in them. A view is valid until the next one is asked for. Every
        rank goes through the whole iteration.
        """
        for name in weight_shapes(self.config.model):
            with self.whole(self.model.get_parameter(name)):
                if self.world.is_main:
                    yield name, lora.merged(self.model, name)

    def publish_weights(self) -> None:
        """Bring filled fp32 weights into the parameters that the model computes with."""
        publish_weights(self.deepspeed)

    def load(self, path: Path) -> None:
        """See `lamda.engines.deepspeed.checkpoint.load`."""
        checkpoint.load(path, engine=self)

    def load_weights(self, path: Path) -> None:
        """See `lamda.engines.deepspeed.checkpoint.load_weights_alone`."""
        checkpoint.load_weights_alone(path, engine=self)

    def odd_ranks(self) -> list[int]:
        """See `lamda.engines.deepspeed.weight_check.odd_ranks`."""
        return weight_check.odd_ranks(self)

    def checkpoint_bytes(self) -> int:
        """What this rank would write."""
        return self._snapshots.size()

    def copy(self, folder: Path) -> Callable[[], list[Path]]:
        """See `lamda.engines.deepspeed.snapshot.Snapshots.take`."""
        return self._snapshots.take(folder)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint's manifest tells of it."""
        return {"framework": "deepspeed", "zero_stage": self.stage}

    def _too_large(self, reason: str) -> str:
        """What to change after memory ran out: every step has the same shapes, so the first one tells.

        At ZeRO stage 3 nothing is measured: every rank would have to gather weights for it, and others still compute.
        """
        own = self.config.train.micro_batch_size
        told = f"train.micro_batch_size {own} does not fit into memory ({reason.splitlines()[0]})"
        if self.stage == 3:
            return f"{told}; take a smaller one, train.recompute block, or a smaller model"
        fitting = next((rows for rows in range(own // 2, 0, -1) if own % rows == 0 and self._fits(rows)), None)
        if fitting is None:
            return f"{told}; nor does 1: take train.recompute block, a higher ZeRO stage, or a smaller model"
        return f"{told}; {fitting} does, or take train.recompute ffn or block"

    def _fits(self, rows: int) -> bool:
        """Whether that many rows go through the model and back, beside all that is there already."""
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        ids = torch.zeros(rows, self.config.data.sequence_length, dtype=torch.int64, device=self.device)
        try:
            with compile.eagerly(compiled=self.is_compiled):
                nats_BL, _ = self.model(ids, targets_BL=ids)
                torch.autograd.grad(nats_BL.sum(), [each for each in self.model.parameters() if each.requires_grad])
        except torch.OutOfMemoryError:
            return False
        return True

    def _rows(self, batch: Step) -> torch.Tensor:
        """Every row's sha256 on every rank; a row is one rank's, the others add zero."""
        rows = np.zeros((self.config.train.global_batch_size, 32), np.int32)
        rows[batch.positions] = batch.digests
        gathered = torch.from_numpy(rows).to(self.device)
        dist.all_reduce(gathered)
        return gathered

    def _clip_and_refuse(self) -> torch.Tensor | None:
        """Clip the step's gradient, or drop it where it is not finite; its norm, at the last micro-batch."""
        if not self.deepspeed.is_gradient_accumulation_boundary():
            return None
        limit = self.config.train.gradient_clipping or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if not torch.isfinite(norm):
            self.model.zero_grad(set_to_none=True)
        return norm


def _or_nan(loss: torch.Tensor) -> torch.Tensor:
    """The loss, with a gradient of NaN where it is not finite: so the step is refused on all ranks."""
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


@dataclass(frozen=True)
class _Part:
    """A micro-batch on the device.

    inputs, targets: [b, L] int64. documents: [b, L], where attention stays inside a document. scored:
    [b, L] fp32, 1 where the target counts. domains: [b, L] int64, of the targets.
    """

    inputs_BL: torch.Tensor
    targets_BL: torch.Tensor
    documents_BL: torch.Tensor | None
    scored_BL: torch.Tensor
    domains_BL: torch.Tensor

    @classmethod
    def of(cls, rows: MicroBatch, device: torch.device) -> _Part:
        def moved(array: NDArray[np.generic], dtype: type[np.generic]) -> torch.Tensor:
            return torch.from_numpy(array.astype(dtype)).to(device, non_blocking=True)

        ids = moved(rows.ids, np.int64)
        documents = None if rows.documents is None else moved(rows.documents[:, :-1], np.int64)
        scored, domains = moved(rows.scored, np.float32), moved(rows.domains, np.int64)
        return cls(ids[:, :-1], ids[:, 1:], documents, scored, domains)

    def sums(self, nats_BL: torch.Tensor, *, domains: int) -> torch.Tensor:
        """[2, domains] float64: nats and targets by domain, the same on any number of ranks.

        A product adds up in one order on every device; float64 holds the sums of the fp32 products exactly.
        """
        kinds = torch.arange(domains, device=nats_BL.device)
        of_domain_dN = (self.domains_BL.flatten() == kinds[:, None]).float() * self.scored_BL.flatten()
        return torch.stack([of_domain_dN @ nats_BL.float().flatten(), of_domain_dN.sum(dim=1)]).double()


def _emulates_bf16(device: torch.device) -> bool:
    """Whether PyTorch has no fast bf16 product here: measured with 2.13 on AVX2, 100 tokens/s for 600 in fp32."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed reports its memory as it starts, and calls PyTorch by older names: nothing that a user can fix.

    For each report it collects garbage, 14 times 0.5 s a start on a CPU. Once is enough: frozen objects are left out.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    said = io.StringIO()
    gc.collect()
    gc.freeze()
    try:
        with redirect_stdout(said):
            yield
    finally:
        gc.unfreeze()
    log.debug("DeepSpeed: %s", said.getvalue())
