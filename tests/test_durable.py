"""Small files are whole whenever somebody looks, and nothing is left beside them."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from lamda.durable import replace_file


def test_writers_at_once_leave_one_whole_content(tmp_path):
    """Ranks that fail together write status.json at the same moment."""
    path, contents = tmp_path / "status.json", {f"{letter}" * 5000 * n for n, letter in enumerate("abcd", 1)}
    seen = set()

    def write(content):
        for _ in range(40):
            replace_file(path, content)
            seen.add(path.read_text("utf-8"))

    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write, contents))
    assert seen <= contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_write_keeps_the_old_content_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "LATEST"
    replace_file(path, "step-00000001")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, "step-00000002")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text("utf-8") == "step-00000001"
