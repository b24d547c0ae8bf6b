"""`benchmark.py learning`: sample efficiency of LaMDA and of peers of its size, on the same rows.

All models use the project's loader and tokenizer; a seed gives all of them the same rows in the same order. Each has
its usual recipe, with a sweep of learning rates; a peer's `+` has LaMDA's recipe as far as it applies. Every run is
added to the record when it ends, and runs that are in the record are not repeated. An interrupted run continues from
its last saved state.

Loss over seconds is not taken from single runs, since runs at different times on a shared machine do not compare.
`--time` times a few steps of all models in turn, and the seconds of a curve are its tokens times the median time per
token. The seconds of the training steps of each run are recorded as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, learning_ablations, read_report
from benchmarks.learning_peers import EMBEDDING_SCALE, MODELS, PEERS, make_learner, recipe_of
from benchmarks.learning_report import best_rate, draw, markdown
from benchmarks.learning_runs import LOSS_EVERY, How, Rows, batch_of, run, time_in_turn
from benchmarks.learning_state import state_file
from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.config.presets import PRESETS
from lamda.config.schema import Config
from lamda.durable import replace_file

PACKAGES = ("torch", "transformers", "x-transformers", "sentencepiece", "deepspeed")
IDENTITY = ("model", "label", "setting", "rows", "seed", "rate", "recipe")
"""The fields that identify a run."""

SETTING = Path(__file__).with_suffix(".yaml")
"""The configuration of the compared runs."""

SIZES = ("vocab_size", "d_model", "n_layers", "n_heads", "d_head", "d_ff")
REPORT_EVERY = 25
BATCHES = 4
"""Steps whose rows a measurement of time cycles through."""


@dataclass(frozen=True)
class Planned:
    """A run that is not in the record yet. identity: its values of IDENTITY."""

    config: Config
    model: str
    rate: float
    identity: dict[str, Any]


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    options, rest = _parser().parse_known_args(argv)
    if options.markdown or options.picture:
        report = read_report(options.json)
        if options.markdown:
            print(markdown(report))
        if options.picture:
            draw(report, options.picture)
        return 0
    has_file = any(word.partition("=")[0] == "--config" for word in rest)
    config = load_config(rest if has_file else ["--config", str(SETTING), *rest])
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    how = How(torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.precision)
    rows = Rows(config)
    removed = _removed(options)
    if removed:
        config, options.label = learning_ablations.configured(config, removed), learning_ablations.label(removed)
    names = options.models or (["lamda"] if options.label else list(MODELS))
    if options.label and names != ["lamda"]:
        raise UserError(f"{options.label}: ablations are of lamda, not of {', '.join(names)}")
    facts = _environment(["learning", *argv], how)
    if options.time:
        entry = _time(names, rows, how, rounds=options.rounds)
        _add(options.json, "times", {**entry, "environment": facts})
        return 0
    steps = -(-options.tokens // (config.train.global_batch_size * config.data.sequence_length))
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps, "tokens": None})})
    has_rate = removed or any(word.partition("=")[0] == "--train.lr" for word in rest)
    planned = list(_plan(names, config, rows, how, options, own_rate=config.train.lr if has_rate else None))
    for number, each in enumerate(planned, 1):
        place = f"{number}/{len(planned)}"
        found = _run(each, rows, how, options.embedding_scale, removed, place=place)
        _add(options.json, "runs", {**each.identity, **found, "environment": facts})
    print(markdown(read_report(options.json)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py learning",
        allow_abbrev=False,
        epilog="--config FILE (benchmarks/learning.yaml), --section.key VALUE as in pretrain.py; --train.lr: lamda's",
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help=f"of {', '.join(MODELS)}; all")
    parser.add_argument("--tokens", metavar="N", type=int, default=512_000, help="of a run (%(default)s)")
    parser.add_argument("--seeds", metavar="N", type=int, nargs="+", default=[0], help="of weights and rows (0)")
    parser.add_argument(
        "--lr", nargs="+", type=_rate, metavar="RATE", help="rates to sweep, or `best` of the record; a model's three"
    )
    ablation, parts = parser.add_mutually_exclusive_group(), list(learning_ablations.PARTS)
    ablation.add_argument("--label", metavar="TEXT", help="an ablation of lamda: what is different, in words")
    ablation.add_argument(
        "--without",
        metavar="PART",
        nargs="+",
        choices=parts,
        help=f"lamda without these parts of its recipe: of {', '.join(parts)}",
    )
    ablation.add_argument("--only", metavar="PART", nargs="*", choices=parts, help="with only these; none: no part")
    parser.add_argument(
        "--embedding-scale", metavar="X", type=float, default=EMBEDDING_SCALE,
        help="the embedding's rate / the run's of a peer's + (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast (%(default)s)")
    parser.add_argument("--time", action="store_true", help="measure the time per token of all models in turn instead")
    parser.add_argument("--rounds", metavar="N", type=int, default=9, help="of --time (%(default)s)")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, default=Path("benchmarks/learning.json"), help="(%(default)s)"
    )
    parser.add_argument("--markdown", action="store_true", help="measure nothing, print the tables of --json FILE")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="measure nothing, draw its curves (.svg, .png)")
    return parser


def _rate(text: str) -> float | None:
    """A rate; None stands for the best of the record."""
    return None if text == "best" else float(text)


def _environment(words: Sequence[str], how: How) -> dict[str, Any]:
    """The environment, with the versions of installed packages."""
    there = []
    for name in PACKAGES:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        there.append(name)
    device = torch.cuda.get_device_name(how.device) if how.device.type == "cuda" else "CPU"
    return {**environment(words, there), "device": device, "threads": torch.get_num_threads()}


def _setting(config: Config, how: How) -> dict[str, Any]:
    """The common settings of the runs of one table, without length and held-out rows."""
    sizes = {key: getattr(config.model, key) for key in SIZES}
    is_preset = config.model.preset is not None and sizes == PRESETS[config.model.preset]
    return {
        "size": config.model.preset if is_preset else f"{sizes['d_model']} wide, {sizes['n_layers']} layers",
        "sizes": sizes,
        "sequence_length": config.data.sequence_length,
        "batch": config.train.global_batch_size,
        "precision": how.precision,
    }


def _plan(
    names: Sequence[str], config: Config, rows: Rows, how: How, options: argparse.Namespace, *, own_rate: float | None
) -> Iterator[Planned]:
    """The runs that are missing in the record, seed by seed. own_rate: the rate of lamda, if given."""
    known = _read(options.json)["runs"]
    there = {_key(each) for each in known}
    tokens = config.steps * config.train.global_batch_size * config.data.sequence_length
    setting = {**_setting(config, how), "tokens": tokens, "held_out": rows.held_out.digest}
    for seed, name in product(options.seeds, names):
        of_seed = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
        rates = [own_rate] if name == "lamda" and own_rate else PEERS[name.removesuffix("+")].rates
        for rate in options.lr or rates:
            alike = {"model": name, "label": options.label, "setting": setting}
            alike["recipe"] = recipe_of(name, config, 1.0, options.embedding_scale).facts
            chosen = best_rate(known, alike) if rate is None else rate
            identity = {**alike, "rows": rows.digest(seed), "seed": seed, "rate": chosen}
            if _key(identity) in there:
                print(f"{name}, rate {chosen:g}, seed {seed}: is in {options.json}", flush=True)
            else:
                yield Planned(of_seed, name, chosen, identity)


def _removed(options: argparse.Namespace) -> list[str]:
    """The parts of the recipe that an ablation goes without."""
    if options.only is not None:
        return [part for part in learning_ablations.PARTS if part not in options.only]
    return list(options.without or [])


def _run(
    planned: Planned, rows: Rows, how: How, embedding_scale: float, removed: Sequence[str], *, place: str
) -> dict[str, Any]:
    config, steps = planned.config, planned.config.steps
    learner = make_learner(planned.model, config, rate=planned.rate, device=how.device, embedding_scale=embedding_scale)
    if removed:
        learning_ablations.undo(learner.module, learner.optimizers[0], config, removed)
    step_tokens = config.train.global_batch_size * config.data.sequence_length
    title = f"[{place}] {planned.identity['label'] or planned.model}, rate {planned.rate:g}, seed {config.run.seed}"

    def on_progress(step: int, loss: float, seconds: float) -> None:
        if step // REPORT_EVERY > (step - LOSS_EVERY) // REPORT_EVERY or step == steps:
            speed, left = step * step_tokens / seconds, (steps - step) * seconds / step
            speeds = f"{speed:,.0f} tokens/s, {left:.0f} s left"
            print(f"{title}: step {step}/{steps}, loss {loss:.3f}, {speeds}", flush=True)

    state = state_file(Path(config.run.dir), _key(planned.identity))
    found = run(learner, rows, how, seed=config.run.seed, steps=steps, state=state, on_progress=on_progress)
    final = "diverged" if found["final"] is None else f"{found['final']:.4f} nats held out"
    print(f"{title}: {final}", flush=True)
    return {"parameters": learner.sizes, **found}


def _time(names: Sequence[str], rows: Rows, how: How, *, rounds: int) -> dict[str, Any]:
    """Time lamda and the named models in turn, each with its recipe: a step of Muon takes longer than AdamW's."""
    config = rows.config
    learners = {
        name: make_learner(name, config, rate=PEERS[name.removesuffix("+")].rates[0], device=how.device)
        for name in dict.fromkeys(["lamda", *names])
    }
    with closing(rows.steps(config.run.seed)) as steps:
        batches = [batch_of(step, how.device) for step in islice(steps, BATCHES)]
    found = time_in_turn(learners, batches, how, rounds=rounds)
    for name, each in found.items():
        print(f"{name}: {1 / each['seconds_per_token']:,.0f} tokens/s, {each['ratio']:.2f} of lamda's time", flush=True)
    return {"setting": _setting(config, how), "models": found}


def _key(run_: Mapping[str, Any]) -> str:
    return json.dumps([run_[part] for part in IDENTITY], sort_keys=True)


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    return read_report(path) if path.exists() else {"runs": [], "times": []}


def _add(path: Path, kind: str, entry: dict[str, Any]) -> None:
    """Add an entry to the current record, one per line; the file is replaced atomically."""
    report = _read(path)
    report[kind].append(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {name: ",\n".join(map(json.dumps, entries)) for name, entries in report.items()}
    replace_file(path, "{" + ",\n".join(f'"{name}": [\n{each}\n]' for name, each in lines.items()) + "}\n")
