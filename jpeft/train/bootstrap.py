"""Whether one model is better than another on the same rows: the difference and its paired bootstrap interval."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jpeft.errors import ReportError

_AT_ONCE = 500  # draws of all rows that are in memory together


@dataclasses.dataclass(frozen=True)
class Gain:
    """A difference of accuracies and its 95 % interval, as shares of 1.

    Example:
        >>> str(Gain(0.012, -0.001, 0.025))
        '+1.20 [-0.10, +2.50]'
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.2f} [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


def gain(ours: Any, theirs: Any, resamples: int = 10_000, seed: int = 0) -> Gain:
    """Bootstrap the difference of two mean accuracies on the same rows.

    Runs with several seeds are averaged row by row first; then rows are drawn with replacement, both sides together.
    The interval is that of the percentiles 2.5 and 97.5: it is about the choice of test rows, not that of seeds.

    Args:
        ours: which rows are right, bool `[N]`, or `[seeds, N]`.
        theirs: the same; the number of seeds may differ.
        resamples: draws of N rows.
        seed: of the draws.

    Raises:
        ReportError: the two are not about the same number of rows, or there are none.

    Example:
        >>> gain([True] * 8 + [False] * 2, [True] * 6 + [False] * 4)
        Gain(mean=0.2, low=0.0, high=0.5)
    """
    mine, other = np.atleast_2d(ours), np.atleast_2d(theirs)
    if mine.shape[1] != other.shape[1] or not mine.size or not other.size:
        raise ReportError(f"accuracies on {mine.shape[1]} and {other.shape[1]} rows cannot be paired; test both on the "
                          "same rows")
    each = mine.mean(0) - other.mean(0)
    rng, means = np.random.default_rng(seed), []
    for start in range(0, resamples, _AT_ONCE):
        drawn = rng.integers(0, len(each), (min(_AT_ONCE, resamples - start), len(each)))
        means.append(each[drawn].mean(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Gain(float(each.mean()), float(low), float(high))
