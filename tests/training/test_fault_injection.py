"""Faults on purpose: inert unless allowed, and each does what its name says at its point alone."""

import errno
import subprocess
import sys

import pytest
import torch

from lamda.config.errors import UserError
from lamda.training.fault_injection import KINDS, POINTS, InjectedError, maybe_inject, parse


@pytest.fixture
def plan(monkeypatch):
    def set_plan(text):
        monkeypatch.setenv("LAMDA_ALLOW_FAULTS", "1")
        monkeypatch.setenv("LAMDA_FAULT", text)

    return set_plan


def test_without_leave_nothing_happens(monkeypatch):
    monkeypatch.delenv("LAMDA_ALLOW_FAULTS", raising=False)
    monkeypatch.setenv("LAMDA_FAULT", "update:exception:0:1, nonsense")
    maybe_inject("update", rank=0, step=1)


def test_a_fault_happen_tos_its_point_rank_and_step_alone(plan):
    plan("update:exception:1:7")
    for point, rank, step in [("fetch", 1, 7), ("update", 0, 7), ("update", 1, 6)]:
        maybe_inject(point, rank=rank, step=step)
    with pytest.raises(InjectedError):
        maybe_inject("update", rank=1, step=7)
    plan("fetch:exception:*:*")
    with pytest.raises(InjectedError):
        maybe_inject("fetch", rank=5, step=99)


def test_a_full_disk_is_the_systems_own_error(plan):
    plan("save.written:full:0:1")
    with pytest.raises(OSError, match="No space left") as caught:
        maybe_inject("save.written", rank=0, step=1)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flip_turns_one_bit(plan, dtype):
    plan("update:flip:0:1")
    tensor = torch.ones(3, 5, dtype=dtype, requires_grad=True)
    maybe_inject("update", rank=0, step=1, tensor=tensor)
    bits = tensor.detach().view(-1).view(torch.uint8) ^ torch.ones(15, dtype=dtype).view(torch.uint8)
    assert sum(bin(octet).count("1") for octet in bits.tolist()) == 1


def test_nan_reaches_the_gradient(plan):
    plan("loss:nan:0:1")
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * 3).sum()
    maybe_inject("loss", rank=0, step=1, tensor=loss)
    loss.backward()
    assert torch.isnan(weight.grad).all()


def test_truncate_cuts_the_file(plan, tmp_path):
    plan("save.synced:truncate:0:1")
    file = tmp_path / "file"
    file.write_bytes(bytes(10))
    maybe_inject("save.synced", rank=0, step=1, path=file)
    assert file.stat().st_size == 5


@pytest.mark.parametrize(("kind", "code"), [("kill", -9), ("term", -15), ("usr1", -10)])
def test_signals_happen_to_the_process_itself(kind, code):
    script = "from lamda.training.fault_injection import maybe_inject; maybe_inject('fetch', rank=0, step=1)"
    environment = {"LAMDA_ALLOW_FAULTS": "1", "LAMDA_FAULT": f"fetch:{kind}:0:1"}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == code


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("update", "is not point:kind:rank:step"),
        ("update:kill:a:1", "is not point:kind:rank:step"),
        ("updates:kill:0:1", "there is no 'updates'; did you mean 'update'"),
        ("update:kil:0:1", "there is no 'kil'; did you mean 'kill'"),
    ],
)
def test_a_mistake_in_the_plan_is_reported(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_every_point_and_kind_can_be_asked_for():
    assert len(parse(",".join(f"{point}:kill:0:1" for point in POINTS))) == len(POINTS) == 19
    assert [fault.kind for fault in parse(",".join(f"fetch:{kind}:*:*" for kind in KINDS))] == list(KINDS)
