"""What a board compares: tasks, entries, seeds; checked like a job, and every run of it is a job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from jpeft.cli import config
from jpeft.cli.config import JobConfig
from jpeft.cli.fields import Positive, Section, Seed
from jpeft.cli.rules import METHODS
from jpeft.errors import ConfigError, nearest

_TASK = ("model", "data", "objective", "train", "test")


class EntryConfig(Section):
    """One line of the table.

    Attributes:
        rules: as of a job; they come after those of the board.
        learning_rate: null: what the first rule's method recommends.
        train: fields of the task's `train` that are other here.
    """

    rules: dict[str, dict[str, Any]] = Field(default_factory=dict)
    learning_rate: Positive | None = None
    train: dict[str, Any] = Field(default_factory=dict)


class BoardConfig(Section):
    """A whole board.

    Attributes:
        name: null: that of the file.
        seeds: of the runs.
        results: file of the results; null: that of the configuration, with the suffix `.json`. Table and plot lie
            beside it.
        reference: the entry that the others are compared with.
        tasks: name -> `model`, `data`, `objective`, `train` and `test` as of a job.
        rules: rules that come first in every entry, such as that of a new head.
        entries: name -> what trains.
        without: method -> why it has no entry.
    """

    name: str | None = None
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1)
    results: str | None = None
    reference: str
    tasks: dict[str, dict[str, Any]] = Field(min_length=1)
    rules: dict[str, dict[str, Any]] = Field(default_factory=dict)
    entries: dict[str, EntryConfig] = Field(min_length=1)
    without: dict[str, str] = Field(default_factory=dict)


class Run(NamedTuple):
    """One run of a board."""

    task: str
    entry: str
    seed: int

    def __str__(self) -> str:
        return f"{self.entry} on {self.task}, seed {self.seed}"


class Board(NamedTuple):
    """A checked board.

    Attributes:
        config: its fields.
        name: of the board.
        results: file of the results.
        jobs: the job of every run, in the order in which they run.
    """

    config: BoardConfig
    name: str
    results: Path
    jobs: dict[Run, JobConfig]

    def chosen(self, only: Sequence[str], seeds: Sequence[int]) -> list[Run]:
        """Return the runs of some entries (none named: all) and some seeds (the same).

        Raises:
            ConfigError: there is no such entry, or no such seed.
        """
        for name in only:
            if name not in self.config.entries:
                raise ConfigError(f"--only {name!r} is no entry of {self.name}; {nearest(name, self.config.entries)}")
        for seed in seeds:
            if seed not in self.config.seeds:
                raise ConfigError(f"--seeds has {seed}, the seeds of {self.name} are {self.config.seeds}; add it there")
        return [run for run in self.jobs if (not only or run.entry in only) and (not seeds or run.seed in seeds)]


def is_board(path: Path) -> bool:
    """Return whether a file is the configuration of a board, and not that of a job.

    Raises:
        ConfigError: it is absent, or no YAML.
    """
    data = config.read(path)
    return "entries" in data or ("tasks" in data and "model" not in data)


def load(path: Path, settings: Sequence[str] = ()) -> Board:
    """Read the configuration of a board and apply overrides; every run is checked as a job is.

    Raises:
        ConfigError: the file is absent or no YAML, or a field is unknown, missing or wrong.
        PlanError: a method, or one of its fields, is unknown or wrong.
    """
    return resolve(config.read(path, settings), path)


def resolve(data: dict[str, Any], path: Path) -> Board:
    """Check plain data; `path` names it in messages, and says where the results are.

    Raises:
        ConfigError: a field is unknown, missing or wrong.
        PlanError: a method, or one of its fields, is unknown or wrong.
    """
    board = config.checked(BoardConfig, data, str(path))
    name = board.name or path.stem
    if board.reference not in board.entries:
        raise ConfigError(f"{path}: reference = {board.reference!r} is no entry; "
                          f"{nearest(board.reference, board.entries)}")
    if len(set(board.seeds)) < len(board.seeds):
        raise ConfigError(f"{path}: seeds = {board.seeds} has one more than once; name each once")
    for method in board.without:
        if method not in METHODS:
            raise ConfigError(f"{path}: without.{method} is no method; {nearest(method, METHODS)}")
    jobs: dict[Run, JobConfig] = {}
    for task, fields in board.tasks.items():
        for key in fields:
            if key not in _TASK:
                raise ConfigError(f"{path}: unknown key 'tasks.{task}.{key}'; {nearest(key, _TASK, 1)}")
        for entry, what in board.entries.items():
            where = f"{path}, entry {entry} on task {task}"
            first = _job(board, fields, what, board.seeds[0], where)
            jobs |= {Run(task, entry, seed): first.model_copy(update={"seed": seed, "name": f"{name}-{entry}"})
                     for seed in board.seeds}
    return Board(board, name, Path(board.results) if board.results else path.with_suffix(".json"), jobs)


def _job(board: BoardConfig, task: Mapping[str, Any], entry: EntryConfig, seed: int, where: str) -> JobConfig:
    train = task.get("train") or {}
    if not isinstance(train, Mapping):
        raise ConfigError(f"{where}: train = {train!r} must be a mapping of fields")
    rate = {} if entry.learning_rate is None else {"learning_rate": entry.learning_rate}
    job = config.resolve({**task, "seed": seed, "rules": {**board.rules, **entry.rules},
                          "train": {**train, **entry.train, **rate}, "name": "board"}, where)
    for field in ("patience", "tensorboard", "profile", "debug_nans", "hooks"):
        if getattr(job.train, field):
            raise ConfigError(f"{where}: train.{field} is for single runs, as a board keeps no folder of each and "
                              "trains all for as long; drop it")
    return job


def key(job: JobConfig) -> str:
    """Return a hash of all that a run depends on; fields that have their default do not count."""
    said = job.model_dump(exclude_defaults=True, exclude={"name", "output"})
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def methods(board: BoardConfig) -> set[str]:
    """Return the names of all methods that some entry trains, the parts of chains included."""
    found: set[str] = set()

    def collect(rule: Any) -> None:
        if isinstance(rule, Mapping):
            found.update([str(rule["method"])] if "method" in rule else [])
            for part in rule.get("methods", ()):
                collect(part)

    for entry in board.entries.values():
        for rule in entry.rules.values():
            collect(rule)
    return found
