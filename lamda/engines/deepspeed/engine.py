"""The DeepSpeed engine: training steps over all ranks, scoring and checkpoints."""

from __future__ import annotations

import gc
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from lamda.config import ds_config
from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.loader import StepBatch, batch_digest
from lamda.distributed import World
from lamda.durable import Progress
from lamda.engines.deepspeed import checkpoint, compile, lora, weight_check
from lamda.engines.deepspeed.fragments import gathered_parameters, reset_state
from lamda.engines.deepspeed.initialization import empty_model, fill_weights
from lamda.engines.deepspeed.optimizer import check_the_norm_alone, make_optimizer, set_learning_rate, without_compile
from lamda.engines.deepspeed.staging import DeviceBatch, ToHost, arrays_of, to_device
from lamda.engines.protocol import PhaseHook, StepMetrics
from lamda.engines.shared_drawing import drawn_pieces, largest_first
from lamda.host_memory import keep_memory, trim_memory
from lamda.inference.generation import prefill, sample
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA
from lamda.model.counts import peak_flops
from lamda.model.initialization import InitialWeight, initial_weights
from lamda.model.loss import token_nll

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeepSpeedStep:
    """See `lamda.engines.protocol.PendingStep`.

    values: float64, on their way to the host: sums [2, domains], the counters, the sha256 of each row in global order
    [B, 32], and the gradient norm, unless DeepSpeed has read it already.
    """

    values: ToHost
    domains: int
    num_counters: int
    rows: int
    grad_norm: float | None
    skipped: bool

    def wait(self) -> StepMetrics:
        ends = np.cumsum([2 * self.domains, self.num_counters, 32 * self.rows])
        sums, counters, rows, norm = np.split(self.values.wait(), ends)
        return StepMetrics(
            sums.reshape(2, self.domains),
            float(norm[0]) if self.grad_norm is None else self.grad_norm,
            batch_digest(rows.astype(np.uint8).reshape(self.rows, 32)),
            counters.tolist(),
        )


