"""The benchmark of generation, on a model that takes no time."""

from __future__ import annotations

import math

import torch

from benchmarks.generate import markdown, measure
from lamda.config import ModelConfig


def test_it_compares_models_of_the_same_matrices_and_counts_their_bytes():
    config = ModelConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=2, d_head=8, d_ff=32)
    report = measure(config, dtype=torch.bfloat16, prompt=5, new=3, candidates=4, rounds=1)
    tables = config.n_layers * 32 * config.n_heads
    assert report["parameters"]["lamda"] == report["parameters"]["transformers"] + tables
    assert report["weight_bytes"]["int8"] < report["weight_bytes"]["model"]
    # A token of `transformers` is a difference of two times, on a busy machine below 0.
    assert all(math.isfinite(seconds) for seconds in report["seconds"].values())
    facts = {"command": "c", "commit": None, "cpu": "p", "cores": 1, "versions": {}}
    assert "| time, 4 candidates / one |" in markdown(facts | report)
