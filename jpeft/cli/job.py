"""`jpeft train`: build all of it, and only then write; train; test the best adapter; sum up."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jpeft.cli import build, meshes, runs, tasks, trackers
from jpeft.cli.build import Loaded, Training
from jpeft.cli.config import JobConfig
from jpeft.cli.progress import StepTimes
from jpeft.cli.runs import RunSummary
from jpeft.cli.tasks.base import Adapted, Tested
from jpeft.core import files, hosts, store, transform
from jpeft.core.explain import explain
from jpeft.core.identity import fingerprint
from jpeft.core.sharding import mesh_of
from jpeft.data.epochs import Epochs
from jpeft.data.pipeline import stream
from jpeft.errors import JpeftError, NonFiniteLossError, RunError, UncountedError
from jpeft.interop.pretrained import save_pretrained
from jpeft.train import chips, report
from jpeft.train.checkpoint import Checkpoints
from jpeft.train.hlo import count_text
from jpeft.train.loop import FitResult, fit
from jpeft.train.sharding import put_batch

Say = Callable[[str], None]


class Compiled:
    """A training step, compiled ahead for every width, so that no step of the run waits for it.

    Attributes:
        seconds: what compiling took.
        temp_bytes: what the largest program needs besides its inputs and outputs.
        flops: products of a step on all devices together, on average; None if they cannot be counted.
    """

    def __init__(self, step: Any, state: Any, frozen: Any, made: Epochs, debug_nans: bool = False) -> None:
        """Compile `step` for one batch of each width of `made`; on a mesh, batches go where `batch_shardings` says."""
        begin = time.perf_counter()
        self._mesh = mesh_of(state)
        first = {width: i for i, (_, width) in reversed(list(enumerate(made.epoch(0))))}
        # One after the other: each compiles on several threads anyway, and all at once need far more memory.
        lowered = {width: step.lower(state, frozen, self._put(made.make(0, i))) for width, i in first.items()}
        self._programs = {width: program.compile() for width, program in lowered.items()}
        self._jitted = step if debug_nans else None  # only this is run again, operation by operation, after a NaN
        self.flops = _flops(lowered, made)
        self.temp_bytes = max(p.memory_analysis().temp_size_in_bytes for p in self._programs.values())
        self.seconds = time.perf_counter() - begin

    def __call__(self, state: Any, frozen: Any, batch: Any) -> Any:
        """Run the program of the batch's width."""
        run = self._jitted or self._programs[batch["tokens"].shape[-1]]
        return run(state, frozen, self._put(batch))

    def _put(self, batch: Any) -> Any:
        return batch if self._mesh is None else put_batch(batch, self._mesh)


def _flops(lowered: Mapping[int, Any], made: Epochs) -> float | None:
    """Return the products of a step as JAX hands it to the compiler, on average over an epoch."""
    try:
        of = {width: count_text(program.as_text(dialect="hlo")).total for width, program in lowered.items()}
    except UncountedError:
        return None
    return statistics.fmean(of[width] for _, width in made.epoch(0))


def run(job: JobConfig, command: str, resume: bool, say: Say, console: Console) -> RunSummary | str:
    """Train a job in its folder; where several processes run it, the first one prints and writes.

    Args:
        job: the job.
        command: the command line that began it, for the folder.
        resume: go on with the run that is there, if one is.
        say: prints a line of the report.
        console: for the progress.

    Returns:
        The summary; a sentence instead if the run was interrupted.

    Raises:
        JpeftError: something does not fit; before the first step nothing has been written.
    """
    with meshes.used(job.mesh) as mesh, meshes.together():
        return _run(job, command, resume, say, console, mesh)


def _run(job: JobConfig, command: str, resume: bool, say: Say, console: Console,
         mesh: Mesh | None) -> RunSummary | str:
    going_on = runs.check(job, resume)
    done = runs.summary(job.folder) if going_on else None
    if done is not None:
        say(f"{job.folder} is finished already")
        return done
    loaded = build.load_model(job)
    plan = loaded.plan
    data = build.load_data(job, loaded.tokenizer)
    made = build.batches(job, data["train"], shuffle=True)
    start, more = build.training(loaded, made), trackers.of(job) if hosts.first() else []
    say(str(explain(plan, shardings=meshes.places(job.mesh, plan, loaded.params))))
    where = () if mesh is None else meshes.told(mesh, loaded.params, start.state, start.frozen)
    for note in (*loaded.model.notes, *loaded.task.told(job, data, made), *start.notes, *where):
        say(note)
    with console.status(f"compiling for batches of {', '.join(map(str, made.widths))} tokens"):
        compiled = Compiled(start.step, start.state, start.frozen, made, job.train.debug_nans)
    hosts.wait("all processes have looked at the folder")
    if not going_on and hosts.first():
        runs.begin(job, command)
    try:
        with jax.debug_nans(job.train.debug_nans):
            return _train(loaded, start, compiled, made, data, say, console, more)
    except FloatingPointError as error:
        raise NonFiniteLossError(f"train.debug_nans: {' '.join(str(error).split())[:200]}; see where with "
                                 "jpeft --traceback") from error
    except OSError as error:
        if isinstance(error, JpeftError):
            raise
        raise RunError(f"{job.folder} cannot be written ({error.strerror or error}); free space, then continue with "
                       "--resume") from error


