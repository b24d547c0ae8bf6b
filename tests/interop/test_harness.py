"""What lm-eval gets from our decoder is what the model says, computed one token at a time in float64."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lamda import console
from lamda.cli import main
from lamda.data.card import Source
from lamda.data.held_out import HeldOut
from lamda.inference.loading import LoadedModel, load_run
from lamda.inference.sampling import NotFiniteError
from lamda.interop.harness import command
from lamda.interop.harness.language_model import HarnessModel
from lamda.interop.harness.scoring import LocalDecoder, windows
from lamda.interop.harness.tasks import Tasks, task_metrics
from lamda.interop.huggingface import LamdaConfig, LamdaForCausalLM
from lamda.interop.huggingface.tokenization import fast_tokenizer
from lamda.model.loss import token_nll
from lamda.training.evaluation import evaluate
from tests.conftest import WORDS, write_shard
from tests.interop.conftest import DOCUMENTS, QUESTIONS
from tests.random_run import write_run

ROOT = Path(__file__).parents[2]
LENGTH = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_path) -> Path:
    return write_run(tmp_path_factory.mktemp("harness") / "run", tokenizer_path)


@pytest.fixture(scope="module")
def loaded(run) -> LoadedModel:
    """A model whose logits differ enough for a likeliest token to be one by a margin."""
    return load_run(run)


@pytest.fixture(scope="module")
def wide(loaded):
    """The same weights in float64."""
    return load_run(loaded.path).model.double()


def harness(loaded, *, length=LENGTH, batch=4):
    decoder = LocalDecoder(loaded.model, loaded.tokenizer, batch)
    show_progress = lambda what, total: contextlib.nullcontext(lambda more: None)  # noqa: E731
    return HarnessModel(decoder, loaded.tokenizer, sequence_length=length, show_progress=show_progress)


def ask(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def by_hand(wide, inputs, target):
    """(ln P, whether it is the likeliest) of one token after some."""
    with torch.no_grad():
        shares = wide(torch.tensor([inputs], device=wide.final_norm.scale.device))[0, -1].log_softmax(-1)
    return float(shares[target]), int(shares.argmax()) == target


def rolling_by_hand(wide, prefix, ids, length):
    """ln P of ids, each after what lm-eval's windows let it see."""
    total = 0.0
    for inputs, targets in get_rolling_token_windows(ids, prefix, length, 1):
        for place, target in enumerate(targets):
            total += by_hand(wide, inputs[: len(inputs) - len(targets) + 1 + place], target)[0]
    return total


@given(st.integers(0, 90), st.integers(1, 20))
def test_long_texts_are_read_in_lm_evals_own_rolling_windows(count, length):
    ids = list(range(1, count + 1))
    expected = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 0, length, 1)]
    found = list(windows([0], ids, length=length))
    assert [(row.ids[: -row.scored], row.ids[-row.scored :]) for row in found] == expected


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(10, 19), min_size=1, max_size=30))
def test_every_token_is_judged_once_after_all_that_fits(context, tokens):
    rows = list(windows(context, tokens, length=8))
    assert [id for row in rows for id in row.ids[-row.scored :]] == tokens
    whole = context + tokens
    assert all(len(row.ids) == min(9, len(whole)) or row is rows[0] for row in rows)


def test_a_continuation_has_the_probability_of_its_tokens_one_at_a_time(loaded, wide):
    encode, end = loaded.tokenizer.encode, loaded.tokenizer.end_of_document
    pairs = [("the of", " and to"), ("", "is that"), ("have from one had " * 9, "not but\n"), ("a", " käse " * 30)]
    pairs.append(likeliest_continuation(loaded))
    found = harness(loaded).loglikelihood(ask("loglikelihood", *pairs))
    for (context, continuation), (total, is_greedy) in zip(pairs, found, strict=True):
        ids = [end, *encode(context + continuation)]
        first = 1 + len(encode(context.rstrip()))
        parts = [
            by_hand(wide, row.ids[: len(row.ids) - row.scored + place], target)
            for row in windows(ids[:first], ids[first:], length=LENGTH)
            for place, target in enumerate(row.ids[-row.scored :])
        ]
        assert total == pytest.approx(sum(part for part, _ in parts), abs=1e-4)
        assert is_greedy == all(likeliest for _, likeliest in parts)
    assert [is_greedy for _, is_greedy in found] == [False, False, False, False, True]


