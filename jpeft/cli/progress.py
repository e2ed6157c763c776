"""What a person sees of a run while it goes on: a bar on a terminal, a line per evaluation elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jpeft.train.hooks import Hook

WINDOW = 50  # steps that the shown loss, accuracy and speed are the mean of


class ProgressBar(Hook):
    """A hook that shows loss, accuracy (of a classifier), examples or tokens per second and the time left.

    Args:
        console: where; it should be that of the standard error stream, so that results can be piped.
        monitor: the metric that an evaluation is judged by.
        tokens: of a step, on average, where speed is told in tokens.
        quiet: show evaluations in the bar alone.
    """

    def __init__(self, console: Console, monitor: str = "accuracy", tokens: float | None = None,
                 quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._classifies = monitor == "accuracy"
        self._metric = "accuracy" if monitor == "loss" else monitor  # the loss itself is shown anyway
        self._name = "acc" if self._metric == "accuracy" else self._metric
        self._tokens = tokens
        self._recent: deque[tuple[float, float, float, float]] = deque(maxlen=WINDOW)
        self._started = time.perf_counter()
        self._judged = ""
        self._bar = Progress(
            TextColumn("[bold]training"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TextColumn("{task.fields[judged]}", style="cyan"), TextColumn("left"), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=60)
        self._task: Any = None

    def start(self, total: int, at: int) -> None:
        """Show the bar, at the step that the run goes on from."""
        self._task = self._bar.add_task("", total=total, completed=at, shown=self._shown(), judged="")
        self._bar.start()
        self._total = total

    def step(self, n: int, metrics: Mapping[str, float], seconds: float, examples: int) -> None:
        """Move the bar."""
        if not metrics.get("skipped"):
            self._recent.append((metrics["loss"], metrics.get("correct", 0.0), examples, seconds))
        self._bar.update(self._task, completed=n, shown=self._shown())

    def evaluated(self, n: int, metrics: Mapping[str, float]) -> None:
        """Show an evaluation: in the bar, or as a line where there is none."""
        name, value = ("perplexity", f"{metrics['perplexity']:.3f}") if "perplexity" in metrics else (
            self._name, f"{metrics[self._metric]:.4f}")
        self._bar.update(self._task, judged=f"val {name} {value}")
        if self._quiet:
            return
        took = time.perf_counter() - self._started
        self._console.print(f"step {n}/{self._total}  {self._shown()}  validation loss {metrics['loss']:.4f}  {name} "
                            f"{value}  ({took:.0f} s)", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()

    def _shown(self) -> str:
        if not self._recent:
            return "loss -" + ("  acc -" if self._classifies else "")
        losses, correct, examples, seconds = (list(column) for column in zip(*self._recent, strict=True))
        count = max(sum(examples), 1)
        accuracy = f"  acc {sum(correct) / count:.3f}" if self._classifies else ""
        many, unit = (count, "ex/s") if self._tokens is None else (self._tokens * len(losses), "tok/s")
        return f"loss {sum(losses) / len(losses):.4f}{accuracy}  {many / max(sum(seconds), 1e-9):.0f} {unit}"


class StepTimes(Hook):
    """A hook that keeps the time of each step, in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.examples = 0

    def step(self, n: int, metrics: Mapping[str, float], seconds: float, examples: int) -> None:
        """Note a step."""
        self.seconds.append(seconds)
        self.examples += examples
