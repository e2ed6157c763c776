"""The stream of batches that training reads, on grain: made ahead in a thread, and continued exactly where it was."""

from __future__ import annotations

from typing import Any

import grain  # type: ignore[import-untyped]

from jpeft.data.epochs import Batch, Epochs
from jpeft.errors import BatchingError, DataPositionError


class Stream:
    """An iterator over batches whose position is a small JSON value.

    The position counts the batches that were handed out; those that are only made ahead are made again.
    """

    def __init__(self, dataset: Any, order: str) -> None:
        """Use `stream`.

        Args:
            dataset: a `grain.IterDataset`.
            order: names the sequence that `dataset` yields.
        """
        self._iterator = iter(dataset)
        self._order = order

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._iterator)
        except StopIteration:
            raise
        except BaseException:
            # grain has taken the batch out of its buffer but not counted it: start again from what was handed out.
            self._iterator.set_state(self._iterator.get_state())
            raise

    def get_state(self) -> dict[str, Any]:
        """Return the position, a JSON value: the batches handed out so far, and what sequence they belong to."""
        return {"grain": self._iterator.get_state(), "order": self._order}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that `get_state` returned, here or in another process.

        Raises:
            DataPositionError: it is that of other batches, or none.
        """
        if not isinstance(state, dict) or set(state) != {"grain", "order"}:
            raise DataPositionError(f"{state!r:.80} is no position in a stream of batches; pass what get_state gave")
        if state["order"] != self._order:
            raise DataPositionError(f"the position is one in the batches {state['order']}, these are {self._order}: "
                                    "the rows, their order, the batch size, the buckets or the seed has changed; set "
                                    "them back, or start anew")
        before = self._iterator.get_state()
        try:
            self._iterator.set_state(state["grain"])
        except (IndexError, KeyError, TypeError) as error:
            self._iterator.set_state(before)
            raise DataPositionError(f"{state['grain']!r:.80} is no position in this stream ({error}); give it as many "
                                    "epochs as when the position was saved, or more") from error

    def close(self) -> None:
        """Stop making batches ahead."""
        self._iterator.close()


def stream(batches: Epochs, *, epochs: int | None = None, prefetch: int = 2) -> Stream:
    """Return the batches of one epoch after another.

    Args:
        batches: what an epoch is made of.
        epochs: how many; None: without end.
        prefetch: batches that a thread makes ahead; 0: none, without a thread.

    Raises:
        BatchingError: `epochs` or `prefetch` is not a number of that kind.

    Example:
        >>> import numpy as np
        >>> from jpeft.data.batches import Batches
        >>> from jpeft.data.classify import Examples
        >>> rows = [np.full(2, n, np.int32) for n in range(6)]
        >>> examples = Examples(rows, np.zeros(6, np.int32), None, np.zeros(6, bool), pad_id=0)
        >>> batches = Batches(examples, 2, (2,), seed=0, shuffle=True)
        >>> first, again = stream(batches), stream(batches)
        >>> seen = [next(first) for _ in range(4)]
        >>> again.set_state(first.get_state())
        >>> bool((next(first)["tokens"] == next(again)["tokens"]).all())
        True
    """
    for name, value, least in (("epochs", epochs, 1), ("prefetch", prefetch, 0)):
        if value is None and name == "epochs":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BatchingError(f"{name} is {value!r}, must be an integer, {least} or more")
    per_epoch = len(batches)
    numbers = grain.MapDataset.source(range(per_epoch)).repeat(epochs)
    made = numbers.map_with_index(lambda position, number: batches.make(position // per_epoch, number))
    # One thread: rows are in memory, so more of them would only wait for each other.
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return Stream(made.to_iter_dataset(options), batches.fingerprint)
