"""`benchmark.py attention`: forward and backward time of every attention backend (`lamda.proof.attention`)."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import new_parser, report
from lamda.proof.attention import PARTS, measure

PACKAGES = ("torch", "numpy")


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    parser = new_parser("attention")
    gpu = torch.cuda.is_available()
    parser.add_argument(
        "--lengths", metavar="L", type=int, nargs="+", default=[1024, 2048, 4096] if gpu else [512, 1024]
    )
    parser.add_argument("--tokens", metavar="N", type=int, default=32768 if gpu else 2048, help="a batch (%(default)s)")
    parser.add_argument("--heads", metavar="H", type=int, default=40 if gpu else 8, help="(%(default)s)")
    parser.add_argument("--width", metavar="K", type=int, default=128 if gpu else 64, help="of a head (%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="(%(default)s)")
    parser.add_argument("--compile", action="store_true", help="through torch.compile, as a compiled block has it")
    options = parser.parse_args(argv)
    return report(
        options,
        ["attention", *argv],
        PACKAGES,
        lambda: measure(
            lengths=options.lengths,
            tokens=options.tokens,
            heads=options.heads,
            width=options.width,
            dtype=getattr(torch, options.dtype),
            compiled=options.compile,
        ),
        markdown,
    )


def markdown(report: dict[str, Any]) -> str:
    """The table of a report with its environment."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    shape = report["shape"]
    way = "compiled" if shape["compiled"] else "eager"
    rows = [
        ["L", "backend", "forward ms", "backward ms", "times as fast as math", "rounds", "TFLOP/s", "peak MB"],
        ["---:", "---", "---:", "---:", "---:", "---:", "---:", "---:"],
    ]
    for length, found in report["lengths"].items():
        for name, each in found["backends"].items():
            ratios, peak = each["times_as_fast_as_math"], each["peak_megabytes"]
            rows.append(
                [
                    f"{found['rows']} x {length}",
                    name,
                    *(f"{each['seconds'][part] * 1e3:.2f}" for part in PARTS),
                    f"{ratios['median']:.2f}" if ratios else "",
                    f"{min(ratios['rounds']):.2f} to {max(ratios['rounds']):.2f}" if ratios else "",
                    f"{each['teraflops_per_second']:.3g}",
                    "" if peak is None else f"{peak:.0f}",
                ]
            )
    return "\n".join(
        [
            f"`{report['command']}` at {report['commit']}, {report['device']} ({report['cpu']}, {report['cores']} "
            f"cores, {report['threads']} threads), {versions}.",
            f"{shape['heads']} heads of {shape['width']}, {shape['dtype']}, {way}; a product of causal attention "
            "counts half, and the backward pass twice the forward.",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            *(f"Not measured: {reason}." for reason in report["left_out"].values()),
            *(f"Failed: {name}: {reason}." for name, reason in report.get("failed", {}).items()),
        ]
    )
