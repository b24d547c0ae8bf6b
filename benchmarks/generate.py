"""`benchmark.py generate`: sampling speed, beside `transformers` and the memory bandwidth of the device.

Each round measures, on random weights: a token of one candidate, of several, and of the int8 model; a token of
`transformers.generate` with a Llama of the same matrices; the time to the first token of a conversation of the prompt's
length, from the beginning and as its tenth turn, where the keys and values of nine are known; and a sum over as many
bytes as the weights. A token of one sequence has to read every weight once, so the time of the sum is a lower bound.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import new_parser, report
from lamda.config import ModelConfig
from lamda.config.loading import load_config
from lamda.inference.cache import Prefix
from lamda.inference.generation import prefill, prefill_pieces, sample, whole
from lamda.inference.int8 import to_int8
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights

PACKAGES = ("torch", "transformers", "numpy")
PROC = Path("/proc/self")


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    parser = new_parser("generate", takes_config=True)
    parser.add_argument("--prompt", metavar="L", type=int, default=512, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--new", metavar="N", type=int, default=64, help="tokens of a continuation (%(default)s)")
    parser.add_argument("--candidates", metavar="N", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="(%(default)s)")
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="(%(default)s)")
    options, rest = parser.parse_known_args(argv)
    return report(
        options,
        ["generate", *argv],
        PACKAGES,
        lambda: measure(
            load_config(rest).model,
            dtype=getattr(torch, options.dtype),
            prompt=options.prompt,
            new=options.new,
            candidates=options.candidates,
            rounds=options.rounds,
        ),
        markdown,
    )


@torch.no_grad()
def measure(
    config: ModelConfig, *, dtype: torch.dtype, prompt: int, new: int, candidates: int, rounds: int
) -> dict[str, Any]:
    """Seconds, bytes and ratios. A ratio compares two times of one round; reported is the median over rounds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LaMDA(config)
    initialize_weights(model, seed=0)
    model = model.to(device, dtype)
    ids = torch.randint(config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    sampling = Sampling(max_new_tokens=new)
    peaks = {count: _peak(partial(_sample, model, ids, count, sampling), device) for count in (1, candidates)}
    narrow, theirs = to_int8(copy.deepcopy(model)), _llama(config)
    theirs.to(device, dtype).eval()  # type: ignore[arg-type]  # transformers' decorator hides its self
    data = torch.zeros(_bytes(model) // 4, device=device)
    nine = prefill(model, ids[: len(ids) * 9 // 10])
    prefixes = {"one": prefill(model, ids), "int8": prefill(narrow, ids)}
    tokens_BL = torch.tensor([ids], device=device)
    works: dict[str, Callable[[], object]] = {
        "prefill": lambda: prefill(model, ids),
        "first_token": lambda: sample(model, prefill(model, ids), sampling=Sampling(max_new_tokens=1)),
        "tenth_turn": lambda: sample(model, _after(model, nine, ids), sampling=Sampling(max_new_tokens=1)),
        "one": lambda: sample(model, prefixes["one"], sampling=sampling),
        "several": lambda: sample(model, prefixes["one"], count=candidates, sampling=sampling),
        "int8": lambda: sample(narrow, prefixes["int8"], sampling=sampling),
        "transformers_prefill": lambda: _continue(theirs, tokens_BL, 1),
        "transformers": lambda: _continue(theirs, tokens_BL, new),
        "sum": lambda: data.sum(),
    }
    found = [{name: _timed(work, device) for name, work in works.items()} for _ in range(rounds + 1)][1:]
    for each in found:
        each["transformers"] -= each["transformers_prefill"]
        for name, steps in (("one", new - 1), ("several", new - 1), ("int8", new - 1), ("transformers", new - 1)):
            each[name] /= steps
    ratios = {
        "tenth_turn_to_first_token": [each["tenth_turn"] / each["first_token"] for each in found],
        "several_to_one": [each["several"] / each["one"] for each in found],
        "transformers_to_one": [each["transformers"] / each["one"] for each in found],
        "one_to_int8": [each["one"] / each["int8"] for each in found],
        "sum_to_one": [each["sum"] / each["one"] for each in found],
    }
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "model": config.dimensions,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": {"lamda": _parameters(model), "transformers": _parameters(theirs)},
        "weight_bytes": {"model": _bytes(model), "int8": _bytes(narrow)},
        "prompt": prompt,
        "new": new,
        "candidates": candidates,
        "peak_bytes": {"one": peaks[1], "several": peaks[candidates], "ratio": peaks[candidates] / peaks[1]},
        "seconds": {name: median(each[name] for each in found) for name in works},
        "bytes_per_second": median(_bytes(model) / each["sum"] for each in found),
        "ratios": {name: {"median": median(each), "rounds": each} for name, each in ratios.items()},
    }


def _sample(model: LaMDA, ids: list[int], count: int, sampling: Sampling) -> None:
    sample(model, prefill(model, ids), count=count, sampling=sampling)


def _after(model: LaMDA, start: Prefix, ids: list[int]) -> Prefix:
    return whole(prefill_pieces(model, ids, start=start, shared=len(start.ids)))


def _llama(config: ModelConfig) -> LlamaForCausalLM:
    """A decoder with the same matrices: gated feed-forward layers, no biases, a tied embedding."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            head_dim=config.d_head,
            tie_word_embeddings=True,
        )
    )


def _continue(model: LlamaForCausalLM, tokens_BL: torch.Tensor, new: int) -> None:
    model.generate(  # type: ignore[misc]  # transformers gives its own self a protocol's type
        tokens_BL, attention_mask=torch.ones_like(tokens_BL), do_sample=True, top_k=40, max_new_tokens=new,
        min_new_tokens=new, pad_token_id=0,
    )  # fmt: skip


def _timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes at the most while `work` runs: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    (PROC / "clear_refs").write_text("5")
    work()
    lines = (PROC / "status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _parameters(model: torch.nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def _bytes(model: torch.nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))


def markdown(report: dict[str, Any]) -> str:
    """The table of a report, with what it was measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    seconds, ratios, peak, weights = (report[name] for name in ("seconds", "ratios", "peak_bytes", "weight_bytes"))
    several = f"{report['candidates']} candidates"

    def ratio(name: str) -> str:
        rounds = ratios[name]["rounds"]
        return f"{ratios[name]['median']:.2f} ({min(rounds):.2f} to {max(rounds):.2f})"

    rows = [
        ("prompt, once", f"{seconds['prefill'] * 1e3:.0f} ms"),
        ("first token of a tenth turn", f"{seconds['tenth_turn'] * 1e3:.0f} ms"),
        ("time to it, nine turns cached / none", ratio("tenth_turn_to_first_token")),
        ("a token of one candidate", f"{seconds['one'] * 1e3:.1f} ms"),
        (f"a token of {several}", f"{seconds['several'] * 1e3:.1f} ms"),
        (f"time, {several} / one", ratio("several_to_one")),
        (f"peak memory, {several} / one", f"{_mb(peak['several'])} / {_mb(peak['one'])} MB: {peak['ratio']:.2f}"),
        ("a token of `transformers` generate", f"{seconds['transformers'] * 1e3:.1f} ms"),
        ("time, `transformers` / ours", ratio("transformers_to_one")),
        ("a token with 8-bit matrices", f"{seconds['int8'] * 1e3:.1f} ms"),
        ("time, ours / 8 bits", ratio("one_to_int8")),
        ("weights, ours / 8 bits", f"{_mb(weights['model'])} / {_mb(weights['int8'])} MB"),
        ("memory read by a sum", f"{report['bytes_per_second'] / 1e9:.1f} GB/s"),
        ("share of that speed, one candidate", ratio("sum_to_one")),
    ]
    return "\n".join(
        [
            f"`{report['command']}` at {report['commit']}, {report['device']} ({report['cpu']}, "
            f"{report['cores']} cores, {report['threads']} threads), {versions}.",
            f"{report['parameters']['lamda']:,} parameters ({report['parameters']['transformers']:,} in "
            f"`transformers`), {report['dtype']}; {report['prompt']} tokens of prompt, {report['new']} new ones.",
            "",
            "| | |",
            "|---|---:|",
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f}"
