"""Pairs for an encoder and a decoder: their ids, their batches, and the loss of a model on them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("tokenizers")

from data.talk import END, tokenizer

from jpeft.data.seq2seq import PairBatches, Pairs, encode_pairs
from jpeft.errors import (
    ColumnError,
    DataError,
    EmptyDataError,
    JpeftError,
    MissingValueError,
    RowLengthError,
    TemplateError,
)
from jpeft.models.t5 import T5
from jpeft.models.t5_config import T5Config
from jpeft.train.losses import model_inputs, seq2seq

TOK = tokenizer()
STOP = TOK.special["eos_token"]


def ends(text: str) -> list[int]:
    return [*TOK.encode([text])[0].ids, STOP]


def closing() -> Any:
    """Return the tokenizer with the end token behind every text, as T5's has it."""
    import tokenizers

    tok = tokenizer()
    tok.raw.post_processor = tokenizers.processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, STOP)])
    return tok


@pytest.mark.parametrize("own", [False, True])
def test_ids(own: bool) -> None:
    tok = closing() if own else TOK
    made = encode_pairs(tok, ["the", "naïve"], ["12", "🙂"], max_length=20)
    assert [row.tolist() for row in made.sources] == [ends(t) if own else ends(t)[:-1] for t in ("the", "naïve")]
    assert [row.tolist() for row in made.targets] == [ends("12"), ends("🙂")], "one end token, whoever puts it there"
    assert (made.truncated, made.learnt, made.pad_id) == (0, 2 + len(ends("🙂")), STOP)
    assert all(row.dtype == np.int32 for row in (*made.sources, *made.targets))


@pytest.mark.parametrize("own", [False, True])
def test_what_is_cut_is_counted(own: bool) -> None:
    made = encode_pairs(closing() if own else TOK, ["abc", "abcde", "a", "abcd"], ["x", "y", "wxyz", "wxy"],
                        max_length=4, max_target_length=4)
    assert made.cut.tolist() == [False, True, True, own]
    assert [len(row) for row in made.sources] == [3 + own, 4, 1 + own, 4]
    assert [bool(row[-1] == STOP) for row in made.sources] == [own] * 4
    assert [row.tolist() for row in made.targets] == [ends("x"), ends("y"), ends("wxyz")[:4], ends("wxy")]


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches(shuffle: bool) -> None:
    random = np.random.RandomState(0)
    ids = [[np.arange(1, n + 1, dtype=np.int32) + 100 * i for i, n in enumerate(random.randint(1, 17, 23))]
           for _ in range(2)]
    pairs = Pairs(ids[0], ids[1], np.zeros(23, bool), 7)
    made = PairBatches(pairs, 4, (8, 16), seed=1, shuffle=shuffle)
    seen: list[int] = []
    slots = real = 0
    for i, (rows, width) in enumerate(made.epoch(1)):
        batch = made.make(1, i)
        assert list(batch) == ["tokens", "attention_mask", "labels", "weights"]
        assert all(x.shape == (4, width) for x in batch.values())
        assert all(x.dtype == (np.float32 if name == "weights" else np.int32) for name, x in batch.items())
        for b, row in enumerate(rows):
            s, t = pairs.sources[row].tolist(), pairs.targets[row].tolist()
            assert batch["tokens"][b].tolist() == s + [7] * (width - len(s))
            assert batch["attention_mask"][b].tolist() == [1] * len(s) + [0] * (width - len(s))
            assert batch["labels"][b].tolist() == t + [-1] * (width - len(t))
            assert batch["weights"][b].tolist() == [1] * len(t) + [0] * (width - len(t))
            real += len(s) + len(t)
        for b in range(len(rows), 4):
            assert batch["attention_mask"][b].any()
            assert set(batch["labels"][b].tolist()) == {-1}
            assert not batch["weights"][b].any()
        slots += 2 * 4 * width
        seen += rows.tolist()
    assert sorted(seen) == list(range(23))
    assert made.waste() == pytest.approx(1 - real / slots)
    assert made.fingerprint == PairBatches(pairs, 4, (8, 16), seed=1, shuffle=shuffle).fingerprint
    assert made.fingerprint != PairBatches(Pairs(ids[1], ids[0], pairs.cut, 7), 4, (8, 16), seed=1,
                                           shuffle=shuffle).fingerprint


