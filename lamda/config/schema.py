"""Every configuration key with its type, default, description and checks.

The schema is frozen and holds no state. A check of two keys belongs to the later one, so that each error names a key.
`lamda.config.loading` turns YAML files and flags into these objects.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from lamda.config.errors import nearest
from lamda.config.presets import PRESETS
from lamda.config.spans import End, Span, StageConfig, spans
from lamda.config.values import Address, FilePath, Names, Patterns, Positive, Section

COMPUTATION = ("data.document_mask", "train.fp8", "bf16")
"""Settings that change what a model of the same dimensions computes; `bf16` is that of the DeepSpeed file."""

FEWEST_LOSSES = 8
"""Smallest window in which the spread of losses means anything."""

Recompute = Literal["none", "ffn", "block"]
Backend = Literal["math", "sdpa", "flex", "fused", "split"]
Attention = Literal["auto", Backend]
OptimizerName = Literal["adamw", "muon", "adafactor"]
Shuffle = Positive | Literal["none", "epoch"]


class RunConfig(Section):
    """The run directory, and how a run is watched and stopped."""

    dir: FilePath = Field("runs/default", description="directory of everything that belongs to the run")
    seed: int = Field(0, ge=0, description="seed of initialization and data order")
    threads: Positive | None = Field(None, description="CPU threads per rank; default: available cores / local ranks")
    hang_timeout_seconds: float = Field(
        600, gt=0, description="abort if a rank makes no progress for this long; stack traces go to RUN/hang"
    )
    stop_margin_seconds: float = Field(
        180, ge=0, description="seconds before the scheduler's time limit at which the run saves and stops"
    )
    weight_check_every: Positive | None = Field(
        200, description="steps between checks that all ranks hold the same weights, bit for bit"
    )


class ModelConfig(Section):
    """The decoder's dimensions (legend in `lamda/model/decoder.py`)."""

    preset: str | None = Field(None, description=f"dimensions by name: {', '.join(PRESETS)}; other keys override it")
    vocab_size: Positive = Field(32000, description="V, pieces of the tokenizer")
    d_model: Positive = Field(192, description="D, width of the residual stream")
    n_layers: Positive = Field(4, description="number of blocks")
    n_heads: Positive = Field(6, description="H, attention heads")
    d_head: Positive = Field(64, description="K, width of a head")
    d_ff: Positive = Field(1536, description="F, width of the gated feed-forward layer")
    bias_per_layer: bool = Field(
        default=True, description="one relative-bias table per layer (Google's 137B shape) or one shared by all (T5)"
    )
    weights: FilePath | None = Field(None, description="start from this model.safetensors, without optimizer state")
    attention: Attention = Field(
        "auto", description="attention backend; all compute the same function (docs/performance.md)"
    )

    @property
    def dimensions(self) -> dict[str, int | bool]:
        """The keys that weights depend on: all but their source and the way to compute."""
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
    """The SentencePiece model; by default one is trained from the run's own files."""

    path: FilePath | None = Field(None, description="a SentencePiece model; default RUN/tokenizer.model")
    train_bytes: Positive = Field(
        200_000_000, description="bytes of text to train a new tokenizer on, drawn evenly from all files"
    )