def likeliest_continuation(loaded):
    """A word, and the text of the model's likeliest next token, where both together have just these tokens."""
    for word in WORDS:
        ids = loaded.tokenizer.encode(word)
        with torch.no_grad():
            id = int(loaded.model(torch.tensor([[loaded.tokenizer.end_of_document, *ids]]))[0, -1].argmax())
        text = loaded.tokenizer.decode([id])
        if text.strip() and loaded.tokenizer.encode(word + text) == [*ids, id]:
            return word, text
    raise AssertionError("take other words")


class Encoding(TemplateLM):
    """lm-eval's own way to cut a text in two, with our tokenizer."""

    eot_token_id = 0

    def __init__(self, tokenizer):
        super().__init__()
        self.tok_encode = tokenizer.encode

    tok_encode = _loglikelihood_tokens = loglikelihood_rolling = generate_until = None


@given(st.lists(st.sampled_from(["the", "of", "käse", "\n", "7"]), min_size=1), st.sampled_from(["", " ", "  ", "\n"]))
def test_context_and_continuation_are_cut_where_lm_eval_cuts(loaded, words, between):
    context, continuation = " ".join(words) + between, " and so on"
    before, after = harness(loaded)._split(context, continuation)
    assert (before[1:], after) == Encoding(loaded.tokenizer)._encode_pair(context, continuation) or not context.strip()
    assert [*before[1:], *after] == loaded.tokenizer.encode(context + continuation)


def test_a_continuation_that_merges_into_its_context_is_still_judged(loaded):
    """`whe` + `re`: the tokens of the whole are judged from where they part with those of the context."""
    for context, continuation in (("th", "e"), ("the o", "f"), ("\n", "x")):
        before, after = harness(loaded)._split(context, continuation)
        assert after
        assert [*before[1:], *after] == loaded.tokenizer.encode(context + continuation)


def real_documents(tokenizer, *, rows):
    """Texts of this repository, each cut so that its tokens fill `rows` rows exactly; with the rows' length."""
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])[:8]:
        text = path.read_text("utf-8")[: 900 * rows]
        while len(tokenizer.encode(text)) % rows:
            text = text[:-1]
        yield text, len(tokenizer.encode(text)) // rows


@pytest.mark.parametrize("rows", [1, 3])
def test_lamda_evaluate_and_lm_eval_find_the_same_loss_on_real_documents(loaded, wide, tmp_path, rows):
    """Their tokens are the same but for one: lm-eval leaves out the end symbol."""
    tokenizer, documents = loaded.tokenizer, list(real_documents(loaded.tokenizer, rows=rows))
    end = tokenizer.end_of_document
    for number, (text, length) in enumerate(documents):
        file = write_shard(tmp_path / f"{number}.jsonl", [text])
        source = Source(name="s", license="none", files=str(file), domain="meta.pile_set_name")
        with torch.no_grad():
            ours = evaluate(
                HeldOut((source,), tokenizer, length),
                lambda inputs_BL, targets_BL, _: token_nll(loaded.model(inputs_BL), targets_BL),
                device=loaded.model.final_norm.scale.device,
                micro_batch=2,
            )
        (theirs,) = harness(loaded, length=length).loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
        ids = tokenizer.encode(text)
        last, _ = by_hand(wide, ids[-1:], end)  # the end symbol is alone in a row of its own
        assert int(ours.targets.sum()) == len(ids) + 1
        assert float(ours.nats.sum()) + last == pytest.approx(-theirs, abs=1e-5 * len(ids))


def test_rolling_loglikelihood_is_that_of_a_walk_in_float64(loaded, wide):
    found = harness(loaded).loglikelihood_rolling(ask("loglikelihood_rolling", *((text,) for text in DOCUMENTS)))
    for text, total in zip(DOCUMENTS, found, strict=True):
        expected = rolling_by_hand(wide, loaded.tokenizer.end_of_document, loaded.tokenizer.encode(text), LENGTH)
        assert total == pytest.approx(expected, abs=1e-3)
    assert found[1] == 0


