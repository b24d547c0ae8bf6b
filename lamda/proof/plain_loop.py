"""The training step in plain PyTorch on one device, to measure the overhead of an engine."""

from __future__ import annotations

import torch

from lamda.config.schema import Config
from lamda.engines.deepspeed import compile
from lamda.engines.deepspeed.optimizer import make_optimizer, set_learning_rate, without_compile
from lamda.engines.protocol import PhaseHook
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights


class PlainLoop:
    """bf16 (or fp32) weights with fp32 masters, fp32 accumulation, clipping, and the optimizer of the run."""

    def __init__(self, config: Config, *, device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
        self._config, self.device = config, device
        self._model = LaMDA(config.model, recompute=config.train.recompute)
        initialize_weights(self._model, seed=config.run.seed, base_width=config.train.base_width)
        self._model.to(device)
        self._optimizer = make_optimizer(self._model, config.train)
        self._masters: list[torch.Tensor] = list(self._model.parameters())
        self._working = LaMDA(config.model, recompute=config.train.recompute).to(device, dtype)
        self._copy_back()
        if compiled:
            self.compile_blocks()

    def compile_blocks(self) -> None:
        """Compile the blocks in the next step."""
        compile.compile_blocks(self._working)

    def step(
        self, ids_MBL: torch.Tensor, *, learning_rate: float, on_phase: PhaseHook = lambda phase, tensor: None
    ) -> torch.Tensor:
        """One step over micro-batches of ids [M, b, L+1]; returns the loss, in nats per target token."""
        set_learning_rate(self._optimizer, learning_rate)
        targets, total = ids_MBL[..., 1:].numel(), torch.zeros((), device=self.device)
        for ids_BL in ids_MBL:
            on_phase("forward", None)
            nll_BL, log_z_BL = self._working(ids_BL[:, :-1], targets_BL=ids_BL[:, 1:])
            loss = (nll_BL + self._config.train.z_loss * log_z_BL.square()).sum() / targets
            on_phase("loss", loss)
            loss.backward()
            on_phase("backward", None)
            for master, parameter in zip(self._masters, self._working.parameters(), strict=True):
                assert parameter.grad is not None
                gradient, parameter.grad = parameter.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            total += nll_BL.detach().sum() / targets
        torch.nn.utils.clip_grad_norm_(self._masters, self._config.train.gradient_clipping)
        with without_compile(self._config.train):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._copy_back()
        on_phase("update", None)
        return total

    def _copy_back(self) -> None:
        with torch.no_grad():
            working: list[torch.Tensor] = list(self._working.parameters())
            torch._foreach_copy_(working, self._masters)
