"""A checkpoint goes out and comes back to the last bit, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lamda.cli import main
from lamda.config import Config
from lamda.config.errors import UserError
from lamda.dialog.calibration import CALIBRATION, Calibration
from lamda.dialog.options import calibrated
from lamda.dialog.ratings import Ratings
from lamda.dialog.speaker import ReplyOptions
from lamda.distributed import World
from lamda.engines.deepspeed.engine import DeepSpeedEngine
from lamda.inference.loading import find_checkpoint, load_run
from lamda.interop.huggingface import export as export_module
from lamda.interop.huggingface import weights as weights_module
from lamda.interop.huggingface.card import model_card
from lamda.interop.huggingface.export import export
from lamda.interop.huggingface.importing import import_folder
from lamda.interop.huggingface.source import ExportSource
from lamda.storage import manifest
from lamda.storage.commit import add_file
from lamda.storage.metrics import MetricsFile
from lamda.storage.state import RunState
from lamda.training.inputs import check_initial_weights
from lamda.training.saver import Saver
from tests.distributed.engine_worker import batch, config
from tests.random_run import write_run

STATE = "optimizer-00000-of-00001.safetensors"
RANK = 3


@pytest.fixture(scope="module")
def train(tmp_path_factory, device, tokenizer_path):
    """Makes a run in bf16 with a checkpoint after two steps; of adapters beside these weights, where there are some."""

    def make(weights: Path | None = None) -> Path:
        run = tmp_path_factory.mktemp("runs") / "ship"
        run.mkdir()
        model = {"vocab_size": 400, **({} if weights is None else {"weights": str(weights)})}
        job = {"stage": 1, "bf16": True, "lora_rank": 0 if weights is None else RANK, "model": model}
        own = config(job, run, 0)
        own = Config.model_validate(
            {
                **own.model_dump(exclude_unset=True),
                "run": {"seed": 3, "dir": str(run)},
                "data": {"corpus": "standard_library", "sequence_length": 12},
            }
        )
        engine = DeepSpeedEngine(own, world=World(), device=device)
        engine.initialize_weights() if weights is None else engine.load_weights(weights)
        with MetricsFile(run / "metrics.jsonl", discarded=run / "metrics.discarded.jsonl", step=0) as metrics:
            for step in (1, 2):
                loss = engine.train_step(batch(step, World()), lr=1e-2).wait().loss()
                metrics.write(
                    {"step": step, "loss": loss, **({"eval/loss": 5.75, "eval/full/loss": 5.25} if step == 1 else {})}
                )
            metrics.write({"step": 3, "loss": 99.0, "eval/loss": 99.0})
        saver = Saver(run / "checkpoints", engine=engine, tokenizer=tokenizer_path)
        assert saver.begin(RunState(step=2, updates=2, consumed=16, samples=16, tokens=192)) is None
        assert saver.finish().problem is None
        return run

    return make


@pytest.fixture(scope="module")
def run(train) -> Path:
    return train()


@pytest.fixture(scope="module")
def saved(run) -> Path:
    return run / "checkpoints" / "step-00000002"


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """The checkpoint, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints" / saved.name))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("exported") / "ship"
    assert export(run, to) == "bfloat16"
    return to


@pytest.fixture
def foreign(exported, tmp_path) -> Path:
    """The exported folder, to be damaged, without the manifest that would tell."""
    folder = Path(shutil.copytree(exported, tmp_path / "foreign"))
    (folder / "manifest.json").unlink()
    return folder


def test_the_auto_classes_load_what_the_run_computes(run, exported):
    loaded = load_run(run)
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(exported)("what that was\n", return_tensors="pt").input_ids
    torch.testing.assert_close(model.float()(ids).logits, loaded.model.float()(ids), rtol=0, atol=1e-5)
    assert model.config.max_position_embeddings == 12


def test_generation_stops_where_lamda_generate_does(exported):
    settings = GenerationConfig.from_pretrained(exported)
    assert settings.eos_token_id == [*range(64)]
    assert (settings.do_sample, settings.top_k, settings.pad_token_id) == (True, 40, 1)


