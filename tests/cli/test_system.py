"""What a job says of its training besides the optimiser: averages, parts, precision, trackers, early ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from jpeft.cli import progress, runs
from jpeft.cli.main import main
from jpeft.train import metrics

STEPS = 12
TRACKER = """
import json

class Tracker:
    def __init__(self):
        self.rows = []

    def step(self, n, metrics, seconds, examples):
        self.rows.append(n)

    def end(self, result):
        with open("tracked.json", "w") as file:
            json.dump([result.stopped, self.rows], file)
"""


class Death(BaseException):
    """Stands for the death of the process."""


def train(job: Path, name: str, *settings: str, options: tuple[str, ...] = ()) -> Path:
    sets = [word for one in ("train.epochs=null", f"train.steps={STEPS}", "train.eval_every=4", *settings)
            for word in ("--set", one)]
    assert main(["train", str(job), "--name", name, *sets, *options]) in (0, 130)
    return job.parent / "runs" / name


def rows(folder: Path) -> list[dict[str, Any]]:
    return metrics.read(folder / "metrics.jsonl")


def adapter(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "adapter" / "adapter.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    ("train.optimizer=muon", "train.schedule=wsd", "train.decay=0.25", "train.ema=0.9", "train.accumulate=2",
     "model.dtype=bfloat16"),
    ("train.optimizer=schedule_free", "train.schedule=constant", "train.warmup=3"),
    ("train.loss_scale=dynamic", "model.dtype=float16"),
], ids=["muon, ema", "schedule_free", "float16"])
def test_an_interrupted_run_of_every_kind_continues_bit_by_bit(
    job: Path, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    label = request.node.callspec.id.replace(", ", "-")
    whole = train(job, f"whole-{label}", *settings)
    step = progress.StepTimes.step

    def interrupt(self: Any, n: int, *rest: Any) -> None:
        step(self, n, *rest)
        if n == 5:
            raise Death

    with monkeypatch.context() as patch:
        patch.setattr(progress.StepTimes, "step", interrupt)
        with pytest.raises(Death):
            train(job, f"parts-{label}", *settings)
    parts = train(job, f"parts-{label}", *settings, options=("--resume",))
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert {k: v.tobytes() for k, v in adapter(parts).items()} == {k: v.tobytes() for k, v in adapter(whole).items()}
    assert {v.dtype for v in adapter(whole).values()} == {np.dtype("float32")}
    trained = [row for row in rows(whole) if "loss" in row]
    assert trained[-1]["loss"] < trained[0]["loss"]
    summary = runs.summary(whole)
    assert summary is not None
    assert summary.step_flops is not None
    assert summary.step_flops > 0
    assert summary.mfu is None
    if "float16" in label and "b" not in label:
        assert trained[0]["loss_scale"] >= 2.0**5
        skipped = sum(row["skipped"] for row in trained)
        assert bool(skipped) == any("steps were skipped" in note for note in summary.notes)


@pytest.mark.slow
def test_trackers_profile_and_tensorboard(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    monkeypatch.chdir(tmp_path)
    Path("my_tracker.py").write_text(TRACKER)
    folder = train(job, "watched", "train.tensorboard=true", "train.profile={start: 3, steps: 2}",
                   "train.data_timeout=60.0", options=("--hook", "my_tracker:Tracker"))
    assert json.loads(Path("tracked.json").read_text()) == ["finished", list(range(1, STEPS + 1))]
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert list((folder / "profile").rglob("*.xplane.pb"))
    said = capsys.readouterr().out
    assert "FLOP/s; the peak of cpu is not known" in said
    plain = train(job, "unwatched")
    assert (plain / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_early(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(job, "tired", "train.learning_rate=1e-9", "train.patience=2", "train.eval_every=1")
    summary = runs.summary(folder)
    assert summary is not None
    assert (summary.stopped, summary.steps) == ("early", 3)
    assert "stopped early after step 3 of 12: accuracy has not got better in 2" in capsys.readouterr().out


@pytest.mark.slow
def test_debug_nans_says_where(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = jax.config.jax_debug_nans
    sets = ["train.learning_rate=1e30", "train.clip=null", "train.debug_nans=true", "train.steps=12",
            "train.epochs=null"]
    assert main(["train", str(job), "--name", "nans", *(w for one in sets for w in ("--set", one))]) == 1
    assert "error: train.debug_nans: invalid value (nan) encountered in" in capsys.readouterr().err
    assert jax.config.jax_debug_nans == before
