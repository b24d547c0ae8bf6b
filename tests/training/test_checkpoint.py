"""What a checkpoint gives back, and that nothing in it is trusted: no pickle is opened, no wrong tensor is taken."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamda.config import Config
from lamda.config.errors import UserError
from lamda.distributed import World
from lamda.engines.deepspeed import checkpoint
from lamda.engines.deepspeed.engine import DeepSpeedEngine
from lamda.engines.deepspeed.optimizer import make_optimizer, set_learning_rate
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights
from lamda.storage import commit, manifest
from lamda.storage.state import RunState
from lamda.training.saver import Saver
from tests.distributed.engine_worker import BATCH, LENGTH, batch, config, tokens
from tests.losses import cross_entropy

OLD = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "gradient_clipping": 0.05}
NEW = {"beta1": 0.5, "beta2": 0.7, "weight_decay": 3.0, "gradient_clipping": 0.01}
STATE = "optimizer-00000-of-00001.safetensors"


def engine_of(folder, device, train) -> DeepSpeedEngine:
    own = config({"stage": 1, "bf16": False}, folder, 0)
    changed = {**own.train.model_dump(exclude_unset=True), **train}
    own = Config.model_validate({**own.model_dump(exclude_unset=True), "train": changed})
    engine = DeepSpeedEngine(own, world=World(), device=device)
    engine.initialize_weights()
    return engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory, device):
    """An engine that is filled again and again."""
    return engine_of(tmp_path_factory.mktemp("engine"), device, NEW)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, device):
    """A checkpoint after two steps."""
    folder = tmp_path_factory.mktemp("saved")
    trained = engine_of(folder, device, OLD)
    for step in (1, 2):
        trained.train_step(batch(step, World()), lr=1e-2)
    (folder / "tokenizer.model").touch()
    saver = Saver(folder / "checkpoints", engine=trained, tokenizer=folder / "tokenizer.model")
    state = RunState(step=2, updates=2, consumed=2 * BATCH, skipped=((3, 5),))
    assert saver.begin(state) is None
    assert saver.finish().problem is None
    return folder / "checkpoints" / "step-00000002"


@pytest.fixture
def copied(saved, tmp_path):
    """The checkpoint, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))


def seal(path):
    """A manifest that vouches for what lies there: an attacker would write one too."""
    content = manifest.read(path)
    del content["sha256"]
    content["files"] = {name: commit.sync_and_describe(path / name) for name in content["files"]}
    (path / manifest.MANIFEST).write_text(manifest.sealed(content))
    assert manifest.problem_of(path) is None


def change(path, edit):
    """Edit the tensors of the optimizer's file."""
    tensors = load_file(path / STATE)
    edit(tensors)
    save_file(tensors, path / STATE)
    seal(path)


def test_state_comes_back_bit_for_bit(saved, engine):
    assert checkpoint.load(saved, engine.deepspeed, config=engine.config) == RunState(
        step=2, updates=2, consumed=2 * BATCH, skipped=((3, 5),)
    )
    stored, found = load_file(saved / STATE), dict(checkpoint.local_state(engine.deepspeed))
    assert stored.keys() == found.keys()
    assert all(torch.equal(stored[key], found[key]) for key in stored)


