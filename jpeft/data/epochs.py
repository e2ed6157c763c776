"""What every kind of batches shares: which rows, how wide, in which order, as a function of (seed, epoch)."""

from __future__ import annotations

import abc
import functools
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from jpeft.data.checks import whole
from jpeft.errors import BatchingError, EmptyDataError, RowLengthError

Batch = dict[str, np.ndarray]
Part = tuple[np.ndarray, int]  # row numbers of a batch, and its width
NOTHING = -1  # the label of a token that is not to be predicted


class Encoded(abc.ABC):
    """Rows of token ids, each of one or more texts.

    Attributes:
        cut: rows that lost tokens to a length limit, bool `[N]`.
    """

    cut: np.ndarray

    @property
    @abc.abstractmethod
    def texts(self) -> Sequence[list[np.ndarray]]:
        """The texts of a row, S in all: of each the ids in every row, int32 `[n]`."""

    def __len__(self) -> int:
        return len(self.cut)

    @property
    def truncated(self) -> int:
        """Number of rows that lost tokens."""
        return int(self.cut.sum())

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of the longest text of each row, int64 `[N]`."""
        return np.array([max(map(len, row)) for row in zip(*self.texts, strict=True)], np.int64)


class Epochs(abc.ABC):
    """The batches of every epoch: nothing is stored, any batch can be made at any time.

    A row belongs to the narrowest bucket that holds it. Each epoch draws the rows in random order, fills batches bucket
    by bucket, hands what does not fill one up to the next bucket, and draws the order of the batches. So an epoch has
    `ceil(rows / batch_size)` batches, of which at most one is short; that one is filled up with copies of its first row
    that weigh nothing. Every batch has `batch_size` rows and a bucket's width: there are at most as many shapes as
    buckets, and each epoch has the same ones.

    A subclass sets what it holds, then calls `__init__`, and says how the rows of a batch are written.

    Attributes:
        sides: texts of a row, each of the batch's width.
    """

    sides: int = 1

    def __init__(self, lengths: np.ndarray, batch_size: int, buckets: Sequence[int], *, seed: int,
                 shuffle: bool) -> None:
        """Check the arguments.

        Args:
            lengths: tokens of each row.
            batch_size: rows of a batch, B.
            buckets: widths that a batch may have, in tokens, ascending.
            seed: 0 to 2**32 - 1.
            shuffle: draw the orders; otherwise rows stay in their order within a bucket, and batches go from narrow to
                wide, for evaluation.

        Raises:
            EmptyDataError: there are no rows.
            RowLengthError: a row is longer than the largest bucket.
            BatchingError: an argument is not what it must be.
        """
        if not whole(batch_size) or batch_size < 1:
            raise BatchingError(f"batch_size is {batch_size!r}, must be a whole number of rows, 1 or more")
        if not whole(seed) or not 0 <= seed < 2**32:
            raise BatchingError(f"seed is {seed!r}, must be an integer from 0 to 2**32 - 1")
        widths = list(buckets) if isinstance(buckets, Sequence | np.ndarray) and not isinstance(buckets, str) else []
        if not widths or not all(whole(w) and w > 0 for w in widths) or not all(np.diff(widths) > 0):
            raise BatchingError(f"buckets are {buckets!r}, must be widths in tokens, ascending, such as (16, 32, 64)")
        if not len(lengths):
            raise EmptyDataError("there are no rows to make batches of; check the filter and the sizes of the split")
        self.batch_size = int(batch_size)
        self.buckets = tuple(int(w) for w in widths)
        self.seed = int(seed)
        self.shuffle = bool(shuffle)
        self._lengths = lengths
        longest = int(lengths.argmax())
        if lengths[longest] > self.buckets[-1]:
            raise RowLengthError(f"row {longest} has {lengths[longest]} tokens, more than the largest bucket of "
                                 f"{self.buckets[-1]}; add a bucket, or encode with max_length={self.buckets[-1]}")
        self._bucket = np.searchsorted(self.buckets, lengths)
        # A border of epochs needs two at once: this one and the one that is fetched ahead.
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return -(-len(self._lengths) // self.batch_size)

    def epoch(self, e: int) -> list[Part]:
        """Return `(row numbers, width)` of each batch of epoch `e`, counted from 0; filler rows are not among them.

        Raises:
            BatchingError: `e` is negative.
        """
        if not whole(e) or e < 0:
            raise BatchingError(f"epoch is {e!r}, must be an integer, 0 or more")
        return list(self._epoch(int(e)))

    def make(self, e: int, i: int) -> Batch:
        """Return batch `i` of epoch `e`, padded on the right; the class says what it holds.

        Raises:
            BatchingError: there is no such batch.
        """
        epoch = self.epoch(e)
        if not whole(i) or not 0 <= i < len(epoch):
            raise BatchingError(f"there is no batch {i!r}; an epoch has {len(epoch)} batches, counted from 0")
        rows, width = epoch[i]
        real = np.arange(self.batch_size) < len(rows)
        return self._write(int(e), np.concatenate([rows, np.full(self.batch_size - len(rows), rows[0])]), real, width)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that occur, ascending: one compiled program each."""
        return tuple(sorted({width for _, width in self._epoch(0)}))

    def waste(self) -> float:
        """Return the fraction of an epoch's tokens that is padding or filler; the same for every epoch."""
        return 1 - self._tokens() / self._slots()

    def per_batch(self) -> float:
        """Return how many tokens a batch has on average, padding and filler not counted."""
        return self._slots() * (1 - self.waste()) / len(self)

    def _slots(self) -> int:
        return self.sides * self.batch_size * sum(width for _, width in self._epoch(0))

    def _tokens(self) -> int:
        """Return the tokens of all rows."""
        return int(self._lengths.sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the rows, their order, or what decides on the batches."""
        pad_id, arrays = self._content()
        digest = hashlib.sha256(repr((self.batch_size, self.buckets, self.seed, self.shuffle, pad_id)).encode())
        for array in (self._lengths, *arrays):
            digest.update(array.astype("<f8" if array.dtype.kind == "f" else "<i8").tobytes())
        return digest.hexdigest()[:16]

    @abc.abstractmethod
    def _write(self, e: int, rows: np.ndarray, real: np.ndarray, width: int) -> Batch:
        """Return the batch of these rows in epoch `e`; those that are not `real` must weigh nothing."""

    @abc.abstractmethod
    def _content(self) -> tuple[int, Iterable[np.ndarray]]:
        """Return the id that fills rows, and all arrays that the batches are made of."""

    def _random(self, e: int, stream: int = 0) -> np.random.RandomState:
        # RandomState, and not Generator: NumPy promises that its stream stays as it is.
        words = [self.seed & 0xFFFFFFFF, e & 0xFFFFFFFF, e >> 32, *([stream] if stream else [])]
        return np.random.RandomState(np.array(words, np.uint32))

    def _draw(self, e: int) -> tuple[Part, ...]:
        random = self._random(e)
        rows = np.arange(len(self._lengths), dtype=np.int64)
        if self.shuffle:
            random.shuffle(rows)
        out: list[Part] = []
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


def padded(rows: Sequence[np.ndarray], width: int, fill: int | float, dtype: type = np.int32) -> np.ndarray:
    """Return rows as one array `[B, width]`, filled up on the right.

    Example:
        >>> padded([np.array([1, 2]), np.array([3])], 3, 0).tolist()
        [[1, 2, 0], [3, 0, 0]]
    """
    out: np.ndarray = np.full((len(rows), width), fill, dtype)
    for b, row in enumerate(rows):
        out[b, :len(row)] = row
    return out
