"""What a job gives its methods to start from: training rows, texts, names of classes, places in the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli import tinylm
from cli.tinyjob import Tiny
from cli.tinylm import TinyLm
from support import assert_close

import jpeft
from jpeft.cli import build, calibrating, config, runs
from jpeft.cli.main import main
from jpeft.cli.rules import Words, places, to_methods
from jpeft.core.calibrate import statistics
from jpeft.errors import ConfigError, MethodConfigError, ModelConfigError

Capture = pytest.CaptureFixture[str]
WORDS = Words(lambda text: [len(word) for word in text.split()], ("no", "maybe yes"))
PROMPT = {"method": "PromptTuning", "length": 4}
PREFIX = {"method": "PrefixTuning", "length": 3}
KV = "layers/attention/(key|value)/kernel"
PLACES = "{'.*/adapter_(prompt|gate)': {method: LLaMAAdapter, length: 3}, all-linear: {method: LoRA, rank: 2}}"


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> TinyLm:
    return tinylm.make(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def file(lm: TinyLm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration on pairs; its runs are beside it."""
    path = tmp_path_factory.mktemp("configs") / "pairs.yaml"
    path.write_text(lm.config(tinylm.PAIRS, tinylm.GENERATE, f"output: {path.parent / 'runs'}"))
    return path


def begun(job: config.JobConfig) -> tuple[Any, Any, build.Training]:
    """The model of a job, its batches, and the start of its training."""
    loaded = build.load_model(job)
    made = build.batches(job, build.load_data(job, loaded.tokenizer)["train"], shuffle=True)
    return loaded, made, build.training(loaded, made)


def test_words_become_ids() -> None:
    def ids(**more: Any) -> Any:
        return to_methods({"embed": {**PROMPT, **more}}, WORDS)["embed"].init_ids  # type: ignore[attr-defined]

    assert ids(init_text="a short text") == (1, 5, 4)
    assert ids(init_labels=True) == ((2,), (5, 3))
    assert ids(init_labels=["x", "yy z"]) == ((1,), (2, 1))
    chain = {"method": "Chain", "methods": [{"method": "LoRA"}, {**PREFIX, "init_text": "a b c"}]}
    assert to_methods({"kv": chain}, WORDS)["kv"].calibration == {"outputs"}


