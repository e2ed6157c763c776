"""The table of a board: means over seeds, and the difference to the reference with its interval."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from jpeft.cli import tables
from jpeft.cli.board.config import Board, Run
from jpeft.cli.board.results import Result
from jpeft.errors import RunError
from jpeft.train.bootstrap import Gain, gain

# The metric that a task is judged by is the first of these that its test has.
METRICS: Mapping[str, tuple[str, bool]] = {  # name -> head of its column, and whether it is a share
    "f1": ("F1", True), "recall_at_1": ("recall@1", True),
    "accuracy": ("test accuracy", True), "exact_match": ("exact match", True), "perplexity": ("perplexity", False)}
SMALL, NEAR = 2.0, 0.01  # percent of the parameters; difference to the reference


@dataclasses.dataclass(frozen=True)
class Line:
    """One entry on one task, over its seeds.

    Attributes:
        entry: its name.
        runs: its results, by seed.
        metric: name of what it is judged by.
        gain: the difference to the reference; None: it is the reference, or nothing is right or wrong.
    """

    entry: str
    runs: tuple[Result, ...]
    metric: str
    gain: Gain | None

    @property
    def values(self) -> list[float]:
        """The metric of each seed."""
        return [one.test[self.metric] for one in self.runs]

    @property
    def mean(self) -> float:
        """Mean of the metric over seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Its standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def step(self) -> float | None:
        """Median over seeds of the milliseconds of a step."""
        known = [one.ms_per_step for one in self.runs if one.ms_per_step is not None]
        return statistics.median(known) if known else None


def lines(board: Board, found: Mapping[Run, Result], task: str) -> list[Line]:
    """Return the entries of a task that have results, the best first.

    Raises:
        RunError: results of one task were tested on different numbers of rows.
    """
    groups = {entry: tuple(found[run] for run in board.jobs if run.task == task and run.entry == entry and run in found)
              for entry in board.config.entries}
    groups = {entry: some for entry, some in groups.items() if some}
    everything = [one for some in groups.values() for one in some]
    if not everything:
        return []
    if len({one.rows for one in everything}) > 1:
        raise RunError(f"the results of {task} in {board.results} are of other test rows; remove the old ones")
    metric = next(name for name in METRICS if name in everything[0].test)
    base = {one.seed: _right(one) for one in groups.get(board.config.reference, ()) if one.rows}
    made = []
    for entry, some in groups.items():
        both = [one for one in some if one.seed in base and entry != board.config.reference]
        other = None
        if both:
            other = gain(np.stack([_right(one) for one in both]), np.stack([base[one.seed] for one in both]))
        made.append(Line(entry, some, metric, other))
    return sorted(made, key=lambda line: line.mean, reverse=METRICS[metric][1])


def small(board: Board, made: Sequence[Line]) -> list[str]:
    """Return the entries that train few parameters and are as good as the reference or nearly so."""
    return [line.entry for line in made if line.gain is not None and line.gain.mean >= -NEAR
            and line.runs[0].percent < SMALL]


def markdown(board: Board, found: Mapping[Run, Result], notes: Sequence[str] = ()) -> str:
    """Return the whole board: a section and a table for each task that has results."""
    used = [found[run] for run in board.jobs if run in found]
    dates = sorted(one.date[:10] for one in used)
    text = [f"# {board.name}", ""]
    if used:
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        about = sorted({", ".join(f"{name} {value}" for name, value in one.about.items()) for one in used})
        text += [f"`{used[-1].command}`, {when}; {'; '.join(about)}.", ""]
    for task in board.config.tasks:
        text += section(board, found, task)
    text += [f"- {note}" for note in notes]
    if board.config.without:
        text += ["Without an entry: " + "; ".join(f"{name}: {why}" for name, why in board.config.without.items()), ""]
    return "\n".join(text).rstrip("\n") + "\n"


def section(board: Board, found: Mapping[Run, Result], task: str) -> list[str]:
    """Return the lines of one task."""
    made = lines(board, found, task)
    if not made:
        return []
    name, share = METRICS[made[0].metric]
    reference = board.config.reference
    head = ("entry", "what trains", "lr", f"{name}, mean", "sd", "seeds", f"minus {reference} [95 %]", "trainable", "%",
            "adapter", "ms/step", "temporaries")
    rows = [[line.entry, line.runs[0].methods, f"{line.runs[0].learning_rate:g}", _number(line.mean, share),
             "-" if line.deviation is None else _number(line.deviation, share), str(len(line.runs)),
             "-" if line.gain is None else str(line.gain), f"{line.runs[0].trainable:,}",
             f"{line.runs[0].percent:.3f}", tables.size(line.runs[0].adapter_bytes),
             "-" if line.step is None else f"{line.step:.0f}", tables.size(line.runs[0].temp_bytes)] for line in made]
    said = [f"## {task}", ""]
    rows_said = f"{made[0].runs[0].rows:,} test rows; " if made[0].runs[0].rows else ""
    unit = "in percent" if share else "lower is better"
    said += [f"{rows_said}{name} {unit}, mean and standard deviation over seeds; differences in points over the seeds "
             "that both have, with the 95 % interval of a paired bootstrap over the test rows.", "",
             tables.markdown(head, rows, left=2), ""]
    if any(line.gain is not None for line in made):
        near = small(board, made)
        said += [f"Within {100 * NEAR:g} point of {reference} or above it, with less than {SMALL:g} % of all: "
                 f"{len(near)} ({', '.join(near) or 'none'}).", ""]
    return said


def _right(result: Result) -> np.ndarray:
    found = result.right
    assert found is not None
    return found


def _number(value: float, share: bool) -> str:
    return f"{100 * value:.2f}" if share else f"{value:.3f}"
