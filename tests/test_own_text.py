"""A folder of a user's own text trains, is evaluated on a part of itself, and the exported card says what it was."""

import gzip
import json
import zipfile

import pytest

from lamda.data.hashing import document_hash
from lamda.interop.huggingface.export import export
from lamda.storage.metrics import read_metrics
from tests.conftest import make_text
from tests.launch import run_ranks

SIZES = {
    "model.vocab_size": "400", "model.d_model": "16", "model.n_layers": "1", "model.n_heads": "1", "model.d_head": "8",
    "model.d_ff": "16", "data.sequence_length": "16", "train.steps": "4", "train.global_batch_size": "4",
    "train.micro_batch_size": "2", "checkpoint.every": "2", "eval.every": "2",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Text of several kinds, one of which is no text and one of which is damaged."""
    place = tmp_path / "texts"
    place.mkdir()
    texts = [make_text(seed, 120) for seed in range(60)]
    (place / "notes.md").write_text(texts[0])
    (place / "old.txt").write_bytes(("Größe und Übermut, ein schöner Tag. " * 40).encode("latin-1"))
    (place / "page.html").write_text(f"<html><script>hidden()</script><p>{texts[1]}</p></html>")
    with gzip.open(place / "array.json.gz", "wt") as stream:
        json.dump([{"text": text} for text in texts[2:40]], stream)
    (place / "table.csv").write_text("id,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(texts[40:50])))
    with zipfile.ZipFile(place / "code.zip", "w") as archive:
        for number, text in enumerate(texts[50:]):
            archive.writestr(f"{number}.py", text)
    (place / "photo.jpg").write_bytes(bytes(range(256)) * 20)
    (place / "damaged.zip").write_bytes(b"PK\x03\x04 and no more")
    return place


def test_a_mixed_folder_trains_is_evaluated_on_its_own_split_and_exports_with_its_card(folder, tmp_path):
    run = tmp_path / "run"
    flags = [part for key, value in SIZES.items() for part in (f"--{key}", value)]
    command = ["scripts/pretrain.py", "--config", "tiny", "--data.files", str(folder), "--run.dir", str(run), *flags]
    (result,) = run_ranks(command, world_size=1)
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert "reads 6 files and leaves out 2: 1 .jpg" in said
    assert "held out of training: " in said
    held_out = {json.loads(line)["text"] for line in (run / "data" / "held_out.jsonl").read_text().splitlines()}
    assert held_out
    state = json.loads((run / "checkpoints" / "step-00000004" / "run_state.json").read_text())
    assert state["fingerprint"]["held_out"][0] == len({document_hash(text) for text in held_out})
    assert [row["eval/bits_per_byte"] > 0 for row in read_metrics(run / "metrics.jsonl") if "eval/loss" in row]
    export(run, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| files | `texts` | not stated |" in card
    assert "Held out of these files for validation" in card
    assert "Pile" not in card
