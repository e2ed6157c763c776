"""The folder of a run: what is in it, when it may be written, and its summary."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, cast

from jpeft.cli import config
from jpeft.cli.config import JobConfig
from jpeft.core import files
from jpeft.errors import RunError, nearest
from jpeft.train import report

CONFIG, METRICS, PLOT, SUMMARY = "config.yaml", "metrics.jsonl", "plot.png", "summary.json"
ADAPTER, CHECKPOINTS, SAMPLES, MODEL = "adapter", "checkpoints", "samples.md", "model"
TENSORBOARD, PROFILE = "tensorboard", "profile"


@dataclasses.dataclass(frozen=True)
class RunSummary(report.Summary):
    """A finished run in numbers: what `compare` lists.

    Attributes:
        name: of the run.
        methods: what trains, in words.
        learning_rate: its peak.
        task: `model.task` of the job, or "preference".
        test: metrics on the test rows, with the adapter that is best on the validation rows.
        before: the same without an adapter; empty where there is nothing to compare with.
        baseline: what needs no model, such as the most frequent answer.
        adapter_bytes: size of the adapter's file.
        model_bytes: size of the base parameters.
        ms_per_step: median time of a training step; None if none was timed.
        tokens_per_second: trained on in a step of that time, padding not counted.
        step_flops: products of such a step in all, recomputation counted; None if they cannot be counted.
        mfu: their share of the peak that the devices have in bfloat16; None where that is not known.
        temp_bytes: what a training step of the largest batch needs besides its inputs and outputs.
        compile_seconds: time of compiling the training step, for all widths together.
        device: what it ran on.
        mesh: the size of each axis of the mesh; empty if it ran on one device.
        processes: how many ran it together.
        device_bytes: of `base`, `adapters` and `optimizer`, what the fullest device of the mesh held.
    """

    name: str = ""
    methods: str = ""
    learning_rate: float = 0.0
    task: str = "classification"
    test: dict[str, float] = dataclasses.field(default_factory=dict)
    before: dict[str, float] = dataclasses.field(default_factory=dict)
    baseline: dict[str, float] = dataclasses.field(default_factory=dict)
    adapter_bytes: int = 0
    model_bytes: int = 0
    ms_per_step: float | None = None
    tokens_per_second: float | None = None
    step_flops: float | None = None
    mfu: float | None = None
    temp_bytes: int = 0
    compile_seconds: float = 0.0
    device: str = ""
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    processes: int = 1
    device_bytes: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of the base's."""
        return 100 * self.trainable_parameters / max(self.base_parameters, 1)


def describe(rules: dict[str, dict[str, Any]]) -> str:
    """Name the methods of a job, `Full` last: it is the head nearly everywhere.

    Example:
        >>> describe({"attention": {"method": "LoRA", "rank": 8}, "head/.*": {"method": "Full"}})
        'LoRA(rank=8) + Full'
    """
    hidden = ("method", "learning_rate")
    named = [rule["method"] + (f"({said})" if (said := ", ".join(
        f"{k}={v}" for k, v in rule.items() if k not in hidden)) else "") for rule in rules.values()]
    return " + ".join(sorted(dict.fromkeys(named), key=lambda name: name == "Full"))


def check(job: JobConfig, resume: bool) -> bool:
    """Say whether a run goes on in its folder; nothing is written.

    Returns:
        True if there is a run to go on with, False if a new one begins.

    Raises:
        RunError: the folder is there and `resume` is not set, it is no run, or it was begun with other values.
    """
    folder = job.folder
    if not folder.exists():
        return False
    if not resume:
        raise RunError(f"{folder} exists already; continue it with --resume, give this run a --name, or remove it")
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder} holds no {CONFIG}, so it is no run that can be resumed; give this run a --name")
    begun = config.load(folder / CONFIG)
    if other := job.differences(begun):
        shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        raise RunError(f"{folder} was begun with another {shown}; resume with the values in {folder / CONFIG}, or give "
                       "this run a --name")
    return True


def begin(job: JobConfig, command: str) -> None:
    """Make the folder of a new run and write its configuration.

    Raises:
        RunError: it cannot be written.
    """
    try:
        job.folder.mkdir(parents=True)
        files.write(job.folder / CONFIG, config.write(job, command))
    except OSError as error:
        shutil.rmtree(job.folder, ignore_errors=True)
        raise RunError(
            f"{job.folder} cannot be written ({error.strerror}); free space, or set another output") from error


def find(target: Path) -> Path:
    """Return the folder of a run, named by itself or by the configuration that it comes from.

    Raises:
        RunError: there is no such run.
        ConfigError: the configuration cannot be read.
    """
    if target.suffix in (".yaml", ".yml"):
        folder = config.load(target).folder
        if not (folder / CONFIG).is_file():
            raise RunError(f"there is no run of {target} in {folder}; begin it with: jpeft train {target}")
        return folder
    if not (target / CONFIG).is_file():
        home = target.parent
        runs = [str(p.parent) for p in home.glob(f"*/{CONFIG}")] if home.is_dir() else []
        raise RunError(f"{target} is no run: it has no {CONFIG} ({nearest(str(target), runs, 1)}); give a folder that "
                       "jpeft train has written")
    return target


def read(folder: Path) -> JobConfig:
    """Return the configuration of a run, with the folder that it lies in now."""
    job = config.load(folder / CONFIG)
    return job.model_copy(update={"name": folder.name, "output": str(folder.parent)})


def summary(folder: Path) -> RunSummary | None:
    """Return the summary of a run; None if it has not finished.

    Raises:
        ReportError: the file is damaged.
    """
    path = folder / SUMMARY
    return cast(RunSummary, RunSummary.read(path)) if path.is_file() else None
