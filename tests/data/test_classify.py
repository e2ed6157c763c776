"""Encoding texts and labels: ids, truncation that is counted, every spelling of a label, and what each mistake says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jpeft.data.classify import Examples, encode
from jpeft.errors import (
    ColumnError,
    DataError,
    EmptyDataError,
    JpeftError,
    LabelError,
    MissingValueError,
    RowLengthError,
)
from jpeft.interop.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")

WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "good": 4, "bad": 5, "film": 6}


def make(token_types: bool = True, max_length: int = 8) -> Tokenizer:
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, "[UNK]"))
    raw.normalizer = tokenizers.normalizers.BertNormalizer()
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return Tokenizer(raw, 0, max_length, token_types)


def run(texts: Any = ("good film",), labels: Any = (1,), classes: Any = 2, max_length: Any = 8) -> Examples:
    return encode(make(), texts, labels, classes=classes, max_length=max_length)


def fails(kind: type[JpeftError], **arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        run(**arguments)
    assert isinstance(caught.value, DataError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ids_types_and_labels() -> None:
    examples = run(["good film", "bad"], [1, 0])
    assert [row.tolist() for row in examples.ids] == [[2, 4, 6, 3], [2, 5, 3]]
    assert examples.type_ids is not None
    assert [row.tolist() for row in examples.type_ids] == [[0, 0, 0, 0], [0, 0, 0]]
    assert examples.labels.tolist() == [1, 0]
    assert {row.dtype for row in (*examples.ids, *examples.type_ids, examples.labels)} == {np.dtype(np.int32)}
    assert (len(examples), examples.truncated, examples.pad_id) == (2, 0, 0)
    assert encode(make(token_types=False), ["good"], [1], classes=2, max_length=8).type_ids is None


def test_truncation_keeps_special_tokens_and_is_counted() -> None:
    texts = ["good film"] * 3 + ["good bad film good"] + ["bad"] * 2 + ["film film film"]
    examples = run(texts, [0] * 7, max_length=4)
    assert examples.ids[3].tolist() == [2, 4, 5, 3]
    assert examples.lengths.tolist() == [4, 4, 4, 4, 3, 3, 4]
    assert examples.cut.tolist() == [False] * 3 + [True] + [False] * 2 + [True]
    assert examples.truncated == 2


def test_more_rows_than_are_tokenised_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["good", "bad film", "good bad film good film", "film"] * 3
    whole = run(texts, [0] * 12, max_length=5)
    monkeypatch.setattr("jpeft.data.classify._CHUNK", 5)
    parts = run(texts, [0] * 12, max_length=5)
    assert [row.tolist() for row in parts.ids] == [row.tolist() for row in whole.ids]
    assert parts.cut.tolist() == whole.cut.tolist() == [False, False, True, False] * 3


NAMES = ["negative", "positive"]


@pytest.mark.parametrize(("label", "classes", "number"), [
    (1, 2, 1), (np.int64(1), 2, 1), (True, 2, 1), (np.True_, 2, 1), (1.0, 2, 1), ("1", 2, 1), (" 1 ", 2, 1),
    ("1.0", 2, 1),
    ("positive", NAMES, 1), (" positive", NAMES, 1), ("1", NAMES, 1), (0, NAMES, 0), (False, NAMES, 0),
    # Names that are numbers are names; booleans go by their name where there is one.
    ("3", ["3", "5"], 0), (5, ["3", "5"], 1), (5.0, [3, 5], 1), (True, ["true", "false"], 0),
    (False, ["True", "False"], 1), (" a", ["a", " a"], 1),
])
def test_spellings_of_a_label(label: Any, classes: Any, number: int) -> None:
    assert run(labels=[label], classes=classes).labels.tolist() == [number]


@pytest.mark.parametrize(("label", "classes", "said"), [
    (2, 2, "has the label 2, which is none of the 2 classes 0 to 1; correct the row"),
    (-1, 2, "has the label -1"),
    (0.5, 2, "has the label 0.5"),
    ("neutral", 3, "has the label 'neutral'"),
    ("positiv", NAMES, "'positiv', which is none of the 2 classes 'negative', 'positive' (nearest: 'positive')"),
    ("1", ["3", "5"], "has the label '1', which is none of the 2 classes '3', '5'"),
    ([1], 2, "has the label [1]"),
    ("z", [str(i) * 2 for i in range(10)], "'77', ... (nearest:"),
])
def test_a_label_outside_the_classes_names_row_and_value(label: Any, classes: Any, said: str) -> None:
    good = 0 if isinstance(classes, int) else classes[0]
    message = fails(LabelError, texts=["good", "bad film"], labels=[good, label], classes=classes)
    assert message.startswith("row 1 (counted from 0, 'bad film')")
    assert said in message


@pytest.mark.parametrize("classes", [1, 0, -3, True, "positive", [], ["a"], ["a", "a"], ["a", None], [True, False]])
def test_classes_that_are_none(classes: Any) -> None:
    assert f"classes are {classes!r}, must be two or more different names" in fails(LabelError, classes=classes)


@pytest.mark.parametrize(("arguments", "said"), [
    ({"texts": ["good", None], "labels": [0, 1]}, "row 1 (counted from 0) has no text; fill it in or leave"),
    ({"texts": ["good", float("nan")], "labels": [0, 1]}, "row 1 (counted from 0) has no text"),
    ({"texts": ["", "good"], "labels": [0, 1]}, "row 0 (counted from 0) has an empty text, ''"),
    ({"texts": [" \n\t"]}, "has an empty text, ' \\n\\t'"),
    ({"texts": ["\x00\x01"]}, "row 0 (counted from 0, '\\x00\\x01') has no tokens: the tokenizer drops all"),
    ({"labels": [None]}, "row 0 (counted from 0, 'good film') has no label"),
    ({"labels": [float("nan")]}, "has no label"),
    ({"labels": [" "]}, "has no label"),
])
def test_missing_values(arguments: dict[str, Any], said: str) -> None:
    assert said in fails(MissingValueError, **arguments)


def test_no_rows() -> None:
    assert "no texts to encode" in fails(EmptyDataError, texts=[], labels=[])


@pytest.mark.parametrize(("arguments", "said"), [
    ({"texts": ["good", 3], "labels": [0, 1]}, "the text of row 1 (counted from 0) is a int, 3, expected a string"),
    ({"texts": [["good"]]}, "is a list, ['good'], expected a string"),
    ({"texts": ["go\ud800od"]}, "holds '\\ud800', half of a character, in place 2; correct the row"),
    ({"labels": [0, 1]}, "there are 1 texts and 2 labels; pass a list of each"),
    ({"texts": "g"}, "pass a list of each"),
])
def test_texts_that_are_none(arguments: dict[str, Any], said: str) -> None:
    assert said in fails(ColumnError, **arguments)


@pytest.mark.parametrize(("max_length", "said"), [
    (9, "max_length is 9, but the model takes at most 8 tokens; set max_length to 8 or less"),
    (2, "max_length is 2, but special tokens alone take 2; set it to 3 or more"),
    (0, "special tokens alone take 2"),
    (4.0, "max_length is 4.0, must be a whole number of tokens"),
    (True, "max_length is True"),
    (None, "max_length is None"),
])
def test_lengths_that_do_not_fit(max_length: Any, said: str) -> None:
    assert said in fails(RowLengthError, max_length=max_length)


def test_a_long_text_is_short_in_a_message() -> None:
    message = fails(LabelError, texts=["good\n" * 1000], labels=[7])
    assert len(message) < 300


def test_take() -> None:
    examples = run(["good", "bad", "good bad film", "film"], [0, 1, 0, 1], max_length=4)
    some = examples.take(np.array([2, 0]))
    assert [row.tolist() for row in some.ids] == [[2, 4, 5, 3], [2, 4, 3]]
    assert some.type_ids is not None
    assert [len(row) for row in some.type_ids] == [4, 3]
    assert (some.labels.tolist(), some.truncated, some.pad_id) == ([0, 0], 1, 0)
    assert examples.take([1, 3]).truncated == 0
    assert len(examples.take([])) == 0
    assert encode(make(token_types=False), ["good"], [1], classes=2, max_length=8).take([0]).type_ids is None


@pytest.mark.parametrize(("indices", "said"), [
    ([0, 4], "indices go from 0 to 4, but there are 2 rows, counted from 0"),
    ([-1], "indices go from -1 to -1"),
    ([True, False], "indices are bool"),
    ([[0]], r"of shape \(1, 1\)"),
    ([0.0], "indices are float64"),
])
def test_take_of_rows_that_are_not_there(indices: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        run(["good", "bad"], [0, 1]).take(indices)


def test_examples_with_parts_of_unequal_length() -> None:
    with pytest.raises(DataError, match=r"have lengths \[1, 2, 1, 1\]; give each row one of each"):
        Examples([np.zeros(1, np.int32)], np.zeros(2, np.int32), None, np.zeros(1, bool), 0)
