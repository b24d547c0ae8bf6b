"""Pre-training in plain PyTorch on one rank, by the contract of `lamda.engines.protocol` and the loop of all runs.

`python -m tests.training.plain_framework ARGUMENTS` as `scripts/pretrain.py ARGUMENTS`; it ends with 3 where the run
has loaded DeepSpeed. TEST_SPOIL_AFTER=N: the N-th step of the process spoils the weights.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from lamda.data.loader import batch_digest
from lamda.distributed import World
from lamda.engines.protocol import StepMetrics
from lamda.inference.generation import prefill, sample
from lamda.launch.main import launch
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights
from lamda.model.loss import token_nll


class Plain:
    """See `lamda.engines.protocol.Framework`."""

    name = "plain"

    def world(self):
        return World()

    def check(self, config, world):
        pass

    def start(self, config, world):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return torch.device("cpu")

    def engine(self, config, *, world, device, domains, progress):
        return Engine(config, world, domains)


@dataclass
class FinishedStep:
    """See `lamda.engines.protocol.PendingStep`."""

    metrics: StepMetrics
    skipped: bool

    def wait(self):
        return self.metrics


class Engine:
    """See `lamda.engines.protocol.Engine`."""

    device, is_compiled, peak_flops, num_devices = torch.device("cpu"), False, 1e12, 2

    def __init__(self, config, world, domains):
        self.config, self.world, self.domains = config, world, domains
        self.model = LaMDA(config.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0)
        self.steps, self.spoilt_after = 0, int(os.environ.get("TEST_SPOIL_AFTER") or -1)

    def enter_stage(self, config, *, domains):
        self.config, self.domains = config, domains

    def train_step(self, batch, *, lr, counters, on_phase):
        self.optimizer.param_groups[0]["lr"] = lr
        sums = torch.zeros(2, self.domains, dtype=torch.float64)
        rows = [(torch.from_numpy(part.ids.astype("int64")), part) for part in batch.micro_batches]
        targets = sum(int(part.loss_mask.sum()) for _, part in rows)
        for ids_BL, part in rows:
            on_phase("forward", None)
            documents_BL = None if part.documents is None else torch.from_numpy(part.documents[:, :-1].astype("int64"))
            nll_BL, _ = self.model(ids_BL[:, :-1], documents_BL, targets_BL=ids_BL[:, 1:])
            loss_mask_BL = torch.from_numpy(part.loss_mask)
            loss = (nll_BL * loss_mask_BL).sum() / targets
            on_phase("loss", loss)
            loss.backward()
            on_phase("backward", None)
            for domain in range(self.domains):
                own_BL = loss_mask_BL & (torch.from_numpy(part.domains) == domain)
                sums[:, domain] += torch.stack([nll_BL.detach()[own_BL].sum(), own_BL.sum()])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        on_phase("update", self.model.embedding.weight)
        self.steps += 1
        if self.steps == self.spoilt_after:
            with torch.no_grad():
                self.model.embedding.weight.mul_(4)
        digest = batch_digest(batch.digests[batch.positions.argsort()])
        metrics = StepMetrics(sums.numpy(), float(norm), digest, [float(number) for number in counters])
        return FinishedStep(metrics, skipped=not norm.isfinite())

    @contextmanager
    def eval_mode(self):
        with torch.no_grad():
            yield

    def logits(self, inputs_BL):
        return self.model(inputs_BL)

    def nll(self, inputs_BL, targets_BL, documents_BL=None):
        return token_nll(self.model(inputs_BL, documents_BL), targets_BL)

    def generate(self, ids, sampling):
        with self.eval_mode():
            return sample(self.model, prefill(self.model, ids), sampling=sampling).ids[0]

    def initialize_weights(self):
        initialize_weights(self.model, seed=self.config.run.seed)

    def load_checkpoint(self, path):
        self.load_weights(path / "model.safetensors")
        kept = load_file(path / "state" / "moments.safetensors")
        for number, parameter in enumerate(self.model.parameters()):
            kinds = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {kind: kept[f"{number}.{kind}"] for kind in kinds}

    def load_weights(self, path):
        self.model.load_weights(load_file(path))

    def corrupted_ranks(self):
        return []

    def checkpoint_bytes(self):
        return 3 * sum(parameter.nbytes for parameter in self.model.parameters())

    def snapshot(self, folder):
        assert folder.is_dir(), "there is room by the time that the state is copied"
        weights = {name: weight.detach().clone() for name, weight in self.model.export_weights().items()}
        moments = {
            f"{number}.{kind}": tensor.clone()
            for number, state in enumerate(self.optimizer.state.values())
            for kind, tensor in state.items()
        }

        def write():
            files = {folder / "state" / "moments.safetensors": moments, folder / "model.safetensors": weights}
            (folder / "state").mkdir()
            for file, tensors in files.items():
                save_file(tensors, file)
            return list(files)

        return write

    def manifest_entries(self):
        return {"framework": "plain"}


def pretraining():
    from lamda.training.task import Pretraining

    return Pretraining()


if __name__ == "__main__":
    code = launch(sys.argv[1:], pretraining, Plain(), lambda config, world: None)
    sys.exit(3 if "deepspeed" in sys.modules else code)
