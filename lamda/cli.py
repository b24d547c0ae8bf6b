"""The command `lamda`: a table of commands, each imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from lamda import __version__, console
from lamda.config.completion import SHELLS, script
from lamda.config.errors import RunError, UserError, nearest, refused_by_system
from lamda.config.help import help_text, to_yaml
from lamda.config.loading import load_config, wants_help
from lamda.dialog import usage

_CONFIG = "--config FILE [--section.key VALUE ...]"
_CHECKPOINT = "CHECKPOINT|RUN[@STEP]"


class Command(NamedTuple):
    """What a command calls, the arguments it takes, what it does, and what its options and exit codes mean."""

    call: Callable[[list[str]], int | None]
    usage: str
    summary: str
    details: str = ""


def _main_of(module: str) -> Callable[[list[str]], int | None]:
    return lambda argv: importlib.import_module(module).main(argv)


def _train_tokenizer(argv: list[str]) -> None:
    config = load_config(argv)
    print(importlib.import_module("lamda.data.run_tokenizer").train_run_tokenizer(config))


def _show_config(argv: list[str]) -> None:
    _say(to_yaml(load_config(argv)).rstrip("\n"))


def _complete(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise UserError(f"lamda completion takes the name of your shell: {', '.join(SHELLS)}")
    told = {name: (f"{command.usage}\n{command.details}", command.summary) for name, command in COMMANDS.items()}
    _say(script(argv[0], told).rstrip("\n"))


COMMANDS = {
    "pretrain": Command(_main_of("lamda.launch.pretrain"), _CONFIG, "train a model from raw text, or go on with a run"),
    "finetune": Command(
        _main_of("lamda.launch.finetune"), _CONFIG, "fine-tune a model on dialogues and ratings, or go on with a run"
    ),
    "evaluate": Command(
        _main_of("lamda.training.evaluate"),
        "RUN_OR_CHECKPOINT [--files GLOB] [--json]",
        "loss, perplexity and bits per byte of a checkpoint on text, in all and by domain",
    ),
    "eval": Command(
        _main_of("lamda.interop.harness.command"),
        "RUN_OR_CHECKPOINT --tasks NAME,NAME [--limit N] [--num-fewshot N] [--batch-size N] [--include-path DIR] "
        "[--json] [--output FILE]",
        "a model on tasks of the evaluation harness lm-eval: lambada_openai, hellaswag ...",
        """\
--tasks NAME,NAME      tasks, groups or tags; `lm-eval ls tasks` lists them
--limit N              the first N examples of each task
--num-fewshot N        examples in a prompt, in place of the task's own number
--batch-size N         rows that go through the model together; default: the run's micro-batch
--include-path DIR     folder of further task files; files that they name are looked for there first
--json                 one JSON object
--output FILE          the same into a file""",
    ),
    "generate": Command(
        _main_of("lamda.inference.command"),
        "RUN --prompt TEXT [--max-new-tokens N] [--temperature T] [--top-k K] [--top-p P] [--repetition-penalty R] "
        "[--seed N] [--candidates N] [--int8] [--json]",
        "continue a text with a trained model, as it comes",
        """\
--prompt TEXT          what is continued; "" begins a document
--max-new-tokens N     at the most; default 128
--temperature T        default 1; 0 takes the likeliest token each time
--top-k K              draw among the K likeliest tokens; default 40, 0 for all
--top-p P              and among the fewest that have this share together; default 1
--repetition-penalty R on what was there before; default 1, none
--seed N               the same gives the same text; default 0
--candidates N         so many continuations of the same prompt
--int8                 the matrices in 8 bits
--json                 one JSON object: texts, ids, log probabilities""",
    ),
    "serve": Command(
        _main_of("lamda.dialog.server.main"),
        f"RUN [--host H] [--port P] [--key-file FILE | --without-key] [--requests N] [--seconds S] {usage.USAGE}",
        "answer OpenAI's HTTP requests, and a page, with a trained model",
        f"""\
