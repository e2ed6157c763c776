"""Metrics for TensorBoard, by tensorboardX."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft.errors import ReportError
from jpeft.train.hooks import Hook


class TensorBoard(Hook):
    """A hook that writes event files: `train/loss` and the like per step, `eval/accuracy` and the like per evaluation.

    A resumed run tells TensorBoard to forget what came after the step that it resumes from. What is not finite is left
    out, as JSON lines and evaluations say it.

    Args:
        folder: where to; `tensorboard --logdir` of it or of a folder above shows it.

    Raises:
        ReportError: tensorboardX is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            import tensorboardX
        except ModuleNotFoundError as error:
            raise ReportError("metrics for TensorBoard need tensorboardX; pip install 'jpeft[tensorboard]', or set "
                              "train.tensorboard=false") from error
        self._make: Any = tensorboardX.SummaryWriter
        self._folder = Path(folder)
        self._writer: Any = None

    def start(self, total: int, at: int) -> None:
        """Open a file; of earlier ones, what is after step `at` no longer counts."""
        # Files are named by the second; the suffix keeps two of one second apart.
        self._writer = self._make(os.fspath(self._folder), purge_step=at + 1 if at else None, filename_suffix=f".{at}")

    def step(self, n: int, metrics: Mapping[str, float], seconds: float, examples: int) -> None:
        """Write the metrics of a step, and how many rows per second it took."""
        speed = {"examples_per_second": examples / seconds} if seconds > 0 else {}
        self._write("train", n, {**metrics, **speed})

    def evaluated(self, n: int, metrics: Mapping[str, float]) -> None:
        """Write an evaluation."""
        self._write("eval", n, metrics)

    def saving(self, n: int) -> None:
        """See that all of it is in the file."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, group: str, n: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(f"{group}/{name}", value, n)
