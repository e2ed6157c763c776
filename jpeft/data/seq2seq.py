"""Texts and what they become, as ids for an encoder and a decoder, and their batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from jpeft.data.checks import check_limit, check_text, numbers
from jpeft.data.epochs import NOTHING, Batch, Encoded, Epochs, padded
from jpeft.data.sft import end_id
from jpeft.errors import ColumnError, DataError, EmptyDataError, MissingValueError
from jpeft.interop.tokenizer import Tokenizer

_CHUNK = 2048  # rows tokenised at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs(Encoded):
    """Encoded pairs.

    Attributes:
        sources: ids that the encoder reads, int32 `[n]` for each row.
        targets: ids that the decoder should write, the end token last unless it was cut off.
        cut: rows that lost tokens on either side, bool `[N]`.
        pad_id: id that fills short rows.
    """

    sources: list[np.ndarray]
    targets: list[np.ndarray]
    cut: np.ndarray
    pad_id: int

    def __post_init__(self) -> None:
        sizes = [len(part) for part in (self.sources, self.targets, self.cut)]
        if len(set(sizes)) > 1:
            raise DataError(f"sources, targets, cut have lengths {sizes}; give each row one of each")

    @property
    def texts(self) -> tuple[list[np.ndarray], ...]:
        return (self.sources, self.targets)

    @property
    def learnt(self) -> int:
        """Number of tokens that are learnt."""
        return sum(len(row) for row in self.targets)

    def take(self, indices: Sequence[int] | np.ndarray) -> Pairs:
        """Return some of the rows, in the order of `indices`.

        Raises:
            DataError: an index is that of no row.
        """
        some = numbers(indices, len(self))
        return Pairs([self.sources[i] for i in some], [self.targets[i] for i in some], self.cut[some], self.pad_id)


def encode_pairs(tokenizer: Tokenizer, sources: Sequence[str], targets: Sequence[str], *, max_length: int,
                 max_target_length: int | None = None) -> Pairs:
    """Tokenise texts and what they become; a target ends with the end token.

    Args:
        tokenizer: the model's; it puts around a text what it always does.
        sources: one text per row.
        targets: one text per row.
        max_length: longest source in tokens; longer ones lose their end and are counted.
        max_target_length: the same for targets, the end token included; None: `max_length`.

    Raises:
        EmptyDataError: there are no rows.
        MissingValueError: a text is missing or empty.
        ColumnError: one is not text, or there are more sources than targets or the reverse.
        TemplateError: the tokenizer names no end token.
        RowLengthError: a limit is more than the model takes, or leaves nothing.

    Example:
        >>> import tokenizers
        >>> raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[END]": 0, "hi": 1, "ho": 2}, "[END]"))
        >>> raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> made = encode_pairs(Tokenizer(raw, 0, 8, False, {"eos_token": 0}), ["hi hi"], ["ho"], max_length=4)
        >>> made.sources[0].tolist(), made.targets[0].tolist()
        ([1, 1], [2, 0])
    """
    if isinstance(sources, str) or isinstance(targets, str) or len(sources) != len(targets):
        raise ColumnError(f"there are {len(sources)} sources and {len(targets)} targets; pass a list of each, one "
                          "a row")
    if not len(sources):
        raise EmptyDataError("there are no pairs to encode; read at least one row")
    end = end_id(tokenizer)
    limits = [check_limit(max_length, tokenizer.max_length),
              check_limit(max_length if max_target_length is None else max_target_length, tokenizer.max_length,
                          "max_target_length")]
    sides: list[list[np.ndarray]] = []
    cut = np.zeros(len(sources), bool)
    for name, texts, limit in zip(("source", "target"), (sources, targets), limits, strict=True):
        for i, text in enumerate(texts):
            check_text(i, text, name)
        rows: list[np.ndarray] = []
        for start in range(0, len(texts), _CHUNK):
            rows += [np.array(one.ids, np.int32) for one in tokenizer.encode(texts[start:start + _CHUNK])]
        for i, row in enumerate(rows):
            if not (row != end).any():
                raise MissingValueError(f"the {name} of row {i} (counted from 0, {texts[i]!r:.40}) has no tokens: the "
                                        "tokenizer drops all its characters; leave the row out")
            if name == "target" and row[-1] != end:
                row = np.append(row, np.int32(end))
            cut[i] |= len(row) > limit
            # The encoder's end token stays: it is there in every text that the model has seen.
            stays = name == "source" and row[-1] == end and len(row) > limit
            rows[i] = np.append(row[:limit - 1], np.int32(end)) if stays else row[:limit]
        sides.append(rows)
    return Pairs(sides[0], sides[1], cut, tokenizer.pad_id)


class PairBatches(Epochs):
    """Batches of pairs, in buckets by the longer side; see `Epochs`.

    `make` returns, all `[B, T]` with one T for both sides: `tokens` and `attention_mask` int32 of the sources, `labels`
    int32 of the targets, negative behind their end, and `weights` float32, 1 for each label and 0 elsewhere. A row that
    only fills the last batch has no labels.

    Args:
        pairs: encoded rows.
        batch_size: rows of a batch, B.
        buckets: widths that a batch may have, in tokens, ascending.
        seed: 0 to 2**32 - 1.
        shuffle: draw the orders; otherwise batches go from narrow to wide, for evaluation.

    Raises:
        EmptyDataError: there are no rows.
        RowLengthError: a row is longer than the largest bucket.
        BatchingError: an argument is not what it must be.

    Example:
        >>> pairs = Pairs([np.array([5, 6], np.int32)], [np.array([7, 1], np.int32)], np.zeros(1, bool), 0)
        >>> batch = PairBatches(pairs, 1, (3,), seed=0, shuffle=False).make(0, 0)
        >>> batch["tokens"].tolist(), batch["labels"].tolist(), batch["weights"].tolist()
        ([[5, 6, 0]], [[7, 1, -1]], [[1.0, 1.0, 0.0]])
    """

    sides = 2

    def __init__(self, pairs: Pairs, batch_size: int, buckets: Sequence[int], *, seed: int = 0,
                 shuffle: bool = False) -> None:
        self.pairs = pairs
        super().__init__(pairs.lengths, batch_size, buckets, seed=seed, shuffle=shuffle)

    def _tokens(self) -> int:
        return sum(len(row) for row in (*self.pairs.sources, *self.pairs.targets))

    def _write(self, e: int, rows: np.ndarray, real: np.ndarray, width: int) -> Batch:
        sources = [self.pairs.sources[row] for row in rows]
        targets = [self.pairs.targets[row][:None if is_real else 0] for row, is_real in zip(rows, real, strict=True)]
        return {
            "tokens": padded(sources, width, self.pairs.pad_id),
            "attention_mask": padded([np.ones(len(row)) for row in sources], width, 0),
            "labels": padded(targets, width, NOTHING),
            "weights": padded([np.ones(len(row)) for row in targets], width, 0, np.float32)}

    def _content(self) -> tuple[int, Iterable[np.ndarray]]:
        ends = np.array([len(row) for row in self.pairs.sources])
        return self.pairs.pad_id, (ends, *self.pairs.sources, *self.pairs.targets)
