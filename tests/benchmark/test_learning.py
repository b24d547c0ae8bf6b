"""What a token teaches: models of one size, on the same rows, in a record that is continued."""

import json
import sys
from contextlib import closing
from importlib.util import find_spec
from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import learning, learning_report, learning_runs, main
from benchmarks.learning_nanochat import Muon, Nanochat
from benchmarks.learning_peers import MODELS, PEERS, make_learner, recipe_of, require_alike
from benchmarks.learning_runs import How, Rows, evaluate, train_step
from lamda.config.errors import UserError
from lamda.config.loading import load_config
from tests.conftest import make_text, write_shard

CPU = How(torch.device("cpu"))
SIZES = {
    "narrow": {"vocab_size": 400, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_head": 24, "d_ff": 96},
    "tiny": {"vocab_size": 4096, "d_model": 192, "n_layers": 4, "n_heads": 6, "d_head": 64, "d_ff": 1536},
}
HELD_OUT = [make_text(seed, 61) for seed in range(60, 70)]


def of_peers(names):
    """Each name as a parameter, skipped where its package is missing."""
    missing = pytest.mark.skipif(find_spec("x_transformers") is None, reason="x-transformers is not installed")
    return [pytest.param(name, marks=missing if name.startswith("x-") else ()) for name in names]


def words(size, *more):
    flags = [word for key, value in SIZES[size].items() for word in (f"--model.{key}", str(value))]
    return ["--config", "tiny", *flags, *more]


def small_words(folder, tokenizer_path):
    """A run on a few words, in steps of 4 x 16."""
    write_shard(folder / "train.jsonl.zst", [make_text(seed, 60) for seed in range(60)])
    write_shard(folder / "val.jsonl.zst", HELD_OUT)
    files = ["--data.files", f"{folder}/train*", "--data.eval_files", f"{folder}/val*"]
    rows = ["--data.sequence_length", "16", "--train.global_batch_size", "4", "--train.micro_batch_size", "2"]
    return [*words("narrow"), *files, *rows, "--tokenizer.path", str(tokenizer_path)]


@pytest.fixture
def small(tmp_path, tokenizer_path):
    return small_words(tmp_path, tokenizer_path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tokenizer_path):
    return Rows(load_config(small_words(tmp_path_factory.mktemp("text"), tokenizer_path)))


def narrow(*more):
    return load_config(words("narrow", "--data.sequence_length", "16", *more))


def a_batch():
    ids_BL = torch.randint(400, (4, 17), generator=torch.Generator().manual_seed(1))
    loss_mask_BL = torch.ones(4, 16, dtype=torch.bool)
    loss_mask_BL[1, 9:] = False
    return [(ids_BL[:2], loss_mask_BL[:2]), (ids_BL[2:], loss_mask_BL[2:])]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", of_peers(PEERS))
def test_models_have_the_same_matrices_and_products(name, size):
    config = load_config(words(size, "--data.sequence_length", "16"))
    learner = make_learner(name, config, rate=1e-3, device=CPU.device)
    V, D, layers, H, K, F = SIZES[size].values()
    matrices = layers * (4 * D * H * K + 3 * D * F)
    assert learner.sizes["matrices"] == matrices
    trained = {parameter for group in groups(learner) for parameter in group["params"]}
    assert sum(parameter.numel() for parameter in trained) == learner.sizes["parameters"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        learner.logits(torch.zeros(2, 16, dtype=torch.long))
    products = {str(kind): flops for kind, flops in counter.get_flop_counts()["Global"].items()}
    assert products["aten.mm"] + products.get("aten.addmm", 0) == 2 * 16 * 2 * (matrices + V * D)
    scores = D if name == "gpt2" else H * K
    assert learner.sizes["flops_per_token"] == 6 * (matrices + V * D + layers * 16 * scores)


def groups(learner):
    return [group for optimizer in learner.optimizers for group in optimizer.param_groups]


def test_a_model_of_another_size_is_refused():
    sizes = make_learner("nanochat", narrow(), rate=1e-3, device=CPU.device).sizes
    with pytest.raises(UserError, match="flops_per_token"):
        require_alike("nanochat", sizes, narrow("--data.sequence_length", "4096"), flops_too=True)


@pytest.mark.parametrize("name", of_peers(MODELS))
def test_every_model_learns_a_batch_by_heart(name):
    learner = make_learner(name, narrow("--train.steps", "40"), rate=5e-3, device=CPU.device)
    losses = [float(train_step(learner, a_batch(), CPU, step=step, steps=40)) for step in range(1, 26)]
    assert losses[0] == pytest.approx(np.log(400), rel=0.1)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", of_peers(PEERS))
def test_bf16_gives_nearly_the_same_loss(name):
    loss = {}
    for precision in ("fp32", "bf16"):
        learner = make_learner(name, narrow(), rate=5e-3, device=CPU.device)
        loss[precision] = float(train_step(learner, a_batch(), How(CPU.device, precision), step=1, steps=9))
        assert {parameter.dtype for parameter in learner.module.parameters()} == {torch.float32}
    assert loss["bf16"] == pytest.approx(loss["fp32"], rel=2e-3)


def test_a_loss_is_the_mean_over_all_scored_targets(rows):
    learner = make_learner("llama", rows.config, rate=5e-3, device=CPU.device)
    ids_BL, loss_mask_BL = (torch.cat(parts) for parts in zip(*a_batch(), strict=True))
    nll_BL = functional.cross_entropy(learner.logits(ids_BL[:, :-1]).transpose(1, 2), ids_BL[:, 1:], reduction="none")
    loss = float(train_step(learner, a_batch(), CPU, step=1, steps=9))
    assert loss == pytest.approx(nll_BL[loss_mask_BL].mean().item(), rel=1e-5)
    held = rows.held_out
    with torch.no_grad():
        logits_BVL = learner.logits(held.ids[:20, :-1]).transpose(1, 2)
    nll_BL = functional.cross_entropy(logits_BVL, held.ids[:20, 1:], reduction="none") * held.loss_mask[:20]
    found = evaluate(learner, held, CPU, rows=20)
    np.testing.assert_allclose(found[:, 0], nll_BL.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(found[:, 1], held.loss_mask[:20].sum(1))


def test_the_last_held_out_row_is_padded_and_not_scored(rows):
    assert rows.held_out.loss_mask.sum() < rows.held_out.loss_mask.numel()
    assert rows.held_out.loss_mask.all(1).sum() == len(rows.held_out.loss_mask) - 1
    assert rows.held_out.utf8_bytes == sum(len(text.encode()) for text in HELD_OUT)


def test_nanochat_sees_no_later_token():
    model = Nanochat(vocab_size=50, d_model=16, n_layers=2, n_heads=2, d_head=8, d_ff=24, length=12, seed=0)
    with torch.no_grad():
        for weight in model.parameters():  # its outputs start at 0
            weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    tokens_BL = torch.arange(12)[None]
    changed_BL = tokens_BL.clone()
    changed_BL[0, 7] = 40
    before, after = model(tokens_BL), model(changed_BL)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=0)
    assert (after[:, 7:] != before[:, 7:]).any(-1).all()
    assert before.abs().max() < 15


def test_nanochat_tells_positions_apart_by_their_distance():
    model = Nanochat(vocab_size=50, d_model=16, n_layers=1, n_heads=2, d_head=8, d_ff=24, length=12, seed=0)
    q_BHLK = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(1, 1, 12, 8)
    turned_LK = sys.modules[Nanochat.__module__]._rotated(q_BHLK, model.rotation_2LK)[0, 0]
    scores_LL = turned_LK @ turned_LK.T
    for distance in range(12):
        diagonal = scores_LL.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand(12 - distance))
    assert scores_LL[0].unique().numel() == 12


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_lamdas_recipe_reaches_a_peers_parameters(optimizer):
    keys = ["--train.norm_lr_scale", "7", "--train.beta2", "0.98", "--train.optimizer", optimizer]
    config = narrow(*keys, "--train.steps", "1000", "--train.warmup_steps", "20")
    learner = make_learner("llama+", config, rate=1e-3, device=CPU.device, embedding_scale=3.0)
    learner.set_rate(20, steps=1000)  # the end of the warm-up
    by_scale = {round(group["lr"] / 1e-3, 6): group for group in groups(learner)}
    assert [parameter.shape for parameter in by_scale[3.0]["params"]] == [(400, 32)]
    assert by_scale[3.0]["weight_decay"] == 0
    assert by_scale[3.0]["betas"] == (0.9, 0.98)
    assert {parameter.ndim for parameter in by_scale[7.0]["params"]} == {1}
    assert by_scale[7.0]["weight_decay"] == 0
    of_muon = [group for group in groups(learner) if group.get("use_muon")]
    assert sum(len(group["params"]) for group in of_muon) == (14 if optimizer == "muon" else 0)
    plain = make_learner("llama", config, rate=1e-3, device=CPU.device)
    assert {group["lr_multiplier"] for group in groups(plain)} == {1.0}
    decays = {parameter.ndim: group["weight_decay"] for group in groups(plain) for parameter in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}


@pytest.mark.skipif(find_spec("x_transformers") is None, reason="x-transformers is not installed")
def test_x_transformers_gets_lamdas_start_and_bias_rate():
    plain, restarted = (
        make_learner(name, narrow("--train.bias_lr_scale", "30"), rate=1e-3, device=CPU.device)
        for name in ("x-transformers", "x-transformers+")
    )
    before, after = (dict(learner.module.named_parameters()) for learner in (plain, restarted))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    (table,) = (name for name in changed if "relative_attention_bias" in name)
    assert len(changed - {table}) == 4
    for name in changed - {table}:
        torch.testing.assert_close(after[name], before[name] / 2)
    slopes = torch.tensor([2.0**-4, 2.0**-8])  # ALiBi's of two heads
    torch.testing.assert_close(after[table][:16], -torch.arange(16.0)[:, None] * slopes / 24**0.5)
    (group,) = (group for group in groups(restarted) if any(each is after[table] for each in group["params"]))
    assert (group["lr_multiplier"], len(group["params"])) == (30.0, 1)


def test_nanochat_has_its_published_rates_and_momentum():
    wide = ["--model.d_model", "192", "--train.steps", "100"]
    learner = make_learner("nanochat", narrow(*wide), rate=0.02, device=CPU.device)
    learner.set_rate(40, steps=100)
    assert sorted(group["lr"] for group in learner.optimizers[0].param_groups) == pytest.approx(
        [2 * 0.004, 2 * 0.2]
    )  # (192 / 768)^-0.5 is 2
    (muon,) = learner.optimizers[1].param_groups
    assert muon["lr"] == 0.02
    assert muon["momentum"] == pytest.approx(0.85 + 0.1 * 39 / 300)
    learner.set_rate(75, steps=100)
    assert muon["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_muon_is_pytorchs_up_to_bf16(shape):
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = [Muon([{"params": [ours], "lr": 0.1}]), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)]
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape, generator=draw)
        for optimizer in optimizers:
            optimizer.step()
    moved, expected = ours.detach() - 1, theirs.detach() - 1
    assert (moved - expected).norm() < 0.05 * expected.norm()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "x_transformers", None)
    with pytest.raises(UserError, match=r"lamda-pytorch\[benchmark\]"):
        make_learner("x-transformers", narrow(), rate=1e-3, device=CPU.device)


