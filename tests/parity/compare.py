"""Results of both sides, their differences with paired bootstrap intervals, and the table that shows them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIDES = ("jpeft", "peft")
METHODS = ("lora", "full", "head")


@dataclasses.dataclass(frozen=True)
class Result:
    """One training run, as its JSON file says it.

    Attributes:
        side: one of `SIDES`.
        method: one of `METHODS`.
        seed: of the run.
        batches: hash of settings and training batches; runs of one seed must agree.
        tests: hash of the test examples; all runs must agree.
        correct: `[N]` of bool, which test examples the chosen parameters get right.
        trainable: number of trainable parameters.
        steps: number of training steps.
        step_ms: median time of a training step.
        train_s: wall time of training, with compilation and evaluations.
        peak_bytes: largest resident set of the process.
        growth_bytes: that of training, minus the resident set before the first step; None: not measured.
        about: versions and choices, for the reader; `steps_peak_bytes`: the peak after compilation.
    """

    side: str
    method: str
    seed: int
    batches: str
    tests: str
    correct: np.ndarray
    trainable: int
    steps: int
    step_ms: float
    train_s: float
    peak_bytes: int
    growth_bytes: int | None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def steps_bytes(self) -> int:
        """The largest resident set while steps were done."""
        return int(self.about.get("steps_peak_bytes", self.peak_bytes))

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


def write(path: Path, values: dict[str, Any]) -> None:
    """Write the JSON file of a result; `correct` may be any sequence of truth values."""
    known = {field.name for field in dataclasses.fields(Result)}
    if set(values) != known:
        raise ValueError(f"a result has the fields {sorted(known)}, found {sorted(values)}")
    correct = "".join("1" if one else "0" for one in values["correct"])
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps({**values, "correct": correct}, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def read(path: Path) -> Result:
    """Read a file that `write` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["correct"] = np.array([one == "1" for one in values["correct"]])
    return Result(**values)


def check(results: Sequence[Result]) -> None:
    """Raise ValueError if the results are not of one experiment: other examples, batches, steps or run twice."""
    if not results:
        raise ValueError("there are no results; run `yardstick.py run` first")
    if len({r.tests for r in results}) > 1 or len({len(r.correct) for r in results}) > 1:
        raise ValueError("the results are not of the same test examples: "
                         + ", ".join(f"{r.side} {r.method} seed {r.seed}: {r.tests}" for r in results))
    seen: dict[tuple[str, str, int], Result] = {}
    for r in results:
        if (r.side, r.method, r.seed) in seen:
            raise ValueError(f"two results of {r.side} {r.method} seed {r.seed}")
        seen[r.side, r.method, r.seed] = r
    for r in results:
        other = next(seen[s, m, r.seed] for s in SIDES for m in METHODS if (s, m, r.seed) in seen)
        if (r.batches, r.steps) != (other.batches, other.steps):
            raise ValueError(f"seed {r.seed}: {r.side} {r.method} and {other.side} {other.method} had other settings "
                             f"or batches ({r.steps} and {other.steps} steps)")


def table(results: Sequence[Result], resamples: int = 10_000) -> str:
    """Return the report: accuracies, differences with intervals, and cost as ratios."""
    from jpeft.train.bootstrap import gain  # the side that runs torch writes results where there is no JAX

    check(results)
    groups = {(s, m): [r for r in results if (r.side, r.method) == (s, m)] for s in SIDES for m in METHODS}
    groups = {name: found for name, found in groups.items() if found}
    methods = [m for m in METHODS if any(m == method for _, method in groups)]

    def rights(side: str, method: str) -> np.ndarray:
        return np.stack([r.correct for r in groups[side, method]])

    both = [m for m in methods if all((s, m) in groups for s in SIDES)]
    lines = [f"test accuracy in % on {len(results[0].correct)} examples, mean over seeds (each seed in brackets)"]
    for (side, method), found in groups.items():
        each = " ".join(f"{100 * r.accuracy:.2f}" for r in found)
        lines.append(f"  {method:5} {side:6} {100 * rights(side, method).mean():6.2f}  ({each})")
    lines += ["", "differences in points [95 % paired bootstrap interval, seeds averaged per example]"]
    lines += [f"  {m:5} jpeft - peft   {gain(rights('jpeft', m), rights('peft', m), resamples)}" for m in both]
    for side in SIDES:
        lines += [f"  {side:5} lora - {m}    {gain(rights(side, 'lora'), rights(side, m), resamples)}"
                  for m in methods if m != "lora" and (side, "lora") in groups and (side, m) in groups]
    lines += ["", "cost, median over seeds", f"  {'':5} {'':25} {'jpeft':>10} {'peft':>10} {'jpeft/peft':>10}"]
    for method in methods:
        for label, field, unit in _COSTS:
            lines.append(_cost(method, label, [groups.get((s, method), []) for s in SIDES], field, unit))
    return "\n".join(lines)


_COSTS = (("ms per step, median", "step_ms", 1.0), ("training in all, s", "train_s", 1.0),
          ("peak memory, MiB", "peak_bytes", 2.0**20), ("  after compilation, MiB", "steps_bytes", 2.0**20),
          ("growth in training, MiB", "growth_bytes", 2.0**20),
          ("trainable parameters", "trainable", 1.0))


def _cost(method: str, label: str, sides: Sequence[Sequence[Result]], field: str, unit: float) -> str:
    values = [[getattr(r, field) / unit for r in found if getattr(r, field) is not None] for found in sides]
    middle = [float(np.median(found)) if found else None for found in values]
    shown = [" " * 9 + "-" if v is None else f"{v:10,.0f}" if field == "trainable" else f"{v:10,.1f}" for v in middle]
    ours, theirs = middle
    ratio = " " * 9 + "-" if ours is None or not theirs else f"{ours / theirs:10.3f}"
    return f"  {method:5} {label:25} {' '.join([*shown, ratio])}"
