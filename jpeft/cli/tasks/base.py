"""What the commands ask of a task: one page, and a module for each task that answers it."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import numpy as np

from jpeft.cli import meshes
from jpeft.cli.config import JobConfig
from jpeft.cli.rules import to_methods, tokens_for
from jpeft.core import planning
from jpeft.core.plan import Plan
from jpeft.errors import CheckpointError, ConfigError
from jpeft.interop.pretrained import from_pretrained
from jpeft.interop.tokenizer import Tokenizer
from jpeft.models.model import Model
from jpeft.train.losses import Penalty
from jpeft.train.step import LossFn

if TYPE_CHECKING:
    from jpeft.cli.runs import RunSummary

Apply = Callable[..., Any]
Metrics = dict[str, float]
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model as a job wants it.

    Attributes:
        config: the job.
        model: the model, with the head of the job's task.
        params: its params, the frozen base.
        tokenizer: its tokenizer.
        task: what the model does.
    """

    config: JobConfig
    model: Model
    params: Any
    tokenizer: Tokenizer
    task: Task

    @functools.cached_property
    def unadapted(self) -> Apply:
        """The function of the task without an adapter; its `frozen` are the params."""
        return self.task.apply(self, None)

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan of the job's rules."""
        methods = to_methods(self.config.rules)
        args, named = self.task.example(self)
        tokens = tokens_for(methods, "token_types" in named)
        return planning.plan(self.task.base(self), self.params, args, methods, example_kwargs=named, tokens=tokens)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model with the trained adapter of a run.

    Attributes:
        loaded: the model.
        plan: which method rides on which leaf.
        trainable: what was trained.
        frozen: what was not.
        made: the adapted function, where it is compiled already.
    """

    loaded: Loaded
    plan: Plan
    trainable: Any
    frozen: Any
    made: Apply | None = None

    @functools.cached_property
    def apply(self) -> Apply:
        """The adapted function of the task, as `Task.apply` returns it."""
        return self.made or self.loaded.task.apply(self.loaded, self.plan)


class Tested(NamedTuple):
    """What the final test says.

    Attributes:
        after: metrics with the best adapter.
        before: the same without; empty where there is nothing to compare with.
        baseline: what needs no model, such as always giving the most frequent answer.
        samples: Markdown with some answers; "": none.
        notes: what a reader must know, a line each.
        hits: which rows or answers are right, bool `[N]`; None where nothing is right or wrong.
    """

    after: Metrics
    before: Metrics = {}  # noqa: RUF012 - never changed
    baseline: Metrics = {}  # noqa: RUF012
    samples: str = ""
    notes: tuple[str, ...] = ()
    hits: np.ndarray | None = None


class Task(abc.ABC):
    """One value of `model.task`.

    Attributes:
        monitor: the metric that says which evaluation is best.
        mode: whether more or less of it is better.
        sides: arrays of tokens in a batch.
    """

    monitor: ClassVar[str]
    mode: ClassVar[Literal["max", "min"]]
    sides: ClassVar[int] = 1

    @abc.abstractmethod
    def labels(self, job: JobConfig) -> int | None:
        """Return the number of classes; None for a model without classes."""

    @abc.abstractmethod
    def example(self, loaded: Loaded) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return shapes of the arguments, and of the keyword arguments, of `base` after the params."""

    @abc.abstractmethod
    def base(self, loaded: Loaded) -> Apply:
        """Return the function of `(params, *args, **kwargs)` that is adapted."""

    @abc.abstractmethod
    def apply(self, loaded: Loaded, plan: Plan | None) -> Apply:
        """Return `(trainable, frozen, ..., key)` for training and evaluation; no plan: `frozen` are the params."""

    @abc.abstractmethod
    def loss(self, apply: Apply, penalty: Penalty | None) -> LossFn:
        """Return the loss of the training step."""

    @abc.abstractmethod
    def load_data(self, job: JobConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Read, encode and split the rows: what `batches` takes, for each name of `SPLITS`."""

    @abc.abstractmethod
    def batches(self, job: JobConfig, rows: Any, shuffle: bool) -> Any:
        """Return the batches of some rows; see `jpeft.data.batches.Batches`."""

    @abc.abstractmethod
    def evaluate(self, apply: Apply, trainable: Any, frozen: Any, batches: Iterable[Any]) -> Metrics:
        """Return the metrics of some batches."""

    @abc.abstractmethod
    def told(self, job: JobConfig, data: Mapping[str, Any], made: Any) -> list[str]:
        """Say how many rows there are, what of their batches is waste, and what was cut or left out."""

    @abc.abstractmethod
    def test(self, adapted: Adapted, rows: Any, compare: bool) -> Tested:
        """Test an adapter on some rows; `compare`: the model without it as well."""

    @abc.abstractmethod
    def predict(self, adapted: Adapted, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return a line for each text, and notes."""

    @abc.abstractmethod
    def headline(self, metrics: Mapping[str, float]) -> str:
        """Say the metrics of a split in a few words."""

    @abc.abstractmethod
    def line(self, metrics: Mapping[str, float]) -> str:
        """Say the metrics of a split in one line."""

    @abc.abstractmethod
    def result(self, summary: RunSummary) -> list[tuple[str, str]]:
        """Return what the final test says as pairs of a name and a sentence."""

    def names(self, job: JobConfig) -> tuple[str, ...] | None:
        """Return the names of the classes for a checkpoint's configuration; None: there are no classes."""
        return None

    def load(self, job: JobConfig) -> tuple[Any, Any, Tokenizer]:
        """Read model, params and tokenizer.

        Raises:
            SourceError, CheckpointError, ModelConfigError: as of `jpeft.from_pretrained`.
            ConfigError: the job's texts are longer than the model takes.
        """
        m = job.model
        source = cast(str, m.source)  # a task that can begin from a mapping has its own `load`
        model, params, tokenizer = from_pretrained(
            source, m.task, self.labels(job), m.dtype, compute_dtype=m.compute_dtype, remat=m.remat,
            dropout=m.dropout, sha256=m.sha256, seed=job.seed, mesh=meshes.made(job.mesh),
            shardings=None if job.mesh is None else job.mesh.specs)
        if tokenizer is None:
            raise CheckpointError(f"{source} has no tokenizer.json, which texts need; add the file to the checkpoint")
        if job.data.max_length > tokenizer.max_length:
            raise ConfigError(f"data.max_length = {job.data.max_length} is more than the {tokenizer.max_length} tokens "
                              f"that the model takes; set it to {tokenizer.max_length} or less")
        return model, params, tokenizer
