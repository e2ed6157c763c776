"""The loop around a training step: evaluate, save, stop at once where going on would do harm, resume bit by bit."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np

from jpeft.core import hosts
from jpeft.errors import (
    BatchesError,
    CheckpointOrderError,
    CheckpointWriteError,
    NonFiniteLossError,
    TrainConfigError,
    nearest,
)
from jpeft.train.checkpoint import Checkpoints
from jpeft.train.hooks import Hooks
from jpeft.train.scaling import LEAST
from jpeft.train.stall import fetch
from jpeft.train.state import TrainState
from jpeft.train.step import Step

Row = dict[str, Any]
SKIPS = 20  # steps that may be skipped in a row, for gradients that are not finite
_EARLY = "early"


class Best(NamedTuple):
    """The best evaluation: after which step, and all its metrics."""

    step: int
    metrics: dict[str, float]


class FitResult(NamedTuple):
    """How a run ended.

    Attributes:
        state: after the last step that was done.
        best: the best evaluation, those before a resume included; None without evaluations.
        history: the rows of this process, as in metrics.jsonl: one per step, one per evaluation.
        stopped: "finished", "early" where evaluations no longer got better, or "interrupted" by a signal.
        message: one line: where it stopped, what is saved and how to go on.
    """

    state: TrainState
    best: Best | None
    history: list[Row]
    stopped: Literal["finished", "early", "interrupted"]
    message: str


class Batches(Protocol):
    """An endless iterator of batches that knows where it stands; `get_state` returns JSON data."""

    def __next__(self) -> Any: ...
    def get_state(self) -> Any: ...


def fit(
    step: Step, state: TrainState, frozen: Any, batches: Batches | Iterator[Any], *, total_steps: int,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None, eval_every: int | None = None,
    save_every: int | None = None, checkpoints: Checkpoints | None = None,
    on_best: Callable[[Any, dict[str, float], int], None] | None = None, hooks: Sequence[Any] = (),
    monitor: str = "accuracy", mode: Literal["max", "min"] = "max", patience: int | None = None,
    data_timeout: float | None = None,
) -> FitResult:
    """Train up to step `total_steps`; evaluations and checkpoints come at fixed steps and after the last.

    To resume, restore a checkpoint and hand on what it holds; the run then does exactly what it would have done:

        restored = checkpoints.restore(state)
        if restored is not None:
            batches.set_state(restored.data_position)
            state = restored.state
        fit(step, state, frozen, batches, checkpoints=checkpoints, ...)

    A checkpoint is written in a thread, while the training goes on; the next one and the end of the run wait for it.
    SIGINT (Ctrl-C) and SIGTERM let the step finish, save, and return `stopped="interrupted"`; a second one acts as if
    there were no loop. Where several processes train together, one of them that is told to stop tells the others, and
    all stop after the same step.

    Args:
        step: from `make_train_step` or `compiled_step`, compiled.
        state: where to begin; `state.step` says at which step. It may be donated: use `result.state` from then on.
        frozen: what the step needs besides.
        batches: an iterator, with `get_state()` if there are checkpoints.
        total_steps: number of the last step.
        evaluate: `trainable -> metrics`.
        eval_every: steps between evaluations; None: only after the last.
        save_every: steps between checkpoints; None: only after the last.
        checkpoints: where to save; None: nowhere.
        on_best: `(trainable, metrics, step)`, called when an evaluation is better than all before. It must be done with
            `trainable` when it returns.
        hooks: see `jpeft.train.hooks.Hook`.
        monitor: the metric of `evaluate` that says which evaluation is best.
        mode: "max" or "min": whether more of it or less is better.
        patience: stop after so many evaluations in a row none of which is better than the best; None: never.
        data_timeout: seconds that a batch may take to come; None: any time.

    Raises:
        NonFiniteLossError: a loss, a gradient norm or an evaluation is NaN or infinite. Nothing of it is saved. With a
            loss scale: after 20 steps in a row that were skipped for that, or one at the smallest scale.
        BatchesError: the batches end too early, do not come in time, or cannot say where they stand.
        CheckpointOrderError: the folder of checkpoints holds another step than the state is at.
        CheckpointWriteError: a checkpoint cannot be written.
        TrainConfigError: an argument makes no sense.

    Example:
        >>> import itertools, jax, jax.numpy as jnp, optax
        >>> from jpeft.train.state import create
        >>> from jpeft.train.step import compiled_step
        >>> tx = optax.sgd(0.1)
        >>> step = compiled_step(lambda t, frozen, batch, key: (jnp.sum((t["w"] - batch) ** 2), {}), tx)
        >>> state = create({"w": jnp.zeros(2)}, tx, jax.random.key(0))
        >>> result = fit(step, state, None, itertools.repeat(jnp.ones(2)), total_steps=50)
        >>> result.stopped, int(result.state.step), round(float(result.state.trainable["w"][0]), 3)
        ('finished', 50, 1.0)
    """
    at = int(state.step)
    _check(at, total_steps, {"eval_every": eval_every, "save_every": save_every, "patience": patience,
                             "data_timeout": data_timeout}, mode, checkpoints, batches)
    if patience is not None and evaluate is None:
        raise TrainConfigError(f"patience = {patience} evaluations and there is no evaluate; pass it, or drop patience")
    run = _Run(Hooks(hooks), checkpoints, monitor, mode, patience)
    late: _Late | None = None
    stop, n = run.tired(), at
    try:
        with _Signals() as signals:
            run.hooks.tell("start", total_steps, at)
            for n in range(at + 1, at + 1 if stop else total_steps + 1):
                batch = _next(batches, n, total_steps, data_timeout)
                state, metrics = step(state, frozen, batch)
                if late is not None:
                    run.report(late)
                late = _Late(n, metrics, _rows(batch))
                judging, saving = _due(n, eval_every, total_steps), _due(n, save_every, total_steps)
                agreed = "SIGTERM" if hosts.stops(n) else None
                if not (judging or saving or signals.caught or agreed):
                    continue
                run.report(late)
                late = None
                if judging and evaluate is not None:
                    run.judge(n, evaluate(state.evaluated), state.evaluated, on_best)
                stop = agreed or signals.caught or run.tired()
                if saving or stop:
                    run.save(n, state, batches)
                if stop:
                    break
            run.settle()
            result = run.result(state, n, total_steps, stop)
            run.hooks.tell("end", result)
            return result
    except BaseException as error:
        run.abandon(error)
        raise
    finally:
        run.hooks.tell("close")


class _Late(NamedTuple):
    """A step whose metrics are still on the device: its number, they, and how many rows the batch had."""

    n: int
    metrics: Mapping[str, jax.Array]
    rows: int | None


class _Run:
    """What a run knows besides the state."""

    def __init__(self, hooks: Hooks, checkpoints: Checkpoints | None, monitor: str, mode: str,
                 patience: int | None) -> None:
        self.hooks, self.checkpoints, self.monitor, self.mode = hooks, checkpoints, monitor, mode
        self.patience, self._skips = patience, 0
        held = checkpoints.extra if checkpoints is not None else {}
        kept = held.get("best")
        self.best = Best(kept["step"], kept["metrics"]) if kept else None
        self._worse = int(held.get("worse", 0))
        self.history: list[Row] = []
        self._writing: int | None = None
        self._clock = time.perf_counter()

    def report(self, late: _Late) -> None:
        """Fetch the metrics of a step, which waits for it, check them and pass them on."""
        n, metrics, rows = late
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values.get("skipped"):
            self._skip(n, values["loss_scale"])
        else:
            self._skips = 0
            self._check_finite(n, {name: values[name] for name in ("loss", "grad_norm") if name in values}, "after")
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self.history.append({"step": n, **values})
        self.hooks.tell("step", n, values, seconds, int(values.get("count", rows or 0)))

    def judge(self, n: int, found: Mapping[str, float], trainable: Any, on_best: Any) -> None:
        """Record an evaluation and see whether it is the best."""
        metrics = {name: float(value) for name, value in found.items()}
        if self.monitor not in metrics:
            raise TrainConfigError(
                f"evaluate returned no metric {self.monitor!r} ({nearest(self.monitor, metrics)}); set monitor to one")
        self._check_finite(n, metrics, "in the evaluation after")
        self.history.append({"step": n, **{f"eval/{name}": value for name, value in metrics.items()}})
        self.hooks.tell("evaluated", n, metrics)
        sign = 1 if self.mode == "max" else -1
        if self.best is None or sign * metrics[self.monitor] > sign * self.best.metrics[self.monitor]:
            if on_best is not None:
                on_best(trainable, metrics, n)
            self.best, self._worse = Best(n, metrics), 0
        else:
            self._worse += 1
        self._clock = time.perf_counter()

    def tired(self) -> str | None:
        """Say whether too many evaluations were no better than the best."""
        return _EARLY if self.patience is not None and self._worse >= self.patience else None

    def save(self, n: int, state: TrainState, batches: Any) -> None:
        """Begin to write a checkpoint, where there is a place for it; the training goes on meanwhile."""
        if self.checkpoints is None:
            return
        self.settle()
        self.hooks.tell("saving", n)
        best = None if self.best is None else self.best._asdict()
        self.checkpoints.save(n, state, batches.get_state(), {"best": best, "worse": self._worse},
                              wait=False)
        self._writing = n
        self._clock = time.perf_counter()

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is complete, and say so."""
        n, self._writing = self._writing, None
        if self.checkpoints is not None and n is not None:
            self.checkpoints.wait()
            self.hooks.tell("saved", n)

    def abandon(self, error: BaseException) -> None:
        """Let what is being written end before the run does; a second error goes with the first."""
        try:
            if self.checkpoints is not None:
                self.checkpoints.wait()
        except CheckpointWriteError as late:
            error.add_note(str(late))

    def result(self, state: TrainState, n: int, total: int, stop: str | None) -> FitResult:
        """Return the result, with one line that says how the run ended."""
        where = None if self.checkpoints is None else self.checkpoints.folder
        if stop is None or n == total:
            text = f"finished {total} steps" + ("" if where is None else f"; the last checkpoint is in {where}")
            return FitResult(state, self.best, self.history, "finished", text)
        if stop == _EARLY and self.best is not None:
            text = (f"stopped early after step {n} of {total}: {self.monitor} has not got better in {self._worse} "
                    f"evaluations since step {self.best.step}")
            return FitResult(state, self.best, self.history, "early", text)
        saved = "and nothing is saved; pass checkpoints" if where is None else f"saved in {where}; resume to go on"
        text = f"stopped by {stop} after step {n} of {total}, {saved}"
        return FitResult(state, self.best, self.history, "interrupted", text)

    def _skip(self, n: int, scale: float) -> None:
        """Count a step that was skipped; raise where it goes on like this."""
        self._skips += 1
        if self._skips >= SKIPS or scale <= LEAST:
            raise NonFiniteLossError(
                f"the gradients are not finite after step {n}, {self._skips} in a row, the last with a loss scale of "
                f"{scale:g}; compute in bfloat16 or float32, lower the learning rate or warm up longer; {self._left()}")

    def _check_finite(self, n: int, values: Mapping[str, float], when: str) -> None:
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if bad:
            said = " and ".join(f"{name} is {value}" for name, value in bad.items())
            raise NonFiniteLossError(f"{said} {when} step {n}; lower the learning rate, warm up longer or clip the "
                                     f"gradients; {self._left()}")

    def _left(self) -> str:
        kept = None if self.checkpoints is None else self.checkpoints.latest()
        return "there is no checkpoint" if self.checkpoints is None or kept is None else (
            f"the last good checkpoint, of step {kept}, is in {self.checkpoints.folder}")


