"""DeepSpeed as the framework of a run (`lamda.engines.protocol`); imported only where it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamda import distributed
from lamda.config import ds_config
from lamda.config.batches import micro_batches_per_rank
from lamda.config.errors import UserError
from lamda.config.resources import find
from lamda.config.schema import Config
from lamda.config.stages import plan_stages
from lamda.distributed import World
from lamda.durable import Progress

if TYPE_CHECKING:
    import torch

    from lamda.engines.deepspeed.engine import DeepSpeedEngine


def require_valid(config: Config) -> None:
    """Raise UserError where DeepSpeed rejects its own file; it is imported, and knows all keys."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        # Without the other batch sizes, which depend on the number of ranks.
        DeepSpeedConfig({**ds_config.read(config), "train_micro_batch_size_per_gpu": config.train.micro_batch_size})
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    except Exception as error:  # for a value of the wrong kind it raises whatever its code happens to
        found = f"{type(error).__name__}: {error}"
    else:
        return
    raise UserError(f"{find(config.deepspeed.config)}: DeepSpeed rejects it: {found}; correct it, or remove the key")


class DeepSpeed:
    """See `lamda.engines.protocol.Framework`."""

    name = "deepspeed"

    def world(self) -> World:
        return distributed.read_world()

    def check(self, config: Config, world: World) -> None:
        for stage in plan_stages(config):
            micro_batches_per_rank(stage.config.train, world_size=world.world_size)
        ds_config.build(config, world_size=world.world_size)

    def start(self, config: Config, world: World) -> torch.device:
        import torch

        from lamda.model.attention.backends import choose_backend

        distributed.choose_accelerator()
        device = distributed.start(world, threads=config.run.threads)
        distributed.on_main(world, lambda: require_valid(config))
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
