"""Every configuration key, its type, default, meaning and checks.

The schema is frozen: state never lives in it. A check that needs two keys sits at the later one, so
that each error names a key. `lamda.config.loading` turns YAML files and flags into these objects.
"""

from __future__ import annotations

import os
import unicodedata
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from lamda.config.errors import nearest
from lamda.config.presets import PRESETS

Positive = Annotated[int, Field(gt=0)]

FEWEST_LOSSES = 8
"""Losses that the judgment of a loss needs at least: the spread of fewer says nothing."""


def _path(path: str | None) -> str | None:
    """`~` is the home folder, as in patterns; a control character would break lines of scripts and logs."""
    if path is None:
        return None
    if any(unicodedata.category(character) == "Cc" for character in path):
        raise ValueError("should hold no line break and no other control character")
    return os.path.expanduser(path)  # noqa: PTH111 - Path raises where there is no such home


def _without_password(pattern: str) -> str:
    if "@" in urlsplit(pattern).netloc:
        raise ValueError(
            "an address must not hold a user or a password, for the run directory and W&B would keep them; download "
            "the files, or put them on the hub, whose token is taken from HF_TOKEN"
        )
    return pattern


_Parts = BeforeValidator(lambda value: [part.strip() for part in value.split(",")] if isinstance(value, str) else value)
Patterns = Annotated[tuple[Annotated[str, AfterValidator(_without_password)], ...], _Parts, Field(min_length=1)]
Names = Annotated[tuple[str, ...], _Parts, Field(min_length=1)]


Recompute = Literal["none", "ffn", "block"]
Shuffle = Positive | Literal["none", "epoch"]


class Section(BaseModel):
    """A frozen group of keys that refuses unknown ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, str_min_length=1)


class RunConfig(Section):
    """The run and where it lives."""

    dir: str = Field("runs/default", description="directory of everything that belongs to the run")
    seed: int = Field(0, ge=0, description="seed of initialisation and data order")
    threads: Positive | None = Field(
        None, description="CPU threads a rank; default: the cores that this process may use / local ranks"
    )
    hang_seconds: float = Field(
        600, gt=0, description="a rank that shows no progress for so long ends the run, with its stacks in RUN/hang"
    )
    stop_before_end: float = Field(
        180, ge=0, description="seconds before the scheduler's time limit at which the run saves and leaves"
    )
    compare_every: Positive | None = Field(
        200, description="steps between comparisons of the ranks' weights, which must be the same to the last bit"
    )

    _as_path = field_validator("dir")(_path)


class ModelConfig(Section):
    """The decoder's dimensions (legend in `lamda/model/decoder.py`)."""

    preset: str | None = Field(None, description=f"dimensions by name: {', '.join(PRESETS)}; keys given beside it win")
    vocab_size: Positive = Field(32000, description="V, pieces of the tokenizer")
    d_model: Positive = Field(192, description="D, width of the residual stream")
    n_layers: Positive = Field(4, description="number of blocks")
    n_heads: Positive = Field(6, description="H, attention heads")
    d_head: Positive = Field(64, description="K, width of a head")
    d_ff: Positive = Field(1536, description="F, width of the gated feed-forward layer")
    bias_per_layer: bool = Field(
        default=True,
        description="a relative-bias table a layer (as Google's own 137B shape) or one shared by all (as T5)",
    )
    weights: str | None = Field(None, description="start from this model.safetensors, weights alone")
    attention: Literal["math", "sdpa", "flex", "fused", "split"] = Field(
        "math", description="how attention is computed; every way gives the same numbers (docs/performance.md)"
    )

    _as_path = field_validator("weights")(_path)

    @property
    def dimensions(self) -> dict[str, int | bool]:
        """What weights must agree with: every key but those that say where weights come from or how to compute."""
        return self.model_dump(exclude={"preset", "weights", "attention"})

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        return {**PRESETS[name], **values} if name in PRESETS else values

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str | None) -> str | None:
        if name is not None and name not in PRESETS:
            raise ValueError(f"there is no preset {name!r} among {', '.join(PRESETS)}{nearest(name, PRESETS)}")
        return name


class TokenizerConfig(Section):
    """The SentencePiece model; one is trained from the run's own files where none is given."""

    path: str | None = Field(None, description="a SentencePiece model; default RUN/tokenizer.model")
    train_bytes: Positive = Field(
        200_000_000, description="bytes of text to train a new tokenizer on, drawn evenly from all files"
    )

    _as_path = field_validator("path")(_path)


