"""Sentences of words with a tag each: read, as ids with a label on the first piece of every word, and as batches."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.data.checks import check_limit, check_text, missing, numbers, whole
from jpeft.data.epochs import NOTHING, Batch, Encoded, Epochs, padded
from jpeft.data.table import Table, decoded
from jpeft.errors import ColumnError, DataFileError, EmptyDataError, LabelError, MissingValueError, nearest
from jpeft.interop.tokenizer import Tokenizer

_CHUNK = 2048  # rows tokenised at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Tagged(Encoded):
    """Encoded sentences.

    Attributes:
        ids: token ids of each sentence, int32 `[n]`.
        labels: of each token the number of its word's tag, on the first piece of a word alone, else -1; int32 `[n]`.
        cut: sentences that lost words to a length limit, bool `[N]`.
        lost: words that have no label anywhere: cut off, or without a piece of their own.
        pad_id: id that fills short rows.
        type_ids: token types, like ids; None for a model that has none.
        places: the token of each word, its first piece, int32 `[words]`; -1 for a word that is lost; None: unknown.
    """

    ids: list[np.ndarray]
    labels: list[np.ndarray]
    cut: np.ndarray
    lost: int
    pad_id: int
    type_ids: list[np.ndarray] | None = None
    places: list[np.ndarray] | None = None

    @property
    def texts(self) -> tuple[list[np.ndarray], ...]:
        return (self.ids,)

    @property
    def words(self) -> int:
        """Number of words that have a label."""
        return sum(int((row >= 0).sum()) for row in self.labels)

    def take(self, indices: Sequence[int] | np.ndarray) -> Tagged:
        """Return some of the sentences, in the order of `indices`, without the places; no word counts as lost.

        Raises:
            DataError: an index is that of no row.
        """
        some = numbers(indices, len(self))
        types = None if self.type_ids is None else [self.type_ids[i] for i in some]
        return Tagged([self.ids[i] for i in some], [self.labels[i] for i in some], self.cut[some], 0, self.pad_id,
                      types)


def read_conll(path: str | os.PathLike[str], *, token: int = 0, tag: int = -1) -> Table:
    r"""Read a text file of one word a line, sentences apart by blank lines: the format of the CoNLL tasks up to 2003.

    Columns are apart by tabs where a line has one, else by spaces. Lines that begin with `-DOCSTART-` are no words.

    Args:
        path: a local file in UTF-8.
        token: column of the words, counted from 0; from -1 backwards.
        tag: column of the tags.

    Returns:
        A table with the columns `tokens` and `tags`: lists of strings.

    Raises:
        DataFileError: the file is absent, or a line has too few columns or another number than those before it.
        EmptyDataError: it holds no word.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "news.conll"
        >>> _ = path.write_text("EU NNP B-ORG\nrejects VBZ O\n\nBonn NNP B-LOC\n")
        >>> read_conll(path).columns
        {'tokens': [['EU', 'rejects'], ['Bonn']], 'tags': [['B-ORG', 'O'], ['B-LOC']]}
    """
    file = Path(path).expanduser()
    if not file.is_file():
        siblings = (p.name for p in file.parent.iterdir()) if file.parent.is_dir() else ()
        raise DataFileError(f"there is no file {file}; {nearest(file.name, siblings, 2)} in its folder")
    tokens: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    width = 0
    for number, line in enumerate(decoded(file).split("\n"), 1):
        parts = line.rstrip("\r").split("\t") if "\t" in line else line.split()
        if not line.strip() or parts[0] == "-DOCSTART-":
            if tokens[-1]:
                tokens.append([])
                tags.append([])
            continue
        width = width or len(parts)
        if len(parts) != width or not all(-width <= column < width for column in (token, tag)):
            raise DataFileError(f"{file} line {number} has {len(parts)} columns, {line.strip()[:40]!r}, expected "
                                f"{width} as in the lines before, and a word in column {token} and its tag in column "
                                f"{tag}; correct the line, or name the columns")
        tokens[-1].append(parts[token])
        tags[-1].append(parts[tag])
    found = [i for i, words in enumerate(tokens) if words]
    if not found:
        raise EmptyDataError(f"{file} has no words; write one a line with its tag")
    return Table({"tokens": [tokens[i] for i in found], "tags": [tags[i] for i in found]}, file.name)


def encode_tags(tokenizer: Tokenizer, words: Sequence[Sequence[str]], tags: Sequence[Sequence[Any]] | None, *,
                labels: Sequence[str], max_length: int) -> Tagged:
    """Tokenise sentences, words joined by spaces, and put the label of each word on its first piece.

    Args:
        tokenizer: the model's.
        words: the words of each sentence.
        tags: a tag for each: a name, or its number; None: 0 for all, where they are to be found.
        labels: names of the tags in the order of their numbers.
        max_length: longest sentence in tokens, special tokens included; longer ones are cut and counted.

    Raises:
        EmptyDataError: there are no sentences.
        MissingValueError: a sentence has no words, or a word is empty.
        ColumnError: a row is no list of words, or it has more words than tags or the reverse.
        LabelError: a tag is none of the labels.
        RowLengthError: `max_length` is more than the model takes, or leaves nothing.

    Example:
        >>> import tokenizers
        >>> raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "New": 1, "York": 2, "'": 3}, "[UNK]"))
        >>> raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> made = encode_tags(Tokenizer(raw, 0, 8, False), [["New", "York's"]], [["B-LOC", "I-LOC"]],
        ...                    labels=["O", "B-LOC", "I-LOC"], max_length=8)
        >>> made.ids[0].tolist(), made.labels[0].tolist()
        ([1, 2, 3, 0], [1, 2, -1, -1])
    """
    if not len(words):
        raise EmptyDataError("there are no sentences to encode; read at least one row")
    if tags is not None and len(tags) != len(words):
        raise ColumnError(f"there are {len(words)} sentences and {len(tags)} lists of tags; pass one for each")
    special = len(tokenizer.encode([""])[0].ids)
    limit = check_limit(max_length, tokenizer.max_length, least=special + 1)
    number = {name: i for i, name in enumerate(labels)}
    for i, row in enumerate(words):
        _check_words(i, row)
    wanted = [[0] * len(row) for row in words] if tags is None else [
        _numbered(i, row, theirs, number) for i, (row, theirs) in enumerate(zip(words, tags, strict=True))]
    ids, found, types, places, cut = [], [], [], [], np.zeros(len(words), bool)
    for start in range(0, len(words), _CHUNK):
        encodings = tokenizer.encode([" ".join(row) for row in words[start:start + _CHUNK]], None, limit)
        for i, one in enumerate(encodings, start):
            place = _places(words[i], one.offsets)
            label = np.full(len(one.ids), NOTHING, np.int32)
            label[place[place >= 0]] = np.array(wanted[i], np.int32)[place >= 0]
            cut[i] = bool(one.overflowing)
            places.append(place)
            ids.append(np.array(one.ids, np.int32))
            types.append(np.array(one.type_ids, np.int32))
            found.append(label)
    lost = sum(int((place < 0).sum()) for place in places)
    return Tagged(ids, found, cut, lost, tokenizer.pad_id, types if tokenizer.token_types else None, places)


class TagBatches(Epochs):
    """The batches of tagged sentences, as a function of (seed, epoch); see `Epochs`.

    `make` returns, all `[B, T]`: `tokens`, `attention_mask`, `labels` (-1 where there is none) and, if the sentences
    have them, `token_types`, int32; `weights`, float32: 1 for a label, 0 elsewhere and in a row that only fills.

    Args:
        tagged: encoded sentences.
        batch_size: rows of a batch, B.
        buckets: widths that a batch may have, in tokens, ascending.
        seed: 0 to 2**32 - 1.
        shuffle: draw the orders; otherwise batches go from narrow to wide, for evaluation.

    Raises:
        EmptyDataError: there are no rows.
        RowLengthError: a row is longer than the largest bucket.
        BatchingError: an argument is not what it must be.

    Example:
        >>> tagged = Tagged([np.array([5, 6], np.int32)], [np.array([2, -1], np.int32)], np.zeros(1, bool), 0, 0)
        >>> batch = TagBatches(tagged, 1, (3,), seed=0, shuffle=False).make(0, 0)
        >>> batch["tokens"].tolist(), batch["labels"].tolist(), batch["weights"].tolist()
        ([[5, 6, 0]], [[2, -1, -1]], [[1.0, 0.0, 0.0]])
    """

    def __init__(self, tagged: Tagged, batch_size: int, buckets: Sequence[int], *, seed: int = 0,
                 shuffle: bool = False) -> None:
        self.tagged = tagged
        super().__init__(tagged.lengths, batch_size, buckets, seed=seed, shuffle=shuffle)

    def _write(self, e: int, rows: np.ndarray, real: np.ndarray, width: int) -> Batch:
        t = self.tagged
        labels = padded([t.labels[row] for row in rows], width, NOTHING)
        return {
            "tokens": padded([t.ids[row] for row in rows], width, t.pad_id),
            "attention_mask": padded([np.ones(len(t.ids[row])) for row in rows], width, 0),
            **({} if t.type_ids is None else {"token_types": padded([t.type_ids[row] for row in rows], width, 0)}),
            "labels": labels, "weights": ((labels >= 0) & real[:, None]).astype(np.float32)}

    def _content(self) -> tuple[int, Iterable[np.ndarray]]:
        return self.tagged.pad_id, (*self.tagged.ids, *self.tagged.labels, *(self.tagged.type_ids or ()))


def _check_words(i: int, row: Any) -> None:
    if isinstance(row, str) or not isinstance(row, Sequence | np.ndarray):
        raise ColumnError(f"the words of row {i} (counted from 0) are a {type(row).__name__}, {row!r:.60}, expected a "
                          "list of strings; name the column that holds them")
    if not len(row):
        raise MissingValueError(f"row {i} (counted from 0) has no words; leave the row out")
    for k, word in enumerate(row):
        check_text(i, word, f"word {k}")


def _numbered(i: int, row: Sequence[str], tags: Any, number: dict[str, int]) -> list[int]:
    """Return the numbers of the tags of a row."""
    if isinstance(tags, str) or not isinstance(tags, Sequence | np.ndarray):
        raise ColumnError(f"the tags of row {i} (counted from 0) are a {type(tags).__name__}, {tags!r:.60}, expected a "
                          "list, one for each word; name the column that holds them")
    if len(tags) != len(row):
        raise ColumnError(f"row {i} (counted from 0) has {len(row)} words and {len(tags)} tags; give each word one")
    found = []
    for k, tag in enumerate(tags):
        if missing(tag):
            raise MissingValueError(f"word {k} of row {i} (counted from 0), {row[k]!r}, has no tag; fill it in")
        n = number.get(tag, -1) if isinstance(tag, str) else int(tag) if whole(tag) else -1
        if not 0 <= n < len(number):
            raise LabelError(f"word {k} of row {i} (counted from 0), {row[k]!r}, has the tag {tag!r}, which is none of "
                             f"the {len(number)} labels ({nearest(str(tag), number, 1)}); correct it, or add the label")
        found.append(n)
    return found


def _places(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the first token that holds a character of each word; -1 where none does, or it is another word's."""
    holder: dict[int, int] = {}
    for t, (start, end) in enumerate(offsets):
        for place in range(start, end):
            holder.setdefault(place, t)
    out = np.full(len(words), -1, np.int32)
    begin, last = 0, -1
    for i, word in enumerate(words):
        t = next((holder[place] for place in range(begin, begin + len(word)) if place in holder), -1)
        if t > last:
            out[i] = last = t
        begin += len(word) + 1
    return out