def _train(loaded: Loaded, start: Training, compiled: Compiled, made: Epochs, data: dict[str, Any], say: Say,
           console: Console, more: Sequence[Any]) -> RunSummary | str:
    job, plan, state, frozen, task = loaded.config, loaded.plan, start.state, start.frozen, loaded.task
    t, folder = job.train, job.folder
    checkpoints = Checkpoints(folder / runs.CHECKPOINTS, keep=t.keep, base=fingerprint(loaded.params),
                              config_hash=job.hash())
    rows = stream(made)
    restored = checkpoints.restore(state)
    notes: tuple[str, ...] = ()
    if restored is not None:
        rows.set_state(restored.data_position)
        state = restored.state
        notes = (*restored.notes, f"resumed after step {restored.step}; times are those of the steps since",
                 *meshes.moved(runs.read(folder).mesh, job.mesh))
        say("\n".join(notes))
    held = build.batches(job, data["validation"])
    every = t.eval_every or len(made)
    times = StepTimes()
    tokens = None if task.monitor == "accuracy" else made.per_batch()
    begin = time.perf_counter()
    try:
        result = fit(
            compiled, state, frozen, rows, total_steps=start.total_steps, eval_every=every,
            save_every=t.save_every or every, checkpoints=checkpoints,
            evaluate=lambda trainable: task.evaluate(loaded, start.apply, trainable, frozen, build.once(held)),
            on_best=lambda trainable, _, n: store.save(folder / runs.ADAPTER, plan, trainable, frozen),
            hooks=(*(trackers.own(job, console, task.monitor, tokens) if hosts.first() else ()), *more, times),
            monitor=task.monitor, mode=task.mode, patience=t.patience, data_timeout=t.data_timeout)
    finally:
        rows.close()
    seconds = time.perf_counter() - begin
    if hosts.first():
        report.plot(folder / runs.METRICS, folder / runs.PLOT)
    if result.stopped == "interrupted":
        return result.message
    if result.stopped == "early":
        notes = (*notes, result.message)
    if skipped := 0 if result.state.scale is None else int(result.state.scale.skipped):
        notes = (*notes, f"{skipped} of {int(result.state.step)} steps were skipped, as their float16 gradients were "
                         "not finite")
    best = build.load_adapter(loaded, folder / runs.ADAPTER, start.apply)
    with console.status("testing"):
        test = task.test(best, data["test"], compare=True)
    if test.samples and hosts.first():
        files.write(folder / runs.SAMPLES, test.samples.encode())
    if isinstance(job.model.source, dict):
        write_model(best, folder / runs.MODEL)
    found = _summary(loaded, start, compiled, result, times, seconds, test, notes, made)
    if hosts.first():
        found.write(folder / runs.SUMMARY)
    return found


def write_model(adapted: Adapted, folder: Path) -> None:
    """Write model and adapter as one plain Hugging Face folder."""
    params = transform.merge(adapted.plan, adapted.trainable, adapted.frozen)
    loaded = adapted.loaded
    if hosts.several():
        params = jax.tree.map(hosts.whole, params)
    if hosts.first():
        save_pretrained(folder, loaded.model, params, loaded.tokenizer, labels=loaded.task.names(loaded.config))


def _summary(loaded: Loaded, start: Training, compiled: Compiled, result: FitResult, times: StepTimes, seconds: float,
             test: Tested, notes: tuple[str, ...], made: Epochs) -> RunSummary:
    job = loaded.config
    short = report.summarise(result, start.total_steps, base=loaded.params, seconds=seconds, examples=times.examples,
                             notes=(*notes, *test.notes))
    fields: dict[str, Any] = {
        **{f.name: getattr(short, f.name) for f in dataclasses.fields(short)},
        "trainable_parameters": loaded.plan.count()}
    # A step is reported when the one after it has begun: the first time of a run holds two of them.
    steady = times.seconds[1:] or times.seconds
    median = statistics.median(steady) if steady else None
    device = jax.devices()[0].device_kind
    chip, devices = chips.of_kind(device), 1 if job.mesh is None else math.prod(job.mesh.axes.values())
    mfu = None if chip is None or median is None or compiled.flops is None else (
        compiled.flops / (median * devices * chips.CHIPS[chip].flops))
    return RunSummary(
        **fields, name=str(job.name), methods=runs.describe(job.rules), learning_rate=job.train.learning_rate or 0.0,
        task=tasks.name(job), test=test.after, before=test.before, baseline=test.baseline,
        adapter_bytes=(job.folder / runs.ADAPTER / "adapter.safetensors").stat().st_size,
        model_bytes=sum(int(np.asarray(x.nbytes)) for x in jax.tree.leaves(loaded.params)),
        ms_per_step=None if median is None else 1000 * median, temp_bytes=compiled.temp_bytes,
        tokens_per_second=None if median is None else made.per_batch() / median,
        step_flops=compiled.flops, mfu=mfu,
        compile_seconds=compiled.seconds, device=device,
        **({} if job.mesh is None else {"mesh": job.mesh.axes, "processes": jax.process_count(), "device_bytes": {
            name: here for name, (here, _) in meshes.held(loaded.params, result.state, start.frozen).items()}}))


def evaluate_split(loaded: Loaded, adapted: Adapted, split: str) -> Tested:
    """Return the metrics of a run's adapter on one split of its rows."""
    return loaded.task.test(adapted, build.load_data(loaded.config, loaded.tokenizer)[split], compare=False)
