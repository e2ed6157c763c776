"""What every kind of row is checked for, with the number of the row in the message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jpeft.errors import ColumnError, DataError, MissingValueError, RowLengthError


def missing(value: Any) -> bool:
    """Return whether a table's value stands for none.

    Example:
        >>> missing(None), missing(float("nan")), missing("")
        (True, True, False)
    """
    return value is None or (isinstance(value, float | np.floating) and value != value)


def whole(value: object) -> bool:
    """Return whether a value is an integer and no bool.

    Example:
        >>> whole(3), whole(True), whole(3.0)
        (True, False, False)
    """
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_text(i: int, text: Any, name: str = "text") -> None:
    """Raise if a row's text is none.

    Args:
        i: the number of the row, counted from 0.
        text: its text.
        name: what the text is: "text", "prompt", ...

    Raises:
        MissingValueError: it is missing or empty.
        ColumnError: it is no string, or holds half of a character.

    Example:
        >>> check_text(0, "good")
    """
    if missing(text):
        raise MissingValueError(f"row {i} (counted from 0) has no {name}; fill it in or leave the row out")
    if not isinstance(text, str):
        raise ColumnError(f"the {name} of row {i} (counted from 0) is a {type(text).__name__}, {text!r:.60}, expected "
                          "a string; name the column that holds the texts")
    if not text or text.isspace():
        raise MissingValueError(f"row {i} (counted from 0) has an empty {name}, {text!r:.20}; fill it in or leave the "
                                "row out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ColumnError(f"the {name} of row {i} (counted from 0) holds {text[error.start]!r}, half of a character, "
                          f"in place {error.start}; correct the row") from error


def check_limit(value: Any, most: int, name: str = "max_length", least: int = 2) -> int:
    """Return a limit on the tokens of a row, as an int.

    Args:
        value: the limit.
        most: what the model takes.
        name: its name, for messages.
        least: the smallest that makes sense.

    Raises:
        RowLengthError: it is no whole number, or out of bounds.

    Example:
        >>> check_limit(64, 512)
        64
    """
    if not whole(value):
        raise RowLengthError(f"{name} is {value!r}, must be a whole number of tokens")
    if value > most:
        raise RowLengthError(f"{name} is {value}, but the model takes at most {most} tokens; set {name} to {most} or "
                             "less")
    if value < least:
        raise RowLengthError(f"{name} is {value}, which leaves no token to learn; set it to {least} or more")
    return int(value)


def numbers(indices: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Return row numbers as an array.

    Args:
        indices: row numbers.
        count: how many rows there are.

    Raises:
        DataError: one is that of no row.

    Example:
        >>> numbers([2, 0], 3).tolist()
        [2, 0]
    """
    rows = np.asarray(indices, dtype=None if len(indices) else np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise DataError(f"indices are {rows.dtype} of shape {rows.shape}, must be a list of row numbers")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise DataError(f"indices go from {rows.min()} to {rows.max()}, but there are {count} rows, counted "
                        "from 0; take the indices from a split of these rows")
    return rows
