"""The commands on a tiny model: what a run leaves, that it continues bit by bit, and what reads it afterwards."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jpeft
from jpeft.cli import progress, runs, tables
from jpeft.cli.main import main
from jpeft.cli.rules import METHODS

TEXTS = ("good fine film", "bad dull film", "warm")


def words(texts: tuple[str, ...] = TEXTS) -> list[str]:
    return [word for text in texts for word in ("--text", text)]


def test_run_folder_and_summary(run: Path) -> None:
    summary = runs.summary(run)
    assert summary is not None
    assert summary.test["count"] == 16
    assert summary.test["accuracy"] >= 0.75
    assert summary.best["accuracy"] >= 0.75
    assert summary.ms_per_step is not None
    assert summary.temp_bytes > 0
    assert summary.adapter_bytes == (run / "adapter" / "adapter.safetensors").stat().st_size
    assert summary.model_bytes == 4 * summary.base_parameters
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "config.yaml").read_text().startswith("# jpeft train ")


def test_finished_run_is_not_run_again(run: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert main(["train", str(job), "--name", "whole", "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_interrupted_run_continues_bit_by_bit(
    run: Path, job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = progress.StepTimes.step

    def interrupt(self: Any, n: int, *rest: Any) -> None:
        step(self, n, *rest)
        if n == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.StepTimes, "step", interrupt)
    assert main(["train", str(job), "--name", "halves"]) == 130
    said = capsys.readouterr().err
    assert "stopped by SIGINT after step" in said
    assert f"continue with: jpeft train {job} --name halves --resume" in said
    folder = run.parent / "halves"
    assert not (folder / "summary.json").exists()
    monkeypatch.undo()
    assert main(["train", str(job), "--name", "halves", "--resume"]) == 0
    assert "resumed after step" in capsys.readouterr().out
    for name in ("metrics.jsonl", "adapter/adapter.safetensors"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.slow
def test_run_that_was_killed_before_its_summary(run: Path, job: Path) -> None:
    shutil.copytree(run, run.parent / "late")
    (run.parent / "late" / "summary.json").unlink()
    assert main(["train", str(job), "--name", "late", "--resume"]) == 0
    whole, late = runs.summary(run), runs.summary(run.parent / "late")
    assert whole is not None
    assert late is not None
    assert (late.test, late.best, late.best_step) == (whole.test, whole.best, whole.best_step)
    assert late.ms_per_step is None


def test_run_resumes_only_as_it_was_begun(run: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(job), "--name", "whole", "--resume", "--set", "train.epochs=9"]) == 1
    assert "was begun with another train.epochs" in capsys.readouterr().err


def test_eval_gives_the_accuracy_of_the_summary(run: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run)]) == 0
    summary = runs.summary(run)
    assert summary is not None
    assert f"test: accuracy {summary.test['accuracy']:.4f}, loss {summary.test['loss']:.4f}, 16 rows" in (
        capsys.readouterr().out)


def test_predict_by_text_and_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run), *words()]) == 0
    lines = capsys.readouterr().out.splitlines()
    fields = [line.split("\t") for line in lines]
    assert [f[2] for f in fields] == list(TEXTS)
    assert [f[0] for f in fields] == ["positive", "negative", "positive"]
    assert all(0.5 <= float(f[1]) <= 1 for f in fields)
    (tmp_path / "texts").write_text("\n".join(TEXTS) + "\n")
    assert main(["predict", str(run), "--file", str(tmp_path / "texts")]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["predict", str(run), "--text", "film " * 30]) == 0
    assert "1 of 1 texts were truncated to 8 tokens" in capsys.readouterr().err


def test_merged_folder_predicts_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import jax

    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    model, params, tokenizer = jpeft.from_pretrained(tmp_path / "merged")
    assert tokenizer is not None
    assert model.config.task == "classification"
    assert '"positive"' in (tmp_path / "merged" / "config.json").read_text()
    batch = tokenizer(list(TEXTS))
    probabilities = jax.nn.softmax(model.apply(params, **batch).logits, -1)
    capsys.readouterr()
    main(["predict", str(run), *words()])
    shown = [float(line.split("\t")[1]) for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(np.asarray(probabilities).max(-1), shown, atol=1e-4)
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 1
    assert "exists already and is not empty" in capsys.readouterr().err


def test_explain_needs_no_data(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = "rules={mlp: {method: DoRA, rank: 2}}"
    assert main(["explain", str(job), "--set", "data.source=nowhere.csv", "--set", rules]) == 0
    said = capsys.readouterr().out
    assert "layers/mlp/up/kernel" in said
    assert "DoRA" in said
    assert "new, with seed 0: classifier, pooler" in said


def test_methods_are_all_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in METHODS)
    assert "2106.09685" in said


def test_compare(run: Path, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = runs.summary(run)
    assert summary is not None
    shutil.copytree(run, tmp_path / "other")
    (tmp_path / "other" / "summary.json").unlink()
    assert main(["compare", str(run), str(tmp_path / "other"), "--markdown"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0] == "| " + " | ".join(tables.COMPARED) + " |"
    assert f"| {summary.test['accuracy']:.4f} | {summary.trainable_parameters:,} |" in lines[2]
    assert "no result" in err
    assert main(["compare", str(job)]) == 1
    assert main(["compare", str(run)]) == 0
    assert "LoRA" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_runs_what_is_missing(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "fresh.yaml"
    config.write_text(job.read_text().replace(str(job.parent / "runs"), str(tmp_path / "runs")))
    assert main(["compare", str(config), "--run", "--markdown"]) == 0
    assert "| fresh | LoRA(rank=2, alpha=4) + Full |" in capsys.readouterr().out
    assert (tmp_path / "runs" / "fresh" / "summary.json").is_file()


@pytest.mark.parametrize("command", [
    "train", "launch", "eval", "predict", "generate", "merge", "explain", "methods", "compare"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Example: jpeft {command}" in capsys.readouterr().out


@pytest.mark.slow
def test_adalora_drops_ranks_while_it_trains(job: Path) -> None:
    """Six kernels of two layers begin with 4 ranks each and end with 2 on average; the last epochs change none."""
    import safetensors.numpy

    rules = "rules={(pooler|classifier)/.*: {method: Full}, all-linear: {method: AdaLoRA, init_r: 4, target_r: 2, "
    settings = ("train.epochs=8", "train.eval_every=16", "train.learning_rate=1e-2", rules + "tfinal: 2}}")
    assert main(["train", str(job), "--name", "ada", *(w for s in settings for w in ("--set", s))]) == 0
    stored = safetensors.numpy.load_file(job.parent / "runs" / "ada" / "adapter" / "adapter.safetensors")
    values = [v for k, v in stored.items() if k.endswith("#e")]
    assert sum(v.size for v in values) == 6 * 2 * 4
    assert sum(int(np.count_nonzero(v)) for v in values) == 6 * 2 * 2
