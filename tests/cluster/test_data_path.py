"""What the data path is said to deliver and to hold, against the loader of each rank."""

import pytest

from lamda.cluster import estimates
from lamda.cluster.estimates import data_rates, loader_bytes
from lamda.config.schema import Config
from lamda.data import corpus, partitioning, windows
from lamda.data.corpus import open_corpus, packing_of
from lamda.data.loader import Loader
from tests.conftest import make_text


def a_config(batch, **data):
    train = {"steps": 1, "global_batch_size": batch, "micro_batch_size": 1}
    return Config.model_validate({"data": data, "train": train})


def test_the_constants_are_those_of_the_data():
    assert (estimates.MIN_LANES, estimates.MAX_LANES) == (partitioning.MIN_LANES, partitioning.MAX_LANES)
    assert (estimates.FIRST_TOKENS, estimates.WINDOW_ROWS) == (windows.FIRST_TOKENS, corpus.WINDOW_ROWS)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 128])
def test_no_rank_reads_more_lanes_than_that(tmp_path, tokenizer, ranks, monkeypatch):
    """64 equal lanes, and the lanes that each rank's loader reads."""
    monkeypatch.setattr(partitioning, "MIN_ROWS_PER_LANE", 1)
    line = f'{{"text": "{make_text(1, 200)[:99].ljust(99, "x")}"}}\n'
    (tmp_path / "text.jsonl").write_text(line * 64)
    config = a_config(4 * ranks, files=str(tmp_path / "text.jsonl"), sequence_length=8)
    corpus = open_corpus(config.data)
    assert len(corpus.lanes) == 64
    read = []
    for rank in range(ranks):
        with Loader(
            corpus, tokenizer, packing=packing_of(config), seed=0, batch=4 * ranks, micro_batch=1, rank=rank,
            world_size=ranks, exchange=lambda own: [own],
        ) as loader:  # fmt: skip
            read.append(len(loader._local_lanes[0] | loader._edge_lanes[0]))
    rates = data_rates(config, ranks=ranks, tokens_per_second=64e6)
    assert rates.encoded[0] == max(read) * 1e6
    assert (rates.rank, rates.blocks) == (64e6 / ranks, 128e6)


def test_with_fewer_lanes_a_rank_encodes_more():
    assert data_rates(a_config(4096), ranks=512, tokens_per_second=64e6).encoded == (2e6, 16e6)


def test_in_the_order_of_the_text_every_rank_encodes_all_of_it():
    assert data_rates(a_config(64, shuffle="none"), ranks=8, tokens_per_second=1e6).encoded == (1e6, 1e6)


def test_a_rank_holds_its_part_of_two_windows():
    config = a_config(64, shuffle=16384, sequence_length=1023)
    assert loader_bytes(config, ranks=1) == 2.5 * 16384 * 1024 * (4 + 1)
    assert loader_bytes(config, ranks=8) == 2.5 * 16384 * 1024 * (4 + 1) * (8 + 4) / 64
    assert loader_bytes(a_config(64, shuffle="epoch", cache_dir="blocks"), ranks=1) == 0
    in_order = a_config(64, shuffle="none", sequence_length=1023)
    assert loader_bytes(in_order, ranks=8) == loader_bytes(config, ranks=1)
    assert loader_bytes(a_config(64, shuffle=1, sequence_length=1023), ranks=1) == 2.5 * 128 * 1024 * (4 + 1)
    assert loader_bytes(a_config(64, shuffle=1, sequence_length=1 << 16), ranks=1) > 2.5 * 64 * (1 << 16) * 4
