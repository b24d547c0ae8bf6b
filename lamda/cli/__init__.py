"""The command `lamda`: a table of commands, each imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from lamda import __version__, console
from lamda.config.errors import RunError, UserError, nearest, refused_by_system
from lamda.config.loading import wants_help


class Command(NamedTuple):
    """A command. module: `main(argv)` runs it, and `parser()` declares its options without importing torch."""

    module: str
    summary: str

    def run(self, argv: list[str]) -> int | None:
        """Run it; returns the exit code, None for 0."""
        return importlib.import_module(self.module).main(argv)

    def parser(self) -> argparse.ArgumentParser:
        """The parser of its options, with the summary."""
        parser: argparse.ArgumentParser = importlib.import_module(self.module).parser()
        parser.description = self.summary
        return parser


COMMANDS = {
    "data audit": Command("lamda.audit.audit", "what text holds: duplicates, overlap, languages, personal data"),
    "data clean": Command("lamda.audit.clean", "write the list of documents that data.drop leaves out of training"),
    "pretrain": Command("lamda.launch.pretrain", "train a model on raw text, or resume a run"),
    "finetune": Command("lamda.launch.finetune", "fine-tune a model on dialogues and ratings, or resume a run"),
    "eval": Command("lamda.interop.harness.command", "loss and bits per byte on text, or results on lm-eval tasks"),
    "generate": Command("lamda.inference.command", "continue a text with a trained model, streaming"),
    "serve": Command("lamda.dialog.server.main", "serve a model over the OpenAI API, and a chat page"),
    "plan": Command("lamda.cluster.plan", "estimate memory, time, cost and disk of a run, and whether it fits"),
    "branch": Command("lamda.runs.branch", "start a new run from a checkpoint of another, with all of its state"),
    "prepare": Command("lamda.data.prepare", "tokenize and pack a run's rows into data.cache_dir, on all cores"),
    "trace": Command("lamda.runs.trace", "the documents that a training row came from, and its text"),
    "list": Command("lamda.runs.listing", "the runs in a folder: status, step, loss, speed, last checkpoint"),
    "watch": Command("lamda.runs.watch", "follow a run until it ends: its metrics and loss curve"),
    "plot": Command("lamda.runs.plot", "plot curves of one or more runs, one panel per metric"),
    "report": Command("lamda.runs.report", "runs as one HTML page: curves, metrics, settings, checkpoints, samples"),
    "dashboard": Command("lamda.runs.dashboard", "make a W&B workspace with the panels of `lamda report`"),
    "export": Command(
        "lamda.interop.export_command",
        "write a model as a Hugging Face folder: weights, fast tokenizer, chat template, model card",
    ),
    "import": Command(
        "lamda.interop.import_command", "turn an exported folder back into one for model.weights, generate, serve, chat"
    ),
    "checkpoint ls": Command("lamda.runs.checkpoint_ls", "the checkpoints of a run: step, size, ranks, state"),
    "checkpoint show": Command("lamda.runs.checkpoint_show", "the contents of a checkpoint"),
    "checkpoint verify": Command("lamda.runs.checkpoint_verify", "check the files of checkpoints against their hashes"),
    "checkpoint diff": Command(
        "lamda.runs.checkpoint_diff", "differences of two checkpoints: weights, optimizer, state, configuration"
    ),
    "test-resume": Command(
        "lamda.cluster.resume_test", "test that a killed and resumed run equals an uninterrupted one, bit for bit"
    ),
    "supervise": Command("lamda.cluster.supervise", "run a training command, and restart it after failures"),
    "doctor": Command(
        "lamda.cluster.doctor", "check machine, packages, GPUs, network and disk; under a launcher on all ranks"
    ),
    "prove-gpu": Command("lamda.proof.command", "measure a GPU: kernels, rates, the 2B's step, a resume; one page"),
    "submit": Command("lamda.cluster.submit", "start a run on SLURM, Kubernetes or machines over ssh"),
    "chat": Command("lamda.dialog.chat", "talk with a model in the terminal; /why shows how a reply was chosen"),
    "dialog make-tool-data": Command(
        "lamda.dialog.tool_data", "make conversations that teach tool use, from a corpus and arithmetic"
    ),
    "dialog convert": Command("lamda.dialog.convert", "convert published dialogue sets to conversations (JSON lines)"),
    "dialog filter": Command("lamda.dialog.self_filter", "keep the conversations that a model's own ratings accept"),
    "dialog evaluate": Command(
        "lamda.dialog.evaluate", "perplexity of responses and quality of ratings on held-out dialogues"
    ),
    "tokenizer train": Command("lamda.cli.tokenizer_train", "train the run's tokenizer on its training files"),
    "config show": Command("lamda.cli.config_show", "print the configuration that file and flags resolve to"),
    "completion": Command("lamda.cli.completion", "print a script that completes commands, options and keys"),
}

OLD_NAMES = {
    "evaluate": "eval",
    "prove-resume": "test-resume",
    "where": "trace",
    "runs": "list",
    "dialog research-data": "dialog make-tool-data",
}
"""Earlier names of commands; they work, but help and completion do not show them."""

GROUPS: dict[str, tuple[str, ...]] = {
    "Your text": ("data audit", "data clean"),
    "Before a run": ("doctor", "prove-gpu", "plan", "config show", "tokenizer train", "prepare"),
    "Train": ("pretrain", "finetune", "branch", "supervise", "submit", "test-resume"),
    "Look at runs": ("list", "watch", "plot", "report", "dashboard", "trace"),
    "Checkpoints": ("checkpoint ls", "checkpoint show", "checkpoint verify", "checkpoint diff"),
    "Evaluate": ("eval", "dialog evaluate"),
    "Use a model": ("generate", "chat", "serve", "export", "import"),
    "Data for dialogue": ("dialog convert", "dialog make-tool-data", "dialog filter"),
    "Your shell": ("completion",),
}
"""The commands as `lamda --help` groups them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lamda ARGV`.

    Returns the exit code of the command, or 1 where a run or a model failed or the output cannot be written, 2 for
    something that the user can fix (both with a message on stderr), 130 on Ctrl-C, and 141 where the reader of
    standard output has left (`lamda list DIR | head -1`).
    """
    console.end_with_output()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words) or 0
        sys.stdout.flush()
        return code
    except (RunError, UserError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        problem = console.output_problem()
        if problem is None:
            if (message := refused_by_system(error)) is None:
                raise  # a connection, or a bug
            print(message, file=sys.stderr)
            return 1
        if isinstance(problem, BrokenPipeError):
            return 141
        print(f"standard output cannot be written ({problem.strerror})", file=sys.stderr)
        return 1


def _run(words: list[str]) -> int | None:
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS or name in OLD_NAMES), None)
    if name:
        command, arguments = COMMANDS[OLD_NAMES.get(name, name)], words[len(name.split()) :]
        if not wants_help(arguments):
            return command.run(arguments)
        say(command.parser().format_help().rstrip())
    elif words == ["--version"]:
        say(__version__)
    elif wants_help(words) or len(words) < 2:
        say(_overview([word for word in words if not wants_help([word])]))
    else:
        raise _unknown(words[:2])
    return 0


def say(text: str) -> None:
    """Print the whole output of a command, to a reader that may stop early."""
    with suppress(BrokenPipeError):  # `lamda --help | head`
        print(text, flush=True)


def _overview(group: list[str]) -> str:
    """The commands, all or those of a group such as `tokenizer`; raises UserError for an unknown group."""
    chosen = [name for name in COMMANDS if name.split()[: len(group)] == group]
    if not chosen:
        raise _unknown(group)
    parts = ["usage: lamda COMMAND [ARGUMENTS]; `lamda COMMAND --help` shows its options"]
    for title, names in ({"": tuple(chosen)} if group else GROUPS).items():
        lines = [f"  lamda {name:<22}{COMMANDS[name].summary}" for name in names]
        parts.append("\n".join([title, *lines] if title else lines))
    end = [] if group else ["A first run, minutes on two CPU cores: lamda pretrain --config tiny"]
    return "\n\n".join(parts + end)


def _unknown(words: list[str]) -> UserError:
    typed = " ".join([words[0], *(word for word in words[1:] if not word.startswith("-"))])
    guess = nearest(typed, COMMANDS) or nearest(words[0], COMMANDS)
    return UserError(f"there is no command `lamda {typed}`{guess}; `lamda --help` lists all")