def test_all_models_see_the_same_rows(small, tmp_path, monkeypatch):
    seen = {}

    def keep(learner, batch, how, *, step, steps):
        seen.setdefault(type(learner.module).__name__, []).append(torch.cat([ids_BL for ids_BL, _ in batch]))
        return torch.zeros(())

    monkeypatch.setattr(learning_runs, "train_step", keep)
    options = ["--models", "lamda", "nanochat", "--lr", "0.01", "--tokens", "600", "--seeds", "0", "1"]
    assert main(["learning", *options, "--json", str(tmp_path / "found.json"), *small]) == 0
    assert list(seen) == ["LaMDA", "Nanochat"]
    ours, others = (torch.stack(batches) for batches in seen.values())
    assert ours.shape == (20, 4, 17)  # 600 tokens are 10 steps of 64, twice
    torch.testing.assert_close(ours, others, rtol=0, atol=0)
    assert not torch.equal(ours[:10], ours[10:])
    with closing(Rows(load_config(small)).steps(1)) as steps:
        (first,) = islice(steps, 1)
    expected = np.concatenate([part.ids for part in first.micro_batches])
    np.testing.assert_array_equal(ours[10], expected)


def test_a_record_is_continued_and_nothing_is_done_twice(small, tmp_path, monkeypatch, capsys):
    file = tmp_path / "out" / "found.json"
    options = ["learning", "--json", str(file), "--tokens", "640", *small]
    true_run, done = learning.run, []

    def count(learner, *more, **options):
        done.append(type(learner.module).__name__)
        if len(done) == 2:
            raise KeyboardInterrupt
        return true_run(learner, *more, **options)

    monkeypatch.setattr(learning, "run", count)
    both = ["--models", "lamda", "nanochat", "--lr", "0.01"]
    with pytest.raises(KeyboardInterrupt):
        main([*options, *both])
    (first,) = json.loads(file.read_text())["runs"]
    assert main([*options, *both]) == 0
    assert done == ["LaMDA", "Nanochat", "Nanochat"]
    assert main([*options, *both]) == 0
    assert len(done) == 3
    assert main([*options, "--models", "lamda", "--lr", "best", "--seeds", "1"]) == 0
    assert main([*options, "--label", "no z-loss", "--train.z_loss", "0", "--train.lr", "3e-3"]) == 0
    runs = json.loads(file.read_text())["runs"]
    assert runs[0] == first
    assert [(run["model"], run["rate"], run["seed"], run["label"]) for run in runs] == [
        ("lamda", 0.01, 0, None), ("nanochat", 0.01, 0, None), ("lamda", 0.01, 1, None),
        ("lamda", 0.003, 0, "no z-loss"),
    ]  # fmt: skip
    assert first["losses"][-1][0] == first["held_out"][-1][0] == 640
    assert len(first["held_out"]) == 8
    assert first["seconds"] > 0
    assert {"command", "commit", "cpu", "versions", "device", "threads"} <= set(first["environment"])
    assert main([*options, "--models", "nanochat", "--label", "none"]) == 2
    assert main([*options, "--models", "nanochat+", "--lr", "best"]) == 2
    assert "sweep" in capsys.readouterr().err


