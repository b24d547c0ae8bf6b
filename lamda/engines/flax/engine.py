"""The Flax model, its optimiser and the devices that share them, as the training loop knows an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from lamda.config.batches import micro_batches_per_rank
from lamda.config.schema import Config
from lamda.data.loader import Step, batch_digest
from lamda.distributed import World, gather
from lamda.durable import Progress
from lamda.engines.flax.checkpoint import Checkpointer
from lamda.engines.flax.generation import generate
from lamda.engines.flax.optimizer import make_optimizer
from lamda.engines.flax.sharding import (
    ROWS,
    MeshPlacement,
    make_mesh,
    row_ranks,
    shardings_like,
    weight_sharding,
)
from lamda.engines.flax.step import Batch, Figures, TrainState, make_step
from lamda.engines.flax.weight_check import odd_processes
from lamda.engines.flax.weights import Weights, bind, load_weights, make_weights, stacked_shapes
from lamda.inference.sampling import Sampling
from lamda.model.counts import peak_flops
from lamda.model.initialization import initial_weights


@dataclass(frozen=True)
class FlaxResult:
    """See `lamda.engines.protocol.StepResult`. rows: [B, 32] uint8, the sha256 of each row in global order."""

    figures: Figures
    rows: NDArray[np.uint8]
    told: list[float]

    @property
    def grad_norm(self) -> float:
        """Of the gradient before it was clipped."""
        return float(self.figures.grad_norm)

    @property
    def updated(self) -> bool:
        """Whether the weights have changed; waits for the step."""
        return bool(self.figures.updated)

    def loss(self) -> float:
        """Cross-entropy in nats a target, over all ranks."""
        nats, targets = np.asarray(self.figures.sums, np.float64).sum(axis=1)
        return float(nats / targets)

    def by_domain(self) -> list[tuple[float, int]]:
        """(loss, targets) of each domain; the loss of none is NaN."""
        columns = np.asarray(self.figures.sums, np.float64).T.tolist()
        return [(nats / targets if targets else nan, int(targets)) for nats, targets in columns]

    def batch_digest(self) -> str:
        """16 hex digits that name the batch."""
        return batch_digest(self.rows)

    def signals(self) -> list[float]:
        """The ranks' sums of the numbers that they told with the step."""
        return self.told


