"""Texts and labels of a classification data set, as ids."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from jpeft.data.checks import check_text, missing, numbers
from jpeft.data.epochs import Encoded
from jpeft.errors import (
    ColumnError,
    DataError,
    EmptyDataError,
    LabelError,
    MissingValueError,
    RowLengthError,
    nearest,
)

_CHUNK = 2048  # rows tokenised at a time: the encodings that the tokenizer returns are far larger than the ids
_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")


class Encodes(Protocol):
    """What is needed of `jpeft.interop.tokenizer.Tokenizer`."""

    @property
    def pad_id(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def token_types(self) -> bool: ...
    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None,
               max_length: int | None = None) -> list[Any]:
        """Return an object with `ids` and `type_ids` for each text."""


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Encoded):
    """Encoded rows.

    Attributes:
        ids: token ids of each row, int32 `[length]`.
        labels: class numbers, int32 `[N]`.
        type_ids: token types of each row, like `ids`; None for a model that has none.
        cut: rows that lost tokens to `max_length`, bool `[N]`.
        pad_id: id that fills short rows.
        notes: what a reader must know of where they came from, such as how many rows were left out.
    """

    ids: list[np.ndarray]
    labels: np.ndarray
    type_ids: list[np.ndarray] | None
    cut: np.ndarray
    pad_id: int
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parts = (self.ids, self.labels, self.cut, self.ids if self.type_ids is None else self.type_ids)
        if len({len(part) for part in parts}) > 1:
            raise DataError(f"ids, labels, cut, type_ids have lengths {[len(part) for part in parts]}; give each row "
                            "one of each")

    @property
    def texts(self) -> tuple[list[np.ndarray], ...]:
        return (self.ids,)

    def take(self, indices: Sequence[int] | np.ndarray) -> Examples:
        """Return some of the rows, in the order of `indices`.

        Raises:
            DataError: an index is that of no row.
        """
        rows = numbers(indices, len(self))
        types = None if self.type_ids is None else [self.type_ids[i] for i in rows]
        return Examples([self.ids[i] for i in rows], self.labels[rows], types, self.cut[rows], self.pad_id,
                        self.notes)


def encode(tokenizer: Encodes, texts: Sequence[str], labels: Sequence[Any], *, classes: Sequence[str] | int,
           max_length: int) -> Examples:
    """Tokenise texts and number their labels.

    Args:
        tokenizer: a `jpeft.interop.tokenizer.Tokenizer`.
        texts: one text per row.
        labels: one label per row: the name of a class, or its number as an int, bool or string.
        classes: the names of the classes in the order of their numbers, or how many there are. Where a name is itself
            a number, labels are names.
        max_length: longest row in tokens, special tokens included; longer ones are cut and counted.

    Raises:
        EmptyDataError: there are no rows.
        MissingValueError: a text is empty or missing, or a label is missing.
        LabelError: a label is none of the classes, or the classes are not two or more different ones.
        RowLengthError: `max_length` is more than the model takes, or leaves no room for text.
        ColumnError: a text is not text, or there are more texts than labels or the reverse.

    Example:
        >>> import tokenizers
        >>> from jpeft.interop.tokenizer import Tokenizer
        >>> raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2}, "[UNK]"))
        >>> raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> examples = encode(Tokenizer(raw, 0, 8, False), ["good", "not good at all"], ["yes", "no"],
        ...                   classes=["no", "yes"], max_length=3)
        >>> [row.tolist() for row in examples.ids], examples.labels.tolist(), examples.truncated
        ([[2], [1, 2, 1]], [1, 0], 1)
    """
    if isinstance(texts, str) or len(texts) != len(labels):
        raise ColumnError(f"there are {len(texts)} texts and {len(labels)} labels; pass a list of each, one a row")
    if not len(texts):
        raise EmptyDataError("there are no texts to encode; read at least one row")
    if isinstance(max_length, bool) or not isinstance(max_length, int | np.integer):
        raise RowLengthError(f"max_length is {max_length!r}, must be a whole number of tokens")
    if max_length > tokenizer.max_length:
        raise RowLengthError(f"max_length is {max_length}, but the model takes at most {tokenizer.max_length} tokens; "
                             f"set max_length to {tokenizer.max_length} or less")
    special = len(tokenizer.encode([""])[0].ids)
    if max_length <= special:
        raise RowLengthError(f"max_length is {max_length}, but special tokens alone take {special}; set it to "
                             f"{special + 1} or more")
    number = _numbering(classes)
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    cut = np.zeros(len(texts), bool)
    for i, text in enumerate(texts):
        check_text(i, text)
    labelled = np.array([number(i, label, texts[i]) for i, label in enumerate(labels)], np.int32)
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start:start + _CHUNK]
        rows = list(tokenizer.encode(chunk))
        long = [j for j, row in enumerate(rows) if len(row.ids) > max_length]
        for j, row in zip(long, tokenizer.encode([chunk[j] for j in long], None, int(max_length)), strict=True):
            rows[j] = row
        cut[[start + j for j in long]] = True
        for i, row in enumerate(rows, start):
            if len(row.ids) <= special:
                raise MissingValueError(f"{_row(i, texts[i])} has no tokens: the tokenizer drops all its characters; "
                                        "leave the row out")
            ids.append(np.array(row.ids, np.int32))
            if tokenizer.token_types:
                types.append(np.array(row.type_ids, np.int32))
    return Examples(ids, labelled, types if tokenizer.token_types else None, cut, tokenizer.pad_id)


def _row(i: int, text: Any) -> str:
    short = text if not isinstance(text, str) or len(text) <= 40 else text[:40] + "..."
    return f"row {i} (counted from 0, {short!r})"


def _numbering(classes: Sequence[str] | int) -> Callable[[int, Any, str], int]:
    """Return the function `(row, label, text) -> class number` of these classes."""
    names: list[str] = []
    count = 0
    if isinstance(classes, int | np.integer):
        count = int(classes)
    elif not isinstance(classes, str) and all(type(one) in (str, int) for one in classes):
        names = [str(one) for one in classes]
        count = len(set(names))
    if count < max(2, len(names)):
        raise LabelError(f"classes are {classes!r}, must be two or more different names, or their number")
    by_name = {name: i for i, name in enumerate(names)}
    by_number = not any(_NUMBER.fullmatch(name) for name in names)
    known = f"the {count} classes {', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}" if names else \
        f"the {count} classes 0 to {count - 1}"

    def number(i: int, label: Any, text: str) -> int:
        if missing(label) or (isinstance(label, str) and not label.strip()):
            raise MissingValueError(f"{_row(i, text)} has no label; fill it in or leave the row out")
        plain = str(label).strip()
        if isinstance(label, float | np.floating) and float(label).is_integer():
            plain = str(int(label))
        for name in (str(label), plain):
            if name in by_name:
                return by_name[name]
        if isinstance(label, bool | np.bool_):
            if plain.lower() in by_name:
                return by_name[plain.lower()]
            plain = str(int(label))
        if by_number and _NUMBER.fullmatch(plain) and 0 <= (value := int(plain.partition(".")[0])) < count:
            return value
        hint = f" ({nearest(plain, names, 1)})" if names else ""
        raise LabelError(f"{_row(i, text)} has the label {label!r}, which is none of {known}{hint}; correct the row, "
                         "add the class, or leave such rows out")

    return number
