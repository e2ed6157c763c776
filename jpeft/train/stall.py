"""Batches that must come in time: a data source that hangs is an error and no endless wait."""

from __future__ import annotations

import queue
import threading
from typing import Any

from jpeft.errors import BatchesError


def fetch(batches: Any, seconds: float) -> Any:
    """Return the next batch.

    A thread waits for it: one that hangs in a read cannot be stopped and is left behind.

    Args:
        batches: an iterator.
        seconds: how long to wait.

    Raises:
        BatchesError: it did not come in that time.

    Example:
        >>> fetch(iter([3]), 60.0)
        3
    """
    box: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            box.put((next(batches), None))
        except BaseException as error:
            box.put((None, error))

    threading.Thread(target=work, name="jpeft-batch", daemon=True).start()
    try:
        batch, error = box.get(timeout=seconds)
    except queue.Empty:
        raise BatchesError(f"{type(batches).__name__} has given no batch for {seconds:g} s; see what the data source "
                           "waits for, or raise data_timeout (train.data_timeout of a job)") from None
    if error is not None:
        raise error
    return batch
