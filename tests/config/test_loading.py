"""What a user may write, and what is answered where it is wrong."""

from pathlib import Path

import pytest

from lamda.config.help import to_yaml
from lamda.config.loading import DEPRECATED, KEYS, load_config
from lamda.config.presets import PRESETS
from lamda.config.settings import ConfigError
from lamda.runs.checkpoints import read_config

REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))
FINETUNING = sorted((REPOSITORY / "configs/finetune").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, "utf-8")
        return path

    return write


def problems(*argv):
    with pytest.raises(ConfigError) as caught:
        load_config([str(word) for word in argv])
    return str(caught.value).splitlines()


def values(*argv):
    return load_config([str(word) for word in argv])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path):
    assert values("--config", path).run.dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", FINETUNING, ids=lambda path: path.name)
def test_every_shipped_config_of_fine_tuning_is_valid(path):
    config = values("--config", path)
    assert config.run.dir == f"runs/{path.stem}-dialog"
    assert config.data.packing == "whole"


def test_the_shipped_configs_hold_the_papers_batch_and_steps():
    assert {path.stem for path in SHIPPED} >= {"tiny", "small", "lamda_110m", "lamda_2b", "lamda_8b", "lamda_137b"}
    papers_steps = {"2b": 501_000, "8b": 521_000, "137b": 3_000_000}
    for size, steps in papers_steps.items():
        config = values("--config", REPOSITORY / f"configs/lamda_{size}.yaml")
        assert config.model.preset == size
        assert config.steps == steps
        assert config.train.global_batch_size * config.data.sequence_length == 256 * 1024


def test_defaults_yield_to_preset_to_file_to_flags(write):
    path = write("model: {preset: 110m, d_ff: 77, n_heads: 3}\ntrain: {steps: 9, lr: 1e-4}\n")
    config = values("--config", path, "--model.n_heads", 5, "--train.lr=2e-4")
    assert config.model.d_model == PRESETS["110m"]["d_model"] != 192
    assert config.model.d_ff == 77
    assert config.model.n_heads == 5
    assert config.train.lr == 2e-4
    assert config.train.beta2 == 0.99


def test_a_preset_from_a_flag_yields_to_the_files_dimensions(write):
    config = values("--config", write("model: {d_model: 48}\ntrain: {steps: 9}\n"), "--model.preset", "2b")
    assert (config.model.d_model, config.model.n_heads) == (48, PRESETS["2b"]["n_heads"])


def test_the_later_of_two_flags_wins():
    assert values("--train.steps", 3, "--train.steps", 4).train.steps == 4


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local_rank", "1"]])
def test_the_launchers_flag_is_ignored(flag):
    assert values(*flag, "--train.steps", 3) == values("--train.steps", 3)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_floats_are_read_as_people_write_them(write, text):
    config = values("--config", write(f"train: {{steps: 1, lr: {text}}}"), "--train.eps", text.strip("'"))
    assert config.train.lr == config.train.eps == 1e-4


@pytest.mark.parametrize("text", ["300e9", "3e11", "300_000_000_000", "300000000000"])
def test_large_integers_are_read_as_people_write_them(write, text):
    assert values("--config", write(f"train: {{tokens: {text}}}")).train.tokens == 300 * 10**9
    assert values("--train.tokens", text).train.tokens == 300 * 10**9


@pytest.mark.parametrize(("text", "steps"), [("010", 10), ("08", 8), ("0_1_0", 10), ("0x10", 16), ("1_000", 1000)])
def test_a_leading_zero_is_no_octal(write, text, steps):
    assert values("--config", write(f"train: {{steps: {text}}}")).train.steps == steps
    assert values("--train.steps", text).train.steps == steps


@pytest.mark.parametrize("text", ["1:30", "1:30:00", "1:30.5"])
@pytest.mark.parametrize("key", ["steps", "lr"])
def test_minutes_and_seconds_are_no_number(write, key, text):
    with pytest.raises(ConfigError, match=rf":2: train\.{key}: should be a valid \w+, .*not '{text}'"):
        values("--config", write(f"train:\n  {key}: {text}"))


def test_an_empty_name_of_a_file_is_refused():
    with pytest.raises(ConfigError, match="--config: is empty"):
        values("--config", "", "--train.steps", 1)


@pytest.mark.parametrize("text", ["1e3", "off", "2024-01-01", "0x10", "12"])
def test_text_is_not_mistaken_for_a_number_a_date_or_a_truth(write, text):
    config = values("--config", write(f"run: {{dir: {text}}}\ndata: {{files: [{text}]}}\ntrain: {{steps: 1}}"))
    assert (config.run.dir, config.data.files) == (text, (text,))
    assert values("--train.steps", 1, "--run.dir", text).run.dir == text


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("*.jsonl", ("*.jsonl",)),
        ("a,b", ("a", "b")),
        ("[a, 'b,c']", ("a", "b,c")),
        ("[ab]/*.txt", ("[ab]/*.txt",)),
        ("a #1: {b}", ("a #1: {b}",)),
        ("null", None),
    ],
)
def test_globs_pass_through_a_flag(text, files):
    assert values("--train.steps", 1, "--data.files", text).data.files == files


