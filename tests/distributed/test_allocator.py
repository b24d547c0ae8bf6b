"""What PyTorch's allocator for GPUs is set to, where the user sets nothing."""

import os

import pytest

from lamda import distributed


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
def test_segments_grow_unless_the_user_has_settings(monkeypatch, own, expected):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    distributed._keep_segments()
    found = {name: value for name, value in os.environ.items() if "ALLOC_CONF" in name}
    os.environ.pop("PYTORCH_ALLOC_CONF", None)
    assert found == expected