class DataConfig(Section):
    """What is read, and how it is cut into rows."""

    corpus: str = Field("pile", description="a card in data/ by name, or a path to one")
    files: Patterns | None = Field(None, description="globs or URLs that replace the card's training files")
    eval_files: Patterns | None = Field(None, description="globs or URLs that replace the card's validation files")
    accept_changed: Patterns | None = Field(
        None, description="names of files whose text a resumed run takes for unchanged, whatever their hash or tag says"
    )
    sequence_length: Positive = Field(1024, description="L, targets a row")
    shuffle: Shuffle = Field(
        16384,
        description="rows that are mixed with each other, from all of the text; none: its order (one lane a source); "
        "epoch: all rows of an epoch, from data.blocks",
    )
    packing: Literal["concat", "best_fit", "whole"] = Field(
        "concat",
        description="how a lane's documents fill its rows: in order; so that few are cut; or whole with padding "
        "after them and attention inside them (dialogues)",
    )
    blocks: str | None = Field(
        None, description="folder of ready rows: those there are mapped, those made are kept (`lamda prepare`)"
    )
    document_mask: bool = Field(
        default=False,
        description="attention and loss stay inside a document (packed rows hold many), which the end symbol before it "
        "begins",
    )
    max_bad_fraction: float = Field(
        0.001, ge=0, le=1, description="share of a lane's lines that may hold no document; judged from 10,000 lines on"
    )
    threads: Positive = Field(2, description="threads of the tokenizer and loader a rank; never changes the data")

    _as_path = field_validator("blocks")(_path)

    @model_validator(mode="after")
    def _epoch_needs_a_folder(self) -> Self:
        if self.shuffle == "epoch" and self.blocks is None:
            raise ValueError(
                "data.shuffle epoch needs data.blocks: an epoch's rows come from a folder (`lamda prepare`)"
            )
        return self

    @property
    def separates_documents(self) -> bool:
        """Whether attention and loss stay inside a document or an example."""
        return self.document_mask or self.packing == "whole"