def test_rate_betas_decay_and_clipping_are_those_of_the_new_run(saved, engine):
    """One step after loading equals one of PyTorch's AdamW with the new numbers and the old moments."""
    checkpoint.load(saved, engine.deepspeed, config=engine.config)
    result = engine.train_step(batch(3, World()), lr=0.004)
    model = LaMDA(engine.config.model)
    initialize_weights(model, seed=3)
    optimizer = make_optimizer(model, engine.config.train)
    fill(model, optimizer, load_file(saved / STATE))
    for ids in torch.from_numpy(tokens(3).astype("int64")).split(2):
        nats, squares = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        ((nats + engine.config.train.z_loss * squares) / (BATCH * LENGTH)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm > 0.05, "both limits clip, so that they tell themselves apart"
    for group in optimizer.param_groups:
        assert group["betas"] == (0.5, 0.7)
    set_learning_rate(optimizer, 0.004)
    optimizer.step()
    torch.testing.assert_close(result.wait().grad_norm, norm.item(), rtol=1e-5, atol=0)
    for (name, mine), theirs in zip(engine.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6, msg=name)


def fill(model, optimizer, stored):
    """Weights and moments from a checkpoint."""
    for name, parameter in model.named_parameters():
        kinds = {kind: stored[f"{name}|{kind}|0"].view(parameter.shape) for kind in ("weight", "exp_avg", "exp_avg_sq")}
        parameter.data.copy_(kinds.pop("weight"))
        optimizer.state[parameter] = {"step": torch.tensor(2.0), **kinds}


class Trap:
    """A pickle that writes a file when it is opened."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple:
        return Path.touch, (self.sprung,)


def test_pickles_beside_the_state_are_never_opened(copied, engine, tmp_path):
    """DeepSpeed's and PyTorch's own names, and names like ours that the manifest does not list."""
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    names = ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "pytorch_model.bin",
             "model.pkl", "run_state.pt", "optimizer-00001-of-00002.safetensors"]  # fmt: skip
    for name in names:
        (copied / name).write_bytes(trap)
    (copied.parent / "latest").write_text(copied.name)
    assert commit.find_valid(copied.parent, world=World()) == copied
    checkpoint.load(copied, engine.deepspeed, config=engine.config)
    assert not sprung.exists()
    pickle.loads(trap)
    assert sprung.exists(), "the trap works"


def test_a_pickle_that_the_manifest_vouches_for_is_refused_unopened(copied, engine, tmp_path):
    sprung = tmp_path / "sprung"
    (copied / STATE).write_bytes(pickle.dumps(Trap(sprung)))
    seal(copied)
    with pytest.raises(UserError, match=rf"{STATE}: is not a safetensors file"):
        checkpoint.load(copied, engine.deepspeed, config=engine.config)
    assert not sprung.exists()


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def replace(key, make):
    return lambda tensors: tensors.update({key: make(tensors[key])})


def test_the_state_of_another_optimizer_is_refused_before_anything_is_filled(saved, device, tmp_path):
    """`find_resume_point` reports it first, and what to do."""
    own = config({"stage": 0, "bf16": False, "optimizer": "adafactor"}, tmp_path, 0)
    other = DeepSpeedEngine(own, world=World(), device=device)
    other.initialize_weights()
    before = {key: tensor.clone() for key, tensor in checkpoint.local_state(other.deepspeed)}
    assert {tuple(key.split("|")[:2]): tensor.numel() for key, tensor in before.items()} == checkpoint.state_sizes(own)
    with pytest.raises(UserError, match=r"exp_avg.* which is not part of the state"):
        checkpoint.load(saved, other.deepspeed, config=other.config)
    assert all(torch.equal(tensor, before[key]) for key, tensor in checkpoint.local_state(other.deepspeed))


SCALE = "layers.0.attention_norm.scale"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename(f"{SCALE}|weight|0", f"{SCALE}|weights|0"), "which is not part of the state"),
        (rename(f"{SCALE}|weight|0", "layers.9.attention_norm.scale|weight|0"), "which is not part of the state"),
        (rename(f"{SCALE}|weight|0", SCALE), "which is not part of the state"),
        (rename(f"{SCALE}|weight|0", f"{SCALE}|weight|-1"), "which is not part of the state"),
        (rename(f"{SCALE}|weight|0", f"{SCALE}|weight|1"), "holds elements 1 to 25 of 24"),
        (replace(f"{SCALE}|weight|0", torch.Tensor.double), r"\(F64 \[24\]\), which is not part"),
        (replace(f"{SCALE}|weight|0", lambda whole: whole.view(4, 6)), r"\(F32 \[4, 6\]\), which is not part"),
        (replace(f"{SCALE}|weight|0", lambda whole: whole[:20].clone()), "4 elements of weight of .* are missing"),
        (replace(f"{SCALE}|weight|0", lambda whole: whole.repeat(2)), "holds elements 0 to 48 of 24"),
        (lambda tensors: tensors.pop(f"{SCALE}|exp_avg|0"), "24 elements of exp_avg of .* are missing"),
        (lambda tensors: tensors.update({f"{SCALE}|weight|4": torch.ones(8)}), "the pieces before it end at 24"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_filled(saved, copied, engine, edit, message):
    checkpoint.load(saved, engine.deepspeed, config=engine.config)
    before = {key: tensor.clone() for key, tensor in checkpoint.local_state(engine.deepspeed)}
    change(copied, edit)
    with pytest.raises(UserError, match=message):
        checkpoint.load(copied, engine.deepspeed, config=engine.config)
    assert all(torch.equal(tensor, before[key]) for key, tensor in checkpoint.local_state(engine.deepspeed))
