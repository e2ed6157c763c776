"""Jobs of causal language models on a tiny decoder: conversations, pairs and plain text, from train to compare."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cli import tinylm
from cli.tinylm import TinyLm

import jpeft
from jpeft.cli import build, config, progress, runs, tables
from jpeft.cli.main import main
from jpeft.cli.sections import GenerateConfig
from jpeft.cli.tasks import answers, causal_lm
from jpeft.data.packing import Packed, Padded
from jpeft.serve.generate import Generation
from jpeft.train import report

FORMATS = {"pairs": tinylm.PAIRS, "chats": tinylm.CHATS, "texts": tinylm.TEXTS}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> TinyLm:
    return tinylm.make(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def files(lm: TinyLm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A configuration for each format."""
    home = tmp_path_factory.mktemp("configs")
    for name, data in FORMATS.items():
        (home / f"{name}.yaml").write_text(lm.config(data, tinylm.GENERATE, f"output: {home / 'runs'}"))
    return {name: home / f"{name}.yaml" for name in FORMATS}


@pytest.fixture(scope="module")
def pairs(files: dict[str, Path]) -> Path:
    assert main(["train", str(files["pairs"])]) == 0
    return files["pairs"].parent / "runs" / "pairs"


@pytest.fixture(scope="module")
def texts(files: dict[str, Path]) -> Path:
    assert main(["train", str(files["texts"])]) == 0
    return files["texts"].parent / "runs" / "texts"


def summary_of(folder: Path) -> runs.RunSummary:
    found = runs.summary(folder)
    assert found is not None
    return found


