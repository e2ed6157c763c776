"""What remains of a run to look at: a plot and a summary."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jpeft.core import files
from jpeft.errors import ReportError
from jpeft.train import metrics
from jpeft.train.loop import FitResult
from jpeft.train.memory import peak_memory

JUDGES = ("f1", "mrr")  # metrics of evaluations that say more than the accuracy
LARGE = 700.0  # the loss from which on a perplexity is no number


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run in numbers; JSON on disk.

    Attributes:
        steps: updates done.
        total_steps: updates asked for.
        stopped: "finished" or "interrupted".
        best_step: after which the best evaluation was; None without evaluations.
        best: its metrics.
        final: metrics of the last step of this process.
        trainable_parameters: numbers that were trained.
        base_parameters: numbers that were not.
        seconds: wall time of this process's steps.
        examples_per_second: rows trained on per second.
        peak_host_bytes: highest memory use of the process.
        peak_device_bytes: highest memory use of a device, if devices tell.
        notes: what a reader must know, one line each.
    """

    steps: int
    total_steps: int
    stopped: str
    best_step: int | None = None
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    final: dict[str, float] = dataclasses.field(default_factory=dict)
    trainable_parameters: int = 0
    base_parameters: int = 0
    seconds: float = 0.0
    examples_per_second: float = 0.0
    peak_host_bytes: int = 0
    peak_device_bytes: int | None = None
    notes: tuple[str, ...] = ()

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, all or nothing."""
        _write(Path(path), (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Summary:
        """Read what `write` has written.

        Raises:
            ReportError: the file is missing or no summary.
        """
        try:
            data = json.loads(Path(path).read_bytes())
            return cls(**{**data, "notes": tuple(data.get("notes", ()))})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ReportError(f"{path} is no summary of a run ({type(error).__name__}); give a summary.json") from error


def summarise(
    result: FitResult, total_steps: int, *, base: Any = None, seconds: float = 0.0, examples: int = 0,
    notes: Sequence[str] = (),
) -> Summary:
    """Return the summary of a run.

    Args:
        result: of `fit`.
        total_steps: updates asked for.
        base: the base parameters, to count them.
        seconds: wall time.
        examples: rows trained on in that time.
        notes: what a reader must know.
    """
    trained = [row for row in result.history if "loss" in row]
    peak = peak_memory()
    return Summary(
        int(result.state.step), total_steps, result.stopped,
        None if result.best is None else result.best.step, {} if result.best is None else dict(result.best.metrics),
        {k: v for k, v in (trained[-1] if trained else {}).items() if k != "step"},
        _size(result.state.trainable), _size(base), seconds, examples / seconds if seconds else 0.0,
        peak.host, peak.device, tuple(notes))


def plot(source: str | os.PathLike[str] | Sequence[dict[str, Any]], png: str | os.PathLike[str]) -> Path:
    """Draw the loss over the steps, of training and of evaluations, and beside it what judges the model.

    Args:
        source: a metrics.jsonl, or the `history` of a result.
        png: the file to write.

    Returns:
        The path of the file.

    Raises:
        ReportError: there is nothing to draw, the metrics are damaged, or the file cannot be written.
    """
    rows = metrics.read(source) if isinstance(source, str | os.PathLike) else list(source)
    if not rows:
        raise ReportError("there are no metrics to plot; train for a step first")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _lines(left, "loss", _series(rows, "loss"), _series(rows, "eval/loss"))
    counted = (row for row in rows if row.get("count") and row.get("correct") is not None)
    share = [(row["step"], row["correct"] / row["count"]) for row in counted]
    if judged := _series(rows, "eval/perplexity"):
        trained = [(n, math.exp(loss)) for n, loss in _series(rows, "loss") if loss < LARGE]
        _lines(right, "perplexity", trained, judged)
    else:
        name = next((name for name in JUDGES if _series(rows, f"eval/{name}")), "accuracy")
        _lines(right, name, share if name == "accuracy" else [], _series(rows, f"eval/{name}"))
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    _write(Path(png), image.getvalue())
    return Path(png)


def _series(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _lines(axes: Any, name: str, trained: list[tuple[int, float]], judged: list[tuple[int, float]]) -> None:
    """Draw the steps faintly, their running mean clearly, and the evaluations with dots."""
    if trained:
        steps, values = np.array(trained, float).T
        axes.plot(steps, values, color="C0", alpha=0.3, linewidth=0.8)
        width = max(1, len(values) // 30)
        mean = np.convolve(values, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1:], mean, color="C0", label="train" + (f", mean of {width}" if width > 1 else ""))
    if judged:
        steps, values = np.array(judged, float).T
        axes.plot(steps, values, color="C1", marker="o", markersize=3, label="evaluation")
    axes.set(xlabel="step", ylabel=name)
    axes.grid(alpha=0.3)
    if trained or judged:
        axes.legend()


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, data)
    except OSError as error:
        raise ReportError(f"{path} cannot be written ({error.strerror}); free space or fix the folder") from error


def _size(tree: Any) -> int:
    return sum(int(np.prod(np.shape(leaf), dtype=np.int64)) for leaf in jax.tree_util.tree_leaves(tree))
