"""The plot of a board: what each entry reaches against what it costs, and the entries that nothing beats."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jpeft.cli.board.config import Board, Run
from jpeft.cli.board.results import Result
from jpeft.cli.board.table import METRICS, Line, lines
from jpeft.errors import ReportError

# name of an axis -> the value of an entry, and whether the axis is logarithmic
COSTS: Mapping[str, tuple[Callable[[Line], float | None], bool]] = {
    "trainable parameters": (lambda line: float(line.runs[0].trainable), True),
    "ms per step": (lambda line: line.step, False),
    "temporaries of a step, MB": (lambda line: line.runs[0].temp_bytes / 1e6, False),
    "adapter, bytes": (lambda line: float(line.runs[0].adapter_bytes), True)}


def frontier(points: Sequence[tuple[float, float]], more: bool = True) -> list[int]:
    """Return which points `(cost, value)` no other one beats, from cheap to dear.

    Args:
        points: one for each entry.
        more: whether a larger value is better.

    Example:
        >>> frontier([(1, 0.7), (3, 0.8), (2, 0.6), (4, 0.8)])
        [0, 1]
    """
    sign = 1 if more else -1
    best: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if not best or sign * points[i][1] > sign * points[best[-1]][1]:
            best.append(i)
    return best


def png(board: Board, found: Mapping[Run, Result]) -> bytes:
    """Return a PNG with a row of panels for each task: its metric against each of `COSTS`.

    Raises:
        ReportError: there are no results.
    """
    made = {task: lines(board, found, task) for task in board.config.tasks}
    made = {task: some for task, some in made.items() if some}
    if not made:
        raise ReportError(f"{board.results} holds no result of {board.name} to plot; run the board first")
    figure = Figure(figsize=(6 * len(COSTS), 6 * len(made)), layout="constrained")
    panels = figure.subplots(len(made), len(COSTS), squeeze=False)
    for row, (task, some) in zip(panels, made.items(), strict=True):
        for axes, (name, (cost, logarithmic)) in zip(row, COSTS.items(), strict=True):
            _panel(axes, some, cost)
            head, share = METRICS[some[0].metric]
            axes.set(xlabel=name, ylabel=f"{head}, %" if share else head, title=task,
                     xscale="log" if logarithmic else "linear")
            axes.grid(alpha=0.3)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()


def _panel(axes: Any, some: Sequence[Line], cost: Callable[[Line], float | None]) -> None:
    share = METRICS[some[0].metric][1]
    known = [(line.entry, x, line.mean * (100 if share else 1)) for line in some if (x := cost(line)) is not None]
    if not known:
        return
    points = [(x, y) for _, x, y in known]
    edge = frontier(points, share)
    axes.step([points[i][0] for i in edge], [points[i][1] for i in edge], where="post", color="C1", alpha=0.6,
              label="nothing is better and cheaper")
    axes.scatter(*zip(*points, strict=True), s=14, color="C0")
    for i, (entry, x, y) in enumerate(known):
        axes.annotate(entry, (x, y), xytext=(3, 3 if i % 2 else -8), textcoords="offset points", fontsize=7,
                      fontweight="bold" if i in edge else "normal")
    axes.legend(loc="lower right" if share else "upper right", fontsize=8)