@pytest.mark.parametrize("secret", ["X-Amz-Signature", "access_token", "api_key", "sig", "key", "auth"])
def test_a_token_in_an_address_is_refused_and_not_repeated(write, secret):
    path = write(f"data: {{files: 'https://store.org/a.jsonl?version=3&{secret}=canary'}}")
    (line,) = problems("--config", path, "--train.steps", "1")
    assert "data.files: item 1 an address must not hold a user or a password (nor a token or a signature)" in line
    assert "canary" not in line


@pytest.mark.parametrize("key", ["files", "eval_files"])
def test_a_password_in_an_address_is_refused_and_not_repeated(write, key):
    secret = "https://some@store.org/a.jsonl, https://one:canary@store.org/b, simplecache::s3://one:canary@store/c"
    path = write(f"data: {{{key}: '{secret}'}}")
    output = problems("--config", path, "--train.steps", "1")
    assert len(output) == 3
    for item, line in enumerate(output, start=1):
        assert line.startswith(f"{path}:1: data.{key}: item {item} an address must not hold a user or a password")
        assert "canary" not in line
    allowed = "hf://datasets/some/where@main/*.jsonl.zst,https://store.org/a@b.jsonl?design=2,/data/[0-9]@x?/key=3/a"
    config = values("--config", write("train: {steps: 1}"), f"--data.{key}", allowed)
    assert ",".join(getattr(config.data, key)) == allowed


@pytest.mark.parametrize("key", ["files", "eval_files"])
def test_an_empty_list_of_files_is_refused(write, key):
    (output,) = problems("--config", write(f"train: {{steps: 1}}\ndata: {{{key}: []}}"))
    assert f"data.{key}" in output


def test_null_takes_a_files_value_back(write):
    path = write("train: {steps: 5}\ntokenizer: {path: x}\n")
    config = values("--config", path, "--train.steps", "null", "--train.tokens", "1e6", "--tokenizer.path", "null")
    assert (config.train.steps, config.train.tokens, config.tokenizer.path) == (None, 10**6, None)


def test_everything_wrong_is_reported_at_once_with_its_place(write):
    path = write(
        """\
run:
  sed: 3
modle:
  d_model: 8
train:
  learning_rate: 1e-4
  steps: many
  lr: -1
  schedule: cosin
  warmup_steps: yes
model:
  preset: 2c
data:
  files: {a: b}
  eval_files: [a, [b]]
eval:
  every: 0
  every: 5
wandb: offline
lr: 3
checkpoint:
  keep:
"""
    )
    found = problems("--config", path, "--train.beta1", "1", "--run.sede=3", "--run.seed", "--foo", "word")
    assert found == [
        f"{path}:2: run.sed: there is no such key; did you mean 'run.seed'?",
        f"{path}:3: modle: there is no such section; did you mean 'model'?",
        f"{path}:6: train.learning_rate: there is no such key; did you mean 'train.lr'?",
        f"{path}:7: train.steps: should be a valid integer, not 'many'",
        f"{path}:8: train.lr: should be greater than 0, not -1",
        f"{path}:9: train.schedule: should be 'cosine', 'wsd' or 'inverse_sqrt', not 'cosin'",
        f"{path}:10: train.warmup_steps: should be a valid integer, not 'yes'",
        f"{path}:12: model.preset: there is no preset '2c' among {', '.join(PRESETS)}; did you mean '2b'?",
        f"{path}:14: data.files: should be a list such as [a, b], not a section",
        f"{path}:15: data.eval_files: item 2 should be text, not a list",
        f"{path}:17: eval.every: should be greater than 0, not 0",
        f"{path}:18: eval.every: stands in line 17 already; remove one",
        f"{path}:19: wandb: a section holds `key: value` lines",
        f"{path}:20: lr: there is no such section, and keys stand in sections; did you mean 'train.lr'?",
        f"{path}:22: checkpoint.keep: has no value; give it one or leave it out",
        "--train.beta1: should be less than 1, not 1",
        "--run.sede: there is no such key; did you mean 'run.seed'?",
        "--run.seed: has no value; write --run.seed VALUE",
        "--foo: there is no such key",
    ]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.learning_rate", "train.lr"),
        ("learning_rate", "train.lr"),
        ("train-lr", "train.lr"),
        ("trian.steps", "train.steps"),
        ("train.seed", "run.seed"),
        ("model.num_layers", "model.n_layers"),
        ("checkpoints.evry", "checkpoint.every"),
        ("deep_speed.config", "deepspeed.config"),
    ],
)
def test_a_typo_names_the_nearest_key(typed, meant):
    assert problems("--train.steps", 1, f"--{typed}=1") == [f"--{typed}: there is no such key; did you mean {meant!r}?"]


