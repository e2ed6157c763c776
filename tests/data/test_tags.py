"""Tagged words: where the label of a word goes, what is lost, files of columns, batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers")

from jpeft.data.tags import TagBatches, Tagged, encode_tags, read_conll  # noqa: E402
from jpeft.errors import (  # noqa: E402
    ColumnError,
    DataFileError,
    EmptyDataError,
    JpeftError,
    LabelError,
    MissingValueError,
    RowLengthError,
)
from jpeft.interop.tokenizer import Tokenizer  # noqa: E402

LABELS = ["O", "B-LOC", "I-LOC"]


def pieces(prefix: bool = False) -> Tokenizer:
    """Return a tokenizer of pieces of words, with special tokens around a text; or of bytes, spaces included."""
    if prefix:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        raw = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        return Tokenizer(raw, 0, 64, False)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "new", "york", "##er", "##s", "'"]
    raw = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.normalizer = tokenizers.normalizers.BertNormalizer()
    raw.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    raw.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return Tokenizer(raw, 0, 64, True)


def test_the_label_is_on_the_first_piece() -> None:
    made = encode_tags(pieces(), [["New", "Yorkers", "'", "zz"]], [["B-LOC", 2, "O", np.int64(1)]], labels=LABELS,
                       max_length=16)
    assert made.ids[0].tolist() == [2, 4, 5, 6, 7, 8, 1, 3]
    assert made.labels[0].tolist() == [-1, 1, 2, -1, -1, 0, 1, -1]
    assert made.places is not None
    assert made.places[0].tolist() == [1, 2, 5, 6]
    assert (made.words, made.lost, made.truncated) == (4, 0, 0)


def test_a_space_belongs_to_no_word() -> None:
    made = encode_tags(pieces(prefix=True), [["ab", "c"]], [["B-LOC", "I-LOC"]], labels=LABELS, max_length=16)
    assert made.labels[0].tolist() == [1, -1, -1, 2]


def test_what_is_lost_is_counted() -> None:
    words = [["new", "\u200b", "york"], ["new"] * 9]
    made = encode_tags(pieces(), words, [[1, 1, 2], [1] * 9], labels=LABELS, max_length=6)
    assert made.labels[0].tolist() == [-1, 1, 2, -1]
    assert made.labels[1].tolist() == [-1, 1, 1, 1, 1, -1]
    assert made.cut.tolist() == [False, True]
    assert made.lost == 1 + 5
    assert made.take([0]).lost == 0


@pytest.mark.parametrize(("words", "tags", "error", "said"), [
    ([], [], EmptyDataError, "no sentences"),
    ([["a"]], [["O"], ["O"]], ColumnError, "1 sentences and 2 lists"),
    ([[]], [[]], MissingValueError, "row 0 .* has no words"),
    ([["a", " "]], [["O", "O"]], MissingValueError, "empty word 1"),
    ([["a", 3]], [["O", "O"]], ColumnError, "word 1 of row 0 .* is a int"),
    (["a b"], [["O", "O"]], ColumnError, "are a str"),
    ([["a"]], ["O"], ColumnError, "tags of row 0"),
    ([["a"]], [["O", "O"]], ColumnError, "1 words and 2 tags"),
    ([["a"]], [[None]], MissingValueError, "has no tag"),
    ([["a"]], [["B-LOK"]], LabelError, "'B-LOK'.*nearest: 'B-LOC'"),
    ([["a"]], [[3]], LabelError, "none of the 3 labels"),
    ([["a"]], [[True]], LabelError, "none of the 3 labels"),
])
def test_mistakes(words: Any, tags: Any, error: type[JpeftError], said: str) -> None:
    with pytest.raises(error, match=said):
        encode_tags(pieces(), words, tags, labels=LABELS, max_length=16)


def test_a_limit_that_leaves_no_word() -> None:
    with pytest.raises(RowLengthError):
        encode_tags(pieces(), [["a"]], [["O"]], labels=LABELS, max_length=2)


def test_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("-DOCSTART- -X- O\n\nEU NNP B-ORG\r\n's POS O\n\n\n\nBonn NNP B-LOC")
    assert read_conll(path).columns == {"tokens": [["EU", "'s"], ["Bonn"]], "tags": [["B-ORG", "O"], ["B-LOC"]]}
    assert read_conll(path, tag=1).column("tags") == [["NNP", "POS"], ["NNP"]]
    path.write_text("#one\tO\nNew York\tB-LOC\n\t\nx\tO\n")
    assert read_conll(path).columns["tokens"] == [["#one", "New York"], ["x"]]


@pytest.mark.parametrize(("text", "options", "error", "said"), [
    ("a O\nb\n", {}, DataFileError, "line 2 has 1 columns"), ("a\nb\n", {"tag": 1}, DataFileError, "line 1 has 1"),
    ("\n\n", {}, EmptyDataError, "has no words"),
])
def test_damaged_columns(text: str, options: Any, error: type[JpeftError], said: str, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text(text)
    with pytest.raises(error, match=said):
        read_conll(tmp_path / "a.conll", **options)
    with pytest.raises(DataFileError, match=r"nearest: 'a\.conll'"):
        read_conll(tmp_path / "b.conll")


def test_batches_of_tags() -> None:
    rows = [np.arange(1, n + 1, dtype=np.int32) for n in (3, 2, 3)]
    labels = [np.where(row == 2, -1, 0).astype(np.int32) for row in rows]
    tagged = Tagged(rows, labels, np.zeros(3, bool), 0, 0, [np.zeros_like(row) for row in rows])
    made = TagBatches(tagged, 2, (4,), seed=0, shuffle=False)
    last = made.make(0, 1)
    assert last["labels"].tolist() == [[0, -1, 0, -1]] * 2
    assert last["weights"].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert last["token_types"].shape == (2, 4)
    other = Tagged(rows, [labels[0], labels[1], labels[2] * 0], np.zeros(3, bool), 0, 0, tagged.type_ids)
    assert TagBatches(other, 2, (4,), seed=0, shuffle=False).fingerprint != made.fingerprint
