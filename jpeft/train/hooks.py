"""Who may watch a training run, and when they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jpeft.errors import TrainConfigError, nearest

if TYPE_CHECKING:
    from jpeft.train.loop import FitResult


class Hook:
    """What `fit` calls; each method does nothing here. A hook need not inherit and may leave any of them out.

    The order is `start`, then `step` for each step (one step late, so that the device never waits), with `evaluated`
    and `saving` where they are due, then `end` if the run ended or was interrupted, and `close` in any case. `saved`
    comes before the next `saving`, or before `end`, as the training goes on while a checkpoint is written.
    When `evaluated`, `saving` or `saved` are called for step `n`, `step` has been called for all steps up to `n`. What
    a hook raises ends the run.

    Example: another tracker, for `fit(hooks=[Tracker()])`, or from a file `my_tracker.py` in the working directory for
    `jpeft train CONFIG --hook my_tracker:Tracker`.

        >>> class Tracker:
        ...     def __init__(self, send=print):
        ...         self.send = send
        ...     def step(self, n, metrics, seconds, examples):
        ...         if n % 100 == 0:
        ...             self.send(n, {"loss": metrics["loss"], "rows_per_second": examples / seconds})
        ...     def evaluated(self, n, metrics):
        ...         self.send(n, {f"eval/{name}": value for name, value in metrics.items()})
        >>> Tracker().step(200, {"loss": 0.5}, 0.25, 8)
        200 {'loss': 0.5, 'rows_per_second': 32.0}
    """

    def start(self, total: int, at: int) -> None:
        """Before the first step: `total` is the last step's number, `at` how many are done already."""

    def step(self, n: int, metrics: Mapping[str, float], seconds: float, examples: int) -> None:
        """Step `n` is done: its metrics, the wall time since the one before, and how many rows it had."""

    def evaluated(self, n: int, metrics: Mapping[str, float]) -> None:
        """The evaluation after step `n` is done."""

    def saving(self, n: int) -> None:
        """The checkpoint of step `n` is about to be written: what belongs to the steps before must be safe now."""

    def saved(self, n: int) -> None:
        """The checkpoint of step `n` is complete."""

    def end(self, result: FitResult) -> None:
        """All steps are done, or the run was interrupted: `result.stopped` says which."""

    def close(self) -> None:
        """The run is over, by an error too: give back what is held."""


EVENTS = ("start", "step", "evaluated", "saving", "saved", "end", "close")


class Hooks:
    """Several hooks as one.

    Raises:
        TrainConfigError: an object has none of the methods of a hook.
    """

    def __init__(self, hooks: Sequence[Any]) -> None:
        for hook in hooks:
            if not any(callable(getattr(hook, event, None)) for event in EVENTS):
                own = [name for name in dir(hook) if not name.startswith("_")]
                raise TrainConfigError(
                    f"the hook {type(hook).__name__} has none of the methods {', '.join(EVENTS)} "
                    f"({nearest('step', own, 1)}); see jpeft.train.hooks.Hook")
        self._hooks = tuple(hooks)

    def tell(self, event: str, *args: Any) -> None:
        """Call a method of each hook that has it."""
        for hook in self._hooks:
            method = getattr(hook, event, None)
            if method is not None:
                method(*args)
