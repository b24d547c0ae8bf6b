"""`lamda dialog filter`: keep the conversations whose responses a model's own ratings accept (paper, section 5).

An attribute that does not beat chance on held-out ratings decides nothing; the thresholds are the calibration's.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from lamda.config.errors import UserError
from lamda.console import Progress
from lamda.dialog.conversation import Conversation, to_line
from lamda.dialog.convert import check_target, read_conversations, write_lines

if TYPE_CHECKING:
    from lamda.dialog.calibration import Calibration
    from lamda.inference.loading import LoadedModel


def parser() -> argparse.ArgumentParser:
    """The options of `lamda dialog filter`."""
    parser = argparse.ArgumentParser(prog="lamda dialog filter", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="a calibrated dialogue model, whose ratings decide")
    parser.add_argument("files", metavar="IN", nargs="+", type=Path, help="conversations (.jsonl, .jsonl.zst)")
    parser.add_argument("-o", dest="target", metavar="OUT", type=Path, required=True, help="the kept ones")
    return parser


def main(argv: list[str]) -> int:
    """As `lamda dialog filter --help` says; raises UserError, before anything is written."""
    options = parser().parse_args(argv)
    check_target(options.target, options.files)
    conversations = list(read_conversations(options.files))
    from lamda.dialog.calibration import Calibration
    from lamda.dialog.ranking import RATED_ATTRIBUTES
    from lamda.inference.loading import load_run

    loaded = load_run(options.run)
    calibration = Calibration.read(loaded.path)
    if calibration is None:
        raise UserError(f"{loaded.path}: has no calibration; `lamda dialog evaluate RUN --calibrate 0.05` makes one")
    scalings = calibration.attributes
    deciding = [name for name in RATED_ATTRIBUTES if name in scalings and scalings[name].beats_chance]
    if not deciding:
        raise UserError(f"{loaded.path}: none of its ratings beats chance on held-out dialogues, so they cannot choose")
    kept, dropped = [], Counter[str]()
    with Progress("rating", total=conversations, unit="conversations") as shown:
        for conversation in conversations:
            reason = objection(conversation, loaded, calibration)
            kept += [conversation] if reason is None else []
            dropped.update([] if reason is None else [reason])
            shown.advance()
    if not kept:
        raise UserError(f"-o {options.target}: not written, as no conversation is accepted")
    write_lines(options.target, [to_line(conversation) for conversation in kept])
    reasons = ", ".join(f"{name} {dropped[name]:,}" for name in deciding)
    print(f"{options.target}: {len(kept):,} of {len(conversations):,} conversations; rejected by {reasons}")
    return 0


def objection(conversation: Conversation, loaded: LoadedModel, calibration: Calibration) -> str | None:
    """The attribute by which a response is rejected, if one is. Raises NotFiniteError if the model has diverged."""
    from lamda.dialog.encoding import Encoding
    from lamda.dialog.examples import Response, examples_of
    from lamda.dialog.ranking import judge
    from lamda.inference.generation import prefill
    from lamda.inference.sampling import check_finite

    encoding, room = Encoding(loaded.tokenizer), loaded.config.data.sequence_length - 1
    for example in examples_of(conversation)[0]:
        text = example.response if isinstance(example, Response) else example.action.content
        ids = encoding.text(text)[: room // 2]
        context = encoding.context(example.context, max_tokens=room - len(ids))
        rated = judge(loaded.model, prefill(loaded.model, context), ids, encoding, calibration=calibration)
        check_finite(*rated.values())
        if (reason := calibration.objection(rated)) is not None:
            return reason
    return None
