"""Weights that change, and text that must not: ranks read ahead after the one, and the other is found."""

import numpy as np
import pytest
import yaml

from lamda.config.errors import DataError
from lamda.data.corpus import open_corpus
from lamda.data.rows import RowReader
from tests.data.ranks import Numbers, config_of, read, write_file


def make_corpus(folder, weights, *, documents, **data):
    for source in range(len(weights)):
        (folder / str(source)).mkdir()
        lines = [[(source * 30_000 + n * 17 + k) % 60_000 + 2 for k in range(40)] for n in range(documents)]
        write_file(folder / str(source) / "a.jsonl", lines)
    return config_of(folder, weights, sequence_length=16, **data)


def test_ranks_read_their_lanes_ahead_after_the_weights_have_changed(tmp_path, monkeypatch):
    config = make_corpus(tmp_path, [9, 1], documents=1500, batch=64, shuffle=500)
    card = yaml.safe_load((tmp_path / "card.yaml").read_text())
    card["changes"] = [{"at_sample": 64 * 20, "weights": {"0": 1, "1": 9}}]
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card))
    corpus, late, get = open_corpus(config.data), [], RowReader.get

    def counted(reader, lane, window, part):
        if window not in reader._pending.get(lane, {}):
            late.append((lane, window))
        return get(reader, lane, window, part)

    monkeypatch.setattr(RowReader, "get", counted)
    found = {world: read(config, corpus, Numbers(), count=60, world_size=world).digests for world in (1, 2, 4)}
    assert found[1] == found[2] == found[4]
    assert (
        len(late) < 6
    )  # without heeding the change, 157: lanes at the edges of a rank's part are a row too far at times


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("words", [1, 12])
@pytest.mark.parametrize("is_last", [False, True])
def test_a_document_that_changed_inside_a_window_of_the_checkpoint_is_found(
    tmp_path, monkeypatch, world, words, is_last
):
    monkeypatch.setattr("lamda.data.windows.FIRST_TOKENS", 1 << 17 if is_last else 4000)
    config = make_corpus(tmp_path, [1], documents=600, batch=16, shuffle=400)
    run = read(config, open_corpus(config.data), Numbers(), count=12)
    window = run.order[0].windows[-1]
    assert window.is_last == is_last
    path = tmp_path / "0" / "a.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    changed = next(n for n, line in enumerate(lines) if sum(map(len, lines[:n])) > window.starts[0].byte) + 1
    lines[changed] = lines[changed].replace(b" ", b"1", words)  # of the same size, with fewer numbers
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"0/a.jsonl, .*: the rows that follow are not those .* was changed"):
        read(config, open_corpus(config.data), WideNumbers(), count=60, world_size=world, after=run)


class WideNumbers(Numbers):
    """Numbers of any size."""

    def encode_documents(self, texts, *, threads):
        return [np.array([int(word) % 60_000 for word in text.split()], np.uint32) for text in texts]