--host H               default 127.0.0.1, which other machines cannot reach
--port P               default 8000
--name NAME            what clients call the model; default: the run's folder
--key-file FILE        its content, or LAMDA_API_KEY, must come with every request
--without-key          let other machines in without one
--allow-host NAME      a name beside localhost by which clients call this server; may be given again
--max-tokens N         of a prompt and of an answer at the most; default 2048
--chat-only            without /v1/completions, whose texts no filter sees
--requests N           at work at the same time, one more is refused; default 64
--total-tokens N       whose keys and values all requests may hold together; default 262144
--connections N        open at the same time; default 1024
--seconds S            that the work for a request may take; default 120
{usage.DETAILS}""",
    ),
    "plan": Command(
        _main_of("lamda.cluster.plan"),
        f"[--gpus N] [--gpu NAME] [--mfu SHARE] [--price P] [--save-seconds S] [--json] {_CONFIG}",
        "what a run will take: memory, time, cost and disk; and whether it fits",
        """\
--gpus N               ranks, one a GPU; default 1
--gpu NAME             b200, h200, h100 (default), a100-80, a100-40, l40s or rtx4090
--mfu SHARE            of the GPU's peak that training reaches; default 0.45
--price P              of a GPU-hour, for the cost
--save-seconds S       that training waits for a checkpoint; default 10

exit code: 0 where the run fits, 1 where it does not""",
    ),
    "prepare": Command(
        _main_of("lamda.data.prepare"),
        f"[--json] {_CONFIG}",
        "make the run's blocks ahead into data.cache_dir, with all cores",
    ),
    "where": Command(
        _main_of("lamda.runs.where"),
        "RUN --step S [--row R] [--json]",
        "the documents that a training row came from, and its text",
    ),
    "runs": Command(
        _main_of("lamda.runs.listing"),
        "[DIR] [--json]",
        "the runs in a folder: status, step, loss, speed, last checkpoint",
    ),
    "watch": Command(
        _main_of("lamda.runs.watch"),
        "RUN",
        "follow a run until it ends: its figures and the curve of its loss",
        "exit code: that of the run: 0 finished, 75 preempted, 1 failed or died",
    ),
    "plot": Command(
        _main_of("lamda.runs.plot"),
        "RUN [RUN ...] -o FILE [--metric NAME ...] [--x step|tokens|time] [--log] [--smooth N]",
        "draw the curves of one or more runs into a picture, a panel for each metric",
        """\
-o FILE                .png, .svg or .pdf
--metric NAME ...      columns of metrics.jsonl: loss (default), loss/DOMAIN, grad_norm, tokens_per_second ...
--x step|tokens|time   what lies to the right; default: step
--log                  logarithmic vertical axes
--smooth N             draw the mean of the last N points over the points themselves""",
    ),
    "report": Command(
        _main_of("lamda.runs.report"),
        "RUN [RUN ...] -o FILE.html",
        "runs as one page: curves, figures, settings, checkpoints, what the model wrote",
        """\
-o FILE                a page, .html, that holds everything and fetches nothing: send it, or keep it with a paper""",
    ),
    "dashboard": Command(
        _main_of("lamda.runs.dashboard"),
        "[RUN | --project P] [--entity E] [--dry-run | --json]",
        "make a workspace in W&B with the panels of `lamda report`, in its order",
        """\
RUN                    whose project and entity are taken
--project P            in place of a run
--entity E             W&B user or team; default: the run's, else the account's own
--dry-run              say what would be made, and make nothing
--json                 the specification that W&B would get, and make nothing""",
    ),
    "export": Command(
        _main_of("lamda.interop.huggingface.export"),
        "RUN_OR_CHECKPOINT --to DIR [--dtype bfloat16|float32] [--max-shard-size SIZE]",
        "write a model as a Hugging Face folder: weights, fast tokenizer, chat template, model card",
        """\