class DataConfig(Section):
    """The text of a run, and how it becomes rows of tokens."""

    corpus: str = Field("pile", description="dataset card: a name in data/, or a path to a YAML file")
    files: Patterns | None = Field(
        None, description="files, folders, globs or URLs that replace the card's training files"
    )
    eval_files: Patterns | None = Field(
        None, description="files, folders, globs or URLs that replace the card's validation files"
    )
    held_out: float = Field(
        0.005,
        ge=0,
        le=1,
        description="share of the text that a run without validation text holds out for it; 0: none",
    )
    accept_changed: Patterns | None = Field(
        None, description="files that a resumed run treats as unchanged, even if their hash or tag differs"
    )
    drop: FilePath | None = Field(None, description="list of documents to leave out of training (`lamda data clean`)")
    sequence_length: Positive = Field(1024, description="L, target tokens per row")
    shuffle: Shuffle = Field(
        16384,
        description="rows that are shuffled together, drawn from all of the text; none: in order (one logical shard "
        "per source); epoch: all rows of an epoch, from data.cache_dir",
    )
    packing: Literal["concat", "best_fit", "whole"] = Field(
        "concat",
        description="how documents fill rows: in order; with few cuts; or whole and padded, with attention inside them "
        "(dialogues)",
    )
    cache_dir: FilePath | None = Field(None, description="folder of tokenized rows, read and filled (`lamda prepare`)")
    document_mask: bool = Field(
        default=False,
        description="keep attention and loss inside each document of a packed row, which begins with an end symbol",
    )
    max_bad_line_fraction: float = Field(
        0.001, ge=0, le=1, description="largest share of lines without a document, checked from 10,000 lines on"
    )
    threads: Positive = Field(2, description="tokenizer and loader threads per rank; never changes the data")

    @model_validator(mode="after")
    def _epoch_needs_a_folder(self) -> Self:
        if self.shuffle == "epoch" and self.cache_dir is None:
            raise ValueError("data.shuffle epoch needs data.cache_dir: an epoch's rows are read from it")
        return self

    @property
    def separates_documents(self) -> bool:
        """Whether attention and loss stay inside one document or example."""
        return self.document_mask or self.packing == "whole"


