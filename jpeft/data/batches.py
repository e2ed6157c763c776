"""Batches of rows of like length: few shapes, little padding, every row once per epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jpeft.data.classify import Examples
from jpeft.data.epochs import Batch, Epochs, padded


class Batches(Epochs):
    """The batches of a classification set, as a function of (seed, epoch); see `Epochs`.

    `make` returns int32 `[B, T]`: `tokens`, `attention_mask`, and `token_types` if the examples have them; `[B]`:
    `labels` (int32) and `weights` (float32; 1 for a row, 0 for a filler).

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
        self.examples = examples
        super().__init__(examples.lengths, batch_size, buckets, seed=seed, shuffle=shuffle)

    def _write(self, e: int, rows: np.ndarray, real: np.ndarray, width: int) -> Batch:
        ids = [self.examples.ids[row] for row in rows]
        types = self.examples.type_ids
        return {
            "tokens": padded(ids, width, self.examples.pad_id),
            "attention_mask": padded([np.ones(len(row)) for row in ids], width, 0),
            **({} if types is None else {"token_types": padded([types[row] for row in rows], width, 0)}),
            "labels": self.examples.labels[rows].astype(np.int32),
            "weights": real.astype(np.float32)}

    def _content(self) -> tuple[int, Iterable[np.ndarray]]:
        e = self.examples
        return e.pad_id, (e.labels, *e.ids, *(e.type_ids or ()))