def test_every_key_with_a_letter_missing_finds_itself():
    for key in KEYS:
        typo = key[:-2] + key[-1]
        assert typo in KEYS or key.split(".")[1] in problems(f"--{typo}=1", "--train.steps", 1)[0].partition("did")[2]


@pytest.mark.parametrize("text", ["", "train:\n", "model:\n  preset: tiny\n"])
def test_a_missing_length_is_reported_even_without_a_train_section(write, text):
    (found,) = problems("--config", write(text))
    assert found.endswith("train.tokens: the run has no length: set train.steps or train.tokens")
    assert found.startswith(str(write(text)))


def test_a_missing_length_without_a_file_says_that_there_is_no_file():
    assert problems() == [
        "--train.tokens: the run has no length: set train.steps or train.tokens "
        "(there is no --config FILE; a first run is --config tiny)"
    ]


def test_a_flag_mends_a_wrong_value_of_the_file(write):
    assert values("--config", write("train: {steps: many}"), "--train.steps", 3).steps == 3


def test_a_check_between_keys_names_the_section_where_its_key_stands_nowhere(write):
    (found,) = problems("--config", write("run: {seed: 1}\ntrain:\n  steps: 1\n  global_batch_size: 100\n"))
    assert ":2: train.micro_batch_size: 8 does not divide train.global_batch_size 100;" in found
    assert found.endswith("5 and 10")


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("train: {steps: 1}\na: b: c\n", ":2: this is not YAML: mapping values are not allowed here"),
        ("train: {steps: 1}\n---\na: 1\n", ":2: this is not YAML: but found another document"),
        ("train:\n\tsteps: 1\n", ":2: this is not YAML: found character '\\t' that cannot start any token"),
        ("train: {steps: &a [*a]}", ":1: train.steps: should be a valid integer, not a list"),
        (
            "train: {steps: !!python/object/apply:os.getpid []}",
            ":1: train.steps: should be a valid integer, not a list",
        ),
        ("train: {steps: !!int x}", ":1: train.steps: should be a valid integer, not 'x'"),
        ("train: {steps: 1, lr: .inf}", ":1: train.lr: should be a finite number, not inf"),
        ("train: {steps: 1}\nrun: {dir: ''}", ":2: run.dir: should not be empty, not ''"),
        ("train: {steps: 1}\nmodel: {bias_per_layer: 3}", ":2: model.bias_per_layer: should be true or false, not '3'"),
        ("train: {steps: 1}\ntrain: {lr: 1}", ":2: train: stands in line 1 already; remove one"),
        ("train: {steps: 1}\n? [a]\n: 3", ":2: ?: there is no such section"),
        ("train.steps: 3\ntrain: {lr: 1}", ":1: train.steps: files have sections; write `steps:`"),
    ],
)
def test_odd_files_are_answered_in_one_line_each(write, text, output):
    path = write(text)
    assert any(line.startswith(f"{path}{output}") for line in problems("--config", path))


def test_a_missing_file_names_the_shipped_ones_and_does_not_hide_wrong_flags():
    found = problems("--config", "configs/tyni.yaml", "--train.lr", "-1")
    assert len(found) == 2
    assert found[0].startswith("--config: there is no file 'configs/tyni.yaml': looked for ")
    assert all(f"configs/{path.name}" in found[0] for path in SHIPPED)
    assert found[1] == "--train.lr: should be greater than 0, not -1"


