"""`benchmark.py flax_memory`: memory of a JAX training step on each device of a mesh, without the devices.

The step is compiled for CPU devices and not run, so no weights are allocated. XLA for CPUs multiplies bf16 in fp32, so
other devices need less memory than reported; use the numbers to compare settings.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import environment, write_report
from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.engines.flax.framework import require_jax

PACKAGES = ("jax", "flax", "optax")


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py flax_memory",
        allow_abbrev=False,
        epilog="--config FILE and --section.key VALUE as in pretrain_flax.py; flax.fsdp and flax.tensor make the mesh",
    )
    parser.add_argument("--devices", type=int, default=8, help="in all (%(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep the report")
    options, rest = parser.parse_known_args(argv)
    if options.devices < 1:
        raise UserError(f"--devices is {options.devices}: give at least 1")
    require_jax()
    config = load_config(rest)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    from benchmarks.step_memory import measure

    report = environment(["flax_memory", *argv], PACKAGES) | measure(config)
    if options.json is not None:
        write_report(options.json, report)
    print(summary(report))
    return 0


def summary(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    return (
        f"{mesh}; {report['parameters']:,} parameters, micro-batch {report['micro_batch']} x {report['length']}, "
        f"train.recompute {report['recompute']}, {'bf16' if report['bf16'] else 'fp32'}\n"
        f"a device holds {report['state_bytes'] / 1e9:.1f} GB of state and rows, and in a step "
        f"{report['step_bytes'] / 1e9:.1f} GB beside it"
    )
