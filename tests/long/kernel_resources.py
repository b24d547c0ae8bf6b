"""Compiles every kernel ahead of time with the tiles that it is launched with: shared memory, registers, spilled bytes.

Fails where a kernel outgrows a GPU's shared memory. Needs no GPU; python tests/long/kernel_resources.py [sm ...]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lamda.model.attention import kernels
from lamda.model.attention.bias import BAND
from lamda.model.attention.kernel_ops import MAX_WIDTH, tiles_for

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
"""What one program may take, by compute capability (CUDA C++ Programming Guide, table of compute capabilities)."""

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


def main(chosen: list[int]) -> int:
    """0 where every kernel fits, 1 otherwise; prints a table."""
    print("| sm | kernel | q, k, v | documents | tile | warps, stages | shared KiB (of) | registers | spilled bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    too_large = 0
    for sm, limit in SHARED_KIB.items():
        if chosen and sm not in chosen:
            continue
        for dtype, documents in (("bf16", False), ("bf16", True), ("fp32", False)):
            for kernel, constants, options in launches(sm, dtype=dtype, documents=documents):
                shared, registers, stack = compiled(kernel, sm, dtype, constants, options)
                too_large += shared > limit
                cells = (
                    f"{sm} | {kernel.fn.__name__} | {dtype} | {'yes' if documents else 'no'} | "
                    f"{constants['T']} x {constants.get('S', constants['T'])} | "
                    f"{options['num_warps']}, {options['num_stages']} | {shared:.1f} ({limit}) | {registers} | {stack}"
                )
                print(f"| {cells} |", flush=True)
    return int(too_large > 0)


if __name__ == "__main__":
    sys.exit(main([int(each) for each in sys.argv[1:]]))