class FlaxEngine:
    """See `lamda.engines.protocol.Engine`. A rank is a process, which may have many devices.

    The state is fp32; dtype, of the computation, is bf16 where DeepSpeed's file says so.
    """

    def __init__(
        self, config: Config, *, world: World, is_bf16: bool, domains: int, progress: Progress = lambda: None
    ) -> None:
        self.config, self.world, self.device, self.is_compiled = config, world, torch.device("cpu"), True
        self.mesh = make_mesh(config.flax, config.model)
        self._placement = MeshPlacement(self.mesh)
        self.devices = self.mesh.size
        self.peak_flops = peak_flops(jax.devices()[0].device_kind)
        self.micro_batches = micro_batches_per_rank(config.train, world=row_ranks(self.mesh))
        self._dtype = jnp.bfloat16 if is_bf16 else jnp.float32
        optimizer = make_optimizer(config.train, config.model)
        drawn = {}
        for name, weight in initial_weights(config.model, seed=config.run.seed, base_width=config.train.base_width):
            drawn[name] = weight
            progress()
        weights = self._placed(lambda name, index: drawn[name].numpy()[index])
        self.state = self._with_fresh_optimizer(weights, optimizer.init)
        self._optimizer = optimizer
        self._step = make_step(config, optimizer, state=self.state, mesh=self.mesh, dtype=self._dtype, domains=domains)
        self._checkpointer = Checkpointer(dtype=self._dtype, is_main=world.is_main)
        self._rows = NamedSharding(self.mesh, PartitionSpec(ROWS))
        self._narrow = jax.jit(lambda weights: {name: each.astype(self._dtype) for name, each in weights.items()})
        self._logits = jax.jit(self._logits_of, out_shardings=self._rows)
        self._nats = jax.jit(self._nats_of, out_shardings=self._rows)

    def step(
        self,
        batch: Step,
        *,
        learning_rate: float,
        signals: tuple[int, ...] = (),
        at: Callable[[str, torch.Tensor | None], None] = lambda point, tensor: None,
    ) -> FlaxResult:
        """One compiled program over all devices (`lamda.engines.flax.step`)."""
        at("forward", None)
        self.state, figures = self._step(self.state, self._placed_batch(batch), jnp.float32(learning_rate))
        at("update", None)
        rows = np.zeros((self.config.train.global_batch_size, 32), np.uint8)
        parts = gather((batch.positions, batch.digests, signals))
        for positions, digests, _ in parts:
            rows[positions] = digests
        told = [float(sum(numbers)) for numbers in zip(*(part[2] for part in parts), strict=True)]
        return FlaxResult(figures, rows, told)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The weights in the computation's precision, made once."""
        self._evaluated = self._narrow(self.state.weights)
        try:
            yield
        finally:
            del self._evaluated

    def logits(self, inputs_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, V] of this rank's rows."""
        return self._of_rows(self._logits, inputs_BL)

    def nats(
        self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor, documents_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, L], the cross-entropy of each target of this rank's rows."""
        documents = () if documents_BL is None else (documents_BL,)
        return self._of_rows(self._nats, inputs_BL, targets_BL, *documents)

    def generate(self, ids: Sequence[int], sampling: Sampling) -> list[int]:
        """What the model writes after `ids`, the same on every rank."""
        weights = self._narrow(self.state.weights)
        (new,) = generate(self.config.model, weights, [ids], sampling, placement=self._placement)
        return new

    def load(self, path: Path) -> None:
        """Take a checkpoint's state, from whatever mesh it came."""
        self.state = self._checkpointer.read(path, self.state)

    def load_weights(self, path: Path) -> None:
        """Take the weights of a safetensors file; the optimiser's state is that of none."""
        weights = load_weights(path, self.config.model, dtype=jnp.float32, shardings=self._shardings())
        self.state = self._with_fresh_optimizer(weights, self._optimizer.init)

    def odd_ranks(self) -> list[int]:
        """The processes with a device whose copy of the weights is not the others'."""
        return odd_processes(self.state.weights, self.mesh)

    def checkpoint_bytes(self) -> int:
        """What this rank would write."""
        return self._checkpointer.size(self.state)

    def copy(self, folder: Path) -> Callable[[], list[Path]]:
        """See `lamda.engines.flax.checkpoint`."""
        return self._checkpointer.take(self.state, folder)

    def describe(self) -> dict[str, Any]:
        """The framework, and the mesh that wrote."""
        return {"framework": "flax", "mesh": dict(self.mesh.shape)}

    def _shardings(self) -> dict[str, NamedSharding]:
        return {name: weight_sharding(name, self.mesh) for name in stacked_shapes(self.config.model)}

    def _placed(self, read: Callable[[str, tuple[slice, ...]], NDArray[Any]]) -> Weights:
        return make_weights(self.config.model, read, dtype=jnp.float32, shardings=self._shardings())

    def _with_fresh_optimizer(self, weights: Weights, init: Callable[[Weights], Any]) -> TrainState:
        shapes = stacked_shapes(self.config.model)
        lies = shardings_like(jax.eval_shape(init, weights), self.mesh, shapes)
        return TrainState(weights, jax.jit(init, out_shardings=lies)(weights))

    def _placed_batch(self, step: Step) -> Batch:
        """This rank's micro-batches as its part of the step's arrays."""
        lies = NamedSharding(self.mesh, PartitionSpec(None, ROWS))

        def placed(name: str, dtype: type[np.generic]) -> Array:
            parts = np.stack([getattr(each, name) for each in step.micro_batches]).astype(dtype)
            local = parts.reshape(self.micro_batches, -1, parts.shape[-1])
            return jax.make_array_from_process_local_data(lies, local)

        documents = None if step.micro_batches[0].documents is None else placed("documents", np.int32)
        return Batch(placed("ids", np.int32), placed("scored", np.bool_), placed("domains", np.int32), documents)

    def _of_rows(self, function: Callable[..., Array], *tensors: torch.Tensor) -> torch.Tensor:
        """Rows of this rank through a program of all ranks, filled up to what the devices share evenly."""
        count, each = len(tensors[0]), row_ranks(self.mesh) // self.world.size
        filled = [np.pad(tensor.numpy().astype(np.int32), ((0, -count % each), (0, 0))) for tensor in tensors]
        given = [jax.make_array_from_process_local_data(self._rows, part) for part in filled]
        out = function(self._evaluated, *given)
        shards = {shard.index[0].start or 0: shard.data for shard in out.addressable_shards}
        own = np.concatenate([np.asarray(shards[start], np.float32) for start in sorted(shards)])
        return torch.from_numpy(own[:count])

    def _logits_of(self, weights: Weights, inputs_BL: Array) -> Array:
        return bind(self.config.model, weights, placement=self._placement)(inputs_BL)

    def _nats_of(
        self, weights: Weights, inputs_BL: Array, targets_BL: Array, documents_BL: Array | None = None
    ) -> Array:
        return bind(self.config.model, weights, placement=self._placement).losses(inputs_BL, targets_BL, documents_BL)[
            0
        ]
