"""JAX and Flax as the framework of a run (`lamda.engines.protocol`); imported only where they are needed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from lamda import distributed
from lamda.config import ds_config
from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.distributed import World
from lamda.durable import Progress

if TYPE_CHECKING:
    import torch

    from lamda.engines.flax.engine import FlaxEngine


class Flax:
    """See `lamda.engines.protocol.Framework`.

    multihost: join the other processes of a TPU slice or a SLURM job, which JAX finds itself. Under torchrun or
    deepspeed their variables say where they are.
    """

    name = "flax"

    def __init__(self, *, multihost: bool = False) -> None:
        self._multihost = multihost

    def world(self) -> World:
        """Rank and world size from the launcher or from JAX. Raises UserError if JAX finds no other processes."""
        if not self._multihost:
            return distributed.read_world()
        require_jax()
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--multihost: JAX finds no other processes ({error}); it knows those of a TPU slice and of a SLURM "
                "step. Leave the option out, or start with torchrun"
            ) from error
        return World(rank=jax.process_index(), world_size=jax.process_count())

    def check(self, config: Config, world: World) -> None:
        """Reject keys that the JAX implementation does not support; devices are not known yet."""
        require_jax()
        ds_config.read(config)
        train = config.train
        unsupported = {
            "train.lora_rank": train.lora_rank or None,
            "train.fp8": train.fp8 or None,
            "train.profile": train.profile,
            "eval.tasks": config.eval.tasks or None,
        }
        problems = [
            f"{key}: the JAX implementation does not support it; remove it, or train with scripts/pretrain.py"
            for key, value in unsupported.items()
            if value is not None
        ]
        if problems:
            raise UserError("\n".join(problems))

    def start(self, config: Config, world: World) -> torch.device:
        """Join JAX's processes and a process group of the hosts; the training loop's tensors are on the CPU."""
        import jax
        import torch

        if self._multihost:
            from jax.experimental import multihost_utils

            address = distributed.free_address().encode().ljust(64) if world.is_main_process else bytes(64)
            received = bytes(multihost_utils.broadcast_one_to_all(bytearray(address))).decode().strip()
            distributed.start_hosts(world, threads=config.run.threads, address=received)
        else:
            distributed.start_hosts(world, threads=config.run.threads)
            if world.world_size > 1:
                jax.config.update("jax_cpu_collectives_implementation", "gloo")
                jax.distributed.initialize(
                    distributed.broadcast(distributed.free_address()), world.world_size, world.rank
                )
        if not ds_config.is_bf16(ds_config.read(config)):
            jax.config.update("jax_default_matmul_precision", "highest")  # a TPU would compute fp32 in bf16
        return torch.device("cpu")

    def engine(
        self, config: Config, *, world: World, device: torch.device, domains: int, progress: Progress = lambda: None
    ) -> FlaxEngine:
        from lamda.engines.flax.engine import FlaxEngine

        del device
        is_bf16 = ds_config.is_bf16(ds_config.read(config))
        return FlaxEngine(config, world=world, is_bf16=is_bf16, domains=domains, progress=progress)


def require_jax() -> None:
    """Raises UserError where the extra is not installed."""
    if missing := [name for name in ("jax", "flax", "optax", "orbax") if find_spec(name) is None]:
        raise UserError(
            f"{', '.join(missing)}: not installed; `pip install 'lamda-pytorch[flax]'` installs what JAX needs"
        )
