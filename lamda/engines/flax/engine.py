"""The Flax engine: training steps over a mesh of devices, scoring and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from lamda.config.stages import plan_stages
from lamda.data.loader import StepBatch, batch_digest
from lamda.distributed import World, gather
from lamda.durable import Progress
from lamda.engines.flax.checkpoint import Checkpointer
from lamda.engines.flax.generation import generate
from lamda.engines.flax.optimizer import make_optimizer
from lamda.engines.flax.sharding import ROWS, MeshPlacement, make_mesh, row_ranks, shardings_like, weight_sharding
from lamda.engines.flax.step import Batch, StepOutput, TrainState, make_step
from lamda.engines.flax.weight_check import corrupted_processes
from lamda.engines.flax.weights import Weights, bind, in_stacks, load_weights, place_weights, stacked_shapes
from lamda.engines.protocol import PhaseHook, StepMetrics
from lamda.engines.shared_drawing import drawn_pieces, whole
from lamda.inference.sampling import Sampling
from lamda.model.counts import peak_flops
from lamda.model.initialization import initial_weights


@dataclass(frozen=True)
class FlaxStep:
    """See `lamda.engines.protocol.PendingStep`. rows: [B, 32] uint8, the sha256 of each row in global order."""

    output: StepOutput
    rows: NDArray[np.uint8]
    counters: Sequence[float]

    @property
    def skipped(self) -> bool:
        return not self.output.updated

    def wait(self) -> StepMetrics:
        sums = np.asarray(self.output.sums, np.float64)
        return StepMetrics(sums, float(self.output.grad_norm), batch_digest(self.rows), self.counters)


class FlaxEngine:
    """See `lamda.engines.protocol.Engine`; a rank is a process with any number of devices. The state is fp32."""

    def __init__(
        self, config: Config, *, world: World, is_bf16: bool, domains: int, progress: Progress = lambda: None
    ) -> None:
        self.config, self.world, self.device, self.is_compiled = config, world, torch.device("cpu"), True
        self.mesh = make_mesh(config.flax, config.model)
        self._placement = MeshPlacement(self.mesh)
        self.num_devices = self.mesh.size
        self.peak_flops = peak_flops(jax.devices()[0].device_kind)
        self._dtype = jnp.bfloat16 if is_bf16 else jnp.float32
        self._optimizer = make_optimizer(config.train, config.model)
        self._progress = progress
        self.state = self._empty_state()
        for stage in plan_stages(config):
            micro_batches_per_rank(stage.config.train, world_size=row_ranks(self.mesh))
        self.enter_stage(config, domains=domains)
        self._checkpointer = Checkpointer(dtype=self._dtype, is_main_process=world.is_main_process)
        self._rows = NamedSharding(self.mesh, PartitionSpec(ROWS))
        self._to_compute_dtype = jax.jit(
            lambda weights: {name: weight.astype(self._dtype) for name, weight in weights.items()}
        )
        self._logits = jax.jit(self._logits_of, out_shardings=self._rows)
        self._nll = jax.jit(self._nll_of, out_shardings=self._rows)

    def enter_stage(self, config: Config, *, domains: int) -> None:
        self.config = config
        self.micro_batches = micro_batches_per_rank(config.train, world_size=row_ranks(self.mesh))
        self._step = make_step(
            config, self._optimizer, state=self.state, mesh=self.mesh, dtype=self._dtype, domains=domains
        )

    def train_step(
        self,
        batch: StepBatch,
        *,
        lr: float,
        counters: Sequence[int] = (),
        on_phase: PhaseHook = lambda phase, tensor: None,
    ) -> FlaxStep:
        """Run the compiled step (`lamda.engines.flax.step`) on all devices."""
        on_phase("forward", None)
        self.state, output = self._step(self.state, self._placed_batch(batch), jnp.float32(lr))
        on_phase("update", None)
        rows = np.zeros((self.config.train.global_batch_size, 32), np.uint8)
        parts = gather((batch.positions, batch.digests, tuple(counters)))
        for positions, digests, _ in parts:
            rows[positions] = digests
        totals = [float(sum(numbers)) for numbers in zip(*(part[2] for part in parts), strict=True)]
        return FlaxStep(output, rows, totals)

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Converts the weights to the precision of the computation once for all calls."""
        self._eval_weights = self._to_compute_dtype(self.state.weights)
        try:
            yield
        finally:
            del self._eval_weights

    def logits(self, inputs_BL: torch.Tensor) -> torch.Tensor:
        return self._of_rows(self._logits, inputs_BL)

    def nll(
        self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor, documents_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        documents = () if documents_BL is None else (documents_BL,)
        return self._of_rows(self._nll, inputs_BL, targets_BL, *documents)

    def generate(self, ids: Sequence[int], sampling: Sampling) -> list[int]:
        weights = self._to_compute_dtype(self.state.weights)
        (new,) = generate(self.config.model, weights, [ids], sampling, placement=self._placement)
        return new

    def initialize_weights(self) -> None:
        config = self.config
        drawn = in_stacks(initial_weights(config.model, seed=config.run.seed, base_width=config.train.base_width))
        pieces = drawn_pieces(drawn, world=self.world, device=self.device, dtype=torch.float32)
        weights = place_weights(whole(pieces, drawn, progress=self._progress), config.model, self._shardings())
        self.state = self._with_fresh_optimizer(weights)

    def load_checkpoint(self, path: Path) -> None:
        self.state = self._checkpointer.read(path, self.state)

    def load_weights(self, path: Path) -> None:
        weights = load_weights(path, self.config.model, dtype=jnp.float32, shardings=self._shardings())
        self.state = self._with_fresh_optimizer(weights)

    def corrupted_ranks(self) -> list[int]:
        return corrupted_processes(self.state.weights, self.mesh)

    def checkpoint_bytes(self) -> int:
        return self._checkpointer.size(self.state)

    def snapshot(self, folder: Path) -> Callable[[], list[Path]]:
        return self._checkpointer.take(self.state, folder)

    def manifest_entries(self) -> dict[str, Any]:
        return {"framework": "flax", "mesh": dict(self.mesh.shape)}

    def _shardings(self) -> dict[str, NamedSharding]:
        return {name: weight_sharding(name, self.mesh) for name in stacked_shapes(self.config.model)}

    def _empty_state(self) -> TrainState:
        """The shapes and shardings of the state, without values."""
        weights: Any = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in stacked_shapes(self.config.model).items()
        }
        state = TrainState(weights, jax.eval_shape(self._optimizer.init, weights))
        shardings = shardings_like(state, self.mesh, stacked_shapes(self.config.model))
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
        )

    def _with_fresh_optimizer(self, weights: Weights) -> TrainState:
        init, shapes = self._optimizer.init, stacked_shapes(self.config.model)
        shardings = shardings_like(jax.eval_shape(init, weights), self.mesh, shapes)
        return TrainState(weights, jax.jit(init, out_shardings=shardings)(weights))

    def _placed_batch(self, step: StepBatch) -> Batch:
        """This rank's micro-batches as its shards of the step's arrays."""
        sharding = NamedSharding(self.mesh, PartitionSpec(None, ROWS))

        def placed(name: str, dtype: type[np.generic]) -> Array:
            parts = np.stack([getattr(each, name) for each in step.micro_batches]).astype(dtype)
            local = parts.reshape(self.micro_batches, -1, parts.shape[-1])
            return jax.make_array_from_process_local_data(sharding, local)

        documents = None if step.micro_batches[0].documents is None else placed("documents", np.int32)
        return Batch(placed("ids", np.int32), placed("loss_mask", np.bool_), placed("domains", np.int32), documents)

    def _of_rows(self, function: Callable[..., Array], *tensors: torch.Tensor) -> torch.Tensor:
        """Run a program of all ranks on rows of this rank, padded to a multiple of its devices."""
        count, divisor = len(tensors[0]), row_ranks(self.mesh) // self.world.world_size
        padded = [np.pad(tensor.numpy().astype(np.int32), ((0, -count % divisor), (0, 0))) for tensor in tensors]
        arrays = [jax.make_array_from_process_local_data(self._rows, rows) for rows in padded]
        out = function(self._eval_weights, *arrays)
        shards = {shard.index[0].start or 0: shard.data for shard in out.addressable_shards}
        local = np.concatenate([np.asarray(shards[start], np.float32) for start in sorted(shards)])
        return torch.from_numpy(local[:count])

    def _logits_of(self, weights: Weights, inputs_BL: Array) -> Array:
        return bind(self.config.model, weights, placement=self._placement)(inputs_BL)

    def _nll_of(self, weights: Weights, *rows: Array) -> Array:
        nll_BL, _ = bind(self.config.model, weights, placement=self._placement).losses(*rows)
        return nll_BL