class TrainConfig(Section):
    """Length, batch, optimizer and schedule."""

    steps: Positive | None = Field(None, description="optimizer steps; this or train.tokens")
    tokens: Positive | None = Field(
        None, description="target tokens, data.sequence_length per row; rounded up to whole steps"
    )
    global_batch_size: Positive = Field(256, description="rows per step over all ranks")
    micro_batch_size: Positive = Field(8, description="rows that a rank computes at a time")
    recompute: Recompute = Field(
        "none",
        description="activation checkpointing: recompute nothing, the inside of the feed-forward, or whole blocks",
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="torch.compile of blocks; auto: if the run is long enough to save more than it costs"
    )
    fp8: bool = Field(
        default=False, description="fp8 matmuls for query, key, value and feed-forward; Hopper and newer (torchao)"
    )
    profile: tuple[Positive, Positive] | None = Field(
        None, description="first and last step of a trace in RUN/profile, for ui.perfetto.dev"
    )
    optimizer: OptimizerName = Field(
        "adamw",
        description="adamw; muon for the blocks' matrices and adamw for the rest (ZeRO stage 1 in bf16, "
        "stage 0 in fp32); adafactor (stage 0)",
    )
    lr: float = Field(
        3e-4, gt=0, description="peak learning rate; muon uses adamw's, adafactor's is relative to a weight's size"
    )
    base_width: Positive | None = Field(
        None, description="muP base width: the d_model that lr was tuned at; rates and the final norm scale with width"
    )
    lora_rank: int = Field(0, ge=0, description="rank of LoRA adapters, trained instead of the weights; 0: none")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW's decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    embedding_lr_scale: float = Field(
        50.0,
        gt=0,
        description="multiplier of lr for the embedding, whose weights are ten times larger than a matrix's (unused by "
        "adafactor)",
    )
    norm_lr_scale: float = Field(10.0, gt=0, description="multiplier of lr for norm scales (unused by adafactor)")
    bias_lr_scale: float = Field(
        100.0, gt=0, description="multiplier of lr for relative-bias tables (unused by adafactor)"
    )
    weight_decay: float = Field(0.1, ge=0, description="decay of the blocks' matrices; other weights have none")
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    schedule: Literal["cosine", "wsd", "inverse_sqrt"] = Field(
        "cosine", description="warm-up, then: cosine; wsd (stable, then linear decay); inverse_sqrt (LaMDA's)"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up; inverse_sqrt holds the peak instead")
    decay_fraction: float = Field(0.2, ge=0, le=1, description="last part of the run in which wsd decays")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate of cosine and wsd / peak")
    z_loss: float = Field(1e-4, ge=0, description="weight of the squared log-partition, not included in `loss`")
    max_skipped_steps: Positive = Field(
        10, description="consecutive skipped steps (loss or gradient not finite) before a rollback"
    )
    spike_threshold: float | None = Field(
        None, gt=0, description="robust z-score of a finite loss that triggers a rollback; default: never"
    )
    spike_window: int = Field(
        128, ge=FEWEST_LOSSES, description="finite losses that a new one is compared with, at least 8"
    )
    max_rollbacks: int = Field(3, ge=0, description="how often a run may roll back and skip the samples in between")

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
    keep: Positive = Field(3, description="newest checkpoints to keep")
    keep_every: Positive | None = Field(None, description="keep checkpoints at multiples of this step for good")
    resume: str = Field(
        "auto", description="auto (newest valid one, else start), required, never (error if one exists), or a path"
    )
    mirror: Address | None = Field(
        None,
        description="second place for checkpoints: a folder, s3://..., hf://...; copied in the background, and fetched "
        "where run.dir has none",
    )
    accept_changed: Names | None = Field(
        None,
        description="settings that a resumed run may change although the model then computes something else: "
        f"{', '.join(COMPUTATION)}",
    )

    @field_validator("accept_changed")
    @classmethod
    def _known_settings(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if unknown := [name for name in names or () if name not in COMPUTATION]:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(COMPUTATION)}{nearest(unknown[0], COMPUTATION)}")
        return names


class DialogConfig(Section):
    """Examples per conversation and epoch in fine-tuning, the rest in later epochs; and the calibration at its end."""

    generative: int = Field(1, ge=0, description="responses and tool calls, with loss on the model's own text")
    discriminative: int = Field(4, ge=0, description="ratings of a response, with loss on the rating alone")
    false_refusals: float = Field(
        0.05, ge=0, lt=1, description="share of safe responses that the calibrated safety filter may refuse"
    )


class EvalConfig(Section):
    """Evaluation on held-out text and on lm-eval tasks (docs/evaluation.md)."""

    every: Positive | None = Field(None, description="steps between evaluations; default: only at the end")
    batches: Positive = Field(
        50, description="rows of an evaluation / train.global_batch_size; the last step also scores all text"
    )
    full_batches: Positive | None = Field(
        None, description="rows of the last step's evaluation on all text / train.global_batch_size; default: all"
    )
    tasks: Names | None = Field(None, description="lm-eval tasks by name: lambada_openai, hellaswag ...")
    tasks_every: Positive | None = Field(
        None, description="steps between evaluations on eval.tasks; default: only at the end"
    )
    tasks_limit: Positive | None = Field(None, description="examples per task; default: all")
    tasks_path: FilePath | None = Field(None, description="folder of additional task files (YAML, in lm-eval's format)")


class WandbConfig(Section):
    """The mirror of metrics.jsonl in Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = Field(
        "online", description="where the mirror goes; WANDB_MODE may restrict it"
    )
    project: str = Field("lamda", description="W&B project")
    entity: str | None = Field(None, description="W&B user or team; default: the account's own")
    name: str | None = Field(None, description="display name; default: the run directory's name")
    checkpoints: Literal["none", "reference", "upload"] = Field(
        "none", description="checkpoints as artifacts: none, by address, or with their files"
    )


class DeepSpeedConfig(Section):
    """DeepSpeed's own settings."""

    config: str = Field("ds_config.json", description="DeepSpeed's file: ZeRO stage, precision, communication")


class FlaxConfig(Section):
    """The mesh of the JAX implementation (docs/flax.md); its data axis has the other devices. PyTorch ignores it."""

    fsdp: Positive = Field(1, description="devices that shard weights and optimizer state")
    tensor: Positive = Field(1, description="devices that split heads and widths (tensor parallelism)")


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
    stages: tuple[StageConfig, ...] = ()

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.spans[-1].last

    @property
    def spans(self) -> list[Span]:
        """The steps of each stage; of the whole run, if it has no stages."""
        return spans(self.stages, batch=self.train.global_batch_size, length=self.data.sequence_length, end=self.end)

    @property
    def end(self) -> End:
        """The end of the run."""
        train = self.train
        return End(train.steps, "steps") if train.steps is not None else End(train.tokens or 0, "tokens")
