"""Bad input: one line on the standard error stream, exit code 1, and nothing written."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli import tinyjob
from cli.tinyjob import Tiny

from jpeft.cli.main import main
from jpeft.core import files, store


def fails(capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    """Run a command that must fail with one line."""
    capsys.readouterr()
    assert main(args) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines == err.splitlines()[-1:]
    assert said in lines[0]


@pytest.mark.parametrize(("settings", "said"), [
    (["train.epoch=1"], "unknown key 'train.epoch'; the nearest is 'train.epochs'"),
    (["data.source={tmp}/rwos.csv"], "there is no"),
    (["model.source={tmp}/modle"], "there is no"),
    (["data.text=txet"], "has no column 'txet'; nearest: 'text'"),
    (["data.where.source=imdb"], "has no row with source 'imdb'; nearest: 'rotten_tomatoes'"),
    (["data.classes=[negative, positive, neutral]", "data.source={tmp}/odd.csv"],
     "'5', which is none of the 3 classes"),
    (["data.source={tmp}/empty.csv"], "no rows"),
    (["data.source={tmp}/blank.csv"], "is empty"),
    (["data.test=90"], "leave no row of 96"),
    (["data.max_length=64", "data.buckets=null"], "more than the 32 tokens that the model takes"),
    (["model.sha256=" + "0" * 64], "sha256"),
    (["data.source=pypi:no-such==1.0#x", "data.sha256=abc"], "64 hex digits"),
    (["rules={'layers/.*/kernle': {method: LoRA}}"], "matches none of the"),
    (["rules.all-linear.rank=99"], "does not fit"),
    (["train.warmup=999"], "warmup"),
    (["model.source={tmp}/broken"], "broken"),
    (["train.optimizer=adam"], "adam has no weight decay"),
    (["train.optimizer=schedule_free"], "averages in place of a schedule, and schedule = 'linear'"),
    (["train.accumulate=5"], "train.accumulate = 5 does not divide train.batch_size = 32"),
    (["train.decay=0.1"], "is of the schedule wsd, and this is linear"),
    (["train.optimizer=schedule_free", "train.ema=0.9"], "keeps an average of its own"),
    (["train.loss_scale=dynamic", "train.debug_nans=true"], "drop one"),
    (["model.compute_dtype=float16"], "set train.loss_scale=dynamic, or model.compute_dtype=bfloat16"),
    (["train.loss_scale=8.0"], "is for float16 compute, and this is float32; set it to null"),
    (["train.hooks=[no_such_tracker:Tracker]"], "whose module cannot be imported"),
    (["train.hooks=[tracker]"], "which is no module:Class"),
    (["train.hooks=['jpeft.train.hooks:Hok']"], "has no 'Hok'; nearest: 'Hook'"),
    (["train.hooks=['builtins:object']"], "has none of the methods start, step,"),
])
def test_bad_configuration(
    job: Path, tiny: Tiny, settings: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    tinyjob.rows(inputs / "odd.csv", odd="5")
    (inputs / "empty.csv").write_text("text,label\n")
    (inputs / "blank.csv").write_text("")
    shutil.copytree(tiny.model, inputs / "broken")
    weights = inputs / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    sets = [word for one in settings for word in ("--set", one.replace("{tmp}", str(inputs)))]
    fails(capsys, ["train", str(job), "--set", f"output={tmp_path / 'runs'}", *sets], said)
    assert not (tmp_path / "runs").exists()


def test_missing_configuration(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["train", str(job.with_name("jbo.yaml"))], "nearest: ")
    fails(capsys, ["explain", str(job.with_name("jbo.yaml"))], "there is no file")


def test_existing_run_is_left_alone(run: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    fails(capsys, ["train", str(job), "--name", "whole"], "exists already; continue it with --resume")
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_no_run(tmp_path: Path, run: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["eval", str(run.parent / "whoel")], f"nearest: '{run}'")
    fails(capsys, ["predict", str(tmp_path), "--text", "x"], "is no run")
    fails(capsys, ["eval", str(job)], "there is no run of")
    fails(capsys, ["eval", str(run), "--split", "tset"], "nearest: 'test'")
    fails(capsys, ["predict", str(run)], "nothing to predict")
    fails(capsys, ["predict", str(run), "--file", str(tmp_path / "no")], "cannot be read")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_damaged_adapter(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "adapter" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    fails(capsys, ["eval", str(copy)], "truncated or garbled")
    fails(capsys, ["merge", str(copy), str(tmp_path / "merged")], "truncated or garbled")
    assert not (tmp_path / "merged").exists()
    shutil.rmtree(copy / "adapter")
    fails(capsys, ["eval", str(copy)], "has no adapter yet")


def test_adapter_of_another_base(copy: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tinyjob.make(tmp_path / "other", seed=1)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny.model), str(other.model)))
    fails(capsys, ["eval", str(copy)], "was trained on other base parameters")


def test_what_cannot_be_merged(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--set", f"output={tmp_path}", "--set", "rules={layers/mlp/down/kernel: {method: Pfeiffer, bottleneck: 2}}",
            "--set", "train.epochs=1", "--set", "train.eval_every=null"]
    assert main(["train", str(job), *args]) == 0
    fails(capsys, ["merge", str(tmp_path / "job"), str(tmp_path / "merged")], "Pfeiffer on 'layers/mlp/down/kernel'")
    assert not (tmp_path / "merged").exists()


def test_loss_that_is_not_finite(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--set", f"output={tmp_path}", "--set", "train.learning_rate=1e30", "--set", "train.save_every=1",
            "--set", "train.eval_every=100"]
    fails(capsys, ["train", str(job), *args], "the last good checkpoint, of step 1,")
    assert [p.name for p in (tmp_path / "job" / "checkpoints").iterdir()] == ["1"]
    assert not (tmp_path / "job" / "summary.json").exists()


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("place", "said", "left"), [
    ((files, "write"), "No space left on device", False),
    ((store, "save"), "continue with --resume", True),
])
def test_disk_is_full(
    job: Path, tmp_path: Path, place: tuple[Any, str], said: str, left: bool, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = ["train", str(job), "--set", f"output={tmp_path / 'runs'}"]
    with monkeypatch.context() as patch:
        patch.setattr(*place, full)
        fails(capsys, args, said)
    assert (tmp_path / "runs" / "job").exists() == left


def test_traceback_on_request(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(job.with_name("no.yaml")), "--traceback"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_wrong_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "x.yaml", "--epochs", "3"]) == 2
    assert main(["trian"]) == 2


def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    import jpeft.cli.main as module

    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"needs typer; pip install 'jpeft\[train\]'"):
        importlib.reload(module)
    monkeypatch.undo()
    importlib.reload(module)


