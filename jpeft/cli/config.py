"""What a job is: the fields of a configuration file, checked, with every mistake named by its full path."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import pydantic
from pydantic import BaseModel

from jpeft.cli import datakinds, yamlio
from jpeft.cli.datakinds import Rows
from jpeft.cli.fields import Section, Seed
from jpeft.cli.meshes import MeshConfig
from jpeft.cli.rules import to_methods
from jpeft.cli.sections import (
    EPOCHS,
    OBJECTIVES,
    CalibrationConfig,
    ModelConfig,
    ObjectiveConfig,
    TestConfig,
    TrainConfig,
)
from jpeft.errors import ConfigError, nearest
from jpeft.methods import Full

D = TypeVar("D", bound=Rows)
S = TypeVar("S", bound=BaseModel)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SECTIONS = ("data.", "model.", "train.", "test.", "objective.")  # how a sentence about several fields begins
# What may differ between the two halves of a resumed run: where it lies, on which devices, how often it is saved, and
# who watches.
_FREE = ("name", "output", "mesh", "train.save_every", "train.keep", "train.data_timeout", "train.debug_nans",
         "train.profile", "train.tensorboard", "train.hooks")


class JobConfig(Section, Generic[D]):
    """A whole job.

    Attributes:
        name: of the run's folder; null: that of the file.
        seed: of the new head, the adapter, the order of rows and dropout.
        output: folder of the runs.
        model: which model.
        data: which rows; its class follows from `model.task` and `data.format`.
        rules: pattern -> `{method: Name, field: value, ...}`, in order; the first that matches a leaf wins.
        objective: the numbers of its loss, where that has some.
        train: how it trains.
        test: how it is tested.
        mesh: the devices that it is divided over; null: it runs on one.
        calibration: rows for methods that start from data; null: no method does.
    """

    name: str | None = None
    seed: Seed = 0
    output: str = "runs"
    model: ModelConfig
    data: D
    rules: dict[str, dict[str, Any]]
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    test: TestConfig = TestConfig()
    mesh: MeshConfig | None = None
    calibration: CalibrationConfig | None = None

    @pydantic.model_validator(mode="after")
    def _writes(self) -> JobConfig[D]:
        if self.test.generate is not None and self.model.task not in datakinds.WRITE:
            raise ValueError("test.generate is for models that write; drop it")
        if self.test.generate is not None and getattr(self.data, "learn", "assistant") == "all":
            raise ValueError("test.generate needs data.learn = assistant, to know where an answer begins; drop one of "
                             "the two")
        return self

    @pydantic.model_validator(mode="after")
    def _aims(self) -> JobConfig[D]:
        known = OBJECTIVES[self.data.learns]
        for name, value in self.objective:
            if value is not None and name not in known:
                raise ValueError(f"objective.{name} = {value!r} is not for the loss of these rows, which has "
                                 f"{', '.join(known) or 'no such field'}; drop it")
        return self

    @pydantic.model_validator(mode="after")
    def _divides(self) -> JobConfig[D]:
        if self.mesh is not None and self.train.batch_size % self.mesh.rows:
            raise ValueError(f"train.batch_size = {self.train.batch_size} rows are not divided by mesh.data x mesh.fsdp"
                             f" = {self.mesh.rows} devices; make it a multiple of that")
        return self

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
        return [(path, value) for path, value in _leaves(self.model_dump())
                if not any(f"{path}.".startswith(f"{free}.") for free in _FREE)]

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
    data = read(path, settings)
    if "entries" in data and "model" not in data:
        raise ConfigError(f"{path} compares several methods and is no job; run it with: jpeft compare {path}")
    if name is not None:
        data["name"] = name
    return resolve(data, str(path))


def read(path: str | os.PathLike[str], settings: Sequence[str] = ()) -> dict[str, Any]:
    """Read a configuration file as plain data and apply overrides.

    Raises:
        ConfigError: the file is not there or is no YAML mapping, or an override is none.
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
    return data


def resolve(data: dict[str, Any], where: str) -> JobConfig:
    """Check plain data and fill its gaps; `where` names it in messages, and its stem names the run.

    Raises:
        ConfigError: a field is unknown, missing or wrong.
        PlanError: a method, or one of its fields, is unknown or wrong.
    """
    try:
        generic: Any = JobConfig
        shape: type[JobConfig] = generic[datakinds.kind(data)]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    job: JobConfig = checked(shape, data, where)
    try:
        methods = to_methods(job.rules)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    named = [m for m in methods.values() if not isinstance(m, Full)] or list(methods.values())
    if not named:
        raise ConfigError(f"{where}: 'rules' is empty; give a method to some leaves, as 'all-linear': {{method: LoRA}}")
    reads = any(method.calibration & {"inputs", "gradient"} for method in methods.values())
    if job.calibration is not None and not reads:
        raise ConfigError(f"{where}: calibration is for methods that start from data, as {{method: LoRA, init_weights: "
                          "eva}, and 'rules' has none; drop it")
    rate = job.train.learning_rate or named[0].recommended_lr
    epochs = job.train.epochs if job.train.steps else job.train.epochs or EPOCHS
    source = job.model.source if isinstance(job.model.source, dict) else datakinds.absolute(job.model.source)
    return job.model_copy(update={
        "name": job.name or Path(where).stem,
        "model": job.model.model_copy(update={"source": source}),
        "data": job.data.model_copy(update=job.data.gaps()),
        "objective": job.objective.model_copy(update=job.objective.gaps(job.data.learns)),
        "calibration": job.calibration or (CalibrationConfig() if reads else None),
        "train": job.train.model_copy(update={"learning_rate": float(rate), "epochs": epochs}),
    })


def checked(shape: type[S], data: dict[str, Any], where: str) -> S:
    """Return the fields of plain data.

    Raises:
        ConfigError: one is unknown, missing or wrong; `where` and its full path name it.
    """
    try:
        return shape.model_validate(data)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: {_sentence(error, data, shape)}") from error


def write(job: JobConfig, command: str) -> bytes:
    """Return the file that `load` reads the same job from; its first line is the command."""
    return f"# {command}\n{yamlio.dump(job.model_dump())}".encode()


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
        for part in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                each = "NAME." if typing.get_origin(field.annotation) is dict else ""
                found += _known(part, f"{prefix}{name}.{each}")
    return found


def _closest(path: str, shape: type[BaseModel]) -> str:
    """Return the field with the most similar last name, one of the same section before others."""
    home, _, last = path.rpartition(".")

    def score(known: str) -> float:
        parent, _, word = known.rpartition(".")
        return difflib.SequenceMatcher(None, last, word).ratio() + 0.15 * (parent == home)

    return max(_known(shape), key=score)


def _sentence(error: pydantic.ValidationError, data: dict[str, Any], shape: type[BaseModel]) -> str:
    """Say what is wrong in one line: unknown keys first, as they often are the missing ones."""
    said: dict[str, list[str]] = {}
    faults = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    for fault in faults:
        path, value = _place(fault["loc"], data)
        if fault["type"] == "extra_forbidden":
            text = f"unknown key {path!r}; the nearest is {_closest(path, shape)!r}"
        elif fault["type"] == "missing":
            text = f"{path!r} is missing"
        elif fault["type"] == "value_error":
            words = str(fault["ctx"]["error"])
            text = words if words.startswith(_SECTIONS) else f"{path} = {value!r} {words}"
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