def test_an_unreadable_file_is_an_error_and_no_traceback(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xfa")
    (found,) = problems("--config", tmp_path / "x.yaml")
    assert found.startswith(f"--config: {tmp_path / 'x.yaml'} cannot be read: ")


def test_stray_words_are_answered():
    assert problems("--train.steps", 1, "word", "-x", "--") == [
        f"{word}: is not a flag; write --section.key VALUE" for word in ("word", "-x", "--")
    ]


@pytest.mark.parametrize("name", ["nodes", "num_nodes", "gpus", "num_gpus", "nproc_per_node"])
def test_what_a_launcher_takes_is_answered_with_the_launcher(name):
    (problem,) = problems("--train.steps", 1, f"--{name}", 2)
    assert problem.startswith(f"--{name}: there is no such key; the number of ")
    assert "deepspeed --num_" in problem
    assert "did you mean" not in problem


def test_a_path_begins_at_the_home_folder_where_it_says_so(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    flags = {
        "run.dir": "~/runs/x",
        "data.cache_dir": "~/blocks",
        "tokenizer.path": "~no such user/t",
        "model.weights": "a~",
    }
    config = load_config(["--config", "tiny", *(word for key, value in flags.items() for word in (f"--{key}", value))])
    assert (config.run.dir, config.data.cache_dir) == ("/home/ada/runs/x", "/home/ada/blocks")
    assert (config.tokenizer.path, config.model.weights) == ("~no such user/t", "a~")


@pytest.mark.parametrize("name", ["runs/a\nb", "runs/\0", "runs/\x1b[31m"])
def test_a_path_with_a_line_break_is_refused(name):
    with pytest.raises(ConfigError, match=r"--run\.dir: should hold no line break"):
        load_config(["--config", "tiny", "--run.dir", name])


def test_the_config_of_a_run_of_an_earlier_version_is_read_without_its_removed_keys(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: {lanes: 8, block_rows: 64, threads: 3}\ntrain: {steps: 2}\n")
    assert load_config(["--config", str(path)]).data.threads == 3
    with pytest.raises(ConfigError, match=r"data.lanes: is gone"):
        load_config(["--config", str(path), "--data.lanes", "8"])


OTHER_VALUES = {
    "run.compare_every": 3, "run.stop_before_end": 7.0, "run.hang_seconds": 11.0, "train.rollbacks": 5,
    "train.max_bad_steps": 6, "data.blocks": "/blocks", "data.max_bad_fraction": 0.25,
}  # fmt: skip
"""A value that is not the default, for each earlier name of a key."""


def read(config, key):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize(("old", "new"), DEPRECATED.items())
def test_an_earlier_name_of_a_key_is_read_with_a_warning_from_flags_and_files(old, new, write, caplog):
    section, name = old.split(".")
    assert read(values("--train.steps", 1, f"--{old}", OTHER_VALUES[old]), new) == OTHER_VALUES[old]
    path = write(f"{section}:\n\n  {name}: {OTHER_VALUES[old]}\n")
    assert read(values("--config", path, "--train.steps", 1), new) == OTHER_VALUES[old]
    assert [record.message for record in caplog.records] == [f"--{old} is now {new}", f"{path}:3: {old} is now {new}"]


@pytest.mark.parametrize(("old", "new"), DEPRECATED.items())
def test_both_names_of_a_key_are_an_error(old, new, write):
    value, section = OTHER_VALUES[old], old.partition(".")[0]
    message = f"{old} is now {new}, and both are given; remove {old}"
    for first, second in ((old, new), (new, old)):
        flags = ("--train.steps", 1, f"--{first}", value, f"--{second}", value)
        assert problems(*flags) == [f"--{second}: {message}"]
        names = [key.partition(".")[2] for key in (first, second)]
        lines = [f"  {key}: {value}" for key in names] + ["  steps: 1"] * (section == "train")
        path = write("\n".join([f"{section}:", *lines, *["train: {steps: 1}"] * (section != "train")]))
        assert problems("--config", path) == [f"{path}:3: {second}: {message}"]


def test_a_flag_overrides_a_file_that_has_the_earlier_name(write):
    path = write("train: {steps: 1, rollbacks: 5}\n")
    assert values("--config", path, "--train.max_rollbacks", 2).train.max_rollbacks == 2
    path = write("train: {steps: 1, max_rollbacks: 5}\n")
    assert values("--config", path, "--train.rollbacks", 2).train.max_rollbacks == 2


def test_the_config_of_an_old_run_is_read_without_a_word(tmp_path, caplog):
    config = values("--train.steps", 1, *(word for old, value in OTHER_VALUES.items() for word in (f"--{old}", value)))
    caplog.clear()
    text = to_yaml(config)
    for old, new in DEPRECATED.items():
        text = text.replace(f"  {new.partition('.')[2]}:", f"  {old.partition('.')[2]}:")
    saved = tmp_path / "config.yaml"
    saved.write_text(text, "utf-8")
    assert values("--config", saved) == config
    assert not caplog.records
    assert read_config(saved).keys() == KEYS.keys()


def test_a_wrong_value_of_a_key_that_takes_a_word_or_a_number_is_reported_for_both(write):
    path = write("data:\n  shuffle: maybe\ntrain: {steps: 3}\n")
    with pytest.raises(ConfigError) as refused:
        load_config(["--config", str(path)])
    assert f"{path}:2: data.shuffle: should be 'none' or 'epoch', not 'maybe'" in str(refused.value)
    assert f"{path}:2: data.shuffle: should be a valid integer, not 'maybe'" in str(refused.value)
