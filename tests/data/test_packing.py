"""Packed rows: every sequence whole and once, little waste, and a model that cannot tell them from single ones."""

from __future__ import annotations

import itertools
import json
from typing import Any

import jax
import numpy as np
import pytest

from jpeft.data.packing import Packed, Padded, best_fit
from jpeft.data.sft import Sequences
from jpeft.errors import BatchingError, DataError, EmptyDataError, JpeftError, RowLengthError
from jpeft.models.decoder import Decoder
from jpeft.models.decoder_config import DecoderConfig
from jpeft.models.rope import Rope
from jpeft.train.losses import causal_lm, model_inputs

PAD = 3


def sequences(lengths: Any, vocabulary: int = 10**6, seed: int = 0) -> Sequences:
    """Sequence i holds the ids 1000 i + 1, ... (modulo the vocabulary), and about half of its tokens are learnt."""
    random = np.random.RandomState(seed)
    ids = [((np.arange(1, n + 1) + 1000 * i) % vocabulary).astype(np.int32) for i, n in enumerate(lengths)]
    weights = [(random.rand(n) < 0.5).astype(np.float32) for n in lengths]
    for weight in weights:
        weight[0], weight[-1] = 0, 1
    return Sequences(ids, weights, np.zeros(len(ids), bool), PAD)


def word_problems(n: int = 2000) -> np.ndarray:
    """Lengths like those of 2,000 word problems in a chat template: 20 to 110 tokens, most of them about 53."""
    random = np.random.RandomState(0)
    return np.clip(np.round(random.lognormal(3.95, 0.26, n)), 20, 110).astype(np.int64)


LENGTHS = np.random.RandomState(1).randint(2, 33, size=103)


def segments(batch: Any, b: int) -> list[tuple[list[int], list[int]]]:
    """Return tokens and weights of each sequence in row b."""
    numbers = batch["segment_ids"][b]
    return [(batch["tokens"][b][numbers == s].tolist(), batch["weights"][b][numbers == s].tolist())
            for s in range(1, numbers.max() + 1)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("batch_size", "length"), [(1, 32), (4, 32), (5, 64), (7, 100), (200, 64)])
def test_every_sequence_whole_and_once_per_epoch(batch_size: int, length: int, shuffle: bool) -> None:
    data = sequences(LENGTHS)
    packed = Packed(data, batch_size, length, seed=5, shuffle=shuffle)
    for e in range(3):
        found = []
        epoch = packed.epoch(e)
        assert len(epoch) == len(packed)
        for i, (rows, width) in enumerate(epoch):
            batch = packed.make(e, i)
            assert width == length
            assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
                name: ((batch_size, length), np.dtype(np.float32 if name == "weights" else np.int32)) for name in (
                    "tokens", "attention_mask", "positions", "segment_ids", "labels", "weights")}
            for b in range(len(rows)):
                found += segments(batch, b)
                members = packed.members(e, int(rows[b]))
                assert [data.ids[m].tolist() for m in members] == [tokens for tokens, _ in segments(batch, b)]
            assert not batch["weights"][len(rows):].any()
        assert sorted(found) == sorted((i.tolist(), w.tolist()) for i, w in zip(data.ids, data.weights, strict=True))
    assert packed.widths == (length,)


def test_contents() -> None:
    packed = Packed(sequences(LENGTHS), 3, 64, seed=5, shuffle=True)
    for i, (rows, _) in enumerate(packed.epoch(1)):
        batch = packed.make(1, i)
        mask, segment = batch["attention_mask"], batch["segment_ids"]
        assert (mask == (segment > 0)).all()
        assert (np.diff(mask, axis=1) <= 0).all(), "padding lies on the right"
        assert (batch["tokens"][mask == 0] == PAD).all()
        assert (batch["labels"] == np.where(batch["weights"] > 0, batch["tokens"], -1)).all()
        first = np.diff(segment, axis=1, prepend=0) > 0
        assert set(np.unique(np.diff(segment, axis=1, prepend=0)[first])) == {1}
        assert (batch["positions"][first] == 0).all()
        inner = (mask > 0) & ~first
        assert (batch["positions"][inner] == np.roll(batch["positions"], 1, axis=1)[inner] + 1).all()
        assert not batch["weights"][first].any()
        assert len(rows) == 3 or i == int(np.argmin([len(r) for r, _ in packed.epoch(1)]))


def test_a_filler_row_is_a_real_one_that_teaches_nothing() -> None:
    batch = Packed(sequences([4, 3]), 3, 4, seed=0, shuffle=False).make(0, 0)
    assert batch["tokens"][2].tolist() == batch["tokens"][0].tolist()
    assert batch["attention_mask"][2].any()
    assert set(batch["labels"][2].tolist()) == {-1}
    assert not batch["weights"][2].any()


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    def order(seed: int, e: int, shuffle: bool = True) -> list[Any]:
        packed = Packed(sequences(LENGTHS), 4, 64, seed=seed, shuffle=shuffle)
        return [packed.make(e, i)["tokens"].tolist() for i in range(len(packed))]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0, False) == order(2, 7, False)
    packed = Packed(sequences(LENGTHS), 4, 64, seed=1, shuffle=True)
    later = packed.make(9, 2)["tokens"].tolist()
    for e, i in itertools.product(range(4), range(len(packed))):
        packed.make(e, i)
    assert packed.make(9, 2)["tokens"].tolist() == later


