"""Small files are whole whenever somebody looks, and nothing is left beside them."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lamda.config.errors import refused_by_system
from lamda.durable import read_object, replace_file, umask_mode, write_file


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


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_library_writes_with_the_mode_that_the_umask_asks_for(tmp_path, mask, mode):
    """safetensors' own is 0600."""
    before = os.umask(mask)
    try:
        with umask_mode(tmp_path / "weights"):
            save_file({"w": np.zeros(3)}, tmp_path / "weights")
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == mode
    assert load_file(tmp_path / "weights")["w"].shape == (3,)


@pytest.mark.parametrize("content", ["", "[]", "3", "{", "[" * 9999, '{"a": ' * 9999])
def test_what_is_no_json_object_is_a_value_error(tmp_path, content):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError):
        read_object(tmp_path / "file.json")


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "nothing"):
        with pytest.raises(FileNotFoundError):
            read_object(tmp_path / name)


def test_a_full_disk_is_named_with_the_file_where_it_is_known():
    with pytest.raises(OSError, match="No space left") as caught:
        write_file(Path("/dev/full"), "text")
    assert refused_by_system(caught.value) == "/dev/full: No space left on device"
    without = OSError(errno.ENOSPC, "No space left on device")
    assert refused_by_system(without) == "a file cannot be written (No space left on device)"