--to DIR               a new folder; nothing is written over
--dtype TYPE           default: as the checkpoint computes; float32 takes the optimiser's own weights
--max-shard-size SIZE  of a file of weights, such as 500MB; default 5GB""",
    ),
    "import": Command(
        _main_of("lamda.interop.huggingface.importing"),
        "DIR --to RUNLIKE_DIR",
        "take a Hugging Face folder of LaMDA's back, for model.weights, generate, serve and chat",
    ),
    "checkpoint ls": Command(
        _main_of("lamda.runs.checkpoint_ls"), "RUN [--json]", "the checkpoints of a run: step, size, ranks, state"
    ),
    "checkpoint show": Command(
        _main_of("lamda.runs.checkpoint_show"), f"{_CHECKPOINT} [--json]", "what a checkpoint holds"
    ),
    "checkpoint verify": Command(
        _main_of("lamda.runs.checkpoint_verify"),
        f"{_CHECKPOINT} [--json]",
        "whether checkpoints are as they were written, by their hashes",
        "exit code: 0 where all are, 1 where one is damaged",
    ),
    "checkpoint diff": Command(
        _main_of("lamda.runs.checkpoint_diff"),
        f"{_CHECKPOINT} {_CHECKPOINT} [--json]",
        "by what two checkpoints differ: weights, optimiser, state, configuration",
        "exit code: 0 where they are the same, 1 where they differ",
    ),
    "prove-resume": Command(
        _main_of("lamda.cluster.prove_resume"),
        f"[--ranks N] [--others M] [--steps S] [--seed N] [--keep] [--json] {_CONFIG}",
        "prove that a killed run of this configuration ends as an unbroken one, to the last bit",
    ),
    "supervise": Command(
        _main_of("lamda.cluster.supervise"),
        "[--run DIR] -- COMMAND ...",
        "run a command that trains, and start it again from its last checkpoint when it fails",
    ),
    "doctor": Command(
        _main_of("lamda.cluster.doctor"),
        f"[--json] {_CONFIG}",
        "check machine, packages, GPUs, network and disk for a run; under a launcher all ranks",
    ),
    "submit": Command(
        _main_of("lamda.cluster.submit"),
        f"--cluster FILE [--nodes N] [--doctor] [--dry-run | --json] {_CONFIG}",
        "start a run on SLURM, on machines over ssh or on Kubernetes, or show what would be started",
        """\
--cluster FILE         the site: scheduler, partition, what a node has (configs/cluster/)
--nodes N              default 1
--doctor               examine all ranks in place of training
--dry-run              print what would be started, and start nothing
--json                 of a job in the queue one JSON object: scheduler, job, run, nodes, ranks""",
    ),
    "chat": Command(
        _main_of("lamda.dialog.chat"),
        f"RUN [--system TEXT] {usage.USAGE}",
        "talk with a model in the terminal; /why shows how a reply was chosen",
        f"{usage.DETAILS}\n{usage.SAMPLING}",
    ),
    "dialog research-data": Command(
        _main_of("lamda.dialog.research_data"),
        "CORPUS -o OUT [--count N] [--seed N] [--json]",
        "make conversations that teach a model to use its tools, from a corpus and from arithmetic",
    ),
    "dialog convert": Command(
        _main_of("lamda.dialog.convert"),
        "FORMAT IN [IN ...] -o OUT [--json]",
        "turn published dialogue sets into conversations, one JSON object a line",
        """\
FORMAT                 topical-chat, hh-rlhf, taskmaster, oasst1 or chat (messages of role and content)
IN                     .jsonl, .jsonl.zst, .jsonl.gz or .json, as published
-o OUT                 .jsonl, .jsonl.zst or .jsonl.gz""",
    ),
    "dialog evaluate": Command(
        _main_of("lamda.dialog.evaluate"),
        "RUN_OR_CHECKPOINT [--files GLOB] [--examples N] [--length L] [--json]",
        "perplexity of responses and how well ratings are told, on held-out dialogues",
    ),
    "tokenizer train": Command(_train_tokenizer, _CONFIG, "train the run's tokenizer from its training files"),
    "config show": Command(_show_config, _CONFIG, "print the whole configuration that file and flags resolve to"),
    "completion": Command(
        _complete,
        "bash|zsh|fish",
        "print what makes your shell complete commands, options and keys",
        """\
