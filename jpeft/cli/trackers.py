"""Who watches a run: its own files and bar, TensorBoard, the profiler, and what a user names."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from rich.console import Console

from jpeft.cli import runs
from jpeft.cli.config import JobConfig
from jpeft.cli.progress import ProgressBar
from jpeft.errors import ConfigError, nearest
from jpeft.train.hooks import Hooks
from jpeft.train.metrics import JsonLines
from jpeft.train.profile import Profile
from jpeft.train.tensorboard import TensorBoard


def of(job: JobConfig) -> list[Any]:
    """Make the hooks that a job asks for besides its metrics and its bar; nothing is written yet.

    Raises:
        ConfigError: `train.hooks` names something that cannot be had.
        ReportError: tensorboardX is not there.
        TrainConfigError: a hook is none.
    """
    t = job.train
    made: list[Any] = []
    if t.tensorboard:
        made.append(TensorBoard(job.folder / runs.TENSORBOARD))
    if t.profile is not None:
        made.append(Profile(job.folder / runs.PROFILE, t.profile.start, t.profile.steps))
    made += map(named, t.hooks)
    Hooks(made)
    return made


def own(job: JobConfig, console: Console, monitor: str, tokens: float | None) -> list[Any]:
    """Make those that every run has."""
    return [JsonLines(job.folder / runs.METRICS), ProgressBar(console, monitor, tokens)]


def named(where: str) -> Any:
    """Make a hook from `module:Class`; the module may lie in the working directory.

    Raises:
        ConfigError: there is no such module or class, or it cannot be made without arguments.

    Example:
        >>> type(named("jpeft.train.hooks:Hook")).__name__
        'Hook'
    """
    module, colon, name = where.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"train.hooks has {where!r}, which is no module:Class; write it as my_tracker:Tracker")
    path = list(sys.path)
    try:
        sys.path.insert(0, "")
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"train.hooks has {where!r}, whose module cannot be imported ({error}); name one in the "
                          "working directory or an installed one") from error
    finally:
        sys.path[:] = path
    if not hasattr(found, name):
        raise ConfigError(f"train.hooks has {where!r}, and {module} has no {name!r}; {nearest(name, dir(found), 1)}")
    try:
        return getattr(found, name)()
    except TypeError as error:
        raise ConfigError(f"train.hooks has {where!r}, which cannot be made without arguments ({error}); give it "
                          "defaults") from error
