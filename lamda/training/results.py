"""What a run shows once its last step is done: evaluation, a sample, and where everything is."""

from __future__ import annotations

from lamda.best_effort import BestEffort
from lamda.console import computing
from lamda.durable import replace_file
from lamda.storage.metrics import read_metrics
from lamda.training.trainer import Trainer

HIGHER_AGAIN = dict.fromkeys(("cosine", "wsd"), " (the learning rate then rises again: docs/faq.md)")


def show_results(trainer: Trainer) -> str | None:
    """Show the last evaluation, a sample and the folder; returns the reason if a rank is asked to stop first."""
    evaluator, guard, say = trainer.evaluator, trainer.guard, trainer.logger.progress.say
    guard.mark("finish", step=trainer.state.step)
    then = "the run is complete without it"
    with BestEffort("the final table cannot be made", errors=Exception, then=then):
        if evaluator.scores is not None and trainer.world.is_main_process:
            with computing(guard.watchdog.progress):
                for line in evaluator.task.summary(evaluator.scores):
                    say(line)
        metrics = _recorded_metrics(trainer) if evaluator.scores is None else evaluator.task_metrics
        for name, value in metrics.items():
            say(f"{name} {value:.4f}")
    if (reason := guard.agreed_stop_reason()) is not None:
        return reason
    # No BestEffort: if one rank failed alone, the others would wait for it.
    sample = evaluator.task.sample(trainer.engine, evaluator.tokenizer)
    if trainer.world.is_main_process:
        say(f"sample:\n{sample}")
        file = trainer.directory.samples / f"step-{trainer.state.step:08d}.txt"
        with BestEffort(f"{file} cannot be written", then=then):
            file.parent.mkdir(exist_ok=True)
            replace_file(file, sample)
        higher_again = HIGHER_AGAIN.get(trainer.config.train.schedule, "")
        say(
            f"everything is in {trainer.directory.path}; to continue, run the same command with a larger train.steps "
            f"or train.tokens{higher_again}"
        )
    return None


def _recorded_metrics(trainer: Trainer) -> dict[str, float]:
    """`eval/...` of the last step from metrics.jsonl, on rank 0: a previous start may have evaluated it."""
    rows = read_metrics(trainer.directory.metrics)[-1:] if trainer.world.is_main_process else []
    return {
        name: value for row in rows for name, value in row.items() if name.startswith("eval/") and value is not None
    }
