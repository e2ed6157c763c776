"""Which rows are for training, for choosing and for reporting: the same ones on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jpeft.errors import SplitError


class Split(NamedTuple):
    """Row numbers of the three parts, int64 and ascending; together they are every row once."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split(n: int, *, test: int | float, validation: int | float, seed: int,
          labels: Sequence[Any] | np.ndarray | None = None) -> Split:
    """Divide `n` rows into train, validation and test, at random.

    The result depends on nothing but the arguments. The test rows do not depend on `validation`.

    Args:
        n: number of rows.
        test: a number of rows (int) or a part of all rows (float below 1); 0 for none.
        validation: the same.
        seed: 0 to 2**32 - 1.
        labels: one per row: each part gets every label in proportion, to within one row.

    Returns:
        A `Split`; `train` is what the other two leave.

    Raises:
        SplitError: the parts do not fit, or a part or a label would be left with no row to train on.

    Example:
        >>> parts = split(10, test=0.2, validation=1, seed=0)
        >>> [len(part) for part in parts]
        [7, 1, 2]
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise SplitError(f"seed is {seed!r}, must be an integer from 0 to 2**32 - 1")
    n_test, n_validation = _count("test", test, n), _count("validation", validation, n)
    if n_test + n_validation >= n:
        raise SplitError(f"test={test!r} ({n_test} rows) and validation={validation!r} ({n_validation} rows) leave no "
                         f"row of {n} to train on; make them smaller")
    # RandomState, and not Generator: NumPy promises that its stream stays as it is.
    order = np.random.RandomState(seed).permutation(n).astype(np.int64)
    if labels is None:
        queues, names = [order], [""]
    else:
        if len(labels) != n:
            raise SplitError(f"there are {len(labels)} labels for {n} rows; pass one for each row")
        values, which = np.unique(np.array([str(label) for label in labels]), return_inverse=True)
        queues, names = [order[which[order] == c] for c in range(len(values))], values.tolist()
    sizes = [len(queue) for queue in queues]
    for_test = _share(n_test, sizes)
    for_validation = _share(n_validation, [size - t for size, t in zip(sizes, for_test, strict=True)])
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for name, queue, t, v in zip(names, queues, for_test, for_validation, strict=True):
        if len(queue) == t + v:
            raise SplitError(f"no row with the label {name!r} would be left to train on ({t} of its {len(queue)} go to "
                             f"test and {v} to validation); make the parts smaller, or leave such rows out")
        for part, rows in zip(parts, (queue[t + v:], queue[t:t + v], queue[:t]), strict=True):
            part.append(rows)
    return Split(*(np.sort(np.concatenate(part)) for part in parts))


def _count(name: str, size: int | float, n: int) -> int:
    """Return the number of rows that a size means."""
    if isinstance(size, bool) or not isinstance(size, int | float | np.integer | np.floating) or not size >= 0:
        raise SplitError(f"{name} is {size!r}, must be a number of rows or a part of them between 0 and 1")
    if isinstance(size, int | np.integer):
        return int(size)
    if size >= 1:
        raise SplitError(f"{name} is {size!r}: a float is a part of the rows and must be below 1; for {size:g} rows "
                         f"write the integer {size:.0f}")
    count = round(n * float(size))
    if size > 0 and count == 0:
        raise SplitError(f"{name}={size!r} of {n} rows is less than one row; use a number of rows")
    return count


def _share(total: int, sizes: list[int]) -> list[int]:
    """Divide `total` in proportion to `sizes` by largest remainders; ties go to the first."""
    everything = sum(sizes)
    shares = [total * size // everything for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda c: (-(total * sizes[c] % everything), c))
    for c in by_remainder[: total - sum(shares)]:
        shares[c] += 1
    return shares