def test_weights_come_back_byte_for_byte(saved, exported, tmp_path):
    import_folder(exported, tmp_path / "back")
    for name in ("model.safetensors", "tokenizer.model"):
        assert (tmp_path / "back" / name).read_bytes() == (saved / name).read_bytes()
    assert manifest.problem_of(tmp_path / "back") is None


def test_what_transformers_saved_comes_in(saved, exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path / "theirs")
    shutil.copy(exported / "tokenizer.model", tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_shards_come_back_as_one_file(saved, tmp_path):
    export(saved, tmp_path / "parts", max_shard_size="20KB")
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text("utf-8"))
    files = {*index["weight_map"].values()}
    assert len(files) > 2
    assert files == {file.name for file in (tmp_path / "parts").glob("*.safetensors")}
    largest = max((tmp_path / "parts" / file).stat().st_size for file in files)
    assert largest < 25_000
    import_folder(tmp_path / "parts", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    assert torch.equal(whole["model.embedding.weight"], load_file(saved / "model.safetensors")["embedding.weight"])


def test_what_came_back_generates_trains_and_goes_out_again(run, exported, tmp_path, capsys):
    import_folder(exported, tmp_path / "back")
    said = []
    for place in (run, tmp_path / "back"):
        assert main(["generate", str(place), "--prompt", "it was", "--max-new-tokens", "5"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    loaded = load_run(tmp_path / "back")
    assert loaded.config.data.sequence_length == 12
    check_initial_weights(tmp_path / "back" / "model.safetensors", loaded.config.model)
    export(tmp_path / "back", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert "Unknown: these weights came without their run." in (tmp_path / "again/README.md").read_text("utf-8")


def test_a_dialogue_model_keeps_its_ratings_calibration(tokenizer_path, tmp_path):
    run = write_run(tmp_path / "run", tokenizer_path, packing="whole")
    rng = np.random.default_rng(0)
    positive = rng.random(400) < 0.5
    ratings = Ratings(rng.normal(positive, 1.0).clip(-2, 2) / 5 + 0.5, positive, np.arange(400))
    calibration = Calibration.of({"unsafe": ratings}, false_refusals=0.05)
    add_file(run / "checkpoints" / "step-00000001", CALIBRATION, calibration.model_dump_json(indent=1))
    export(run, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").is_dialogue_model
    import_folder(tmp_path / "out", tmp_path / "back")
    loaded = load_run(tmp_path / "back")
    options = calibrated(ReplyOptions(), loaded, threshold=None)
    assert (options.calibration, options.threshold) == (calibration, calibration.threshold)
    assert calibration.threshold < 1
    (tmp_path / "out" / CALIBRATION).write_text("{}", "utf-8")
    with pytest.raises(UserError, match="calibration"):
        import_folder(tmp_path / "out", tmp_path / "damaged")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"calibration\.json: cannot be read"):
        import_folder(tmp_path / "out", tmp_path / "damaged")


def test_float32_is_the_optimizers_own(saved, tmp_path):
    assert export(saved, tmp_path / "wide", dtype="float32") == "float32"
    wide, narrow = load_file(tmp_path / "wide" / "model.safetensors"), load_file(saved / "model.safetensors")
    state = load_file(saved / STATE)
    assert wide.keys() == narrow.keys()
    for name, weight in wide.items():
        assert torch.equal(weight.flatten(), state[f"{name}|weight|0"]), name
        assert torch.equal(weight.bfloat16(), narrow[name]), name
    assert any(not torch.equal(weight, narrow[name].float()) for name, weight in wide.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32


def test_float32_of_adapters_is_their_sum(train, saved, tmp_path):
    base = saved / "model.safetensors"
    saved = train(base) / "checkpoints" / "step-00000002"
    export(saved, tmp_path / "wide", dtype="float32")
    wide, narrow = load_file(tmp_path / "wide" / "model.safetensors"), load_file(saved / "model.safetensors")
    state = load_file(saved / STATE)
    stem, width = "layers.1.attention", 24
    for part in ("query", "key", "value"):
        b = state[f"{stem}.{part}.lora_b.weight|weight|0"].view(width, RANK)
        a = state[f"{stem}.{part}.lora_a.weight|weight|0"].view(RANK, width)
        assert b.abs().max() > 0
        frozen = state[f"{stem}.{part}.weight|frozen|0"].view(width, width).float()
        wanted = frozen + b @ a
        torch.testing.assert_close(wide[f"{stem}.{part}.weight"], wanted)
    for name, weight in wide.items():
        torch.testing.assert_close(weight.bfloat16(), narrow[name], rtol=1e-2, atol=1e-4, msg=name)


def test_float32_runs_are_narrowed_where_asked(tokenizer_path, tmp_path):
    run = write_run(tmp_path / "run", tokenizer_path)
    stored = load_file(run / "checkpoints/step-00000001/model.safetensors")
    assert export(run, tmp_path / "wide") == "float32"
    assert export(run, tmp_path / "narrow", dtype="bfloat16") == "bfloat16"
    narrow = load_file(tmp_path / "narrow" / "model.safetensors")
    assert all(torch.equal(narrow[name], weight.bfloat16()) for name, weight in stored.items())


def test_the_card_tells_data_license_metrics_and_hashes(run, saved, exported):
    card = (exported / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# ship\n" in card
    for message in ("standard_library", "PSF-2.0", "2 of 9", "192", "U+2581", manifest.read(saved)["sha256"]):
        assert message in card
    loss = json.loads((run / "metrics.jsonl").read_text("utf-8").split("\n")[1])["loss"]
    assert f"| loss (nats per token) | {loss:.4f} |" in card
    assert "On held-out text at step 1:\n\n| metric | value |\n| --- | --- |\n| loss | 5.2500 |\n" in card
    assert "5.75" not in card, "the figure of all the text is the one to show"
    assert "99.0" not in card
    for file in sorted(exported.iterdir()):
        if file.name not in ("README.md", "manifest.json"):
            assert f"| `{file.name}` | `{hashlib.sha256(file.read_bytes()).hexdigest()}` |" in card
    assert str(run.parent) not in card


def test_the_card_claims_nothing_of_its_corpus_for_files_that_the_run_named(run, exported):
    source = ExportSource.of(find_checkpoint(run))
    data = source.config.data.model_copy(update={"files": ("/home/me/mine.jsonl",)})
    own = replace(source, config=source.config.model_copy(update={"data": data}))
    card = model_card(own, exported, dtype="float32", masters=True)
    assert "data.files: files that the run named itself" in card
    assert "| files | `mine.jsonl` | not stated |" in card
    assert "PSF-2.0" not in card
    assert "standard_library" not in card


def test_the_card_may_change_and_nothing_else(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    (folder / "README.md").write_text("Mine.", "utf-8")
    import_folder(folder, tmp_path / "back")
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=r"tokenizer.json has \d+ bytes instead of \d+"):
        import_folder(folder, tmp_path / "other")


def untouched(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_written_over(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="something is there already"):
        export(run, tmp_path)
    with pytest.raises(UserError, match="something is there already"):
        export(run, tmp_path / "mine.txt")
    assert untouched(tmp_path) == {str(tmp_path / "mine.txt"): b"mine"}
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_is_interrupted_leaves_nothing(run, tmp_path, monkeypatch, failure):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(export_module, "model_card", fail)
    with pytest.raises((UserError, KeyboardInterrupt), match=r"No space left|^$"):
        export(run, tmp_path / "new" / "folder")
    assert [*(tmp_path / "new").iterdir()] == []


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_reported(copied, tmp_path, monkeypatch):
    def delete(*_, **__):
        shutil.rmtree(copied)
        raise FileNotFoundError("model.safetensors")

    monkeypatch.setattr(export_module, "write_shards", delete)
    with pytest.raises(UserError, match="the running job has deleted it"):
        export(copied, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_full_disk_is_reported(run, exported, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights_module, "save_file", fail)
    for write, source in ((export, run), (import_folder, exported)):
        with pytest.raises(UserError, match=r"cannot be written \(I/O error: No space left"):
            write(source, tmp_path / "new" / "folder")
        assert [*(tmp_path / "new").iterdir()] == []


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_does_not_go_out(copied, tmp_path):
    spoil(copied / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors has changed since it was written"):
        export(copied, tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither a checkpoint nor a run"),
        (["RUN", "--max-shard-size", "large"], "--max-shard-size large: is not a size"),
        (["BACK", "--dtype", "float32"], "has no optimizer state"),
    ],
)
def test_a_wrong_command_is_reported(run, exported, tmp_path, capsys, arguments, message):
    import_folder(exported, tmp_path / "back")
    places = {"RUN": str(run), "BACK": str(tmp_path / "back")}
    words = [places.get(word, word) for word in arguments]
    assert main(["export", *words, "--to", str(tmp_path / "to")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


def wrong_kind(folder):
    edit(folder / "config.json", model_type="llama")


def untied(folder):
    edit(folder / "config.json", tie_word_embeddings=False)


def other_width(folder):
    edit(folder / "config.json", d_ff=41)


def no_number(folder):
    edit(folder / "config.json", n_heads="many", d_model=-1)


def no_configuration(folder):
    (folder / "config.json").unlink()


def no_tokenizer(folder):
    (folder / "tokenizer.model").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_tensors(folder):
    (folder / "model.safetensors").write_bytes(b"{}")


def half_precision(folder):
    path = folder / "model.safetensors"
    save_file({name: weight.half() for name, weight in load_file(path).items()}, path)


def too_few(folder):
    path = folder / "model.safetensors"
    save_file({name: weight for name, weight in load_file(path).items() if "norm" not in name}, path)


def elsewhere(folder):
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"embedding.weight": "../x.safetensors"}}')


def no_file_name(folder):
    elsewhere(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"embedding.weight": 5}}')


def bottomless(folder):
    (folder / "config.json").write_text("[" * 100_000)


def bottomless_index(folder):
    elsewhere(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map":' * 100_000)


def pipe(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def other_vocabulary(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "embedding.weight": weights["embedding.weight"][:399].contiguous()}, path)
    edit(folder / "config.json", vocab_size=399)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_kind, "model_type is 'llama'"),
        (untied, "tie_word_embeddings is not true"),
        (other_width, "of another shape"),
        (no_number, "(?s)d_model.*n_heads"),
        (no_configuration, "config.json: cannot be read"),
        (no_tokenizer, "tokenizer"),
        (no_weights, "there is no model.safetensors"),
        (no_tensors, "model.safetensors: cannot be read"),
        (half_precision, "are of type F16; save them all in bfloat16 or float32"),
        (too_few, "5 missing"),
        (elsewhere, "not a plain file name"),
        (no_file_name, "names 5, which is not a plain file name"),
        (bottomless, "config.json: cannot be read"),
        (pipe, "config.json: cannot be read .*not a regular file"),
        (bottomless_index, "index.json cannot be read"),
        (other_vocabulary, "has 400 pieces and the model 399 tokens"),
    ],
)
def test_what_is_not_lamdas_does_not_come_in(foreign, tmp_path, change, message):
    change(foreign)
    with pytest.raises(UserError) as error:
        import_folder(foreign, tmp_path / "back")
    assert re.search(message, str(error.value)), error.value
    assert not (tmp_path / "back").exists()
    assert not [*tmp_path.glob(".*.tmp")]


def test_the_commands_say_what_they_did(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    assert "weights in bfloat16, 0.0 MB in one file" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "out"), "--to", str(tmp_path / "back")]) == 0
    assert f"model.weights to {tmp_path / 'back' / 'model.safetensors'}" in capsys.readouterr().out
