"""`scripts/pretrain_flax.py`: pre-training with JAX, by the same configuration, data and loop."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lamda.engines.flax.framework import Flax
from lamda.interop.harness import open_benchmarks
from lamda.launch.main import launch
from lamda.launch.pretrain import pretraining

MULTIHOST = "--multihost"


def main(argv: Sequence[str] | None = None) -> int:
    """Run pre-training; returns the exit code, as `lamda.launch.main.launch`.

    With `--multihost` JAX itself finds the other processes (a TPU slice, a SLURM job).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    framework = Flax(multihost=MULTIHOST in arguments)
    return launch([each for each in arguments if each != MULTIHOST], pretraining, framework, open_benchmarks)


if __name__ == "__main__":
    sys.exit(main())
