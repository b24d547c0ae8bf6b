"""DeepSpeed as the framework of a run (`lamda.engines.protocol`); imported only where it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamda import distributed
from lamda.config import ds_config
from lamda.config.batches import micro_batches_per_rank
from lamda.config.schema import Config
from lamda.distributed import World
from lamda.durable import Progress

if TYPE_CHECKING:
    import torch

    from lamda.engines.deepspeed.engine import DeepSpeedEngine


class DeepSpeed:
    """See `lamda.engines.protocol.Framework`."""

    name = "deepspeed"

    def world(self) -> World:
        return distributed.read_world()

    def check(self, config: Config, world: World) -> None:
        micro_batches_per_rank(config.train, world_size=world.world_size)
        ds_config.build(config, world_size=world.world_size)

    def start(self, config: Config, world: World) -> torch.device:
        import torch

        from lamda.model.attention.backends import choose_backend

        distributed.choose_accelerator()
        device = distributed.start(world, threads=config.run.threads)
        dtype = torch.bfloat16 if ds_config.is_bf16(ds_config.read(config)) else torch.float32
        model = config.model
        distributed.on_main(
            world, lambda: choose_backend(model.attention, device, dtype=dtype, width=model.d_head, training=True)
        )
        return device

    def engine(
        self, config: Config, *, world: World, device: torch.device, domains: int, progress: Progress = lambda: None
    ) -> DeepSpeedEngine:
        from lamda.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(config, world=world, device=device, domains=domains, progress=progress)
