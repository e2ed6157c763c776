"""Configurations: what every mistake says, what fills the gaps, what a resumed run may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import jpeft
from jpeft.cli import config, datakinds, yamlio
from jpeft.cli.datakinds import DataConfig
from jpeft.cli.rules import METHODS, described, to_methods, tokens_for
from jpeft.core.match import Layers
from jpeft.errors import ConfigError, MethodConfigError

BASE = """
model: {source: m}
data: {source: rows.csv, classes: [no, yes], test: 10}
rules: {attention: {method: LoRA}, head/.*: {method: Full}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize(("setting", "said"), [
    ("train.learnin_rate=1", "unknown key 'train.learnin_rate'; the nearest is 'train.learning_rate'"),
    ("learning_rate=1", "unknown key 'learning_rate'; the nearest is 'train.learning_rate'"),
    ("model.sauce=1", "unknown key 'model.sauce'; the nearest is 'model.source'"),
    ("rules.attention.rnak=1", "unknown key 'rules.attention.rnak'; the nearest is 'rules.attention.rank'"),
    ("rules.attention.method=lora", "'lora' is no method (nearest: 'LoRA')"),
    ("rules.attention.rank=x", "rules.attention.rank = 'x' must be int | tuple[int, ...]"),
    ("rules.attention.alpha='3'", "rules.attention.alpha = '3' must be float"),
    ("rules.attention.layers=0", "must be a list of layer numbers"),
    ("rules.attention.learning_rate=0", "rules.attention.learning_rate = 0 must be a number above 0"),
    ("rules.attention.learning_rat=1", "the nearest is 'rules.attention.learning_rate'"),
    ("rules.attention=LoRA", "rules.attention = 'LoRA' should be a valid dictionary"),
    ("rules.attention={rank: 3}", "names no method"),
    ("rules.attention={method: Chain, methods: 3}", "must be a list of two or more rules"),
    ("rules={}", "'rules' is empty"),
    ("model={}", "'model.source' is missing"),
    ("train.epochs=2.5", "train.epochs = 2.5 should be a valid integer"),
    ("train.epochs=0", "train.epochs = 0 should be greater than or equal to 1"),
    ("train.learning_rate=true", "should be a valid number"),
    ("train.betas=[0.9]", "train.betas = [0.9] must be two numbers"),
    ("train.optimizer=adamx", "should be 'adamw', 'adam', 'sgd', 'lion', 'adafactor', 'muon' or 'sch"),
    ("train.warmup=-1", "train.warmup = -1 should be greater than or equal to 0"),
    ("data.classes=[a]", "must be two or more different names"),
    ("data.classes=[1, 2]", "data.classes.0 = 1 should be a valid string"),
    ("data.test=0", "must be a number of rows"),
    ("data.test=1.5", "must be a number of rows"),
    ("data.buckets=[8, 4]", "must rise to data.max_length = 128"),
    ("data.seed=-1", "data.seed = -1 should be"),
    ("name=a/b", "as it names a folder"),
    ("seed.x=1", "seed = {'x': 1} should be a valid integer"),
])
def test_mistake_is_one_line_with_its_full_path(file: Path, setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(file, [setting])
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_missing_file_names_the_nearest(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*jbo.yaml'; nearest: .*job.yaml'"):
        config.load(file.with_name("jbo.yaml"))
    file.write_text("- 1")
    with pytest.raises(ConfigError, match="holds no mapping"):
        config.load(file)


def test_value_that_a_method_refuses(file: Path) -> None:
    with pytest.raises(MethodConfigError, match="init_weights"):
        config.load(file, ["rules.attention.init_weights=best"])


def test_gaps_are_filled_and_the_file_reads_back(file: Path) -> None:
    job = config.load(file, ["data.max_length=64"])
    assert (job.name, job.train.learning_rate, job.data.buckets) == ("job", 1e-3, [16, 32, 48, 64])
    assert job.data.source == str(Path("rows.csv").absolute())
    file.write_bytes(config.write(job, "a command"))
    assert file.read_text().startswith("# a command\n")
    assert config.load(file) == job


def test_every_field_can_be_set(file: Path) -> None:
    others: dict[str, Any] = {
        "name": "n", "seed": 1, "output": "o", "model.source": "hf:a/b", "model.sha256": "f" * 64,
        "model.task": "classification",
        "model.characters": None,
        "model.dtype": "bfloat16", "model.compute_dtype": "float32", "model.remat": "full", "model.dropout": 0.2,
        "data.source": "hf:c/d", "data.test_source": "hf:e/f", "data.unique": ["t"], "data.sha256": "e" * 64,
        "data.text": "t", "data.label": "l", "data.classes": 3, "data.where": {"a": 1},
        "data.test": 0.5, "data.validation": 5, "data.seed": 2, "data.max_length": 9, "data.buckets": [9],
        "rules": {"mlp": {"method": "LoRA", "init_weights": "eva"}}, "calibration.batches": 3, "train.epochs": 3,
        "train.steps": None, "train.batch_size": 4,
        "train.optimizer": "lion", "train.learning_rate": 1e-4, "train.schedule": "cosine", "train.warmup": 5,
        "train.weight_decay": 0.5, "train.clip": 2.0, "train.betas": [0.5, 0.6], "train.eps": 1e-6,
        "train.accumulate": 2, "train.decay": 0.3, "train.ema": 0.9, "train.loss_scale": "dynamic", "train.patience": 3,
        "train.data_timeout": 9.0, "train.debug_nans": False, "train.tensorboard": True, "train.hooks": ["a:B"],
        "train.profile.start": 3, "train.profile.steps": 2,
        **{f"objective.{name}": None for name in ("temperature", "beta", "label_smoothing", "variant")},
        "train.lora_plus": 16.0, "train.eval_every": 7, "train.save_every": 8, "train.keep": 4,
        "test.generate": None, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 3, "mesh.sequence": 4, "mesh.expert": 5,
        "mesh.rules": {".*": ["fsdp", None, ["data", "tensor"]]}, "mesh.replicate_below": 0}
    sections = ("model", "data", "train", "train.profile", "test", "mesh", "calibration", "objective")
    known = {path for path in config._known(config.JobConfig[DataConfig]) if not path.startswith("test.generate.")}
    assert set(others) | set(sections) == known
    written = {path: yamlio.dump(value).removesuffix("...\n") for path, value in others.items()}
    job = config.load(file, [f"{path}={text}" for path, text in written.items()])
    plain = job.model_dump()
    for path, value in others.items():
        found = plain
        for key in path.split(".") if path not in plain else [path]:
            found = found[key]
        assert found == value, path


LM = """
model: {source: m, task: causal-lm}
data: {format: pairs, source: rows.csv, test: 10}
rules: {all-linear: {method: LoRA}}
"""


@pytest.fixture
def lm(tmp_path: Path) -> Path:
    path = tmp_path / "lm.yaml"
    path.write_text(LM)
    return path


@pytest.mark.parametrize(("settings", "said"), [
    (["data={source: r, test: 1}"], "'data.format' is missing; a causal-lm job has one of chat, pairs, text"),
    (["data.format=pair"], "'pair' is unknown; a causal-lm job has one of chat, pairs, text, preference (nearest: "),
    (["data.format=names"], "data.format = 'names' is unknown"),
    (["model.task=seq2seq", "data.format=text"], "a seq2seq job has one of pairs, names"),
    (["model.task=classification"], "data.format = 'pairs' is for the tasks causal-lm, seq2seq"),
    (["model.task=causal"], "model.task = 'causal' is none of classification, token-classification, "),
    (["model={source: m, task: [1]}"], "model.task = [1] is none of"),
    (["data=3"], "data = 3 should be"),
    (["data.promt='{a}'"], "unknown key 'data.promt'; the nearest is 'data.prompt'"),
    (["data.classes=2"], "unknown key 'data.classes'"),
    (["data.keep=middle"], "data.keep = 'middle' should be 'start' or 'end'"),
    (["data.names={label: yes}"], "data.names.label = 'yes' should be a valid list"),
    (["data.match={a: 1}"], "data.match.a = 1 should be a valid string"),
    (["data.format=text", "data.test=[]", "data.validation=[a]"], "data.test = [] List should have at least 1 item"),
    (["data.format=text", "data.validation=[a]"], "data.test = 10 should be a valid list"),
    (["train.steps=0"], "train.steps = 0 should be greater than or equal to 1"),
    (["train.steps=5", "train.epochs=2"], "train.epochs = 2 and train.steps = 5 are both set; drop one"),
    (["test.generate.row=3"], "unknown key 'test.generate.row'; the nearest is 'test.generate.rows'"),
    (["test.generate={rows: 0}"], "test.generate.rows = 0 should be greater than or equal to 1"),
    (["model.source={model_type: llama}"], "model.source is a mapping, which a causal-lm job cannot begin from"),
    (["model.source=3"], "model.source = 3 should be a valid string or a valid dictionary"),
])
def test_mistake_in_a_job_of_a_language_model(lm: Path, settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(lm, settings)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(lm))
    assert "\n" not in str(caught.value)


def test_generation_needs_answers(file: Path, lm: Path) -> None:
    with pytest.raises(ConfigError, match=r"test.generate is for models that write"):
        config.load(file, ["test.generate={rows: 3}"])
    with pytest.raises(ConfigError, match=r"test.generate needs data.learn = assistant"):
        config.load(lm, ["test.generate={rows: 3}", "data={format: chat, source: r, test: 1, learn: all}"])


@pytest.mark.parametrize(("settings", "kind"), [
    (["data.format=chat"], datakinds.ChatData),
    (["data.names={a: [no, yes]}", "data.match={a: '[01]'}", "data.unique=[b]"], datakinds.PairsData),
    (["data={format: text, source: r, test: [a], validation: [b]}"], datakinds.TextData),
    (["model.task=seq2seq"], datakinds.TargetsData),
    (["model={task: seq2seq, source: {model_type: t5, d_model: 8}, characters: xyz}",
      "data={format: names, source: d, read: [tg], write: fa}"], datakinds.NamesData),
])
def test_every_kind_of_rows_reads_back(lm: Path, settings: list[str], kind: type[Any]) -> None:
    job = config.load(lm, [*settings, "train.steps=7", "test.generate={rows: 3}"])
    assert type(job.data) is kind
    assert Path(job.data.source).is_absolute()
    assert (job.train.steps, job.train.epochs, job.train.total(99)) == (7, None, 7)
    lm.write_bytes(config.write(job, "a command"))
    again = config.load(lm)
    assert again == job
    assert again.hash() == job.hash()


def test_epochs_count_where_no_steps_are_set(lm: Path) -> None:
    assert config.load(lm).train.total(5) == 10
    assert config.load(lm, ["train.epochs=3"]).train.total(5) == 15


def test_what_a_resumed_run_may_change(file: Path) -> None:
    job = config.load(file)
    assert config.load(file, ["train.keep=9", "output=x", "train.save_every=3"], "other").hash() == job.hash()
    changed = config.load(file, ["train.epochs=9", "rules.attention.rank=4"])
    assert changed.hash() != job.hash()
    assert changed.differences(job) == ["rules.attention.rank", "train.epochs"]


def test_rules_become_methods() -> None:
    methods = to_methods({
        "mlp": {"method": "LoRA", "rank": [1, 2], "layers": [0]},
        "attention": {"method": "Chain", "methods": [{"method": "LoRA", "alpha": 4}, {"method": "IA3"}]},
        "k": {"method": "PrefixTuning", "channels": [0, 4]}})
    patterns = list(methods)
    assert isinstance(patterns[0], Layers)
    assert list(methods.values()) == [
        jpeft.LoRA(rank=(1, 2)), jpeft.Chain((jpeft.LoRA(alpha=4.0), jpeft.IA3())), jpeft.PrefixTuning(channels=(0, 4))]
    assert tokens_for(methods, True) == jpeft.Tokens(segments="token_types")
    assert tokens_for({"a": jpeft.LoRA()}, True) is None
    assert tokens_for({"a": jpeft.LoReFT()}, False) == jpeft.Tokens()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_does(name: str) -> None:
    what, paper = described(name)
    assert what.endswith(".")
    assert ("arXiv" in paper or "openreview" in paper) == (name not in ("Full", "Chain", "TrainableTokens"))
