"""The model card: architecture, training data, metrics, and hashes of all files."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from jinja2 import Environment

from lamda.config.errors import UserError
from lamda.config.stages import stage_at
from lamda.data.card import Card, load_card
from lamda.interop.huggingface.source import ExportSource
from lamda.interop.huggingface.tokenization import JOINER, SPELLINGS
from lamda.model.counts import parameters
from lamda.storage.commit import sync_and_describe
from lamda.training.lr_schedule import final_step
from lamda.training.task import FULL

TEMPLATE = "model_card.jinja"


def model_card(source: ExportSource, folder: Path, *, dtype: str, masters: bool) -> str:
    """README.md of an exported folder, whose other files exist. masters: whether the weights are the optimizer's."""
    config, weights = source.config, source.config.model.weights
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    template = environment.from_string((resources.files(__package__) / TEMPLATE).read_text("utf-8"))
    return template.render(
        title=config.run.dir.rstrip("/").rpartition("/")[2],
        model=config.model,
        parameters=parameters(config.model),
        dtype=dtype,
        masters=masters,
        data=config.data,
        corpus=_corpus(source),
        places=_places,
        origin="/".join(Path(weights).parts[-2:]) if weights else None,
        training=_training(source),
        loss=_loss(source),
        held_out=_held_out(source),
        held_out_documents=(source.state.fingerprint.get("held_out") or [0])[0] if source.state else 0,
        symbol=SPELLINGS[2],
        joiner=JOINER,
        hashes=_hashes(source, folder),
    )


def _corpus(source: ExportSource) -> Card | None:
    """The card of the training text; with the sources of all stages that the model has been trained in."""
    configs = [source.config]
    if source.state is not None and len(source.stages) > 1:
        configs = [each.config for each in source.stages if each.first < source.state.step]
    try:
        cards = [load_card(each.data) for each in configs]
    except UserError:
        return None
    sources = {(each.name, each.files, each.dataset): each for card in cards for each in card.sources}
    return cards[0].model_copy(update={"sources": tuple(sources.values())})


def _places(patterns: tuple[str, ...]) -> str:
    """URLs in full, local files by name only: their folders mean nothing elsewhere."""
    shown = [f"`{pattern if '://' in pattern else Path(pattern).name}`" for pattern in patterns]
    return ", ".join(shown) or "a dataset of the hub"


def _training(source: ExportSource) -> dict[str, str] | None:
    state = source.state
    if state is None:
        return None
    train = stage_at(source.stages, state.step - 1).config.train
    return {
        "steps": f"{state.step:,} of {final_step(source.stages, state):,}",
        "tokens": f"{state.tokens:,}",
        "rows per step": f"{train.global_batch_size:,} of {source.config.data.sequence_length:,} targets",
        "optimizer": f"{train.optimizer}, peak learning rate {train.lr:g}, {train.schedule}",
        "adapters": f"rank {train.lora_rank}, added to the weights" if train.lora_rank else "none",
    }


def _loss(source: ExportSource) -> tuple[int, dict[str, str]] | None:
    """The last step with a loss, and the loss."""
    if (newest := source.newest("loss")) is None:
        return None
    step, values = newest
    return step, {"loss (nats per token)": f"{values['loss']:.4f}"} if "loss" in values else {}


def _held_out(source: ExportSource) -> tuple[int, dict[str, str]] | None:
    """The last step with an evaluation, and its metrics: those of the full text, where there are any."""
    if (newest := source.newest("eval/")) is None:
        return None
    step, metrics = newest
    full = {key.replace(FULL, "eval/"): value for key, value in metrics.items() if key.startswith(FULL)}
    values = {key: value for key, value in metrics.items() if not key.startswith(FULL)} | full
    return step, {key.removeprefix("eval/"): f"{value:.4f}" for key, value in values.items()}


def _hashes(source: ExportSource, folder: Path) -> dict[str, str]:
    described = {path.name: sync_and_describe(path) for path in sorted(folder.iterdir())}
    files = {f"`{name}`": f"`{entry['sha256']}`" for name, entry in described.items()}
    names = {"manifest of the checkpoint": "sha256", "configuration of the run": "configuration", "data order": "data"}
    return files | {name: f"`{source.manifest[key]}`" for name, key in names.items() if key in source.manifest}