@pytest.mark.parametrize(("rule", "said"), [
    ({**PROMPT, "init_text": " "}, "rules.x.init_text = ' ' must be a text"),
    ({**PROMPT, "init_text": "a", "init_ids": [1]}, "has init_text and init_ids, which both say"),
    ({**PROMPT, "init_labels": "yes"}, "init_labels = 'yes' must be true, or a list of names"),
    ({**PREFIX, "init_labels": True}, "rules.x.init_labels: PrefixTuning does not start from it"),
    ({**PREFIX, "init_weights": "text"}, "init_weights = 'text' says no text; write init_text"),
    ({"method": "MultitaskPromptTuning", "num_tasks": 3}, "rules.x has 3 tasks, of which each call names one"),
    ({"method": "LoRA", "init_text": "a"}, "rules.x.init_text: LoRA does not start from it"),
])
def test_words_that_start_nothing(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_methods({"x": rule})
    assert said in str(caught.value)


def test_labels_need_classes_and_prefixes_one_text() -> None:
    with pytest.raises(ConfigError, match="this job has no classes; name them"):
        to_methods({"x": {**PROMPT, "init_labels": True}}, WORDS._replace(labels=None))
    two = {"k": {**PREFIX, "init_text": "a b c"}, "v": {**PREFIX, "init_text": "d e f"}}
    with pytest.raises(ConfigError, match="start from 2 texts, 'a b c' first"):
        calibrating.read_first(two)


def test_a_section_that_nothing_reads(file: Path) -> None:
    assert config.load(file).calibration is None
    with pytest.raises(ConfigError, match="calibration is for methods that start from data"):
        config.load(file, ["calibration.batches=3"])
    eva = "rules={all-linear: {method: LoRA, rank: 2, init_weights: eva}}"
    assert config.load(file, [eva]).calibration == config.CalibrationConfig(batches=8)


def test_places_of_two_lengths() -> None:
    rules = {name: {"method": "LLaMAAdapter", "length": n} for name, n in (("a", 2), ("b", 3))}
    with pytest.raises(ConfigError, match="adapter_length = 2 and for 3; give them one length"):
        places(to_methods(rules))
    with pytest.raises(MethodConfigError, match="learns nothing"):
        to_methods({"a": {"method": "LLaMAAdapter", "length": 0}})


@pytest.mark.slow
def test_rows_are_the_first_batches_of_training(file: Path) -> None:
    job = config.load(file, ["rules={all-linear: {method: LoRA, rank: 2, init_weights: eva}}",
                             "calibration={batches: 2}"])
    loaded, made, start = begun(job)
    assert start.notes == ("calibration: 2 batches of the training rows",)
    data, _ = calibrating.calibration(loaded, loaded.plan, made)
    assert data is not None
    found = statistics(jpeft.adapt, loaded.plan, loaded.params, data)
    # The loss looks at the tokens that are learnt, and padding has no part in it.
    names = ("tokens", "attention_mask", "segment_ids", "labels")
    batches = [{n: b[n] for n in names} | {"label_weights": b["weights"]} for b in (made.make(0, 0), made.make(0, 1))]
    want = statistics(jpeft.adapt, loaded.plan, loaded.params, jpeft.Calibration(
        lambda p, **named: loaded.model.apply(p, **named).loss, batches))
    assert_close(found, want, 1e-5)
    path = "layers/attention/key/kernel"
    a = np.asarray(start.state.trainable[path]["a"])[0]
    top = np.linalg.eigh(np.asarray(found[path]["inputs"][0]))[1][:, -2:]
    np.testing.assert_allclose(np.abs(top.T @ a), np.eye(2)[::-1], atol=1e-3)


def test_a_prompt_starts_from_a_text(file: Path) -> None:
    job = config.load(file, ["rules={embed/embedding: {method: PromptTuning, length: 5, init_text: 'the good film'}}"])
    loaded, _, start = begun(job)
    ids = loaded.words.encode("the good film")
    assert len(ids) == 3
    rows = loaded.params["embed"]["embedding"][jnp.asarray([*ids, *ids[:2]])]
    assert_close(start.state.trainable["embed/embedding"]["p"], rows, 1e-6)
    assert start.notes == ("rules.embed/embedding.init_text has 3 tokens for 5 virtual ones: they are repeated",)


def test_a_prefix_starts_from_a_text(file: Path) -> None:
    rule = f"rules={{{KV}: {{method: PrefixTuning, length: 2, init_text: 'the good film'}}}}"
    loaded, _, start = begun(config.load(file, [rule]))
    assert "init_text has 3 tokens for 2 virtual ones: the first 2 are used" in start.notes[0]
    ids = jnp.asarray([loaded.words.encode("the good film")])
    want, _ = jpeft.init(loaded.plan, loaded.params, jax.random.key(0), calibration=jpeft.Calibration(
        loaded.model.apply, [(ids,)]))
    assert_close(start.state.trainable, want, 1e-6)
    with pytest.raises(ConfigError, match="init_text has 3 tokens, and a prefix of 4 needs as many: 'the good film'"):
        begun(config.load(file, [rule.replace("length: 2", "length: 4")]))


def test_a_prompt_starts_from_the_classes(tiny: Tiny, job: Path) -> None:
    rule = "{embeddings/word/embedding: {method: PromptTuning, length: 2, init_labels: [good, dull film]}}"
    loaded, _, start = begun(config.load(job, [f"rules={rule}"]))
    table = loaded.params["embeddings"]["word"]["embedding"]
    good, dull, film = (table[loaded.words.encode(word)[0]] for word in ("good", "dull", "film"))
    p = start.state.trainable["embeddings/word/embedding"]["p"]
    assert_close(p, jnp.stack([good, (dull + film) / 2]), 1e-6)
    assert loaded.words.labels == ("negative", "positive")
    with pytest.raises(ModelConfigError, match="asks for places of 'adapter_length', and this Encoder has none"):
        build.load_model(config.load(job, [f"rules={PLACES}"]))


@pytest.mark.slow
def test_a_job_of_starts_from_data(file: Path, tmp_path: Path, capsys: Capture) -> None:
    rule = "rules={all-linear: {method: LoRA, rank: 2, init_weights: lora_ga}}"
    words = ["train", str(file), "--set", rule, "--set", f"output={tmp_path}", "--set", "calibration.batches=1000"]
    assert main(words) == 0
    assert "batches of the training rows (an epoch has no 1000)" in capsys.readouterr().out
    folder = tmp_path / "pairs"
    assert json.loads((folder / runs.SUMMARY).read_text())["test"]["count"] == 20
    assert main(["eval", str(folder)]) == 0


@pytest.mark.slow
def test_a_job_makes_the_places_of_its_adapter(file: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["train", str(file), "--set", f"rules={PLACES}", "--set", f"output={tmp_path}"]) == 0
    assert "layers/attention/adapter_gate" in capsys.readouterr().out
    folder = tmp_path / "pairs"
    found = build.load_adapter(build.load_model(runs.read(folder)), folder / runs.ADAPTER)
    assert found.trainable["layers/attention/adapter_prompt"]["p"].shape == (2, 3, 16)
    assert np.abs(found.trainable["layers/attention/adapter_gate"]["p"]).min() > 0
    assert main(["eval", str(folder)]) == 0
    summary = runs.summary(folder)
    assert summary is not None
    assert capsys.readouterr().out.startswith(f"test: perplexity {summary.test['perplexity']:.4f}")
    assert main(["predict", str(folder), "--text", "the good film"]) == 0
    line = capsys.readouterr().out.split("\t")[0].strip()
    assert main(["generate", str(folder), "--chat", "--prompt", "the good film", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip() == line
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 1
    assert "places for LLaMAAdapter, which no Hugging Face checkpoint holds" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