class _Signals:
    """Catch the first SIGINT or SIGTERM; the second does what it would have done."""

    def __init__(self) -> None:
        self.caught: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            # Among several processes SIGTERM is heard by JAX, which tells the others.
            for number in (signal.SIGINT,) if hosts.several() else (signal.SIGINT, signal.SIGTERM):
                # A process that runs under nohup, or whose caller has its own way, keeps it.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if hosts.several():
            signal.raise_signal(signal.SIGTERM)
        else:
            self.caught = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


def _check(
    at: int, total: int, counts: Mapping[str, float | None], mode: str, checkpoints: Checkpoints | None, batches: Any,
) -> None:
    for name, value in {"total_steps": total, **counts}.items():
        least = 1 if name != "data_timeout" else 0
        if value is not None and (value < least or value == 0):
            raise TrainConfigError(f"{name} = {value} must be {'1 or more' if least else 'above 0'}")
    if mode not in ("max", "min"):
        raise TrainConfigError(f"mode = {mode!r} must be 'max' or 'min'")
    if at > total:
        raise TrainConfigError(f"the state is at step {at}, beyond total_steps = {total}; raise it")
    if checkpoints is None:
        return
    newest = checkpoints.latest()
    if newest is not None and newest != at:
        raise CheckpointOrderError(
            f"{checkpoints.folder} holds a checkpoint of step {newest} and this run is at step {at}; resume from it, "
            "or use another folder")
    if not hasattr(batches, "get_state"):
        raise BatchesError(
            f"{type(batches).__name__} has no get_state(), so its position cannot be saved; use the stream of "
            "jpeft.data, or train without checkpoints")


def _due(n: int, every: int | None, total: int) -> bool:
    return n == total or (every is not None and n % every == 0)


def _next(batches: Any, n: int, total: int, seconds: float | None) -> Any:
    try:
        return next(batches) if seconds is None else fetch(batches, seconds)
    except StopIteration as error:
        raise BatchesError(f"the batches end before step {n} of {total}; give an endless stream") from error


def _rows(batch: Any) -> int | None:
    """Return the length of the first axis of a batch's first array."""
    leaves = jax.tree_util.tree_leaves(batch)
    return int(np.shape(leaves[0])[0]) if leaves and np.ndim(leaves[0]) else None
