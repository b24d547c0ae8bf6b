"""`lamda eval` prints JSON that any parser reads, or says why there are no figures."""

import json
from math import nan

import pytest
from safetensors.torch import load_file, save_file

from lamda.cli import main as lamda
from lamda.config.errors import UserError
from lamda.interop.harness.command import main
from tests.conftest import make_text, write_shard
from tests.random_run import seal_checkpoint, write_run


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


@pytest.fixture
def run(tmp_path, tokenizer_path):
    return write_run(tmp_path / "run", tokenizer_path)


def evaluated(run, files, capsys):
    assert main([str(run), "--files", str(files), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=no_constant)


def test_an_empty_document_beside_others_is_its_end_symbol(run, tmp_path, capsys):
    with_empty = write_shard(tmp_path / "a.jsonl", ["", make_text(1, 40)])
    without = write_shard(tmp_path / "b.jsonl", [make_text(1, 40)])
    figures = evaluated(run, with_empty, capsys)
    alone = evaluated(run, without, capsys)
    assert (figures["tokens"], figures["bytes"]) == (alone["tokens"] + 1, alone["bytes"])
    assert figures["loss"] > 0


def test_text_of_empty_documents_alone_is_refused(run, tmp_path):
    files = write_shard(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(UserError, match=r"there is no text to score: .*empty\.jsonl has only empty documents"):
        main([str(run), "--files", str(files), "--json"])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_diverged_model_has_null_for_figures_that_json_has_not(run, tmp_path, capsys):
    path = run / "checkpoints" / "step-00000001" / "model.safetensors"
    save_file({name: weight.fill_(nan) for name, weight in load_file(path).items()}, path)
    seal_checkpoint(path.parent)
    figures = evaluated(run, write_shard(tmp_path / "text.jsonl", [make_text(1, 40)]), capsys)
    assert (figures["loss"], figures["perplexity"], figures["bits_per_byte"]) == (None, None, None)


def test_a_bad_line_is_warned_of_once_though_rows_are_counted_first(run, tmp_path, capsys, caplog):
    path = write_shard(tmp_path / "text.jsonl", [make_text(1, 40)])
    with path.open("a") as file:
        file.write("not JSON\n")
    evaluated(run, path, capsys)
    assert sum("line 2 quarantined" in message for message in caplog.messages) == 1


def test_options_of_tasks_are_refused_without_tasks(run, capsys):
    with pytest.raises(UserError, match=r"^--limit: give --tasks as well\n--num-fewshot: give --tasks as well$"):
        main([str(run), "--limit", "3", "--num-fewshot", "0"])
    with pytest.raises(SystemExit, match="2"):
        main([str(run), "--files", "x", "--tasks", "y"])


def test_the_earlier_name_of_the_command_gives_the_same_report(run, tmp_path, capsys):
    files, output = str(write_shard(tmp_path / "text.jsonl", [make_text(1, 40)])), tmp_path / "report.json"
    assert lamda(["eval", str(run), "--files", files, "--json", "--output", str(output)]) == 0
    report = capsys.readouterr().out
    assert lamda(["evaluate", str(run), "--files", files, "--json"]) == 0
    assert capsys.readouterr().out == report == f"{output.read_text()}\n"
