"""How large the measurements are: as a GPU needs them, or as toys that rehearse every part on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

Flags = tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """Sizes of all parts.

    shapes: [B, H, L, K] of the attention inputs that are compared with float64, most valuable first. lengths: of rows.
    compiled: the parts that are measured compiled, too. tokens, heads, width, rounds: of timed attention. gemm_seconds:
    of matrix products. steps: timed steps of each kind. step_tokens, micro_tokens: tokens of a step, and of the
    micro-batches to try, largest first. models: configurations for steps and checkpoints, largest first; the first that
    fits into memory is used. learner, learn_steps, resume_steps: configuration and steps of real runs. takes_tokenizer:
    whether the tokenizer that was carried has the model's vocabulary. transfer_bytes: copied.
    """

    shapes: tuple[tuple[int, int, int, int], ...]
    lengths: tuple[int, int]
    compiled: frozenset[str]
    tokens: int
    heads: int
    width: int
    rounds: int
    gemm_seconds: float
    steps: int
    step_tokens: int
    micro_tokens: tuple[int, ...]
    models: tuple[Flags, ...]
    learner: Flags
    takes_tokenizer: bool
    learn_steps: int
    resume_steps: int
    transfer_bytes: int


GPU = Sizes(
    shapes=((2, 40, 1024, 128), (1, 3, 2047, 128), (2, 5, 1031, 64)),
    lengths=(1024, 2048),
    compiled=frozenset({"kernels", "short", "long"}),
    tokens=32768,
    heads=40,
    width=128,
    rounds=9,
    gemm_seconds=15.0,
    steps=10,
    step_tokens=32768,
    micro_tokens=(32768, 16384, 8192, 4096),
    models=(("--config", "configs/lamda_2b.yaml"), ("--config", "configs/lamda_110m.yaml")),
    learner=(
        "--config=configs/lamda_110m.yaml", "--train.global_batch_size=32", "--train.micro_batch_size=16",
        "--train.warmup_steps=40", "--eval.batches=8",
    ),
    takes_tokenizer=True,
    learn_steps=200,
    resume_steps=12,
    transfer_bytes=1 << 30,
)  # fmt: skip

_TOY = (
    "--model.vocab_size=512", "--model.d_model=32", "--model.n_layers=2", "--model.n_heads=2", "--model.d_head=16",
    "--model.d_ff=64", "--run.threads=1",
)  # fmt: skip

REHEARSAL = Sizes(
    shapes=((1, 2, 140, 16),),
    lengths=(64, 128),
    compiled=frozenset({"short"}),
    tokens=128,
    heads=2,
    width=16,
    rounds=2,
    gemm_seconds=0.1,
    steps=2,
    step_tokens=256,
    micro_tokens=(128,),
    models=((*_TOY, "--data.corpus=standard_library"),),
    learner=(
        *_TOY, "--data.corpus=standard_library", "--data.sequence_length=64", "--train.global_batch_size=4",
        "--train.micro_batch_size=2", "--train.warmup_steps=2", "--train.lr=1e-2", "--eval.batches=2",
        "--tokenizer.train_bytes=200000", "--data.shuffle=64",
    ),
    takes_tokenizer=False,
    learn_steps=20,
    resume_steps=6,
    transfer_bytes=1 << 22,
)  # fmt: skip
"""Each part takes seconds. It shows that the part runs, and says nothing about speed."""
