"""The model card: architecture, training data, metrics, and hashes of all files."""

from __future__ import annotations

from pathlib import Path

from lamda.config.errors import UserError
from lamda.data.card import Card, load_card
from lamda.interop.huggingface.source import ExportSource
from lamda.interop.huggingface.tokenization import JOINER, SPELLINGS
from lamda.model.counts import parameters
from lamda.storage.commit import sync_and_describe
from lamda.training.lr_schedule import total_steps
from lamda.training.task import FULL

_HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: unknown
tags:
- lamda
---
"""


def model_card(source: ExportSource, folder: Path, *, dtype: str, masters: bool) -> str:
    """README.md of an exported folder, whose other files exist. masters: whether the weights are the optimizer's."""
    parts = {
        source.config.run.dir.rstrip("/").rpartition("/")[2]: _summary(source, dtype=dtype, masters=masters),
        "Use": _USE,
        "Training data": _data(source),
        "Training": _training(source),
        "Metrics": _metrics(source),
        "Tokenizer": _TOKENIZER,
        "License": "No license has been stated for these weights. State one here and in the first lines of this file "
        "before publishing them, in accordance with the data's.",
        "Hashes": _hashes(source, folder),
    }
    (title, summary), *rest = parts.items()
    return "\n\n".join([f"{_HEAD}\n# {title}", summary, *(f"## {name}\n\n{text}" for name, text in rest)]) + "\n"


_USE = """\
From a checkout of Open LaMDA, the project that wrote this folder:

```
pip install '.[huggingface]'
```

```python
import lamda.interop.huggingface  # registers the model with transformers; no remote code is run
from transformers import pipeline

generate = pipeline("text-generation", model="FOLDER")
print(generate("The ship")[0]["generated_text"])
```

The model reads documents that begin with the end symbol, which the tokenizer puts before every text. The relative
position bias has no maximum distance, but the model was not trained on longer rows than those below."""

_NAMED = "No license has been stated for the files that the run itself named."

_TOKENIZER = f"""\
`tokenizer.json` gives the ids of the SentencePiece model beside it (`tokenizer.model`) for every text, with two
exceptions for texts with U+2581, SentencePiece's sign for a space: a text that spells a control symbol, such as
`{SPELLINGS[2]}`, becomes that symbol, and `{JOINER}` is removed. Text without U+2581 cannot produce a control symbol,
and in the chat template no text can. U+2581 alone becomes its three bytes, as in LaMDA's own tokenizer."""


def _summary(source: ExportSource, *, dtype: str, masters: bool) -> str:
    model = source.config.model
    origin = ", the optimizer's master weights" if masters else ""
    bias = "one table per layer" if model.bias_per_layer else "one table for all layers"
    return (
        f"A decoder of LaMDA's shape (arXiv 2201.08239) with {parameters(model):,} parameters in {dtype}{origin}: "
        f"{model.n_layers} layers, width {model.d_model}, {model.n_heads} heads of {model.d_head}, feed-forward "
        f"{model.d_ff} (gated GELU), T5's relative position bias ({bias}), {model.vocab_size:,} tokens, tied embedding."
    )


def _data(source: ExportSource) -> str:
    if source.state is None:
        return "Unknown: these weights came without their run."
    try:
        card = load_card(source.config.data)
    except UserError:
        return f"Corpus `{source.config.data.corpus}`, whose card was not available at export."
    named = ["", _NAMED] if source.config.data.files or source.config.data.eval_files else []
    return "\n".join([*_corpus(card), *named, *_origins(source)])


def _corpus(card: Card) -> list[str]:
    named = [(source.name, source) for source in card.sources]
    named += [(f"{source.name} (validation)", source) for source in card.validation]
    rows = [f"| {name} | {_places(source.files)} | {source.license} |" for name, source in named]
    home = [f"<{card.homepage}>", ""] if card.homepage else []
    return [f"{card.name}: {card.description}", "", *home, "| source | files | license |", "| --- | --- | --- |", *rows]


def _places(patterns: tuple[str, ...]) -> str:
    """URLs in full, local files by name only: their folders mean nothing elsewhere."""
    shown = [f"`{pattern if '://' in pattern else Path(pattern).name}`" for pattern in patterns]
    return ", ".join(shown) or "a dataset of the hub"


def _origins(source: ExportSource) -> list[str]:
    weights = source.config.model.weights
    return ["", f"Training began from the weights `{'/'.join(Path(weights).parts[-2:])}`."] if weights else []


def _training(source: ExportSource) -> str:
    if source.state is None:
        return "Unknown: these weights came without their run."
    train, state = source.config.train, source.state
    facts = {
        "steps": f"{state.step:,} of {total_steps(source.config, state):,}",
        "tokens": f"{state.tokens:,}",
        "rows per step": f"{train.global_batch_size:,} of {source.config.data.sequence_length:,} targets",
        "optimizer": f"{train.optimizer}, peak learning rate {train.lr:g}, {train.schedule}",
        "adapters": f"rank {train.lora_rank}, added to the weights" if train.lora_rank else "none",
    }
    return _table(("", ""), facts)


def _metrics(source: ExportSource) -> str:
    loss, evaluation = source.newest("loss"), source.newest("eval/")
    if loss is None:
        return "Unknown: the run's metrics were not available at export."
    values = {"loss (nats per token)": f"{loss[1]['loss']:.4f}"} if "loss" in loss[1] else {}
    text = f"Of step {loss[0]:,} in training:\n\n{_table(('metric', 'value'), values)}"
    if evaluation is None:
        return text + "\n\nThe run was not evaluated."
    held_out = {key.removeprefix("eval/"): f"{value:.4f}" for key, value in _of_full_text(evaluation[1]).items()}
    return f"{text}\n\nOn held-out text at step {evaluation[0]:,}:\n\n{_table(('metric', 'value'), held_out)}"


def _of_full_text(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of some held-out rows, replaced by those of the full text if available."""
    full = {key.replace(FULL, "eval/"): value for key, value in metrics.items() if key.startswith(FULL)}
    return {key: value for key, value in metrics.items() if not key.startswith(FULL)} | full


def _hashes(source: ExportSource, folder: Path) -> str:
    described = {path.name: sync_and_describe(path) for path in sorted(folder.iterdir())}
    files = {f"`{name}`": f"`{entry['sha256']}`" for name, entry in described.items()}
    names = {"manifest of the checkpoint": "sha256", "configuration of the run": "configuration", "data order": "data"}
    origin = {name: f"`{source.manifest[key]}`" for name, key in names.items() if key in source.manifest}
    return _table(("", "sha256"), {**files, **origin})


def _table(head: tuple[str, str], rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines])