def test_sequences_of_one_length_change_places() -> None:
    packed = Packed(sequences([8] * 40), 1, 32, seed=0, shuffle=True)
    mates = [{frozenset(packed.members(e, row).tolist()) for row in range(10)} for e in range(3)]
    assert len(mates[0] & mates[1]) + len(mates[1] & mates[2]) <= 2


@pytest.mark.parametrize(("length", "batch_size"), [(256, 4), (256, 8), (512, 4), (1024, 2)])
def test_less_than_a_twentieth_is_wasted(length: int, batch_size: int) -> None:
    lengths = word_problems()
    packed = Packed(sequences(lengths), batch_size, length, seed=0, shuffle=True)
    batches = [packed.make(0, i) for i in range(len(packed))]
    mask = np.concatenate([batch["attention_mask"] for batch in batches])
    learning = np.concatenate([batch["labels"] for batch in batches]).max(1) >= 0
    assert packed.waste() == pytest.approx(1 - mask[learning].sum() / mask.size, abs=1e-12)
    assert mask[learning].sum() == lengths.sum()
    assert packed.waste() < 0.05
    one_a_row = Padded(sequences(lengths), batch_size, (length,), seed=0, shuffle=True)
    assert one_a_row.waste() > 0.7


@pytest.mark.parametrize("seed", range(20))
def test_best_fit(seed: int) -> None:
    random = np.random.RandomState(seed)
    size = int(random.randint(1, 60))
    lengths = random.randint(1, size + 1, size=random.randint(1, 80))
    bins = best_fit(lengths, size)
    ordered = np.sort(lengths)[::-1]
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(ordered[one].sum() <= size for one in bins)
    assert best_fit(random.permutation(lengths), size) == bins
    # No item fits into a bin that was opened before its own: the rule of best fit.
    slow: list[list[int]] = []
    for place, item in enumerate(ordered):
        room = [(size - ordered[one].sum(), n) for n, one in enumerate(slow) if size - ordered[one].sum() >= item]
        if room:
            slow[min(room)[1]].append(place)
        else:
            slow.append([place])
    assert sorted(ordered[one].sum() for one in bins) == sorted(ordered[one].sum() for one in slow)


def test_padded_rows() -> None:
    data = sequences(LENGTHS)
    padded = Padded(data, 4, (8, 16, 33))
    found = []
    for i, (rows, width) in enumerate(padded.epoch(0)):
        batch = padded.make(0, i)
        assert list(batch) == ["tokens", "attention_mask", "labels", "weights"]
        assert width == min(w for w in (8, 16, 33) if w >= LENGTHS[rows].max())
        for b, row in enumerate(rows):
            n = LENGTHS[row]
            assert batch["tokens"][b].tolist() == [*data.ids[row].tolist(), *[PAD] * (width - n)]
            assert batch["attention_mask"][b].tolist() == [1] * n + [0] * (width - n)
            assert batch["weights"][b].tolist() == [*data.weights[row].tolist(), *[0] * (width - n)]
            assert (batch["labels"][b] == np.where(batch["weights"][b] > 0, batch["tokens"][b], -1)).all()
        assert not batch["weights"][len(rows):].any()
        found += rows.tolist()
    assert sorted(found) == list(range(103))


BASE = DecoderConfig(vocab_size=31, hidden_size=16, layers=2, heads=4, kv_heads=2, head_size=4, mlp_size=24,
                     positions=64, rope=Rope(), initializer_range=0.3)
MODELS = {
    "rope": {},
    "table": {"rope": None, "position_table": True, "norm": "layer", "gated": False, "activation": "gelu"},
    "window": {"window": 3, "local": (0,), "tied": True, "logit_cap": 5.0},
}


def weights_of(model: Decoder) -> Any:
    random = np.random.RandomState(0)
    return jax.tree.map(lambda leaf: random.normal(0, 0.5, leaf.shape).astype(np.float32), model.shapes())


def mean(model: Decoder) -> Any:
    return causal_lm(lambda params, frozen, batch, key: model.apply(
        params, batch["tokens"], **model_inputs(batch), key=key).loss)


