"""The file that a board grows in: one JSON object a run, written whole after each of them.

Several sessions may share one: each adds to what is there.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import json
import os
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.cli.board.config import Board, Run, key
from jpeft.core import files
from jpeft.errors import ReportError, RunError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Result:
    """One run in numbers.

    Attributes:
        task: name of the task.
        entry: name of the entry.
        seed: of the run.
        key: hash of the configuration that it ran with.
        methods: what trained, in words.
        learning_rate: its peak.
        test: metrics on the test rows, with the parameters that are best on the validation rows.
        validation: their metrics on those.
        best_step: after which step they were.
        steps: updates done.
        hits: which test rows or answers are right, packed in base64; "": nothing is right or wrong.
        rows: how many there are.
        trainable: parameters that were trained.
        base: parameters of the model.
        adapter_bytes: size of the adapter's file.
        temp_bytes: what a training step needs besides its inputs and outputs, as compiled.
        ms_per_step: median time of a training step; None where there was one step alone.
        seconds: of training, with its evaluations.
        compile_seconds: of the training step, which the seeds of an entry share.
        date: when it ended, UTC.
        about: versions and device.
        command: that ran it.
    """

    task: str
    entry: str
    seed: int
    key: str
    methods: str
    learning_rate: float
    test: dict[str, float]
    validation: dict[str, float]
    best_step: int
    steps: int
    hits: str
    rows: int
    trainable: int
    base: int
    adapter_bytes: int
    temp_bytes: int
    ms_per_step: float | None
    seconds: float
    compile_seconds: float
    date: str
    about: dict[str, str]
    command: str

    @property
    def run(self) -> Run:
        """Which run of the board it is."""
        return Run(self.task, self.entry, self.seed)

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of the model's."""
        return 100 * self.trainable / max(self.base, 1)

    @property
    def right(self) -> np.ndarray | None:
        """Which test rows are right, bool `[N]`; None: nothing is right or wrong."""
        return unpack(self.hits, self.rows) if self.hits else None


def pack(right: Sequence[bool] | np.ndarray) -> str:
    """Write truth values as text, eight in a byte.

    Example:
        >>> unpack(pack([True, False, True]), 3).tolist()
        [True, False, True]
    """
    return base64.b64encode(np.packbits(np.asarray(right, bool)).tobytes()).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """Inverse of `pack`."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)


def read(path: Path) -> dict[Run, Result]:
    """Read a file of results; an absent one holds none.

    Raises:
        ReportError: it is damaged, or holds a run twice.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} is no file of results ({' '.join(str(error).split())}); restore it, or remove it to "
                          "run everything again") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("results"), list):
        raise ReportError(f"{path} is no file of results of format {FORMAT}; name another file in 'results', or remove "
                          "it to run everything again")
    found: dict[Run, Result] = {}
    for i, one in enumerate(data["results"]):
        result = _result(path, i, one)
        if result.run in found:
            raise ReportError(f"{path} holds {result.run} twice; remove one of the two")
        found[result.run] = result
    return found


def write(path: Path, results: Iterable[Result]) -> None:
    """Write a file of results, all or nothing; a line for each.

    Raises:
        ReportError: it cannot be written.
    """
    lines = ",\n".join(json.dumps(dataclasses.asdict(one)) for one in results)
    put(path, f'{{"format": {FORMAT}, "results": [\n{lines}\n]}}\n'.encode())


def add(path: Path, order: Iterable[Run], one: Result) -> dict[Run, Result]:
    """Put a result into a file that other sessions may be writing to, and return what it holds then.

    Args:
        path: the file; sessions on one machine take turns.
        order: the runs of the board in their order; results of others come behind.
        one: the result; it replaces one of the same run.

    Raises:
        ReportError: the file is damaged or cannot be written.
    """
    with _alone(path.parent):
        found = {**read(path), one.run: one}
        runs = dict.fromkeys(run for run in (*order, *found) if run in found)
        found = {run: found[run] for run in runs}
        write(path, found.values())
    return found


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ReportError(f"{folder} cannot be opened ({error.strerror}); fix the folder") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def put(path: Path, data: bytes) -> None:
    """Write a file, all or nothing.

    Raises:
        ReportError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, data)
    except OSError as error:
        raise ReportError(f"{path} cannot be written ({error.strerror}); free space or fix the folder") from error


def stale(board: Board, found: Mapping[Run, Result]) -> set[Run]:
    """Return the runs whose results are of another configuration than the board has now."""
    return {run for run, result in found.items() if run in board.jobs and result.key != key(board.jobs[run])}


def missing(board: Board, found: Mapping[Run, Result], runs: Sequence[Run], again: bool) -> list[Run]:
    """Return which of some runs have to be done.

    Args:
        board: the board.
        found: what its file holds.
        runs: which are asked for.
        again: do those again whose results are of another configuration.

    Raises:
        RunError: `again` is not set, and there is one.
    """
    old = stale(board, found)
    asked = [run for run in runs if run in old]
    if asked and not again:
        others = f" and {len(asked) - 1} more" if len(asked) > 1 else ""
        raise RunError(f"{board.results} holds {asked[0]}{others} with other values than the configuration has now; "
                       "add --again to replace them, or name another file: --set results=FILE")
    return [run for run in runs if run not in found or run in old]


def _result(path: Path, i: int, data: Any) -> Result:
    hints = typing.get_type_hints(Result)
    if not isinstance(data, dict) or set(data) != set(hints):
        odd = sorted(set(data) ^ set(hints))[:3] if isinstance(data, dict) else type(data).__name__
        raise ReportError(f"{path}: result {i} (counted from 0) has not the fields of a run ({odd}); restore the file, "
                          "or remove that line")
    for name, kind in hints.items():
        value = data[name]
        wanted = (float, int) if kind is float else (float, int, type(None)) if "None" in str(kind) else (
            typing.get_origin(kind) or kind)
        if not isinstance(value, wanted):
            raise ReportError(f"{path}: {name!r} of result {i} (counted from 0) is {value!r:.60}; restore the file, or "
                              "remove that line")
    result = Result(**data)
    try:
        size = len(base64.b64decode(result.hits, validate=True))
    except ValueError:
        size = -1
    if size != -(-result.rows // 8):
        raise ReportError(f"{path}: 'hits' of {result.run} is damaged; restore the file, or remove that line")
    return result
