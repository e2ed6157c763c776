"""One run after the other: models and rows are read once, programs are compiled once for all seeds of an entry."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from jpeft.cli import build, runs, tasks
from jpeft.cli.board import results
from jpeft.cli.board.claims import claim
from jpeft.cli.board.config import Board, Run, key
from jpeft.cli.board.results import Result
from jpeft.cli.build import Adapted, Loaded, Training
from jpeft.cli.config import JobConfig
from jpeft.cli.job import Compiled
from jpeft.cli.progress import ProgressBar, StepTimes
from jpeft.cli.rules import places, to_methods
from jpeft.core import store
from jpeft.core.plan import Plan
from jpeft.data.pipeline import stream
from jpeft.errors import JpeftError
from jpeft.train.loop import fit

Say = Callable[[str], None]
VERSIONS = ("jax", "jaxlib", "optax", "numpy")


class Outcome(NamedTuple):
    """How a session of a board ended.

    Attributes:
        found: all results that there are now.
        left: runs that were asked for and are not done.
        failed: those of them that raised an error, and what it said.
        interrupted: whether a signal ended it.
    """

    found: dict[Run, Result]
    left: list[Run]
    failed: dict[Run, str]
    interrupted: bool = False


class _Ready(NamedTuple):
    """What the seeds of one entry on one task share."""

    plan: Plan
    start: Training
    compiled: Compiled
    adapter_bytes: int


class Bench:
    """Models and rows by what they were read with, and the programs of the entry that is at work."""

    def __init__(self, board: Board, console: Console) -> None:
        """Begin with nothing read."""
        self._board, self._console = board, console
        self._models: dict[str, Loaded] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._ready: tuple[tuple[str, str], _Ready] | None = None

    def run(self, run: Run, command: str) -> Result | None:
        """Do one run; None: a signal interrupted it.

        Raises:
            JpeftError: something does not fit, or training diverges.
        """
        job = self._board.jobs[run]
        loaded = self._load(job)
        data = self._data(job, loaded)
        ready, start = self._prepare(run, loaded, data)
        task, made = loaded.task, build.batches(job, data["train"], shuffle=True)
        held = build.batches(job, data["validation"])
        times, rows = StepTimes(), stream(made)
        best: dict[str, Any] = {}
        begin = time.perf_counter()
        try:
            fitted = fit(
                ready.compiled, start.state, start.frozen, rows, total_steps=start.total_steps,
                eval_every=job.train.eval_every or len(made),
                evaluate=lambda trainable: task.evaluate(loaded, start.apply, trainable, start.frozen,
                                                         build.once(held)),
                on_best=lambda trainable, metrics, n: best.update(theta=jax.tree.map(jnp.copy, trainable)),
                hooks=(ProgressBar(self._console, task.monitor, quiet=True), times),
                monitor=task.monitor, mode=task.mode, data_timeout=job.train.data_timeout)
        finally:
            rows.close()
        seconds = time.perf_counter() - begin
        if fitted.stopped == "interrupted" or fitted.best is None:
            return None
        tested = task.test(Adapted(loaded, ready.plan, best["theta"], start.frozen, start.apply), data["test"], False)
        steady, now = times.seconds[1:], datetime.datetime.now(datetime.UTC)
        return Result(
            *run, key(job), runs.describe(job.rules), job.train.learning_rate or 0.0, tested.after,
            fitted.best.metrics, fitted.best.step, start.total_steps,
            "" if tested.hits is None else results.pack(tested.hits), 0 if tested.hits is None else len(tested.hits),
            ready.plan.count(), sum(int(x.size) for x in jax.tree.leaves(loaded.params)), ready.adapter_bytes,
            ready.compiled.temp_bytes, 1000 * statistics.median(steady) if steady else None, seconds,
            ready.compiled.seconds, now.isoformat(timespec="seconds"), _about(), command)

    def notes(self, run: Run) -> list[str]:
        """Return what a reader must know of the rows of a task that has been run."""
        job = self._board.jobs[run]
        loaded = self._load(job)
        data = self._data(job, loaded)
        return loaded.task.told(job, data, build.batches(job, data["train"], shuffle=True))

    def _load(self, job: JobConfig) -> Loaded:
        """Return the model; a new head depends on the classes and the seed, places in it on the methods."""
        shared = [job.model.model_dump(), job.data.model_dump(), places(to_methods(job.rules))]
        said = json.dumps([shared, job.seed], sort_keys=True)
        if said not in self._models:
            if not any(json.loads(other)[0] == json.loads(said)[0] for other in self._models):
                self._models.clear()
            self._models[said] = build.load_model(job)
        return dataclasses.replace(self._models[said], config=job)

    def _data(self, job: JobConfig, loaded: Loaded) -> dict[str, Any]:
        said = json.dumps([job.model.model_dump(), job.data.model_dump()], sort_keys=True)
        if said not in self._rows:
            self._rows = {said: build.load_data(job, loaded.tokenizer)}
        return self._rows[said]

    def _prepare(self, run: Run, loaded: Loaded, data: dict[str, Any]) -> tuple[_Ready, Training]:
        """Compile the programs of an entry, or begin anew with those that there are."""
        home = (run.task, run.entry)
        made = build.batches(loaded.config, data["train"], shuffle=True)
        if self._ready is not None and self._ready[0] == home:
            ready = self._ready[1]
            return ready, ready.start.again(loaded, ready.plan, made)
        self._ready = None
        jax.clear_caches()
        start = build.training(loaded, made)
        compiled = Compiled(start.step, start.state, start.frozen, made)
        ready = _Ready(loaded.plan, start, compiled, _size(loaded.plan, start))
        self._ready = (home, ready)
        return ready, start


def session(board: Board, wanted: Sequence[Run], command: str, say: Say, console: Console,
            minutes: float | None = None, again: bool = False) -> Outcome:
    """Do the runs that have no result yet, and write each result when it is there.

    Other sessions may share the file of results: none undoes what another has added, and each works on other entries.

    Args:
        board: the board.
        wanted: which runs.
        command: the command line, for the results.
        say: prints a line of the report.
        console: for the progress.
        minutes: begin no run after this many; 0: none, and results of another configuration are no error.
        again: do those again whose results are of another configuration.

    Raises:
        ReportError: the file of results is damaged or cannot be written.
        RunError: results are of another configuration, and `again` is not set.
    """
    found = results.read(board.results)
    if minutes == 0:
        return Outcome(found, [run for run in wanted if run not in found], {})
    todo = results.missing(board, found, wanted, again)
    begun, bench, failed, told = time.monotonic(), Bench(board, console), {}, set()
    left = list(todo)
    for number, run in enumerate(todo, 1):
        if minutes is not None and time.monotonic() - begun >= 60 * minutes:
            break
        with claim(board.results, run) as mine:
            if not mine:
                say(f"{number}/{len(todo)}  {run}: another session is at work on this entry")
                continue
            found = results.read(board.results)
            if not results.missing(board, found, [run], again=True):
                left.remove(run)
                say(f"{number}/{len(todo)}  {run}: another session has done it")
                continue
            try:
                if run.task not in told:
                    told.add(run.task)
                    say("\n".join([f"task {run.task}", *bench.notes(run)]))
                made = bench.run(run, command)
            except JpeftError as error:
                failed[run] = " ".join(str(error).split())
                say(f"{number}/{len(todo)}  {run}: failed: {failed[run]}")
                continue
            if made is None:
                return Outcome(found, left, failed, interrupted=True)
            found = results.add(board.results, board.jobs, made)
            left.remove(run)
            say(f"{number}/{len(todo)}  {run}: {_headline(board, made)}, {made.seconds:.0f} s")
    return Outcome(found, left, failed)


def _headline(board: Board, made: Result) -> str:
    task = tasks.of(board.jobs[made.run])
    return f"{task.headline(made.test)} (validation: {task.headline(made.validation)})"


def _size(plan: Plan, start: Training) -> int:
    """Return the bytes of the adapter's file."""
    with tempfile.TemporaryDirectory() as folder:
        store.save(folder, plan, start.state.trainable, start.frozen)
        return (Path(folder) / "adapter.safetensors").stat().st_size


def _about() -> dict[str, str]:
    return {"jpeft": sys.modules["jpeft"].__version__, "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in VERSIONS}, "device": jax.devices()[0].device_kind}