@pytest.mark.parametrize("kind", ["window", *(pytest.param(k, marks=pytest.mark.slow) for k in ("table", "rope"))])
def test_a_packed_row_is_its_sequences_one_by_one(kind: str) -> None:
    """Loss and gradients of packed rows, and of each sequence alone without any padding."""
    model = Decoder(DecoderConfig(**{**vars(BASE), **MODELS[kind]}))
    params = weights_of(model)
    data = sequences([9, 4, 4, 9, 4, 4, 9, 4, 4], vocabulary=31)
    loss_fn = mean(model)
    total = jax.jit(jax.value_and_grad(lambda params, batch: loss_fn(params, None, batch, None)[1]["loss_sum"]))

    def over(batches: list[Any]) -> Any:
        return jax.tree.map(lambda *x: np.sum(x, axis=0), *(total(params, batch) for batch in batches))

    packed = Packed(data, 2, 17, seed=0, shuffle=True)
    assert len(packed) == 2, "several sequences in a row, several rows in a batch, and one to fill the last"
    assert sorted(len(packed.members(0, row)) for row in range(3)) == [3, 3, 3]
    alone = over([{"tokens": ids[None], "labels": np.where(w > 0, ids, -1)[None], "weights": w[None]}
                  for ids, w in zip(data.ids, data.weights, strict=True)])
    rows = over([packed.make(0, i) for i in range(len(packed))])
    assert float(alone[0]) / data.learnt > 1
    for want, got in zip(jax.tree.leaves(alone), jax.tree.leaves(rows), strict=True):
        assert np.isfinite(got).all()
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_what_makes_the_difference() -> None:
    """Padded rows have the loss of packed ones, whatever stands where nothing is learnt; without segments not."""
    model = Decoder(BASE)
    params = weights_of(model)
    data = sequences([9, 5], vocabulary=31)
    loss_fn = mean(model)
    loss = jax.jit(lambda batch: loss_fn(params, None, batch, None)[0])
    batch = Packed(data, 2, 16, seed=0, shuffle=False).make(0, 0)
    right = float(loss(batch))
    assert float(loss(Padded(data, 2, (16,)).make(0, 0))) == pytest.approx(right, rel=1e-5)
    spoilt = {**batch, "labels": np.where(batch["weights"] > 0, batch["labels"], 7)}
    assert float(loss(spoilt)) == pytest.approx(right, rel=1e-6)
    joined = {name: value for name, value in batch.items() if name != "segment_ids"}
    assert abs(float(loss(joined)) - right) > 1e-3


@pytest.mark.parametrize("kind", [Packed, Padded])
def test_a_stream_of_them_goes_on_where_it_was(kind: Any) -> None:
    pytest.importorskip("grain")
    from jpeft.data.pipeline import stream

    def made(**change: Any) -> Any:
        fit = 64 if kind is Packed else (16, 33)
        return kind(sequences(LENGTHS), 4, fit, **{"seed": 2, "shuffle": True, **change})

    first = stream(made())
    for _ in range(len(made()) + 3):
        next(first)
    state = json.dumps(first.get_state())
    again = stream(made())
    again.set_state(json.loads(state))
    for _ in range(5):
        one, other = next(first), next(again)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert made().fingerprint == made().fingerprint
    assert len({made().fingerprint, made(seed=3).fingerprint, made(shuffle=False).fingerprint}) == 3
    first.close()
    again.close()


def test_the_fingerprint_knows_weights() -> None:
    data = sequences(LENGTHS)
    other = Sequences(data.ids, [w * 0 for w in data.weights], data.cut, PAD)
    for make in (lambda d: Packed(d, 4, 64, seed=0, shuffle=True), lambda d: Padded(d, 4, (33,))):
        assert make(data).fingerprint != make(other).fingerprint


NONE = Sequences([], [], np.zeros(0, bool), PAD)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: Packed(sequences([3, 9, 4]), 2, 8, seed=0, shuffle=True), RowLengthError,
     "sequence 1 has 9 tokens, more than a row of 8; .*max_length=8"),
    (lambda: Padded(sequences([3, 9, 4]), 2, (4, 8)), RowLengthError, "row 1 has 9 tokens, .*largest bucket of 8"),
    (lambda: Packed(NONE, 2, 8, seed=0, shuffle=True), EmptyDataError, "there are no rows"),
    (lambda: Padded(NONE, 2, (8,)), EmptyDataError, "there are no rows"),
    (lambda: Packed(sequences([3]), 2, 0, seed=0, shuffle=True), BatchingError, "length is 0"),
    (lambda: Packed(sequences([3]), 2, 8.0, seed=0, shuffle=True), BatchingError, "length is 8.0"),  # type: ignore
    (lambda: Packed(sequences([3]), 0, 8, seed=0, shuffle=True), BatchingError, "batch_size is 0"),
    (lambda: Packed(sequences([3]), 1, 8, seed=-1, shuffle=True), BatchingError, "seed is -1"),
    (lambda: Packed(sequences([3]), 1, 8, seed=0, shuffle=True).make(0, 1), BatchingError, "there is no batch 1"),
    (lambda: Packed(sequences([3]), 1, 8, seed=0, shuffle=True).make(-1, 0), BatchingError, "epoch is -1"),
    (lambda: sequences([3]).take([1]), DataError, "indices go from 1 to 1, but there are 1 rows"),
])
def test_mistakes(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, JpeftError)
    assert "\n" not in str(caught.value)
