"""metrics.jsonl: one line per step and per evaluation, the same whether a run was interrupted or not."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft.core import files
from jpeft.errors import ReportError
from jpeft.train.hooks import Hook


class JsonLines(Hook):
    """A hook that writes a file of JSON lines: `{"step": 3, "loss": ...}` and `{"step": 3, "eval/accuracy": ...}`.

    A resumed run first drops the lines after the step that it resumes from, so no step is there twice. Lines are whole
    on the disk before a checkpoint is. A number that is not finite is `null`.

    Example:
        >>> import tempfile, os
        >>> hook = JsonLines(os.path.join(tempfile.mkdtemp(), "metrics.jsonl"))
        >>> hook.start(2, 0)
        >>> hook.step(1, {"loss": 0.5}, 0.1, 8)
        >>> hook.close()
        >>> read(hook.path)
        [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name the file; `start` makes it."""
        self.path = Path(path)
        self._file: Any = None

    def start(self, total: int, at: int) -> None:
        """Keep the lines up to step `at`.

        Raises:
            ReportError: a line up to there is damaged, or the file cannot be written.
        """
        kept = _before(self.path, at) if self.path.exists() else b""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.write(self.path, kept)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._unwritable(error.strerror) from error

    def step(self, n: int, metrics: Mapping[str, float], seconds: float, examples: int) -> None:
        """Write the line of a step."""
        self._write({"step": n, **metrics})

    def evaluated(self, n: int, metrics: Mapping[str, float]) -> None:
        """Write the line of an evaluation."""
        self._write({"step": n, **{f"eval/{name}": value for name, value in metrics.items()}})

    def saving(self, n: int) -> None:
        """See that the lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, row: dict[str, Any]) -> None:
        plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
        line = json.dumps(plain).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._unwritable(error.strerror) from error
        if written != len(line):
            raise self._unwritable(f"the disk took {written} of {len(line)} bytes")

    def _unwritable(self, why: str | None) -> ReportError:
        return ReportError(f"{self.path} cannot be written ({why}); free space or fix the folder, then resume")


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the rows of a metrics file. A last line without its end, as of a run that was killed, is left out.

    Raises:
        ReportError: the file is missing, or a line is damaged.
    """
    file = Path(path)
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ReportError(f"{file} cannot be read ({error.strerror}); give the metrics.jsonl of a run") from error
    return [_row(file, number, line) for number, line in enumerate(lines[:-1], 1)]


def _before(path: Path, at: int) -> bytes:
    """Return the lines of the steps up to `at`, as they are."""
    kept, steps = [], set()
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if at == 0:
            break
        row = _row(path, number, line)
        if row["step"] > at:
            break
        kept.append(line + b"\n")
        steps.add(row["step"])
    if at and at not in steps:
        raise ReportError(
            f"{path} ends at step {max(steps, default=0)} and the run resumes from {at}; move the file away to go on "
            "without the rows before")
    return b"".join(kept)


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row["step"], int):
            raise ValueError("step is no number")
    except (ValueError, TypeError, KeyError) as error:
        raise ReportError(f"line {number} of {path} is no row of metrics; restore the file, or move it away") from error
    return row
