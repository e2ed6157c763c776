"""Batches for language models: whole sequences packed into rows of one length, or one padded sequence a row."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from jpeft.data.checks import whole
from jpeft.data.epochs import NOTHING, Batch, Epochs, padded
from jpeft.data.sft import Sequences
from jpeft.errors import BatchingError, RowLengthError


class _OfSequences(Epochs):
    sequences: Sequences

    def _content(self) -> tuple[int, Iterable[np.ndarray]]:
        return self.sequences.pad_id, (*self.sequences.ids, *self.sequences.weights)


class Packed(_OfSequences):
    """Rows of `length` tokens, each of several whole sequences; see `Epochs` for what stays the same.

    Sequences go into rows by best fit, the longest first. Each epoch draws which sequences of equal length change
    places, then the order of the rows, so that the number of rows is the same in all epochs.

    `make` returns, all `[B, T]`:

    - `tokens` int32, `attention_mask` int32 (0 = padding),
    - `positions` int32, counted from 0 in each sequence, `segment_ids` int32: 1, 2, ... in each row, 0 = padding,
    - `labels` int32: the token itself where it is learnt, else -1. They are aligned with the tokens and go into
      `model.apply(..., labels=..., label_weights=...)` as they are: a decoder shifts them itself,
    - `weights` float32: how much each label counts. The first token of a sequence has none.

    A row that only fills the last batch has no labels.

    Args:
        sequences: encoded rows.
        batch_size: rows of a batch, B.
        length: tokens of a row, T.
        seed: 0 to 2**32 - 1.
        shuffle: draw the orders.

    Raises:
        EmptyDataError: there are no sequences.
        RowLengthError: a sequence is longer than `length`.
        BatchingError: an argument is not what it must be.

    Example:
        >>> ids = [np.arange(1, n + 1, dtype=np.int32) for n in (3, 2, 2)]
        >>> weights = [(row > 1).astype(np.float32) for row in ids]
        >>> packed = Packed(Sequences(ids, weights, np.zeros(3, bool), 0), 2, 5, seed=0, shuffle=False)
        >>> batch = packed.make(0, 0)
        >>> batch["tokens"].tolist(), batch["segment_ids"].tolist()
        ([[1, 2, 3, 1, 2], [1, 2, 0, 0, 0]], [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]])
        >>> batch["labels"].tolist(), batch["positions"].tolist()
        ([[-1, 2, 3, -1, 2], [-1, 2, -1, -1, -1]], [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]])
    """

    def __init__(self, sequences: Sequences, batch_size: int, length: int, *, seed: int, shuffle: bool) -> None:
        self.sequences = sequences
        lengths = sequences.lengths
        if not whole(length) or length < 1:
            raise BatchingError(f"length is {length!r}, must be the tokens of a row, 1 or more")
        if len(lengths) and lengths.max() > length:
            raise RowLengthError(f"sequence {lengths.argmax()} has {lengths.max()} tokens, more than a row of {length}"
                                 f"; make rows longer, or encode with max_length={length}")
        self._bins = best_fit(lengths, int(length))
        sizes = np.sort(lengths)[::-1]
        fill = np.array([sizes[one].sum() for one in self._bins], np.int64)
        super().__init__(fill, batch_size, (length,), seed=seed, shuffle=shuffle)
        self._members = functools.lru_cache(maxsize=2)(self._assign)

    def members(self, e: int, row: int) -> np.ndarray:
        """Return the numbers of the sequences in row `row` of epoch `e`, in their order there."""
        return self._members(e)[self._bins[row]]

    def _assign(self, e: int) -> np.ndarray:
        """Return the sequence in each place, where places go from the longest to the shortest."""
        lengths = self.sequences.lengths
        order = np.arange(len(lengths), dtype=np.int64)
        if self.shuffle:
            self._random(e, 1).shuffle(order)
        return order[np.argsort(-lengths[order], kind="stable")]

    def _write(self, e: int, rows: np.ndarray, real: np.ndarray, width: int) -> Batch:
        return write(self.sequences, [self.members(e, int(row)) for row in rows], real, width)


class Padded(_OfSequences):
    """One sequence a row, in buckets of like length; see `Epochs`.

    `make` returns `tokens`, `attention_mask`, `labels`, `weights` as `Packed` does, without positions and segments.

    Args:
        sequences: encoded rows.
        batch_size: rows of a batch, B.
        buckets: widths that a batch may have, in tokens, ascending.
        seed: 0 to 2**32 - 1.
        shuffle: draw the orders; otherwise batches go from narrow to wide, for evaluation.

    Raises:
        EmptyDataError: there are no sequences.
        RowLengthError: a sequence is longer than the largest bucket.
        BatchingError: an argument is not what it must be.

    Example:
        >>> ids = [np.arange(1, n + 1, dtype=np.int32) for n in (3, 2)]
        >>> weights = [(row > 1).astype(np.float32) for row in ids]
        >>> made = Padded(Sequences(ids, weights, np.zeros(2, bool), 0), 2, (4, 8), seed=0, shuffle=False)
        >>> made.make(0, 0)["labels"].tolist()
        [[-1, 2, 3, -1], [-1, 2, -1, -1]]
    """

    def __init__(self, sequences: Sequences, batch_size: int, buckets: Sequence[int], *, seed: int = 0,
                 shuffle: bool = False) -> None:
        self.sequences = sequences
        super().__init__(sequences.lengths, batch_size, buckets, seed=seed, shuffle=shuffle)

    def _write(self, e: int, rows: np.ndarray, real: np.ndarray, width: int) -> Batch:
        batch = write(self.sequences, [row[None] for row in rows], real, width)
        return {name: batch[name] for name in ("tokens", "attention_mask", "labels", "weights")}


def write(sequences: Sequences, rows: Sequence[np.ndarray], real: np.ndarray, width: int) -> Batch:
    """Return the batch whose rows are these sequences one after another; see `Packed`.

    Args:
        sequences: where they are from.
        rows: the numbers of the sequences in each row.
        real: rows that are not `real` get no labels, bool `[B]`.
        width: T.
    """
    ids, weights = sequences.ids, sequences.weights
    tokens = [np.concatenate([ids[i] for i in row]) for row in rows]
    weight = [np.concatenate([weights[i] for i in row]) * is_real for row, is_real in zip(rows, real, strict=True)]
    labels = [np.where(w > 0, t, NOTHING) for t, w in zip(tokens, weight, strict=True)]
    segments = [np.repeat(np.arange(1, len(row) + 1), [len(ids[i]) for i in row]) for row in rows]
    return {
        "tokens": padded(tokens, width, sequences.pad_id),
        "attention_mask": padded([np.ones(len(row)) for row in tokens], width, 0),
        "positions": padded([np.concatenate([np.arange(len(ids[i])) for i in row]) for row in rows], width, 0),
        "segment_ids": padded(segments, width, 0),
        "labels": padded(labels, width, NOTHING),
        "weights": padded(weight, width, 0, np.float32)}


def best_fit(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Put items into bins, the longest first, each into the bin that it fills up best.

    Args:
        lengths: of the items, none more than `size`.
        size: of a bin.

    Returns:
        For each bin the places of its items in the order from long to short. It depends on the lengths alone, not on
        their order.

    Example:
        >>> best_fit(np.array([2, 5, 3, 3]), 8)
        [[0, 1], [2, 3]]
    """
    bins: list[list[int]] = []
    open_: list[list[int]] = [[] for _ in range(size + 1)]  # bins by the room that is left
    rooms: list[int] = []  # the rooms that some bin has, ascending
    for place, length in enumerate(sorted((int(n) for n in lengths), reverse=True)):
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            number = open_[room].pop()
            if not open_[room]:
                rooms.pop(at)
        else:
            room, number = size, len(bins)
            bins.append([])
        bins[number].append(place)
        left = room - length
        if not open_[left]:
            bisect.insort(rooms, left)
        open_[left].append(number)
    return bins
