"""Batches of rows of like length: few shapes, little padding, every row once per epoch."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from jpeft.data.classify import Examples
from jpeft.errors import BatchingError, EmptyDataError, RowLengthError

Batch = dict[str, np.ndarray]


class Batches:
    """The batches of every epoch, as a function of (seed, epoch): nothing is stored, any batch can be made at any time.

    A row belongs to the narrowest bucket that holds it. Each epoch draws the rows in random order, fills batches bucket
    by bucket, hands what does not fill one up to the next bucket, and draws the order of the batches. So an epoch has
    `ceil(rows / batch_size)` batches, of which at most one is short; that one is filled up with copies of its first row
    that weigh nothing. Every batch has `batch_size` rows and a bucket's width: there are at most as many shapes as
    buckets, and each epoch has the same ones.

    Args:
        examples: encoded rows.
        batch_size: rows of a batch, B.
        buckets: widths that a batch may have, in tokens, ascending.
        seed: 0 to 2**32 - 1.
        shuffle: draw the orders; otherwise rows stay in their order within a bucket, and batches go from narrow to
            wide, for evaluation.

    Raises:
        EmptyDataError: there are no rows.
        RowLengthError: a row is longer than the largest bucket.
        BatchingError: an argument is not what it must be.

    Example:
        >>> rows = [np.arange(1, n + 1, dtype=np.int32) for n in (2, 5, 3)]
        >>> examples = Examples(rows, np.array([0, 1, 1], np.int32), None, np.zeros(3, bool), pad_id=0)
        >>> batches = Batches(examples, 2, (4, 8), seed=0, shuffle=False)
        >>> len(batches), batches.make(0, 0)["tokens"].tolist()
        (2, [[1, 2, 0, 0], [1, 2, 3, 0]])
        >>> batches.make(0, 1)["tokens"].shape, batches.make(0, 1)["weights"].tolist()
        ((2, 8), [1.0, 0.0])
    """

    def __init__(self, examples: Examples, batch_size: int, buckets: Sequence[int], *, seed: int,
                 shuffle: bool) -> None:
        if not _whole(batch_size) or batch_size < 1:
            raise BatchingError(f"batch_size is {batch_size!r}, must be a whole number of rows, 1 or more")
        if not _whole(seed) or not 0 <= seed < 2**32:
            raise BatchingError(f"seed is {seed!r}, must be an integer from 0 to 2**32 - 1")
        widths = list(buckets) if isinstance(buckets, Sequence | np.ndarray) and not isinstance(buckets, str) else []
        if not widths or not all(_whole(w) and w > 0 for w in widths) or not all(np.diff(widths) > 0):
            raise BatchingError(f"buckets are {buckets!r}, must be widths in tokens, ascending, such as (16, 32, 64)")
        if not len(examples):
            raise EmptyDataError("there are no rows to make batches of; check the filter and the sizes of the split")
        self.examples = examples
        self.batch_size = int(batch_size)
        self.buckets = tuple(int(w) for w in widths)
        self.seed = int(seed)
        self.shuffle = bool(shuffle)
        self._lengths = examples.lengths
        longest = int(self._lengths.argmax())
        if self._lengths[longest] > self.buckets[-1]:
            raise RowLengthError(f"row {longest} has {self._lengths[longest]} tokens, more than the largest bucket of "
                                 f"{self.buckets[-1]}; add a bucket, or encode with max_length={self.buckets[-1]}")
        self._bucket = np.searchsorted(self.buckets, self._lengths)
        # A border of epochs needs two at once: this one and the one that is fetched ahead.
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return -(-len(self.examples) // self.batch_size)

    def epoch(self, e: int) -> list[tuple[np.ndarray, int]]:
        """Return `(row numbers, width)` of each batch of epoch `e`, counted from 0; filler rows are not among them.

        Raises:
            BatchingError: `e` is negative.
        """
        if not _whole(e) or e < 0:
            raise BatchingError(f"epoch is {e!r}, must be an integer, 0 or more")
        return list(self._epoch(int(e)))

    def make(self, e: int, i: int) -> Batch:
        """Return batch `i` of epoch `e`, padded on the right.

        Returns:
            int32 `[B, T]`: `tokens`, `attention_mask`, and `token_types` if the examples have them; `[B]`: `labels`
            (int32) and `weights` (float32; 1 for a row, 0 for a filler).

        Raises:
            BatchingError: there is no such batch.
        """
        epoch = self.epoch(e)
        if not _whole(i) or not 0 <= i < len(epoch):
            raise BatchingError(f"there is no batch {i!r}; an epoch has {len(epoch)} batches, counted from 0")
        rows, width = epoch[i]
        shape = (self.batch_size, width)
        weights = np.zeros(self.batch_size, np.float32)
        weights[:len(rows)] = 1
        rows = np.concatenate([rows, np.full(self.batch_size - len(rows), rows[0])])
        batch: Batch = {"tokens": np.full(shape, self.examples.pad_id, np.int32),
                        "attention_mask": np.zeros(shape, np.int32)}
        types = self.examples.type_ids
        if types is not None:
            batch["token_types"] = np.zeros(shape, np.int32)
        for b, row in enumerate(rows):
            ids = self.examples.ids[row]
            batch["tokens"][b, :len(ids)] = ids
            batch["attention_mask"][b, :len(ids)] = 1
            if types is not None:
                batch["token_types"][b, :len(ids)] = types[row]
        batch["labels"] = self.examples.labels[rows].astype(np.int32)
        batch["weights"] = weights
        return batch

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that occur, ascending: one compiled program each."""
        return tuple(sorted({width for _, width in self._epoch(0)}))

    def waste(self) -> float:
        """Return the fraction of an epoch's tokens that is padding or filler; the same for every epoch."""
        slots = self.batch_size * sum(width for _, width in self._epoch(0))
        return 1 - int(self._lengths.sum()) / slots

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the rows, their order, or what decides on the batches."""
        said = (self.batch_size, self.buckets, self.seed, self.shuffle, self.examples.pad_id)
        digest = hashlib.sha256(repr(said).encode())
        for array in (self._lengths, self.examples.labels, *self.examples.ids, *(self.examples.type_ids or ())):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def _draw(self, e: int) -> tuple[tuple[np.ndarray, int], ...]:
        # RandomState, and not Generator: NumPy promises that its stream stays as it is.
        random = np.random.RandomState(np.array([self.seed & 0xFFFFFFFF, e & 0xFFFFFFFF, e >> 32], np.uint32))
        rows = np.arange(len(self.examples), dtype=np.int64)
        if self.shuffle:
            random.shuffle(rows)
        out: list[tuple[np.ndarray, int]] = []
        left = rows[:0]
        for bucket, width in enumerate(self.buckets):
            ready = np.concatenate([left, rows[self._bucket[rows] == bucket]])
            full = len(ready) - len(ready) % self.batch_size
            out += [(part, width) for part in np.split(ready[:full], full // self.batch_size)] if full else []
            left = ready[full:]
        if len(left):
            out.append((left, self.buckets[int(self._bucket[left].max())]))
        for part, _ in out:
            part.flags.writeable = False
        return tuple(out[i] for i in random.permutation(len(out))) if self.shuffle else tuple(out)


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
