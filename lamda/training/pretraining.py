"""Pre-training: raw text, its held-out bits per byte, and a continuation of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lamda.best_effort import BestEffort
from lamda.config.schema import Config
from lamda.console import computing
from lamda.data.compression import compressed_bits_per_byte
from lamda.data.documents import Form
from lamda.data.held_out import HeldOut
from lamda.data.lanes import RAW_TEXT
from lamda.data.tokenizer import Tokenizer
from lamda.distributed import on_main
from lamda.inference.sampling import Sampling
from lamda.training.evaluation import HeldOutText, held_out_bytes, table
from lamda.training.inputs import validation
from lamda.training.trainer import Run

COMPARED_BYTES = 32_000_000
"""Held-out text up to this size is also compressed, to set the bits per byte beside something known."""


class Pretraining:
    """See `lamda.training.task.Task`."""

    def form(self, config: Config) -> Form:
        """Raw text."""
        return RAW_TEXT

    def held_out(
        self, config: Config, tokenizer: Tokenizer, *, on_wait: Callable[[], object] = lambda: None
    ) -> HeldOutText | None:
        """The validation text, if there is one."""
        sources = validation(config)
        if not sources:
            return None
        length, is_masked = config.data.sequence_length, config.data.separates_documents
        return HeldOutText(HeldOut(sources, tokenizer, length, document_mask=is_masked, on_wait=on_wait))

    def told(self, run: Run) -> Iterator[str]:
        """The table of losses, and what compressors make of the same text."""
        yield from table(run.scores.report())
        is_whole = run.config.eval.full_batches is None
        if run.world.is_main and is_whole and (text := held_out_bytes(run.held_out.text, limit=COMPARED_BYTES)):
            with computing(run.watchdog.progress):
                compressed = compressed_bits_per_byte(text)
            others = ", ".join(f"{name} {bits:.4f}" for name, bits in compressed.items())
            yield f"bits per byte on the same text: {others}"

    def sample(self, run: Run, tokenizer: Tokenizer) -> str:
        """A continuation of the first held-out words, or of an empty document."""
        prompt = on_main(run.world, lambda: _prompt(run))
        ids = [tokenizer.end_of_document, *tokenizer.encode(prompt)]
        return f"{prompt}⟫{tokenizer.decode(continuation(run, ids, stop_ids=(tokenizer.end_of_document,)))}\n"


def _prompt(run: Run) -> str:
    with BestEffort("no held-out text to continue", then="an empty document is continued", errors=Exception):
        if run.held_out is not None:
            beginning = next(iter(run.held_out.text.documents())).text[:200]
            return "".join(beginning.splitlines(keepends=True)[:-1]) or beginning
    return ""


def continuation(run: Run, ids: Sequence[int], *, stop_ids: Sequence[int]) -> list[int]:
    """What the model writes after `ids`; every rank calls it."""
    how = Sampling(max_new_tokens=100, temperature=0.8, seed=run.config.run.seed, stop_ids=frozenset(stop_ids))
    return run.engine.generate(ids, how)