def test_times_are_of_all_models_in_turn(small, tmp_path):
    file = tmp_path / "found.json"
    assert main(["learning", "--time", "--rounds", "2", "--models", "nanochat+", "--json", str(file), *small]) == 0
    (entry,) = json.loads(file.read_text())["times"]
    assert list(entry["models"]) == ["lamda", "nanochat+"]
    assert entry["models"]["lamda"]["ratio"] == 1
    assert all(len(each["rounds"]) == 2 for each in entry["models"].values())


def test_a_run_whose_loss_is_not_finite_ends(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(learning_runs, "train_step", lambda *_, **__: torch.tensor(torch.nan))
    learner = make_learner("nanochat", rows.config, rate=1.0, device=CPU.device)
    state = tmp_path / "state.pt"
    found = learning_runs.run(learner, rows, CPU, seed=0, steps=40, state=state, on_progress=lambda *_: None)
    assert found["diverged_at"] == 10
    assert found["final"] is None
    json.dumps(found, allow_nan=False)


def test_intervals_are_students():
    middle, half = learning_report.t_interval([1.0, 2.0, 3.0])
    assert (middle, half) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert learning_report.t_interval([5.0]) == (5.0, None)
    # Tables: 2.2010 for 11 degrees of freedom, 2.0423 for 30, 1.9840 for 100.
    for freedom, quantile in ((11, 2.2010), (30, 2.0423), (100, 1.9840)):
        assert learning_report._quantile(freedom) == pytest.approx(quantile, rel=1e-3)


def a_record():
    """lamda at two rates and two seeds, llama at one, one that diverged, an ablation, and times."""
    setting = {"size": "tiny", "sequence_length": 16, "batch": 4, "precision": "fp32"}
    made = {"device": "CPU", "cpu": "a cpu", "threads": 1, "commit": "0123456789abcdef-dirty"}

    def a_run(model, rate, seed, final, *, label=None, **recipe):
        held_out = [[320, 6.0], [640, final]]
        return {
            "model": model, "label": label, "setting": {**setting, "tokens": 640, "held_out": "00"}, "recipe": recipe,
            "rows": "11", "seed": seed, "rate": rate, "held_out": held_out, "losses": held_out, "seconds": 1.0,
            "final": final, "parameters": {"matrices": 1000, "parameters": 2000, "flops_per_token": 3000},
            "environment": made, **({} if final is None else {"bits_per_byte": final / 2}),
        }  # fmt: skip

    runs = [
        a_run("lamda", 1e-3, 0, 5.0, z=1), a_run("lamda", 2e-3, 0, 4.0, z=1), a_run("lamda", 2e-3, 1, 4.2, z=1),
        a_run("llama", 1e-3, 0, 4.5), a_run("llama", 1e-3, 1, 4.5), a_run("gpt2", 1e-3, 0, None),
        a_run("lamda", 2e-3, 0, 4.1, label="no z", z=0), a_run("llama+", 2e-3, 0, 4.3, scale=2),
        a_run("llama+", 2e-3, 0, 4.4, scale=3),
    ]  # fmt: skip
    models = {"lamda": {"seconds_per_token": 0.01, "ratio": 1.0}, "llama": {"seconds_per_token": 0.02, "ratio": 2.0}}
    return {"runs": runs, "times": [{"setting": setting, "models": models, "environment": made}]}


def test_tables_have_each_model_at_its_best_rate(tmp_path, capsys):
    (tmp_path / "found.json").write_text(json.dumps(a_record()))
    assert main(["learning", "--markdown", "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    rows = {
        row[0]: row
        for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines())
        if row
    }
    # 4.0 and 4.2: half the interval is 12.706 x 0.1; to llama 0.5 and 0.3, as far apart.
    assert rows["lamda"][:4] == ["lamda", "0.002", "4.1000 ± 1.2706 (2 seeds)", "2.0500"]
    assert rows["lamda"][9] == "0.001: 5.0000"
    assert rows["llama"][2:6] == ["4.5000 ± 0.0000 (2 seeds)", "2.2500", "+0.4000 ± 1.2706", "2.00"]
    assert rows["gpt2"][2] == "diverged"
    assert rows["llama+"][4] == "+0.4000"
    assert rows["llama+ (scale 2)"][4] == "+0.3000"
    assert rows["no z"] == ["no z", "0.002", "4.1000 (1 seed)", "+0.1000", ""]
    assert "0123456789ab-dirty" in printed


def test_more_seeds_of_the_best_rate_do_not_change_it():
    record = a_record()
    first, best = record["runs"][:2]
    record["runs"] = [{**first, "final": 4.1}, best, *({**best, "seed": seed, "final": 4.6} for seed in (1, 2))]
    (line,) = learning_report.lines_of(record["runs"])
    assert (line.rate, line.means) == (2e-3, {1e-3: 4.1, 2e-3: 4.0})
    assert line.finals == {0: 4.0, 1: 4.6, 2: 4.6}


def test_curves_are_by_tokens_and_by_measured_time(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *more, **how: (figures.append(self), save(self, *more, **how)))
    learning_report.draw(a_record(), tmp_path / "found.svg")
    assert "<svg" in (tmp_path / "found.svg").read_text()
    left, right = figures[0].axes
    by_name = {line.get_label(): line for line in left.lines}
    assert list(by_name) == ["lamda", "llama+ (scale 2)", "llama+", "llama"]
    np.testing.assert_allclose(by_name["lamda"].get_xydata(), [[320e-6, 6.0], [640e-6, 4.1]])
    np.testing.assert_allclose(right.lines[-1].get_xydata(), [[6.4, 6.0], [12.8, 4.5]])
    with pytest.raises(UserError, match="--picture"):
        learning_report.draw(a_record(), tmp_path / "found.nothing")


def test_an_empty_record_is_reported(tmp_path, capsys):
    (tmp_path / "found.json").write_text(json.dumps({"runs": [], "times": []}))
    for what in (["--markdown"], ["--picture", str(tmp_path / "found.svg")]):
        assert main(["learning", *what, "--json", str(tmp_path / "found.json")]) == 2
        assert "measure first" in capsys.readouterr().err


def test_recipes_of_lamda_are_the_configurations():
    config = narrow("--train.beta2", "0.98")
    recipe = recipe_of("lamda", config, 3e-3, 5.0)
    assert (recipe.train.lr, recipe.facts["beta2"], recipe.facts["z_loss"]) == (3e-3, 0.98, config.train.z_loss)
    assert not {"lr", "steps", "micro_batch_size"} & set(recipe.facts)