def test_lm_evals_own_model_finds_the_same_on_what_was_exported(loaded):
    """Its Hugging Face model begins a text with the end symbol only if told so, but a rolled one always."""
    theirs = LamdaForCausalLM(LamdaConfig(**loaded.config.model.dimensions)).eval()
    theirs.model.load_state_dict(loaded.model.export_weights())
    given = {"pretrained": theirs, "tokenizer": fast_tokenizer(loaded.path / "tokenizer.model"), "max_length": LENGTH}
    rolled, paired = (HFLM(**given, device="cpu", batch_size=4, add_bos_token=each) for each in (False, True))
    texts = ask("loglikelihood_rolling", *((text,) for text in DOCUMENTS))
    pairs = ask("loglikelihood", *((each["question"], f" {each['choices'][0]}") for each in QUESTIONS))
    found = harness(loaded)
    assert found.loglikelihood_rolling(texts) == pytest.approx(rolled.loglikelihood_rolling(texts), abs=1e-3)
    for (ours, is_greedy), (expected, expected_greedy) in zip(
        found.loglikelihood(pairs), paired.loglikelihood(pairs), strict=True
    ):
        assert (ours, is_greedy) == (pytest.approx(expected, abs=1e-4), expected_greedy)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_neither_batch_nor_company_changes_an_answer(loaded, batch):
    requests = ask("loglikelihood", *((DOCUMENTS[2][: 40 * n], f" and {n}") for n in range(6)))
    expected = [harness(loaded).loglikelihood([request])[0] for request in requests]
    found = harness(loaded, batch=batch).loglikelihood(requests)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)