class TrainConfig(Section):
    """Length, batch, optimiser and schedule."""

    steps: Positive | None = Field(None, description="optimiser steps; this or train.tokens")
    tokens: Positive | None = Field(
        None,
        description="targets to train on, a row counting data.sequence_length of them; rounded up to whole steps",
    )
    global_batch_size: Positive = Field(256, description="rows a step over all ranks")
    micro_batch_size: Positive = Field(8, description="rows a rank computes at a time")
    recompute: Recompute = Field(
        "none",
        description="what the backward pass computes again instead of keeping it: nothing, the feed-forward's inside, "
        "or whole blocks",
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="compile blocks; auto: where the run is long enough to win more than the minute it takes"
    )
    fp8: bool = Field(
        default=False,
        description="8-bit products for query, key, value and the feed-forward; Hopper and newer (torchao)",
    )
    profile: tuple[Positive, Positive] | None = Field(
        None, description="first and last step of a trace that RUN/profile gets, for ui.perfetto.dev"
    )
    optimizer: Literal["adamw", "muon", "adafactor"] = Field(
        "adamw",
        description="adamw; muon for the blocks' matrices and adamw for the rest (ZeRO stage 1 in bf16, "
        "stage 0 in fp32); adafactor (stage 0)",
    )
    lr: float = Field(
        3e-4, gt=0, description="peak learning rate; muon takes adamw's, adafactor's is relative to a weight's size"
    )
    base_width: Positive | None = Field(
        None, description="the d_model that lr was tuned at; rates and the final norm then follow the width (muP)"
    )
    lora_rank: int = Field(
        0,
        ge=0,
        description="rank of the adapters that are trained in place of the weights (LoRA, docs/dialog.md); 0: none",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW's decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    embedding_lr_scale: float = Field(
        50.0,
        gt=0,
        description="the embedding's rate / lr: its weights are an order of magnitude larger than a matrix's; "
        "adafactor, which measures weights itself, needs none",
    )
    norm_lr_scale: float = Field(10.0, gt=0, description="the rate of norms' scales / lr (adafactor needs none)")
    bias_lr_scale: float = Field(
        100.0, gt=0, description="the rate of the relative-bias tables / lr (adafactor needs none)"
    )
    weight_decay: float = Field(
        0.1, ge=0, description="decay of the blocks' matrices; embedding, norms and bias tables have none"
    )
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0 is no clipping")
    schedule: Literal["cosine", "wsd", "inverse_sqrt"] = Field(
        "cosine", description="warm-up, then: cosine; wsd (stable, then linear decay); inverse_sqrt (LaMDA's)"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up; inverse_sqrt holds the peak for them")
    decay_fraction: float = Field(0.2, ge=0, le=1, description="last part of the run in which wsd decays")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate of cosine and wsd / peak")
    z_loss: float = Field(1e-4, ge=0, description="weight of the squared log-partition, kept out of `loss`")
    max_bad_steps: Positive = Field(
        10, description="refused steps in a row (loss or gradient not finite) before the run goes back"
    )
    spike_threshold: float | None = Field(
        None, gt=0, description="robust z-score of a loss that makes the run go back; default: never for a finite loss"
    )
    spike_window: int = Field(
        128, ge=FEWEST_LOSSES, description="finite losses before it that a loss is judged by, at least 8"
    )
    rollbacks: int = Field(3, ge=0, description="how often the run may go back and jump over the samples in between")

    @field_validator("tokens")
    @classmethod
    def _one_length(cls, tokens: int | None, info: ValidationInfo) -> int | None:
        if tokens is not None and info.data.get("steps") is not None:
            raise ValueError("the length is given twice: set train.steps or train.tokens, not both")
        if tokens is None and info.data.get("steps", 0) is None:
            raise ValueError("the run has no length: set train.steps or train.tokens")
        return tokens

    @field_validator("profile")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and steps[0] > steps[1]:
            raise ValueError(f"the first step, {steps[0]}, comes after the last, {steps[1]}")
        return steps

    @field_validator("micro_batch_size")
    @classmethod
    def _divides(cls, micro: int, info: ValidationInfo) -> int:
        batch = info.data.get("global_batch_size")
        if batch is not None and batch % micro:
            fitting = [n for n in range(1, batch + 1) if batch % n == 0]
            closest = sorted(fitting, key=lambda n: abs(n - micro))[:2]
            raise ValueError(
                f"{micro} does not divide train.global_batch_size {batch}; "
                f"the nearest that do are {' and '.join(map(str, sorted(closest)))}"
            )
        return micro


class CheckpointConfig(Section):
    """When the state is saved, and how a run starts."""

    every: Positive = Field(500, description="steps between checkpoints; the last step always has one")
    keep: Positive = Field(3, description="newest checkpoints that stay")
    keep_every: Positive | None = Field(None, description="checkpoints of steps that this divides stay for good")
    resume: str = Field(
        "auto",
        description="auto (newest valid one, else start), required, never (refused where a run is), or a "
        "checkpoint's path",
    )


class DialogConfig(Section):
    """What fine-tuning makes of a conversation in each epoch; other examples come in the next one, until all have."""

    generative: int = Field(1, ge=0, description="responses and research steps, the loss on what the model writes")
    discriminative: int = Field(4, ge=0, description="ratings of a response, the loss on the rating alone")


class EvalConfig(Section):
    """Evaluation on held-out text, and on tasks of lm-eval's (docs/evaluation.md)."""

    every: Positive | None = Field(None, description="steps between evaluations; default: only at the end")
    batches: Positive = Field(
        50, description="rows of each evaluation / train.global_batch_size; the last step scores all the text as well"
    )
    full_batches: Positive | None = Field(
        None, description="rows of the last step's evaluation on all the text / train.global_batch_size; default: all"
    )
    tasks: Names | None = Field(None, description="tasks of lm-eval's, by name: lambada_openai, hellaswag ...")
    tasks_every: Positive | None = Field(
        None, description="steps between evaluations on eval.tasks; default: only at the end"
    )
    tasks_limit: Positive | None = Field(None, description="examples of each task; default: all")
    tasks_path: str | None = Field(None, description="folder of further task files (YAML, as lm-eval's own)")

    _as_path = field_validator("tasks_path")(_path)


class WandbConfig(Section):
    """The mirror of metrics.jsonl in Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = Field(
        "online", description="where the mirror goes; WANDB_MODE may ask for less"
    )
    project: str = Field("lamda", description="W&B project")
    entity: str | None = Field(None, description="W&B user or team; default: the account's own")
    name: str | None = Field(None, description="display name; default: the run directory's name")
    checkpoints: Literal["none", "reference", "upload"] = Field(
        "none", description="checkpoints as artifacts: not at all, by their address, or with their files"
    )


class DeepSpeedConfig(Section):
    """What DeepSpeed owns."""

    config: str = Field("ds_config.json", description="DeepSpeed's file: ZeRO stage, precision, communication")


class FlaxConfig(Section):
    """The mesh of the JAX twin (docs/flax.md), whose data axis has the devices left; PyTorch takes no notice of it."""

    fsdp: Positive = Field(1, description="devices that a copy of weights and optimiser state is cut among")
    tensor: Positive = Field(1, description="devices that share the heads and widths of the same rows")


class Config(Section):
    """A whole run."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig
    dialog: DialogConfig = Field(default_factory=DialogConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)
    flax: FlaxConfig = Field(default_factory=FlaxConfig)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None, "checked by TrainConfig"
        return -(-self.train.tokens // (self.train.global_batch_size * self.data.sequence_length))
