"""The model card: what the model is, what it was trained on, how well it does, and the hashes of everything."""

from __future__ import annotations

from pathlib import Path

from lamda.config.errors import UserError
from lamda.data.card import Card, load_card
from lamda.interop.huggingface.source import Source
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


def model_card(source: Source, folder: Path, *, dtype: str, masters: bool) -> str:
    """README.md of an exported folder, whose other files are there. masters: whether these are the optimiser's."""
    parts = {
        source.config.run.dir.rstrip("/").rpartition("/")[2]: _summary(source, dtype=dtype, masters=masters),
        "Use": _USE,
        "Training data": _data(source),
        "Training": _training(source),
        "Metrics": _metrics(source),
        "Tokenizer": _TOKENIZER,
        "License": "Nobody has stated a license for these weights. Whoever publishes them states one here and in the "
        "first lines of this file, and heeds the data's.",
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
import lamda.interop.huggingface  # makes the model known to transformers; no remote code is run
from transformers import pipeline

generate = pipeline("text-generation", model="FOLDER")
print(generate("The ship")[0]["generated_text"])
```

The model reads documents that begin with the end symbol, which the tokenizer puts before every text. The relative
position bias has no longest distance, but nothing was trained on longer rows than those below."""

_NAMED = "Of the files that the run named itself nobody has stated a license."

_TOKENIZER = f"""\
`tokenizer.json` gives the ids of the SentencePiece model beside it (`tokenizer.model`) for every text but such as
hold U+2581, SentencePiece's own sign for a space, in one of two ways: where a text spells a control symbol, as
`{SPELLINGS[2]}`, that symbol comes of it; and `{JOINER}` vanishes. Text without U+2581 cannot make a control symbol,
and in the chat template no text can. U+2581 alone becomes its three bytes, as in LaMDA's own tokenizer."""


def _summary(source: Source, *, dtype: str, masters: bool) -> str:
    model = source.config.model
    origin = ", the weights that the optimiser holds" if masters else ""
    bias = "a table a layer" if model.bias_per_layer else "one table for all layers"
    return (
        f"A decoder of LaMDA's shape (arXiv 2201.08239) with {parameters(model):,} parameters in {dtype}{origin}: "
        f"{model.n_layers} layers, width {model.d_model}, {model.n_heads} heads of {model.d_head}, feed-forward "
        f"{model.d_ff} (gated GELU), T5's relative position bias ({bias}), {model.vocab_size:,} tokens, tied embedding."
    )


def _data(source: Source) -> str:
    if source.state is None:
        return "Unknown: these weights came without their run."
    try:
        card = load_card(source.config.data)
    except UserError:
        return f"Corpus `{source.config.data.corpus}`, whose card was not there when this was written."
    named = ["", _NAMED] if source.config.data.files or source.config.data.eval_files else []
    return "\n".join([*_corpus(card), *named, *_origins(source)])


def _corpus(card: Card) -> list[str]:
    rows = [f"| {name} | {_places(source.files)} | {source.license} |" for name, source in _sources(card)]
    home = [f"<{card.homepage}>", ""] if card.homepage else []
    return [f"{card.name}: {card.description}", "", *home, "| source | files | license |", "| --- | --- | --- |", *rows]


def _sources(card: Card) -> list[tuple[str, object]]:
    return [(source.name, source) for source in card.sources] + [
        (f"{source.name} (validation)", source) for source in card.validation
    ]


def _places(patterns: tuple[str, ...]) -> str:
    """Addresses whole, files of a machine by their last name: the rest means nothing elsewhere."""
    shown = [f"`{pattern if '://' in pattern else Path(pattern).name}`" for pattern in patterns]
    return ", ".join(shown) or "a data set of the hub"


def _origins(source: Source) -> list[str]:
    weights = source.config.model.weights
    return ["", f"Training began from the weights `{'/'.join(Path(weights).parts[-2:])}`."] if weights else []


def _training(source: Source) -> str:
    if source.state is None:
        return "Unknown: these weights came without their run."
    train, state = source.config.train, source.state
    facts = {
        "steps": f"{state.step:,} of {total_steps(source.config, state):,}",
        "tokens": f"{state.tokens:,}",
        "rows a step": f"{train.global_batch_size:,} of {source.config.data.sequence_length:,} targets",
        "optimiser": f"{train.optimizer}, peak rate {train.lr:g}, {train.schedule}",
        "adapters": f"rank {train.lora_rank}, added to the weights" if train.lora_rank else "none",
    }
    return _table(("", ""), facts)


def _metrics(source: Source) -> str:
    loss, evaluation = source.newest("loss"), source.newest("eval/")
    if loss is None:
        return "Unknown: the run's metrics were not there when this was written."
    values = {"loss (nats a token)": f"{loss[1]['loss']:.4f}"} if "loss" in loss[1] else {}
    text = f"Of step {loss[0]:,} in training:\n\n{_table(('metric', 'value'), values)}"
    if evaluation is None:
        return text + "\n\nThe run was not evaluated."
    held_out = {key.removeprefix("eval/"): f"{value:.4f}" for key, value in _of_most_text(evaluation[1]).items()}
    return f"{text}\n\nOn held-out text at step {evaluation[0]:,}:\n\n{_table(('metric', 'value'), held_out)}"


def _of_most_text(figures: dict[str, float]) -> dict[str, float]:
    """Of a figure of some rows and the same of all the text, the latter alone."""
    full = {key.replace(FULL, "eval/"): value for key, value in figures.items() if key.startswith(FULL)}
    return {key: value for key, value in figures.items() if not key.startswith(FULL)} | full


def _hashes(source: Source, folder: Path) -> str:
    described = {path.name: sync_and_describe(path) for path in sorted(folder.iterdir())}
    files = {f"`{name}`": f"`{entry['sha256']}`" for name, entry in described.items()}
    names = {"manifest of the checkpoint": "sha256", "configuration of the run": "configuration", "data order": "data"}
    origin = {name: f"`{source.manifest[key]}`" for name, key in names.items() if key in source.manifest}
    return _table(("", "sha256"), {**files, **origin})


def _table(head: tuple[str, str], rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines])
