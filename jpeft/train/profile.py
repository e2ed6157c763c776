"""A window of steps that JAX's profiler watches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jpeft.errors import TrainConfigError
from jpeft.train.hooks import Hook

if TYPE_CHECKING:
    from jpeft.train.loop import FitResult


class Profile(Hook):
    """A hook that writes a trace of some steps, for TensorBoard, XProf or Perfetto.

    Steps are reported when the one after them has begun, so that the trace holds a little more than was asked for. A
    run that resumes behind the first step of the window writes none.

    Args:
        folder: where to.
        start: the first step.
        steps: how many.

    Raises:
        TrainConfigError: a number is less than 1; (in `start`) the training ends before the window does.

    Example:
        >>> import jax.numpy as jnp, pathlib, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> hook = Profile(folder, start=1, steps=1)
        >>> hook.start(1, 0)
        >>> _ = jnp.ones(3).block_until_ready()
        >>> hook.step(1, {}, 0.1, 1)
        >>> len(list(pathlib.Path(folder).rglob("*.xplane.pb")))
        1
    """

    def __init__(self, folder: str | os.PathLike[str], start: int, steps: int) -> None:
        if start < 1 or steps < 1:
            raise TrainConfigError(f"a profile of {steps} steps from step {start} on is none; give numbers from 1 on")
        self.folder, self._first, self._last = Path(folder), start, start + steps - 1
        self._tracing = False

    def start(self, total: int, at: int) -> None:
        """Begin at once, where the first steps are asked for."""
        if self._last > total:
            raise TrainConfigError(f"the profile ends with step {self._last} and the training with step {total}; "
                                   "choose earlier steps")
        if at < self._first <= at + 2:
            self._begin()

    def step(self, n: int, metrics: Mapping[str, float], seconds: float, examples: int) -> None:
        """Begin before the first step of the window, and end after the last."""
        if n == self._first - 2 and not self._tracing:
            self._begin()
        if n >= self._last:
            self.close()

    def end(self, result: FitResult) -> None:
        """End a window that an interrupted run has cut short."""
        self.close()

    def close(self) -> None:
        """Write the trace."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def _begin(self) -> None:
        jax.profiler.start_trace(os.fspath(self.folder))
        self._tracing = True