def test_pairs_leave_a_summary_with_both_sides(pairs: Path) -> None:
    found = summary_of(pairs)
    assert found.task == "causal-lm"
    assert set(found.test) == set(found.before) == {"loss", "perplexity", "count", "exact_match", "answers"}
    assert found.test["count"] == 20  # an answer of one token, and its end, for 10 rows
    assert found.test["answers"] == 7
    assert found.test["loss"] < found.before["loss"]
    assert math.isclose(found.test["perplexity"], math.exp(found.test["loss"]))
    assert 0 < found.baseline["exact_match"] < 1
    assert found.tokens_per_second is not None
    assert any("most frequent answer" in note for note in found.notes)
    rows = [json.loads(line) for line in (pairs / runs.METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/perplexity" in row] == [2, 4]
    assert found.best["loss"] == min(row["eval/loss"] for row in rows if "eval/loss" in row)
    assert (pairs / runs.PLOT).read_bytes().startswith(b"\x89PNG")


def test_before_is_the_model_as_it_was_read(pairs: Path, lm: TinyLm) -> None:
    job = runs.read(pairs)
    loaded = build.load_model(job)
    part = build.load_data(job, loaded.tokenizer)["test"].sequences
    width = int(part.lengths.max())
    ids, weights = (np.stack([np.pad(row, (0, width - len(row))) for row in rows]) for rows in (part.ids, part.weights))
    scores = jax.nn.log_softmax(loaded.model.apply(loaded.params, ids).logits[:, :-1])
    losses = -np.take_along_axis(np.asarray(scores), ids[:, 1:, None], axis=2)[..., 0]
    assert math.isclose(summary_of(pairs).before["loss"], (losses * weights[:, 1:]).sum() / weights.sum(), rel_tol=1e-5)


def test_samples_show_prompt_and_answers(pairs: Path) -> None:
    said = (pairs / runs.SAMPLES).read_text()
    assert said.startswith("# pairs: answers before and after training\n")
    assert [line for line in said.splitlines() if line.startswith("## ")] == ["## 1", "## 2"]
    assert "<|im_start|> user the " in said
    assert [said.count(f"{name}:\n\n{answers.FENCE}\n") for name in ("Prompt", "Right", "Before", "After")] == [2] * 4
    assert "system" not in said  # the template's own system prompt is left out


def test_training_says_what_it_does(files: dict[str, Path], tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--set", f"output={tmp_path}", "--set", "data.max_length=9", "--set", "data.unique=[text]", "--set",
            "data.match.text='[gbfd].*'", "--set", "test.generate=null", "--set", "data.test=4", "--set",
            "data.validation=3"]
    assert main(["train", str(files["pairs"]), *args]) == 0
    said = capsys.readouterr().out
    assert "rows do not match data.match" in said
    assert "rows equal an earlier one in text" in said
    assert "of them padding" in said
    assert "sequences are longer than data.max_length = 9 tokens and lost their start" in said
    assert "test perplexity" in said
    assert "tokens/s" in said
    assert not (tmp_path / "pairs" / runs.SAMPLES).exists()


def test_conversations_are_asked_for_their_last_turn(files: dict[str, Path]) -> None:
    job = config.load(files["chats"])
    loaded = build.load_model(job)
    part = build.load_data(job, loaded.tokenizer)["test"]
    assert part.sequences.learnt == 8 * 2 * 2  # two answers of two tokens in each conversation
    assert set(part.known) == set(tinylm.ANSWERS)
    asked = causal_lm._questions(loaded.tokenizer, part.sequences, GenerateConfig(rows=3), False)
    assert [question.answer in tinylm.ANSWERS for question in asked] == [True] * 3
    said = answers.decoded(loaded.tokenizer, [question.prompt for question in asked])
    assert [text.split()[-1] for text in said] == ["assistant"] * 3
    assert [text.split().count("assistant") for text in said] == [2] * 3


@pytest.mark.slow
def test_plain_text_tells_dialogue_apart(texts: Path) -> None:
    found = summary_of(texts)
    assert found.test["count"] == 6 * 15
    assert 0 < found.test["dialogue_count"] < found.test["count"]
    assert set(found.before) == set(found.test)
    assert "exact_match" not in found.test
    assert found.baseline == {}
    assert (texts / runs.SAMPLES).read_text().count("## ") == 2


@pytest.mark.slow
def test_interrupted_run_of_packed_rows_continues_bit_by_bit(
    pairs: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = progress.StepTimes.step

    def interrupt(self: Any, n: int, *rest: Any) -> None:
        step(self, n, *rest)
        if n == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(progress.StepTimes, "step", interrupt)
    assert main(["train", str(files["pairs"]), "--name", "halves"]) == 130
    folder = pairs.parent / "halves"
    assert not (folder / runs.SUMMARY).exists()
    monkeypatch.undo()
    assert main(["train", str(files["pairs"]), "--name", "halves", "--resume"]) == 0
    assert "resumed after step" in capsys.readouterr().out
    for name in ("metrics.jsonl", "adapter/adapter.safetensors"):
        assert (folder / name).read_bytes() == (pairs / name).read_bytes()
    whole, halves = summary_of(pairs), summary_of(folder)
    assert (halves.test, halves.before, halves.best_step) == (whole.test, whole.before, whole.best_step)


def test_eval_predict_merge_compare(pairs: Path, texts: Path, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    found = summary_of(pairs)
    assert main(["eval", str(pairs)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"test: perplexity {found.test['perplexity']:.4f}, loss {found.test['loss']:.4f}, 20 tokens;"
                           f" exact match {found.test['exact_match']:.4f} of 7 answers")
    assert main(["predict", str(pairs), "--text", "the good film", "--text", "the bad film"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["the good film", "the bad film"]
    assert main(["merge", str(pairs), str(tmp_path / "merged")]) == 0
    model, params, tokenizer = jpeft.from_pretrained(tmp_path / "merged")
    assert tokenizer is not None
    loaded = build.load_model(runs.read(pairs))
    adapted = build.load_adapter(loaded, pairs / runs.ADAPTER)
    batch = build.batches(loaded.config, build.load_data(loaded.config, tokenizer)["test"]).make(0, 0)
    named = {name: batch[name] for name in ("attention_mask", "segment_ids", "labels")}
    merged = model.apply(params, batch["tokens"], **named, label_weights=batch["weights"]).loss
    np.testing.assert_allclose(merged, adapted.apply(adapted.trainable, adapted.frozen, batch), rtol=1e-5)
    capsys.readouterr()
    assert main(["compare", str(pairs), str(texts), "--markdown"]) == 0
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert head.split(" | ")[3] == "test"
    assert f"perplexity {found.test['perplexity']:.4g}, exact match" in first
    assert "exact match" not in second


def test_explain_needs_no_rows(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(files["pairs"]), "--set", "data.source=nowhere.csv"]) == 0
    assert "layers/attention/key/kernel" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "settings", "said"), [
    ("pairs", ["data.prompt='{txet}'"], "has no column 'txet'; nearest: 'text'"),
    ("pairs", ["data.completion=yes"], "names no column"),
    ("pairs", ["data.names={label: [negative]}"], "has no name"),
    ("pairs", ["data.match={text: '['}"], "is no regular expression"),
    ("pairs", ["data.unique=[txet]"], "nearest: 'text'"),
    ("pairs", ["data.max_length=2", "data.keep=start"], "none that is learnt"),
    ("pairs", ["data.max_length=65"], "more than the 64 tokens that the model takes"),
    ("pairs", ["data.test=60"], "leave no row"),
    ("chats", ["data.messages=massages"], "nearest: 'messages'"),
    ("texts", ["data.test=[mcbeth]"], "there is no text 'mcbeth' to hold out; nearest: 'macbeth'"),
    ("texts", ["data.validation=[macbeth]"], "there is no text 'macbeth' to hold out"),
    ("texts", ["data.dialogue='^never'"], "finds nothing"),
    ("texts", ["data.source=nowhere"], "there is no"),
])
def test_bad_rows_are_one_line_and_nothing_is_written(
    files: dict[str, Path], name: str, settings: list[str], said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [word for one in (*settings, f"output={tmp_path / 'runs'}") for word in ("--set", one)]
    assert main(["train", str(files[name]), *sets]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_model_without_end_token(lm: TinyLm, files: dict[str, Path], tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(lm.model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    args = ["--set", f"model.source={tmp_path / 'model'}", "--set", "data.chat=false", "--set",
            f"output={tmp_path}"]
    assert main(["train", str(files["pairs"]), *args]) == 1
    assert "names no eos_token" in capsys.readouterr().err


@pytest.mark.slow
def test_virtual_tokens_get_a_row_for_each_sequence(files: dict[str, Path], tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    rule = "rules={embed/embedding: {method: PromptTuning, length: 3}}"
    job = config.load(files["pairs"], [rule])
    loaded = build.load_model(job)
    data = build.load_data(job, loaded.tokenizer)
    assert isinstance(build.batches(job, data["train"]), Padded)
    assert isinstance(build.batches(config.load(files["pairs"]), data["train"]), Packed)
    assert main(["train", str(files["pairs"]), "--set", rule, "--set", f"output={tmp_path}", "--set",
                 "data.max_length=32"]) == 0
    assert "one sequence a row, as virtual tokens stand before each" in capsys.readouterr().out
    found = summary_of(tmp_path / "pairs")
    assert found.test["answers"] == 7
    assert any("not merged: PromptTuning" in note for note in found.notes)


def test_last_stretch_of_learnt_tokens() -> None:
    assert causal_lm._last(np.array([0, 1, 1])) == (1, 3)
    assert causal_lm._last(np.array([0, 1, 0, 0, 1, 0])) == (4, 5)


def test_answers_count_spaces_around_them_as_nothing() -> None:
    def wrote(text: str) -> Generation:
        return Generation(text, [], "eos", 1)

    asked = [answers.Question([1], " yes"), answers.Question([1], "no"), answers.Question([1], "no")]
    assert answers.right([wrote("yes "), wrote("No"), wrote("no")], asked) == {"exact_match": 2 / 3, "answers": 3.0}
    assert answers.most_frequent(["no ", "no", "yes"], asked) == ("no", {"exact_match": 2 / 3, "answers": 3.0})


def test_plot_of_perplexity(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 2.0, "count": 3.0}, {"step": 1, "eval/loss": 1.0, "eval/perplexity": 2.7}]
    assert report.plot(rows, tmp_path / "a.png").read_bytes() != report.plot(rows[:1], tmp_path / "b.png").read_bytes()


def test_table_of_classifiers_alone_keeps_its_head() -> None:
    one = runs.RunSummary(1, 1, "finished", test={"accuracy": 0.5, "count": 2.0})
    assert tables.heads([one]) == tables.COMPARED
    assert tables.compared([one])[0][3] == "0.5000"
    both = [one, runs.RunSummary(1, 1, "finished", task="causal-lm", test={"perplexity": 9.0})]
    assert [row[3] for row in tables.compared(both)] == ["accuracy 0.5000", "perplexity 9"]
