"""From a configuration to what runs: model, plan, data, step. The one place that every command builds with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import optax

from jpeft.cli import calibrating, meshes, runs, tasks
from jpeft.cli.config import JobConfig
from jpeft.cli.rules import places, rates, to_methods
from jpeft.cli.tasks.base import SPLITS, Adapted, Apply, Loaded
from jpeft.core import store, transform
from jpeft.core.method import Method
from jpeft.core.plan import Plan
from jpeft.data.epochs import Batch, Epochs
from jpeft.errors import RunError, TrainConfigError, WrongBaseError
from jpeft.interop.tokenizer import Tokenizer
from jpeft.train.optimizer import Optimizer, make
from jpeft.train.state import TrainState, create
from jpeft.train.step import compiled_step

__all__ = ["SPLITS", "Adapted", "Loaded", "Training", "batches", "load_adapter", "load_data", "load_model", "once",
           "optimizer", "trained", "training"]


def load_model(config: JobConfig) -> Loaded:
    """Read the model of a job, with the head of its task and the places that its methods ask for.

    Raises:
        SourceError, CheckpointError, ModelConfigError: as of `jpeft.from_pretrained`.
        ConfigError: the job's texts are longer than the model takes.
    """
    task = tasks.of(config)
    model, params, tokenizer = task.load(config)
    if wanted := places(to_methods(config.rules)):
        model, params = model.with_places(params, wanted)
    return Loaded(config, model, params, tokenizer, task)


def load_data(config: JobConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Read, encode and split the rows of a job: what `batches` takes, for each name of `SPLITS`.

    Raises:
        SourceError, DataError: the rows cannot be had, or are not what the configuration says.
    """
    return tasks.of(config).load_data(config, tokenizer)


def batches(config: JobConfig, rows: Any, shuffle: bool = False) -> Any:
    """Return the batches of some rows; shuffled for training, in a fixed order otherwise."""
    return tasks.of(config).batches(config, rows, shuffle)


def once(made: Epochs) -> Iterator[Batch]:
    """Yield the batches of one epoch."""
    return (made.make(0, i) for i in range(len(made)))


@dataclasses.dataclass(frozen=True)
class Training:
    """What a training run needs, besides the model and the rows.

    Attributes:
        state: before the first step.
        frozen: what does not train.
        apply: the adapted function, as `Task.apply` returns it.
        step: the training step, compiled for every width of the batches when it is called.
        total_steps: of the whole run.
        tx: the optimiser.
        notes: how it came about, a line each.
    """

    state: TrainState
    frozen: Any
    apply: Apply
    step: Any
    total_steps: int
    tx: optax.GradientTransformation
    notes: tuple[str, ...] = ()

    def again(self, loaded: Loaded, plan: Plan, made: Epochs) -> Training:
        """Return the start of a run of the same plan with another seed, which shares all programs with this one."""
        trainable, frozen, _ = _fresh(loaded, plan, made)
        return dataclasses.replace(self, state=_state(loaded.config, trainable, self.tx), frozen=frozen)


def training(loaded: Loaded, made: Epochs) -> Training:
    """Build the start of a run.

    Raises:
        TrainConfigError: the optimiser's fields do not fit together, or the loss scale does not fit the compute.
        ConfigError: as of `jpeft.cli.calibrating.calibration`.
    """
    config, plan = loaded.config, loaded.plan
    trainable, frozen, notes = _fresh(loaded, plan, made)
    total = config.train.total(len(made))
    tx, schedule = optimizer(config, total, trainable, plan)
    apply = loaded.task.apply(loaded, plan)
    has_penalty = any(type(e.method).penalty is not Method.penalty for e in plan.entries)
    loss = loaded.task.loss(loaded, apply, (lambda t, f: transform.penalty(plan, t, f)) if has_penalty else None)
    state, t = _state(config, trainable, tx), config.train
    _check_scale(loaded)
    step = compiled_step(loss, tx, schedule=schedule, like=state, accumulate=t.accumulate, ema=t.ema,
                         loss_scale=t.loss_scale, donate=not t.debug_nans)
    return Training(state, frozen, apply, step, total, tx, notes)


def _check_scale(loaded: Loaded) -> None:
    """See that the loss is scaled where compute is float16, and only there."""
    said, scale = loaded.config.model.compute_dtype, loaded.config.train.loss_scale
    held = {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)}
    half = said == "float16" if said is not None else "float16" in held
    if half and scale is None:
        raise TrainConfigError("compute is float16, where small gradients are zero, and train.loss_scale is null; set "
                               "train.loss_scale=dynamic, or model.compute_dtype=bfloat16")
    if scale is not None and not half:
        raise TrainConfigError(f"train.loss_scale = {scale} is for float16 compute, and this is "
                               f"{said or ' and '.join(sorted(held))}; set it to null")


def _fresh(loaded: Loaded, plan: Plan, made: Epochs) -> tuple[Any, Any, tuple[str, ...]]:
    root = jax.random.key(loaded.config.seed)
    data, notes = calibrating.calibration(loaded, plan, made)
    where = meshes.places(loaded.config.mesh, plan, loaded.params)
    return *transform.init(plan, loaded.params, jax.random.fold_in(root, 0), calibration=data, shardings=where), notes


def _state(config: JobConfig, trainable: Any, tx: optax.GradientTransformation) -> TrainState:
    t = config.train
    return create(trainable, tx, jax.random.fold_in(jax.random.key(config.seed), 1), ema=t.ema is not None,
                  loss_scale=t.loss_scale)


def optimizer(config: JobConfig, total: int, trainable: Any,
              plan: Plan) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimiser of a job and its learning rate by step."""
    t = config.train
    betas = None if t.betas is None else (t.betas[0], t.betas[1])
    rate = t.learning_rate or 0.0
    return make(Optimizer(t.optimizer, rate, t.schedule, t.warmup, t.weight_decay, t.clip, betas, t.eps,
                          t.lora_plus, rates(config.rules, plan), t.decay), total, trainable, plan)


def trained(run: Path) -> tuple[Adapted, tuple[str, ...]]:
    """Read a run, named by its folder or its configuration: its model with its adapter, and notes.

    Where there are fewer devices than the run's mesh has, it is read onto one, and a note says so.

    Raises:
        RunError: there is no such run, or it has no adapter yet.
        StoreError: the adapter is damaged, or was trained on another base.
    """
    folder = runs.find(run)
    if not (folder / runs.ADAPTER).is_dir():
        raise RunError(f"{folder} has no adapter yet; finish it with: jpeft train {folder / runs.CONFIG} --resume")
    job, notes = meshes.here(runs.read(folder))
    return load_adapter(load_model(job), folder / runs.ADAPTER), notes


def load_adapter(loaded: Loaded, folder: Path, made: Apply | None = None) -> Adapted:
    """Read the adapter of a run on top of its model; `made` is its function, where that is compiled already.

    Raises:
        StoreError: the adapter is damaged, or was trained on another base.
    """
    try:
        plan, trainable, frozen = store.load(folder, loaded.params)
    except WrongBaseError as error:
        raise WrongBaseError(f"{error}; this run's model is {loaded.config.model.source}") from error
    return Adapted(loaded, plan, trainable, frozen, made)
