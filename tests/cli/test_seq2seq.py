"""Jobs of encoder-decoders: training from random weights, then LoRA or a prefix on what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import tinyseq

import jpeft
from jpeft.cli import build, config, runs
from jpeft.cli.main import main
from jpeft.cli.tasks.characters import SPECIAL, tokenizer_of
from jpeft.errors import ModelConfigError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration that begins from random weights, and one that goes on from its model."""
    home = tmp_path_factory.mktemp("seq2seq")
    names = tinyseq.names(home / "names")
    rows = tinyseq.pairs(home / "pairs.csv")
    read = f"{{format: names, source: {names}, read: [xx], write: yy, max_length: 8, buckets: [8]}}"
    (home / "first.yaml").write_text(tinyseq.config(tinyseq.T5, read, tinyseq.FULL, home / "runs"))
    said = (f"{{format: pairs, source: {rows}, prompt: '{{word}}', completion: '{{back}}', test: 8, validation: 6, "
            "max_length: 8, buckets: [8]}")
    (home / "second.yaml").write_text(tinyseq.config(str(home / "runs/first/model"), said, tinyseq.LORA, home / "runs"))
    return home


@pytest.fixture(scope="module")
def first(home: Path) -> Path:
    assert main(["train", str(home / "first.yaml"), "--set", "model.characters=zé"]) == 0
    return home / "runs" / "first"


@pytest.fixture(scope="module")
def second(home: Path, first: Path) -> Path:
    assert main(["train", str(home / "second.yaml")]) == 0
    return home / "runs" / "second"


def summary_of(folder: Path) -> runs.RunSummary:
    found = runs.summary(folder)
    assert found is not None
    return found


@pytest.mark.slow
def test_training_from_random_weights_leaves_a_model(first: Path) -> None:
    found = summary_of(first)
    assert found.percent == 100
    assert found.before == {}  # there is nothing to compare with
    assert found.test["answers"] == 5
    job = runs.read(first)
    loaded = build.load_model(job)
    adapted = build.load_adapter(loaded, first / runs.ADAPTER)
    model, params, tokenizer = jpeft.from_pretrained(first / runs.MODEL)
    assert tokenizer is not None
    assert tokenizer.special == loaded.tokenizer.special
    assert tokenizer.encode(["zé"])[0].ids == loaded.tokenizer.encode(["zé"])[0].ids
    assert tokenizer.special["unk_token"] not in tokenizer.encode(["zé"])[0].ids
    batch = build.batches(job, build.load_data(job, tokenizer)["test"]).make(0, 0)
    plain = model.apply(params, batch["tokens"], batch["attention_mask"], labels=batch["labels"],
                        label_weights=batch["weights"]).loss
    np.testing.assert_allclose(plain, adapted.apply(adapted.trainable, adapted.frozen, batch), rtol=1e-5)


@pytest.mark.slow
def test_lora_goes_on_from_it(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = summary_of(second)
    assert set(found.before) == set(found.test) == {"loss", "perplexity", "count", "exact_match", "answers"}
    assert found.percent < 50
    assert found.before["loss"] != found.test["loss"]
    rows = [json.loads(line) for line in (second / runs.METRICS).read_text().splitlines()]
    assert found.best["loss"] == min(row["eval/loss"] for row in rows if "eval/loss" in row)
    assert (second / runs.SAMPLES).read_text().count("Before:") == 2
    assert not (second / runs.MODEL).exists()


@pytest.mark.slow
def test_eval_predict_merge(second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(second)]) == 0
    assert f"test: perplexity {summary_of(second).test['perplexity']:.4f}" in capsys.readouterr().out
    assert main(["predict", str(second), "--text", "abc"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split("\t")[1] == "abc"
    assert main(["merge", str(second), str(tmp_path / "merged")]) == 0
    model, params, tokenizer = jpeft.from_pretrained(tmp_path / "merged")
    assert tokenizer is not None
    loaded = build.load_model(runs.read(second))
    adapted = build.load_adapter(loaded, second / runs.ADAPTER)
    batch = build.batches(loaded.config, build.load_data(loaded.config, tokenizer)["test"]).make(0, 0)
    merged = model.apply(params, batch["tokens"], batch["attention_mask"], labels=batch["labels"],
                         label_weights=batch["weights"]).loss
    np.testing.assert_allclose(merged, adapted.apply(adapted.trainable, adapted.frozen, batch), rtol=1e-5)


@pytest.mark.slow
def test_prefix_before_the_text(home: Path, first: Path) -> None:
    rule = "rules={'encoder/layers/attention/(key|value)/kernel': {method: PrefixTuning, length: 3}}"
    assert main(["train", str(home / "second.yaml"), "--name", "prefix", "--set", rule]) == 0
    found = summary_of(home / "runs" / "prefix")
    assert found.trainable_parameters == 2 * 3 * 16
    assert found.test["answers"] == 5
    assert any("not merged: PrefixTuning" in note for note in found.notes)


@pytest.mark.parametrize(("name", "settings", "said"), [
    ("first", ["data.write=zz"], "has no names in the language 'zz'"),
    ("first", ["data.kinds=[currencies]"], "have no name of currencies in common"),
    ("first", ["data.kinds=[currency]"], "data.kinds.0 = 'currency' should be 'territories'"),
    ("first", ["data.test=0.95"], "leave no row for train"),
    ("first", ["model.source.model_type=t6"], "model.source.model_type = 't6' is no model for the task 'seq2seq'"),
    ("first", ["model.source.d_modle=3"], "d_modle"),
    *(pytest.param("second", *row, marks=pytest.mark.slow) for row in [
        (["data.completion='{bcak}'"], "nearest: 'back'"),
        (["model.characters=x"], "model.characters is for a model with random weights"),
        (["model.source={model_type: t5}", "model.task=causal-lm", "data.buckets=null"], "unknown key")]),
])
def test_mistakes_are_one_line(home: Path, name: str, settings: list[str], said: str, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> None:
    if name == "second":
        request.getfixturevalue("first")  # its model
    sets = [word for one in (*settings, f"output={tmp_path / 'runs'}") for word in ("--set", one)]
    assert main(["train", str(home / f"{name}.yaml"), *sets]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_what_a_run_from_random_weights_is_resumed_with(home: Path, first: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    again = config.load(first / runs.CONFIG)
    assert again.model.source == config.load(home / "first.yaml").model.source
    assert main(["train", str(home / "first.yaml"), "--resume"]) == 1
    assert "was begun with another model.characters" in capsys.readouterr().err


def test_characters_are_tokens_and_their_texts_come_back(tmp_path: Path) -> None:
    made = tokenizer_of(["ғ ж", "в\n"])
    assert made.decode([made.encode(["ж ғ\nв"])[0].ids]) == ["ж ғ\nв"]
    assert [made.raw.token_to_id(token) for token in SPECIAL.values()] == [0, 1, 2]
    assert made.encode(["я"])[0].ids == [2, 1]


def test_random_weights_need_a_family_that_has_the_task() -> None:
    from jpeft.cli.tasks.characters import fresh

    said: dict[str, Any] = {"model_type": "bert"}
    with pytest.raises(ModelConfigError, match="must be one of t5, mt5"):
        fresh(said, tokenizer_of(["a"]), "seq2seq", seed=0)