class DeepSpeedEngine:
    """See `lamda.engines.protocol.Engine`. The ranks share the model by ZeRO."""

    def __init__(
        self, config: Config, *, world: World, device: torch.device, domains: int = 1, progress: Progress = lambda: None
    ) -> None:
        self._progress = progress
        self.config, self.world, self.device, self.domains = config, world, device, domains
        self.peak_flops = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.num_devices = world.world_size
        settings = ds_config.build(config, world_size=world.world_size)
        self.stage, self.is_bf16 = ds_config.zero_stage(settings), ds_config.is_bf16(settings)
        if self.is_bf16 and world.is_main_process and _emulates_bf16(device):
            log.warning(
                "this processor has no bf16 instructions: a step takes several times as long as in fp32; train in "
                "fp32 with --deepspeed.config deepspeed/fp32.json"
            )
        # Without ZeRO and in fp32 DeepSpeed neither returns the gradient norm nor skips a step where it is not finite.
        self._is_unguarded = self.stage == 0 and not self.is_bf16
        if self._is_unguarded:
            settings["gradient_clipping"] = 0.0
        self.is_compiled = compile.is_worthwhile(config, device.type, stage=self.stage)
        self._is_first = True
        with _quiet(), without_compile(config.train), _memory_of_state("the start"):
            model = empty_model(config, settings, device)
            if self.is_compiled:
                compile.compile_blocks(model)
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=make_optimizer(model, config.train), config=settings, dist_init_required=False
            )
            trim_memory()
            check_the_norm_alone(self.deepspeed.optimizer)
            reset_state(self.deepspeed, optimizer=config.train.optimizer, updates=0)

    @cached_property
    def _snapshots(self) -> checkpoint.Snapshots:
        return checkpoint.Snapshots(self.deepspeed, device=self.device)

    @property
    def model(self) -> LaMDA:
        """The module that computes."""
        return self.deepspeed.module

    def compile_blocks(self) -> None:
        """Compile the model's blocks in the next step, which may have other shapes than the steps before it."""
        compile.compile_blocks(self.model)
        self.is_compiled = self._is_first = True

    def enter_stage(self, config: Config, *, domains: int) -> None:
        before, train = self.config, config.train
        self.config, self.domains = config, domains
        self.deepspeed.set_train_micro_batch_size(train.micro_batch_size)
        self.deepspeed.set_train_batch_size(train.global_batch_size)
        self.deepspeed.micro_steps = 0  # a step ends when this is a multiple of the accumulation, which may be another
        self.deepspeed.optimizer.gradient_accumulation_steps = self.deepspeed.gradient_accumulation_steps()
        for module in (self.model, *self.model.layers):
            module.recompute = train.recompute
        shapes = [
            (
                each.train.micro_batch_size,
                each.data.sequence_length,
                each.train.recompute,
                each.data.separates_documents,
            )
            for each in (before, config)
        ]
        if self.is_compiled and shapes[0] != shapes[1]:
            self.compile_blocks()

    def train_step(
        self,
        batch: StepBatch,
        *,
        lr: float,
        counters: Sequence[int] = (),
        on_phase: PhaseHook = lambda phase, tensor: None,
    ) -> DeepSpeedStep:
        """See `lamda.engines.protocol.Engine`. Raises UserError where the step does not fit into memory.

        The loss is the sum over target tokens divided by their global number; it is multiplied by the number of ranks,
        because DeepSpeed averages gradients over them.
        """
        try:
            with compile.no_recompile(compiled=self.is_compiled, first=self._is_first):
                step = self._train_step(batch, lr, counters, on_phase)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        else:
            self._is_first = False
            return step
        # Outside of the except block: the traceback holds the failed step's frames, and they hold its activations.
        gc.collect()
        raise UserError(self._too_large(reason))

    def _train_step(self, batch: StepBatch, lr: float, counters: Sequence[int], on_phase: PhaseHook) -> DeepSpeedStep:
        """Nothing here waits for the device but DeepSpeed's update (docs/performance.md)."""
        if self._is_first and self.device.type == "cpu":
            keep_memory()
        set_learning_rate(self.deepspeed.optimizer, lr)
        parts, summed = self._to_device(batch, counters)
        sums = summed[: 2 * self.domains].view(2, self.domains)
        num_tokens = sum((part.loss_mask_BL.sum() for part in parts), start=torch.zeros((), device=self.device))
        dist.all_reduce(num_tokens)
        clipped: tuple[torch.Tensor, bool] | None = None
        for part in parts:
            on_phase("forward", None)
            nll_BL, log_z_BL = self.deepspeed(part.inputs_BL, part.documents_BL, targets_BL=part.targets_BL)
            losses_BL = nll_BL + self.config.train.z_loss * log_z_BL.square()
            loss = (losses_BL * part.loss_mask_BL).sum() * (self.world.world_size / num_tokens)
            on_phase("loss", loss)
            self.deepspeed.backward(_or_nan(loss), scale_wrt_gas=False)
            on_phase("backward", None)
            if self._is_unguarded and self.deepspeed.is_gradient_accumulation_boundary():
                clipped = self._clip_or_drop_gradient()
            with without_compile(self.config.train), _memory_of_state("the update of the weights"):
                self.deepspeed.step()
            sums += part.sums(nll_BL.detach(), domains=self.domains)
        on_phase("update", next(self.model.parameters()))
        dist.all_reduce(summed)
        norm, skipped = clipped or (self.deepspeed.get_global_grad_norm(), not self.deepspeed.was_step_applied())
        known = None if isinstance(norm, torch.Tensor) else float(norm)
        values = torch.cat([summed, norm.double().reshape(1)]) if known is None else summed
        rows = self.config.train.global_batch_size
        return DeepSpeedStep(ToHost(values), self.domains, len(counters), rows, known, skipped)

    def _to_device(self, batch: StepBatch, counters: Sequence[int]) -> tuple[list[DeviceBatch], torch.Tensor]:
        """The step's micro-batches, and the float64 that the ranks sum: zeros for the sums, counters, rows' sha256.

        Each rank has the sha256 of its own rows, and zeros for those of the others.
        """
        rows = np.zeros((self.config.train.global_batch_size, 32))
        rows[batch.positions] = batch.digests
        to_sum = np.concatenate([np.zeros(2 * self.domains), np.array(counters, np.float64), rows.ravel()])
        arrays = [array for micro_batch in batch.micro_batches for array in arrays_of(micro_batch)]
        *moved, summed = to_device([*arrays, to_sum], self.device)
        size = len(moved) // len(batch.micro_batches)
        return [DeviceBatch.of(*moved[at : at + size]) for at in range(0, len(moved), size)], summed

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        self.model.eval()
        with torch.no_grad(), compile.force_eager(compiled=self.is_compiled):
            yield
        self.model.train()

    def logits(self, inputs_BL: torch.Tensor) -> torch.Tensor:
        return self.deepspeed(inputs_BL)

    def nll(
        self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor, documents_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        return token_nll(self.deepspeed(inputs_BL, documents_BL), targets_BL)

    def generate(self, ids: Sequence[int], sampling: Sampling) -> list[int]:
        with self.eval_mode(), self.gathered_parameters():
            written = sample(self.model, prefill(self.model, ids), sampling=sampling, on_token=self._on_token)
        return written.ids[0]

    def _on_token(self, candidate: int, token: int) -> None:
        self._progress()

    def gathered_parameters(self) -> AbstractContextManager[object]:
        """The full parameters on every rank (at ZeRO stage 3 each rank holds a part)."""
        return gathered_parameters(self.deepspeed, list(self.model.parameters()))

    def initialize_weights(self) -> None:
        config = self.config
        weights = initial_weights(config.model, seed=config.run.seed, base_width=config.train.base_width)
        self._draw(weights | lora.initial_adapters(config))

    def load_checkpoint(self, path: Path) -> None:
        checkpoint.load(path, self.deepspeed, config=self.config, progress=self._progress)

    def load_weights(self, path: Path) -> None:
        self._draw(lora.initial_adapters(self.config))
        checkpoint.load_weights(path, self.deepspeed, progress=self._progress)

    def _draw(self, weights: Mapping[str, InitialWeight]) -> None:
        """Draw these weights, rounded as the model's."""
        dtype = torch.bfloat16 if self.is_bf16 else torch.float32
        pieces = drawn_pieces(largest_first(weights), world=self.world, device=self.device, dtype=dtype)
        fill_weights(self.deepspeed, pieces, progress=self._progress)

    def corrupted_ranks(self) -> list[int]:
        return weight_check.corrupted_ranks(self.deepspeed)

    def checkpoint_bytes(self) -> int:
        return self._snapshots.size()

    def snapshot(self, folder: Path) -> Callable[[], list[Path]]:
        return self._snapshots.take(folder)

    def manifest_entries(self) -> dict[str, Any]:
        return {"framework": "deepspeed", "zero_stage": self.stage, "attention": self.model.attention}

    def _too_large(self, reason: str) -> str:
        """The error message after memory ran out: in the first step of a stage, since all of its steps have one size.

        At ZeRO stage 3 no smaller size is tried: every rank would have to gather weights, and others still compute.
        """
        size = self.config.train.micro_batch_size
        problem = f"train.micro_batch_size {size} is out of memory ({reason.splitlines()[0]})"
        if self.stage == 3:
            return f"{problem}; use a smaller one, train.recompute block, or a smaller model"
        fitting = next((rows for rows in range(size // 2, 0, -1) if size % rows == 0 and self._fits(rows)), None)
        if fitting is None:
            return f"{problem}, and so is 1: use train.recompute block, a higher ZeRO stage, or a smaller model"
        return f"{problem}; {fitting} fits, or set train.recompute ffn or block"

    def _fits(self, rows: int) -> bool:
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        ids = torch.zeros(rows, self.config.data.sequence_length, dtype=torch.int64, device=self.device)
        try:
            with compile.force_eager(compiled=self.is_compiled):
                nll_BL, _ = self.model(ids, targets_BL=ids)
                torch.autograd.grad(
                    nll_BL.sum(), [weight for weight in self.model.parameters() if weight.requires_grad]
                )
        except torch.OutOfMemoryError:
            return False
        return True

    def _clip_or_drop_gradient(self) -> tuple[torch.Tensor, bool]:
        """Clip the gradient, or drop it where it is not finite; returns its norm, and whether it was dropped."""
        limit = self.config.train.gradient_clipping or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        is_dropped = not torch.isfinite(norm)
        if is_dropped:
            self.model.zero_grad(set_to_none=True)
        return norm, is_dropped


@contextmanager
def _memory_of_state(what: str) -> Iterator[None]:
    """Wraps what needs memory for the model's and the optimizer's state. Raises UserError where it runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{what} is out of memory ({str(error).splitlines()[0]}), and a smaller train.micro_batch_size needs as "
            "much there: use a higher ZeRO stage, more GPUs, deepspeed/offload-cpu.json, or a smaller model (`lamda "
            "plan` counts the memory)"
        ) from error


def _or_nan(loss: torch.Tensor) -> torch.Tensor:
    """The loss, with a gradient of NaN where it is not finite: so the step is skipped on all ranks."""
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


def _emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 matmuls are slow on this processor: PyTorch 2.13 on AVX2 reaches 100 tokens/s, 600 in fp32."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences DeepSpeed's memory reports and deprecation warnings as it starts: no user can act on them.

    It collects garbage for each report, 14 times 0.5 s on a CPU. Once is enough: frozen objects are not scanned.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    output = io.StringIO()
    gc.collect()
    gc.freeze()
    try:
        with redirect_stdout(output):
            yield
    finally:
        gc.unfreeze()
    log.debug("DeepSpeed: %s", output.getvalue())
