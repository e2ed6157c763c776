"""Splits: every row once, the asked sizes, labels in proportion, the same rows everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jpeft.data.split import split
from jpeft.errors import SplitError

LABELS = ["a"] * 60 + ["b"] * 30 + ["c"] * 10


@pytest.mark.parametrize(("test", "validation", "sizes"), [
    (20, 10, (70, 10, 20)), (0.2, 0.1, (70, 10, 20)), (0, 0, (100, 0, 0)), (0.0, 5, (95, 5, 0)),
    (np.int64(3), np.float64(0.5), (47, 50, 3)), (98, 1, (1, 1, 98)), (0.126, 0.0149, (86, 1, 13)),
])
def test_sizes(test: Any, validation: Any, sizes: tuple[int, int, int]) -> None:
    parts = split(100, test=test, validation=validation, seed=3)
    assert tuple(len(part) for part in parts) == sizes
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


def test_the_rows_are_the_same_everywhere() -> None:
    """Golden: results of earlier releases stay comparable."""
    parts = split(12, test=3, validation=2, seed=7)
    assert [part.tolist() for part in parts] == [[1, 3, 4, 6, 8, 9, 11], [0, 5], [2, 7, 10]]
    parts = split(12, test=3, validation=2, seed=7, labels=[0, 1, 1] * 4)
    assert [part.tolist() for part in parts] == [[1, 4, 5, 6, 8, 9, 11], [2, 3], [0, 7, 10]]


def test_seeds_differ_and_the_test_rows_do_not_depend_on_validation() -> None:
    first = split(100, test=20, validation=10, seed=0, labels=LABELS)
    assert (first.test == split(100, test=20, validation=30, seed=0, labels=LABELS).test).all()
    assert set(first.test) != set(split(100, test=20, validation=10, seed=1, labels=LABELS).test)


@pytest.mark.parametrize(("test", "validation"), [(20, 10), (17, 13), (0.33, 0.33), (1, 1)])
def test_labels_are_in_proportion_to_within_one_row(test: Any, validation: Any) -> None:
    parts = split(100, test=test, validation=validation, seed=5, labels=LABELS)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    for part in parts:
        for name, count in (("a", 60), ("b", 30), ("c", 10)):
            found = sum(LABELS[i] == name for i in part)
            assert abs(found - len(part) * count / 100) <= 1
    assert [len(part) for part in parts] == [len(part) for part in split(100, test=test, validation=validation, seed=5)]


def test_labels_may_be_any_values() -> None:
    for labels in (np.array([0, 1] * 5), [None, "x"] * 5, [True, False] * 5):
        parts = split(10, test=2, validation=2, seed=0, labels=labels)
        assert [str(labels[i]) for i in parts.test].count(str(labels[0])) == 1


@pytest.mark.parametrize(("arguments", "said"), [
    ({"test": 8, "validation": 2}, r"test=8 \(8 rows\) and validation=2 \(2 rows\) leave no row of 10 to train on"),
    ({"test": 0.5, "validation": 0.5}, r"test=0\.5 \(5 rows\) .* make them smaller"),
    ({"n": 0}, "leave no row of 0 to train on"),
    ({"test": -1}, "test is -1, must be a number of rows or a part of them between 0 and 1"),
    ({"test": True}, "test is True"),
    ({"validation": "10"}, "validation is '10'"),
    ({"test": float("nan")}, "test is nan"),
    ({"test": 2.0}, r"test is 2\.0: a float is a part .* for 2 rows write the integer 2"),
    ({"validation": 0.01}, r"validation=0\.01 of 10 rows is less than one row; use a number"),
    ({"labels": [0, 1]}, "2 labels for 10 rows; pass one for each"),
    ({"test": 6, "labels": [0] * 9 + [1]}, r"no row with the label '1' .* \(1 of its 1 go to test and 0 to valid"),
    ({"seed": -1}, "seed is -1, must be an integer from 0"),
    ({"seed": 0.5}, r"seed is 0\.5"),
    ({"seed": 2**32}, "seed is 4294967296"),
])
def test_what_does_not_fit_is_an_error(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(SplitError, match=said) as caught:
        split(**{"n": 10, "test": 1, "validation": 1, "seed": 0, **arguments})
    assert "\n" not in str(caught.value)
