"""Compiles every kernel ahead of time with the tiles that it is launched with: shared memory, registers, spilled bytes.

Fails where a kernel exceeds a limit of a GPU. Needs none. This wrote the record:

    python tests/long/kernel_resources.py --json benchmarks/kernels.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lamda.model.attention import kernels
from lamda.model.attention.bias import BAND
from lamda.model.attention.kernel_ops import tiles_for
from lamda.model.backend_choice import MAX_WIDTH

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
"""What one program may take, by compute capability (CUDA C++ Programming Guide, table of compute capabilities)."""
REGISTERS, MOST_REGISTERS = 65_536, 255
"""32-bit registers of one program on each of these, and of a thread."""
SPILLED_BYTES = {"bf16": 320, "fp32": 3072}
"""What a thread may spill: our bound, to notice a change. In 32 bits the tiles do not fit, and `auto` is `flex`."""

Variant = tuple[str, bool]
VARIANTS: list[Variant] = [("bf16", True), ("bf16", False), ("fp32", False)]
"""Precision of q, k and v, and whether there are documents."""

POINTERS = {"lse": "*fp32", "delta": "*fp32", "band": "*fp32", "tiles": "*fp32", "documents": "*i32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def launches(sm: int, *, dtype: str, documents: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """(kernel, its constants, Triton's options) as `lamda.model.attention.kernel_ops` has them."""
    tiles = tiles_for(divmod(sm, 10), element_size=4 if dtype == "fp32" else 2)
    sizes = {"K": MAX_WIDTH, "K2": MAX_WIDTH, "BAND": BAND, "DOCUMENTS": documents, "WIDE": tl.float32}
    walks = sizes | {"NEAR": False, "ROUND": False}
    by_queries, by_keys = {"T": tiles.owned, "S": tiles.walked}, {"T": tiles.walked, "S": tiles.owned}
    yield kernels.forward, walks | by_queries, tiles.options
    yield kernels.backward_queries, walks | by_queries, tiles.options
    yield kernels.backward_keys, walks | by_keys, tiles.options
    yield kernels.band_tiles, sizes | {"T": tiles.band}, {"num_warps": 4, "num_stages": 1}


def compiled(kernel: triton.JITFunction, sm: int, dtype: str, constants: dict, options: dict) -> tuple[float, int, int]:
    """KiB of shared memory of a program; registers and spilled bytes of a thread."""

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        return "i32" if name in ("B", "H", "L") or "_stride_" in name else POINTERS.get(name, f"*{dtype}")

    signature = {name: type_of(name) for name in kernel.arg_names}
    aligned = [place for place, name in enumerate(kernel.arg_names) if "*" in signature[name] or "_stride_" in name]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    result = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        used = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True).stdout
    registers, stack = (int(re.search(rb"%s:(\d+)" % name, used)[1]) for name in (b"REG", b"STACK"))
    return result.metadata.shared / 1024, registers, stack


def measured(sms: Sequence[int], variants: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """A row per kernel, variant and compute capability, with `problems`: the limits that it exceeds."""
    for sm, (dtype, documents) in product(sms, variants):
        for kernel, constants, options in launches(sm, dtype=dtype, documents=documents):
            shared, registers, spilled = compiled(kernel, sm, dtype, constants, options)
            row = {
                "sm": sm,
                "kernel": kernel.fn.__name__,
                "dtype": dtype,
                "documents": documents,
                "tile": [constants["T"], constants.get("S", constants["T"])],
                "warps": options["num_warps"],
                "stages": options["num_stages"],
                "shared_kib": round(shared, 1),
                "registers": registers,
                "spilled_bytes": spilled,
            }
            yield row | {"problems": problems(row)}


def problems(row: dict[str, Any]) -> list[str]:
    """The limits of its GPU that a kernel exceeds."""
    limits = {
        "shared_kib": SHARED_KIB[row["sm"]],
        "registers": min(MOST_REGISTERS, REGISTERS // (32 * row["warps"])),
        "spilled_bytes": SPILLED_BYTES[row["dtype"]],
    }
    return [f"{name} {row[name]} of {limit}" for name, limit in limits.items() if row[name] > limit]


def main(argv: Sequence[str]) -> int:
    """0 where every kernel is within its limits, 1 otherwise; prints a table."""
    parser = argparse.ArgumentParser(prog="kernel_resources.py", description=__doc__)
    # Not a positional: argparse of Python 3.11 checks an empty list against the choices.
    parser.add_argument("--sm", nargs="+", type=int, choices=SHARED_KIB, default=list(SHARED_KIB), help="default: all")
    parser.add_argument("--quick", action="store_true", help="only bf16 with documents, which needs most in 16 bits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    options = parser.parse_args(argv)
    rows = []
    print("| sm | kernel | q, k, v | documents | tile | warps, stages | shared KiB (of) | registers | spilled bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in measured(options.sm, VARIANTS[:1] if options.quick else VARIANTS):
        rows.append(row)
        cells = (
            row["sm"], row["kernel"], row["dtype"], "yes" if row["documents"] else "no", "{} x {}".format(*row["tile"]),
            f"{row['warps']}, {row['stages']}", f"{row['shared_kib']} ({SHARED_KIB[row['sm']]})", row["registers"],
            row["spilled_bytes"],
        )  # fmt: skip
        print("|", " | ".join(map(str, cells)), "|", *row["problems"], flush=True)
    if options.json:
        lines = ",\n  ".join(map(json.dumps, rows))
        versions = json.dumps({"triton": triton.__version__, "width": MAX_WIDTH})
        options.json.write_text(f'{{"compiled_with": {versions},\n "kernels": [\n  {lines}\n]}}\n', "utf-8")
    return int(any(row["problems"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
