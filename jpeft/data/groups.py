"""Rows of several texts that are compared: anchor, positive and hard negative; a chosen and a rejected answer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jpeft.data.checks import check_limit, check_text, numbers
from jpeft.data.epochs import NOTHING, Batch, Encoded, Epochs, padded
from jpeft.data.sft import Sequences
from jpeft.errors import ColumnError, DataError, EmptyDataError, MissingValueError
from jpeft.interop.tokenizer import Tokenizer

_CHUNK = 2048  # rows tokenised at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Groups(Encoded):
    """Encoded rows of as many texts each.

    Attributes:
        ids: for each text of a row (S in all), its ids in every row, int32 `[n]`.
        cut: rows that lost tokens in one of their texts, bool `[N]`.
        pad_id: id that fills short texts.
        weights: like ids, float32: how much each token is learnt; None: texts are read, not learnt.
        scores: how alike the first two texts of each row are, float32 `[N]`; None: all rows are pairs.
        least: rows of a lower score are no pairs, and weigh nothing.
        notes: what a reader must know of where they came from, such as how many rows were left out.

    Example:
        >>> row = np.array([5, 6], np.int32)
        >>> groups = Groups([[row], [row[:1]]], np.zeros(1, bool), 0)
        >>> len(groups), groups.sides, groups.lengths.tolist()
        (1, 2, [2])
    """

    ids: list[list[np.ndarray]]
    cut: np.ndarray
    pad_id: int
    weights: list[list[np.ndarray]] | None = None
    scores: np.ndarray | None = None
    least: float = 0.0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = [len(side) for side in (*self.ids, *(self.weights or ()), self.cut)]
        sizes += [] if self.scores is None else [len(self.scores)]
        if len(set(sizes)) > 1:
            raise DataError(f"ids, weights, cut, scores have lengths {sizes}; give each row one of each")

    @property
    def texts(self) -> list[list[np.ndarray]]:
        return self.ids

    @property
    def pairs(self) -> np.ndarray:
        """Which rows are pairs, bool `[N]`."""
        return np.ones(len(self), bool) if self.scores is None else self.scores >= self.least

    @property
    def sides(self) -> int:
        """Texts of a row, S."""
        return len(self.ids)

    def take(self, indices: Sequence[int] | np.ndarray) -> Groups:
        """Return some of the rows, in the order of `indices`.

        Raises:
            DataError: an index is that of no row.
        """
        some = numbers(indices, len(self))
        weights = None if self.weights is None else [[side[i] for i in some] for side in self.weights]
        return dataclasses.replace(self, ids=[[side[i] for i in some] for side in self.ids], cut=self.cut[some],
                                   weights=weights, scores=None if self.scores is None else self.scores[some])


def encode_groups(tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]], *, max_length: int) -> Groups:
    """Tokenise rows of several texts; each gets the special tokens that a text of its own has.

    Args:
        tokenizer: the model's.
        texts: what a text of a row is ("anchor", "positive") -> the texts, one a row.
        max_length: longest text in tokens; longer ones are cut and counted.

    Raises:
        EmptyDataError: there are no rows.
        MissingValueError: a text is missing or empty, or has no tokens.
        ColumnError: one is not text, or there are more of one kind than of another.
        RowLengthError: `max_length` is more than the model takes, or leaves nothing.

    Example:
        >>> import tokenizers
        >>> raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "hi": 1, "ho": 2}, "[UNK]"))
        >>> raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> made = encode_groups(Tokenizer(raw, 0, 8, False), {"anchor": ["hi"], "positive": ["hi ho"]}, max_length=4)
        >>> [side[0].tolist() for side in made.ids]
        [[1], [1, 2]]
    """
    counts = {name: len(side) for name, side in texts.items()}
    if any(isinstance(side, str) for side in texts.values()) or len(set(counts.values())) != 1:
        raise ColumnError(f"the texts are {counts}, must be as many of each; pass a list of each, one a row")
    if not next(iter(counts.values())):
        raise EmptyDataError("there are no texts to encode; read at least one row")
    special = len(tokenizer.encode([""])[0].ids)
    limit = check_limit(max_length, tokenizer.max_length, least=special + 1)
    ids: list[list[np.ndarray]] = []
    cut = np.zeros(next(iter(counts.values())), bool)
    for name, side in texts.items():
        for i, text in enumerate(side):
            check_text(i, text, name)
        parts = (tokenizer.encode(side[start:start + _CHUNK], None, limit) for start in range(0, len(side), _CHUNK))
        encoded = list(itertools.chain.from_iterable(parts))
        if empty := [i for i, one in enumerate(encoded) if len(one.ids) <= special]:
            raise MissingValueError(f"the {name} of row {empty[0]} (counted from 0, {side[empty[0]]!r:.40}) has no "
                                    "tokens: the tokenizer drops all its characters; leave the row out")
        cut |= [bool(one.overflowing) for one in encoded]
        ids.append([np.array(one.ids, np.int32) for one in encoded])
    return Groups(ids, cut, tokenizer.pad_id)


class Preferences(NamedTuple):
    """Pairs of answers, and how many rows gave none: of which a side was dropped, and with the same answer twice."""

    groups: Groups
    dropped: int
    same: int


def preferences(chosen: Sequences, rejected: Sequences) -> Preferences:
    """Put prompts with a chosen and with a rejected answer together.

    Args:
        chosen: sequences of some rows, of which the answers are learnt.
        rejected: the same rows with the other answers.

    Raises:
        EmptyDataError: no row has two different answers.

    Example:
        >>> def one(*ids):
        ...     return Sequences([np.array(ids, np.int32)], [np.float32([0, 1])], np.zeros(1, bool), 0)
        >>> made = preferences(one(5, 6), one(5, 7))
        >>> [side[0].tolist() for side in made.groups.ids], made.dropped, made.same
        ([[5, 6], [5, 7]], 0, 0)
    """
    _, left, right = np.intersect1d(chosen.rows, rejected.rows, return_indices=True)
    other = [not np.array_equal(chosen.ids[i], rejected.ids[j]) for i, j in zip(left, right, strict=True)]
    if not any(other):
        raise EmptyDataError(f"no row has a chosen and another rejected answer ({len(left)} have the same twice, as "
                             "far as max_length reaches); name other columns, or raise max_length")
    mine, theirs = chosen.take(left[other]), rejected.take(right[other])
    made = Groups([mine.ids, theirs.ids], mine.cut | theirs.cut, chosen.pad_id, [mine.weights, theirs.weights])
    return Preferences(made, len(chosen) + chosen.dropped - len(left), len(left) - len(made))


class GroupBatches(Epochs):
    """The batches of rows of several texts, as a function of (seed, epoch); see `Epochs`.

    `make` returns `tokens` and `attention_mask`, int32 `[B, S, T]`, and `weights`: of rows, float32 `[B]` (0 for a
    filler and for what is no pair), or where texts are learnt of tokens, `[B, S, T]`, beside `labels`, int32 `[B, S,
    T]`; and `scores`, float32 `[B]` (NaN for a filler), if the rows have them.

    Args:
        groups: encoded rows.
        batch_size: rows of a batch, B.
        buckets: widths that a batch may have, in tokens, ascending.
        seed: 0 to 2**32 - 1.
        shuffle: draw the orders; otherwise batches go from narrow to wide, for evaluation.

    Raises:
        EmptyDataError: there are no rows.
        RowLengthError: a text is longer than the largest bucket.
        BatchingError: an argument is not what it must be.

    Example:
        >>> row = np.array([5, 6], np.int32)
        >>> groups = Groups([[row], [row[:1]]], np.zeros(1, bool), 0)
        >>> batch = GroupBatches(groups, 2, (3,), seed=0, shuffle=False).make(0, 0)
        >>> batch["tokens"][0].tolist(), batch["weights"].tolist()
        ([[5, 6, 0], [5, 0, 0]], [1.0, 0.0])
    """

    def __init__(self, groups: Groups, batch_size: int, buckets: Sequence[int], *, seed: int = 0,
                 shuffle: bool = False) -> None:
        self.groups, self.sides = groups, groups.sides
        super().__init__(groups.lengths, batch_size, buckets, seed=seed, shuffle=shuffle)

    def _tokens(self) -> int:
        return sum(len(text) for side in self.groups.ids for text in side)

    def _write(self, e: int, rows: np.ndarray, real: np.ndarray, width: int) -> Batch:
        def texts(sides: list[list[np.ndarray]], fill: float = 0, dtype: type = np.int32) -> np.ndarray:
            return np.stack([padded([side[row] for row in rows], width, fill, dtype) for side in sides], 1)

        g = self.groups
        batch = {"tokens": texts(g.ids, g.pad_id),
                 "attention_mask": texts([[np.ones(len(text)) for text in side] for side in g.ids])}
        if g.weights is None:
            scores = {} if g.scores is None else {"scores": np.where(real, g.scores[rows], np.nan).astype(np.float32)}
            return {**batch, **scores, "weights": (real & g.pairs[rows]).astype(np.float32)}
        weights = texts(g.weights, dtype=np.float32) * real[:, None, None].astype(np.float32)
        return {**batch, "labels": np.where(weights > 0, batch["tokens"], NOTHING), "weights": weights}

    def _content(self) -> tuple[int, Iterable[np.ndarray]]:
        g = self.groups
        scores = () if g.scores is None else (g.scores, np.array([g.least], np.float32))
        return g.pad_id, (*scores, *(text for side in (*g.ids, *(g.weights or ())) for text in side))
