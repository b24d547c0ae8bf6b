"""metrics.jsonl holds each step once, as lines that any JSON parser reads."""

import json

import pytest

from lamda.model.counts import peak_flops
from lamda.storage.metrics import MetricsFile, read_metrics


def fail_on_constant(name):
    raise AssertionError(f"{name} is not JSON")


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "metrics.jsonl", tmp_path / "metrics.discarded.jsonl"


def write(paths, steps, *, after):
    with MetricsFile(paths[0], discarded=paths[1], step=after) as file:
        for step in steps:
            file.write({"step": step, "loss": 1 / step, "after": after})


def test_a_row_is_on_the_disk_once_it_is_written(paths):
    with MetricsFile(paths[0], discarded=paths[1], step=0) as file:
        file.write({"step": 1, "loss": 2.5})
        assert read_metrics(paths[0]) == [{"step": 1, "loss": 2.5}]


def test_a_resume_continues_after_its_step_and_moves_the_void_lines(paths):
    write(paths, range(1, 8), after=0)
    before = paths[0].read_bytes().splitlines(keepends=True)
    write(paths, range(5, 10), after=4)
    after = paths[0].read_bytes().splitlines(keepends=True)
    assert after[:4] == before[:4]
    assert [json.loads(line)["step"] for line in after] == list(range(1, 10))
    assert paths[1].read_bytes().splitlines(keepends=True) == before[4:]


def test_lines_of_every_resume_are_kept(paths):
    for start in (0, 2, 1):
        write(paths, range(start + 1, 4), after=start)
    assert [row["step"] for row in read_metrics(paths[0])] == [1, 2, 3]
    assert [(row["step"], row["after"]) for row in read_metrics(paths[1])] == [(3, 0), (2, 0), (3, 2)]


def test_a_resume_at_the_last_line_changes_nothing(paths):
    write(paths, range(1, 4), after=0)
    before = paths[0].read_bytes()
    write(paths, [], after=3)
    assert paths[0].read_bytes() == before
    assert not paths[1].exists()


def test_a_torn_last_line_is_moved_even_where_its_step_is_not_void(paths):
    write(paths, range(1, 4), after=0)
    whole = paths[0].read_bytes()
    paths[0].write_bytes(whole + b'{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(paths[0])] == [1, 2, 3]
    write(paths, [4], after=3)
    assert paths[0].read_bytes().startswith(whole)
    assert [row["step"] for row in read_metrics(paths[0])] == [1, 2, 3, 4]
    assert paths[1].read_bytes() == b'{"step": 4, "lo\n'


@pytest.mark.parametrize(
    "broken", [b'{"step": 4, "lo', b"", b"\0" * 64, b"[]", b'{"step": "4"}', b"\xff\xfe", b"[" * 9999, b'{"loss": 2.0}']
)
def test_a_broken_line_in_the_middle_is_moved_and_reported(paths, caplog, broken):
    write(paths, range(1, 7), after=0)
    lines = paths[0].read_bytes().splitlines(keepends=True)
    paths[0].write_bytes(b"".join([*lines[:3], broken + b"\n", *lines[4:]]))
    assert [row["step"] for row in read_metrics(paths[0])] == [1, 2, 3, 5, 6]
    write(paths, [6, 7], after=5)
    assert paths[0].read_bytes().splitlines(keepends=True)[:4] == [*lines[:3], lines[4]]
    assert [row["step"] for row in read_metrics(paths[0])] == [1, 2, 3, 5, 6, 7]
    assert paths[1].read_bytes() == broken + b"\n" + lines[5]
    assert "line 4: no row of metrics; moved to metrics.discarded.jsonl" in caplog.messages[0]
    assert "1 rows up to step 5, from which the run resumes, are missing (steps 4 to 4)" in caplog.messages[1]


def test_rows_that_a_power_cut_took_are_reported(paths, caplog):
    write(paths, range(1, 5), after=0)
    write(paths, [7], after=6)
    assert "2 rows up to step 6, from which the run resumes, are missing (steps 5 to 6)" in caplog.messages[0]
    caplog.clear()
    write(paths, [], after=7)
    assert "missing (steps 5 to 6)" in caplog.messages[0]


def test_a_branch_from_another_runs_checkpoint_has_no_gap(paths, caplog):
    write(paths, range(7, 10), after=6)
    write(paths, [10], after=9)
    assert caplog.messages == []


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_null_to_any_json_parser(paths, loss):
    with MetricsFile(paths[0], discarded=paths[1], step=0) as file:
        file.write({"step": 1, "loss": loss, "lr": 0.5, "mfu": None, "batch_digest": "nan"})
    row = json.loads(paths[0].read_text(), parse_constant=fail_on_constant)
    assert row == {"step": 1, "loss": None, "lr": 0.5, "mfu": None, "batch_digest": "nan"}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("TPU v4", 275e12),
        ("TPU v4 lite", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("AMD EPYC", None),
    ],
)
def test_the_peak_is_that_of_the_device_or_unknown(name, peak):
    assert peak_flops(name) == peak


def test_a_step_that_is_there_twice_keeps_its_first_row(paths):
    write(paths, range(1, 4), after=0)
    rows = paths[0].read_bytes().splitlines(keepends=True)
    again = b'{"step": 2, "loss": 9.0}\n'
    paths[0].write_bytes(b"".join([*rows, again, rows[0]]))
    write(paths, range(4, 5), after=3)
    assert paths[0].read_bytes().splitlines(keepends=True)[:3] == rows
    assert [row["step"] for row in read_metrics(paths[0])] == [1, 2, 3, 4]
    assert paths[1].read_bytes() == again + rows[0]
