"""Rows of several texts: their ids, what weighs nothing, pairs of answers, batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from data.talk import tokenizer

from jpeft.data import sft
from jpeft.data.groups import GroupBatches, Groups, encode_groups, preferences
from jpeft.errors import ColumnError, DataError, EmptyDataError, JpeftError, MissingValueError

TOK = tokenizer()


def rows(*texts: str) -> list[np.ndarray]:
    return [np.array(TOK.encode([text])[0].ids, np.int32) for text in texts]


def test_each_text_is_encoded_on_its_own() -> None:
    made = encode_groups(TOK, {"anchor": ["a", "a b c d"], "positive": ["b c", "d"]}, max_length=3)
    assert [row.tolist() for row in made.ids[0]] == [row.tolist()[:3] for row in rows("a", "a b c d")]
    assert [row.tolist() for row in made.ids[1]] == [row.tolist() for row in rows("b c", "d")]
    assert made.cut.tolist() == [False, len(rows("a b c d")[0]) > 3]


@pytest.mark.parametrize(("texts", "error", "said"), [
    ({"anchor": ["a"], "positive": []}, ColumnError, "as many of each"),
    ({"anchor": "a", "positive": "b"}, ColumnError, "as many of each"),
    ({"anchor": [], "positive": []}, EmptyDataError, "no texts"),
    ({"anchor": ["a"], "positive": [" "]}, MissingValueError, "empty positive"),
])
def test_mistakes(texts: Any, error: type[JpeftError], said: str) -> None:
    with pytest.raises(error, match=said):
        encode_groups(TOK, texts, max_length=8)


def test_rows_of_a_low_score_and_fillers_weigh_nothing() -> None:
    ids = rows("a", "b c", "d")
    groups = Groups([ids, ids], np.zeros(3, bool), 0, scores=np.float32([0.9, 0.2, 0.7]), least=0.5)
    made = GroupBatches(groups, 2, (8,), seed=0, shuffle=False)
    first, last = made.make(0, 0), made.make(0, 1)
    assert first["tokens"].shape == (2, 2, 8)
    assert first["weights"].tolist() == [1, 0]
    assert last["weights"].tolist() == [1, 0]
    assert np.isnan(last["scores"]).tolist() == [False, True]
    assert made.per_batch() == 2 * sum(map(len, ids)) / 2
    assert groups.take([1, 2]).pairs.tolist() == [False, True]
    changed = GroupBatches(Groups([ids, ids], groups.cut, 0, scores=groups.scores, least=0.1), 2, (8,), seed=0)
    assert changed.fingerprint != made.fingerprint
    with pytest.raises(DataError, match="give each row one of each"):
        Groups([ids, ids[:1]], np.zeros(3, bool), 0)


def test_answers_are_paired_by_row() -> None:
    prompts = ["a", "a b c d a b c d", "b", "c"]
    chosen = sft.pairs(TOK, prompts, [" b", " b", " c", " d"], max_length=6, on_long="drop")
    rejected = sft.pairs(TOK, prompts, [" c", " c", " c", " a"], max_length=6, on_long="drop")
    made = preferences(chosen, rejected)
    assert (len(made.groups), made.dropped, made.same) == (2, 4 - len(chosen), 1)
    batch = GroupBatches(made.groups, 2, (8,), seed=0, shuffle=False).make(0, 0)
    assert batch["labels"].shape == batch["weights"].shape == (2, 2, 8)
    assert ((batch["labels"] >= 0) == (batch["weights"] > 0)).all()
    assert (batch["labels"][batch["weights"] > 0] == batch["tokens"][batch["weights"] > 0]).all()
    with pytest.raises(EmptyDataError, match="have the same twice"):
        preferences(chosen, chosen)