def test_what_is_written_is_what_greedy_decoding_without_a_cache_writes(loaded, wide):
    prompts = ["the of", "", "have from one " * 20]
    options = {"until": ["not to be found"], "max_gen_toks": 7}
    found = harness(loaded, batch=2).generate_until(ask("generate_until", *((text, options) for text in prompts)))
    for prompt, written in zip(prompts, found, strict=True):
        ids = [loaded.tokenizer.end_of_document, *loaded.tokenizer.encode(prompt)][-LENGTH:]
        for _ in range(7):
            with torch.no_grad():
                ids.append(int(wide(torch.tensor([ids]))[0, -1].argmax()))
        assert written == loaded.tokenizer.decode(ids[-7:])
    cut = written[len(written) // 2 :][:2]
    (ended,) = harness(loaded).generate_until(ask("generate_until", (prompts[2], options | {"until": ["§", cut]})))
    assert ended == written[: written.index(cut)]


def test_progress_is_reported_up_to_the_whole(loaded):
    message = []

    @contextlib.contextmanager
    def show_progress(what, total):
        message.append((what, total))
        yield message.append

    decoder = LocalDecoder(loaded.model, loaded.tokenizer, 2)
    model = HarnessModel(decoder, loaded.tokenizer, sequence_length=LENGTH, show_progress=show_progress)
    model.loglikelihood_rolling(ask("loglikelihood_rolling", ("the of",), ("and",), ("to in",)))
    assert message == [("rows", 3), 2, 1]


@pytest.fixture
def no_look_at_the_machine(monkeypatch):
    """What `simple_evaluate` adds about the machine takes other programs and seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def test_the_command_runs_local_tasks_without_a_network(
    run, loaded, task_folder, tmp_path, capsys, monkeypatch, no_look_at_the_machine
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "LINE_SECONDS", 0)
    flags = ["--include-path", str(task_folder), "--output", "report.json"]
    assert main(["eval", str(run), "--tasks", "local_choice, local_rolling,local_writing", *flags, "--json"]) == 0
    written, message = capsys.readouterr()
    assert "continuations: 4 of 4 requests, 100%, ETA 0:00:00" in message.splitlines()
    report = json.loads(written)
    assert report == json.loads((tmp_path / "report.json").read_text())
    model = harness(loaded, length=256)
    right = 0
    for each in QUESTIONS:
        pairs = [(each["question"], f" {choice}") for choice in each["choices"]]
        totals = [total for total, _ in model.loglikelihood(ask("loglikelihood", *pairs))]
        right += totals.index(max(totals)) == each["answer"]
    assert report["tasks"]["local_choice"]["acc"] == right / len(QUESTIONS)
    assert "acc_stderr" in report["tasks"]["local_choice"]
    texts = [text for text in DOCUMENTS if text]
    nats = -sum(model.loglikelihood_rolling(ask("loglikelihood_rolling", *((text,) for text in texts))))
    utf8 = sum(len(text.encode()) for text in texts)
    assert report["tasks"]["local_rolling"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / utf8)
    assert report["examples"] == {"local_choice": 4, "local_rolling": 2, "local_writing": 4}
    lines = "\n".join(command.table(report))
    assert f"{right / 4:.4f} ± " in lines
    during = Tasks.load(["local_choice", "local_rolling"], folder=task_folder).run_in_training(model, limit=None)
    for task, named in task_metrics(during).items():
        expected = {name: report["tasks"][task][name] for name in named}
        assert named == pytest.approx(expected, rel=1e-6), "the same without standard errors, in other batches"


def test_a_folder_named_from_where_one_stands_works_with_files_that_include_others(task_folder, tmp_path, monkeypatch):
    shutil.copytree(task_folder, tmp_path / "mine")
    (tmp_path / "mine" / "derived.yaml").write_text("include: local_choice.yaml\ntask: derived\n")
    monkeypatch.chdir(tmp_path)
    for folder in (Path("mine"), Path("mine/../mine")):
        tasks = Tasks.load(["derived"], folder=folder)
        assert [task.config.task for task in tasks._specs] == ["derived"]


def test_filters_and_standard_errors_keep_their_names():
    results = {
        "results": {
            "t": {"alias": "t", "acc,none": 0.5, "em,strict": 1, "em_stderr,strict": 0.1, "f1_stderr,none": "N/A"}
        }
    }
    assert task_metrics(results) == {"t": {"acc": 0.5, "em/strict": 1.0, "em_stderr/strict": 0.1}}
    report = {"tasks": task_metrics(results), "num_fewshot": {"t": 0}, "examples": {"t": 3}}
    assert [line.split() for line in command.table(report)][2] == ["t", "em/strict", "1.0000", "±", "0.1000", "0", "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "local_choise"], "there is no task 'local_choise'; did you mean 'local_choice'?"),
        (["--tasks", "local_missing"], "task local_missing: its data is not available (FileNotFoundError"),
        (
            ["--tasks", "local_choice", "--limit", "0", "--num-fewshot", "-1"],
            "--limit is 0: give at least 1\n--num-fewshot is -1",
        ),
        (["--tasks", "local_choice", "--output", "no/file.json"], "--output no/file.json: there is no folder no"),
        (["--tasks", "local_choice", "--output", "/"], "--output /: is a folder"),
        (["--tasks", " ,"], "--tasks is empty"),
        (["--tasks", "local_choice", "--num-fewshot", "100"], "lower --num-fewshot"),
    ],
)
def test_mistakes_are_reported_before_anything_is_computed(run, task_folder, capsys, monkeypatch, arguments, message):
    index = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **how: index(self, **how | {"include_defaults": False}))
    assert main(["eval", str(run), *arguments, "--include-path", str(task_folder)]) == 2
    assert message in capsys.readouterr().err


def test_a_diverged_model_chooses_no_answer(loaded):
    diverged = copy.deepcopy(loaded.model)
    diverged.final_norm.scale.data[0] = math.nan
    model = harness(replace(loaded, model=diverged))
    with pytest.raises(NotFiniteError, match="diverged"):
        model.loglikelihood(ask("loglikelihood", ("the", " of")))
    with pytest.raises(NotFiniteError, match="diverged"):
        model.loglikelihood_rolling(ask("loglikelihood_rolling", ("the of",)))


def test_figures_that_cannot_be_written_are_shown(run, task_folder, tmp_path, capsys, no_look_at_the_machine):
    arguments = ["--tasks", "local_choice", "--include-path", str(task_folder), "--output", "/dev/full"]
    assert main(["eval", str(run), *arguments]) == 2
    written, message = capsys.readouterr()
    assert "local_choice" in written
    assert "--output /dev/full: cannot be written (No space left on device)" in message


def test_a_hub_that_cannot_be_reached_is_reported_with_what_to_do(run, task_folder, capsys, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'x/y' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert main(["eval", str(run), "--tasks", "local_choice", "--include-path", str(task_folder)]) == 2
    message = capsys.readouterr().err
    assert "Couldn't reach 'x/y' on the Hub" in message
    assert "HF_HOME" in message


def test_a_missing_library_names_the_extra(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(run), "--tasks", "local_choice"]) == 2
    assert "pip install 'lamda-pytorch[eval]'" in capsys.readouterr().err