bash                   lamda completion bash > ~/.local/share/bash-completion/completions/lamda
zsh                    lamda completion zsh > ~/.lamda-completion && echo 'source ~/.lamda-completion' >> ~/.zshrc
fish                   lamda completion fish > ~/.config/fish/completions/lamda.fish""",
    ),
}

# What `lamda --help` shows: the commands by what a person wants. Each has one place here.
MAP: dict[str, tuple[str, ...]] = {
    "Before a run": ("doctor", "plan", "config show", "tokenizer train", "prepare"),
    "Train": ("pretrain", "finetune", "supervise", "submit", "prove-resume"),
    "Look at runs": ("runs", "watch", "plot", "report", "dashboard", "where"),
    "Checkpoints": ("checkpoint ls", "checkpoint show", "checkpoint verify", "checkpoint diff"),
    "Measure": ("evaluate", "eval", "dialog evaluate"),
    "Use a model": ("generate", "chat", "serve", "export", "import"),
    "Data for dialogue": ("dialog convert", "dialog research-data"),
    "Your shell": ("completion",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lamda ARGV`.

    Returns 0 on success, 1 where a run or a model failed, or the output cannot be written, 2 where the user can fix
    something (all reported on stderr), 130 on Ctrl-C, 141 where the reader of standard output has left
    (`lamda runs DIR | head -1`), or what the command gives.
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
                raise  # a connection, or a mistake of ours
            print(message, file=sys.stderr)
            return 1
        if isinstance(problem, BrokenPipeError):
            return 141
        print(f"standard output cannot be written ({problem.strerror})", file=sys.stderr)
        return 1


def _run(words: list[str]) -> int | None:
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
    if name:
        arguments = words[len(name.split()) :]
        if not wants_help(arguments):
            return COMMANDS[name].call(arguments)
        _say(_help(COMMANDS[name], name))
    elif words == ["--version"]:
        _say(__version__)
    elif wants_help(words) or len(words) < 2:
        _say(_overview([word for word in words if not wants_help([word])]))
    else:
        raise _unknown(words[:2])
    return 0


def _say(text: str) -> None:
    with suppress(BrokenPipeError):  # the reader, `head` perhaps, has seen enough
        print(text, flush=True)


def _help(command: Command, name: str) -> str:
    keys = help_text() if _CONFIG in command.usage else ""
    return "\n\n".join(filter(None, (f"usage: lamda {name} {command.usage}", command.summary, command.details, keys)))


def _overview(group: list[str]) -> str:
    """The map of the commands, or a group such as `tokenizer`; raises UserError where there is no such group."""
    chosen = [name for name in COMMANDS if name.split()[: len(group)] == group]
    if not chosen:
        raise _unknown(group)
    parts = ["usage: lamda COMMAND [ARGUMENTS]; `lamda COMMAND --help` says more"]
    for title, names in ({"": tuple(chosen)} if group else MAP).items():
        lines = [f"  lamda {name:<22}{COMMANDS[name].summary}" for name in names]
        parts.append("\n".join([title, *lines] if title else lines))
    end = [] if group else ["A first run, minutes on two CPU cores: lamda pretrain --config tiny"]
    return "\n\n".join(parts + end)


def _unknown(words: list[str]) -> UserError:
    typed = " ".join([words[0], *(word for word in words[1:] if not word.startswith("-"))])
    guess = nearest(typed, COMMANDS) or nearest(words[0], COMMANDS)
    return UserError(f"there is no command `lamda {typed}`{guess}; `lamda --help` lists all")
