"""Does sample-and-rank choose responses that an independent judge prefers over a single sample?

A model answers held-out contexts with N candidates each and ranks them. A judge, a model trained on other ratings,
scores every candidate by the same formula. The value of a single sample is the mean over the candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import new_parser, report
from lamda.config.errors import UserError
from lamda.data.hashing import permutation
from lamda.dialog.conversation import Message, parse_conversation
from lamda.dialog.convert import read_records
from lamda.dialog.encoding import Encoding
from lamda.dialog.examples import Response, examples_of
from lamda.dialog.options import calibrated
from lamda.dialog.ranking import WEIGHTS, Scored, judge
from lamda.dialog.speaker import ReplyOptions, Speaker
from lamda.inference.generation import prefill
from lamda.inference.loading import LoadedModel, load_run
from lamda.inference.sampling import Sampling

PACKAGES = ("torch",)
RESAMPLES = 10_000


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    parser = new_parser("ranking")
    parser.add_argument("run", metavar="RUN", type=Path, help="that answers and ranks")
    parser.add_argument("judge", metavar="JUDGE", type=Path, help="a run that was trained on other ratings")
    parser.add_argument("--files", metavar="FILE", type=Path, nargs="+", required=True, help="held-out conversations")
    parser.add_argument("--contexts", type=int, default=100, help="how many are answered (%(default)s)")
    parser.add_argument("--candidates", type=int, default=16, help="for each (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of a candidate (%(default)s)")
    options = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        run, other = load_run(options.run), load_run(options.judge)
        if run.tokenizer.sha256 != other.tokenizer.sha256:
            raise UserError(f"{options.judge} has another tokenizer than {options.run}: start both from one model")
        contexts = held_out_contexts(options.files)[: options.contexts]
        sampling = Sampling(max_new_tokens=options.max_new_tokens)
        # The threshold accepts all: the safety filter is not what is measured.
        replies = ReplyOptions(candidates=options.candidates, threshold=1.0, sampling=sampling)
        speaker = Speaker.of(run, options=calibrated(replies, run, threshold=replies.threshold))
        return summary(np.array(list(_compared(speaker, other, contexts, sampling))))

    return report(options, ["ranking", *argv], PACKAGES, measured, table)


def held_out_contexts(files: Sequence[Path]) -> list[tuple[Message, ...]]:
    """The contexts to answer, shuffled over conversations. Raises UserError if there are none."""
    found = []
    for path in files:
        for _, record in read_records(path):
            generative, _ = examples_of(parse_conversation(record))
            found += [example.context for example in generative if isinstance(example, Response) and example.context]
    if not found:
        raise UserError(f"{', '.join(map(str, files))}: contain nothing to answer")
    return [found[place] for place in permutation(len(found), 0)]


def _compared(
    speaker: Speaker, other: LoadedModel, contexts: Sequence[tuple[Message, ...]], sampling: Sampling
) -> Iterator[tuple[float, float, float]]:
    """For each context: the judge's score of the chosen candidate, the mean score, and the share of worse ones."""
    for number, context in enumerate(contexts):
        options = replace(speaker.options, sampling=replace(sampling, seed=number))
        reply = speaker.reply(context, options)
        said = [candidate for candidate in reply.candidates if candidate.text]
        if reply.refused or len(said) < 2:
            continue
        values = np.array([_value(other, speaker.encoding, context, candidate) for candidate in said])
        yield values[0], values.mean(), (values[1:] < values[0]).mean()


def _value(other: LoadedModel, encoding: Encoding, context: Sequence[Message], candidate: Scored) -> float:
    room = other.config.data.sequence_length // 2
    prefix = prefill(other.model, encoding.context(context, max_tokens=room))
    judgment = judge(other.model, prefix, encoding.text(candidate.text), encoding)
    return sum(weight * judgment[name] for name, weight in WEIGHTS.items())


def summary(found: NDArray[np.float64]) -> dict[str, Any]:
    """Means over contexts with 95% intervals (bootstrap). found: [contexts, 3] of `_compared`."""
    chosen, single, worse = found.T
    return {
        "contexts": len(found),
        "chosen": float(chosen.mean()),
        "single_sample": float(single.mean()),
        "gain": float((chosen - single).mean()),
        "gain_interval": interval(chosen - single),
        "preferred": float(worse.mean()),
        "preferred_interval": interval(worse),
    }


def interval(values: NDArray[np.float64]) -> list[float]:
    """The 95% interval of a mean."""
    draw = np.random.default_rng(0)
    means = draw.choice(values, (RESAMPLES, len(values))).mean(1)
    return np.quantile(means, (0.025, 0.975)).tolist()


def table(report: dict[str, Any]) -> str:
    """The figures as lines."""
    gain_low, gain_high = report["gain_interval"]
    low, high = report["preferred_interval"]
    return (
        f"{report['contexts']} contexts; the judge's 3 P(sensible) + P(specific) + P(interesting):\n"
        f"  chosen {report['chosen']:.4f}, a single sample {report['single_sample']:.4f}\n"
        f"  gain {report['gain']:+.4f} ({gain_low:+.4f} to {gain_high:+.4f})\n"
        f"  better than another candidate in {report['preferred']:.1%} of pairs ({low:.1%} to {high:.1%})"
    )