def test_the_loss_is_that_of_the_pairs_one_by_one() -> None:
    model = T5(T5Config(vocab_size=31, hidden_size=8, layers=1, decoder_layers=1, heads=2, head_size=4, mlp_size=12,
                        pad_id=0, start_id=0))
    random = np.random.RandomState(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.5, leaf.shape).astype(np.float32), model.shapes())
    ids = [[random.randint(1, 31, n).astype(np.int32) for n in sizes] for sizes in ([5, 3, 5], [3, 5, 3])]
    pairs = Pairs(ids[0], ids[1], np.zeros(3, bool), 0)
    loss_fn = seq2seq(lambda params, frozen, batch, key: model.apply(
        params, batch["tokens"], **model_inputs(batch), key=key).loss)
    total = jax.jit(lambda batch: loss_fn(params, None, batch, None)[1])
    batches = PairBatches(pairs, 2, (6,))
    together = [total(batches.make(0, i)) for i in range(len(batches))]
    alone = [total({"tokens": s[None], "labels": t[None], "weights": np.ones((1, len(t)), np.float32)})
             for s, t in zip(*ids, strict=True)]
    for name in ("loss_sum", "count"):
        assert sum(float(m[name]) for m in together) == pytest.approx(sum(float(m[name]) for m in alone), rel=1e-5)
    assert sum(float(m["count"]) for m in alone) == 11


def test_take() -> None:
    made = encode_pairs(TOK, ["a", "bbbb", "c"], ["x", "y", "z"], max_length=3)
    some = made.take([2, 1])
    assert ([row.tolist() for row in some.targets], some.cut.tolist()) == ([ends("z"), ends("y")], [False, True])
    with pytest.raises(DataError, match="indices go from 3 to 3, but there are 3 rows"):
        made.take([3])


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: encode_pairs(TOK, ["a"], ["b", "c"], max_length=9), ColumnError, "there are 1 sources and 2 targets"),
    (lambda: encode_pairs(TOK, "a", "b", max_length=9), ColumnError, "pass a list of each"),
    (lambda: encode_pairs(TOK, [], [], max_length=9), EmptyDataError, "there are no pairs"),
    (lambda: encode_pairs(TOK, ["a", " "], ["b", "c"], max_length=9), MissingValueError, "row 1 .*an empty source"),
    (lambda: encode_pairs(TOK, ["a"], [None], max_length=9), MissingValueError, "row 0 .*has no target"),
    (lambda: encode_pairs(TOK, ["a"], [1], max_length=9), ColumnError, "the target of row 0 .*is a int"),
    (lambda: encode_pairs(TOK, ["a"], ["b"], max_length=999), RowLengthError, "max_length is 999, .*at most 512"),
    (lambda: encode_pairs(TOK, ["a"], ["b"], max_length=9, max_target_length=1), RowLengthError,
     "max_target_length is 1, .*set it to 2 or more"),
    (lambda: encode_pairs(dataclasses.replace(TOK, special={}), ["a"], ["b"], max_length=9), TemplateError,
     "names no eos_token"),
    (lambda: encode_pairs(TOK, [END], ["b"], max_length=9), MissingValueError, "the source of row 0 .*has no tokens"),
    (lambda: Pairs([], [np.ones(1)], np.zeros(0, bool), 0), DataError, r"have lengths \[0, 1, 0\]"),
    (lambda: PairBatches(Pairs([np.ones(3)], [np.ones(9)], np.zeros(1, bool), 0), 1, (4, 8)), RowLengthError,
     "row 0 has 9 tokens, more than the largest bucket of 8"),
])
def test_mistakes(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, JpeftError)
    assert "\n" not in str(caught.value)
