"""Batches: each row once per epoch, few shapes, exact contents, and an order that stays the same everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from jpeft.data.batches import Batches
from jpeft.data.classify import Examples
from jpeft.errors import BatchingError, DataError, EmptyDataError, JpeftError, RowLengthError

PAD = 99


def rows(lengths: list[int] | np.ndarray, types: bool = True) -> Examples:
    """Row i holds the ids 1000 i + 1, 1000 i + 2, ... and the label i mod 3."""
    ids = [np.arange(1, n + 1, dtype=np.int32) + 1000 * i for i, n in enumerate(lengths)]
    return Examples(ids, np.arange(len(ids), dtype=np.int32) % 3, [row % 2 for row in ids] if types else None,
                    np.zeros(len(ids), bool), PAD)


LENGTHS = np.random.RandomState(0).randint(1, 33, size=103)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 8, 103, 200])
@pytest.mark.parametrize("buckets", [(32,), (8, 16, 32), (4, 5, 16, 32, 64, 512), tuple(range(1, 33))])
def test_each_row_once_per_epoch_in_few_shapes(shuffle: bool, batch_size: int, buckets: tuple[int, ...]) -> None:
    batches = Batches(rows(LENGTHS), batch_size, buckets, seed=1, shuffle=shuffle)
    assert len(batches) == -(-103 // batch_size)
    shapes = []
    for e in range(3):
        epoch = batches.epoch(e)
        assert len(epoch) == len(batches)
        assert sorted(np.concatenate([part for part, _ in epoch]).tolist()) == list(range(103))
        assert sum(len(part) < batch_size for part, _ in epoch) <= 1
        for part, width in epoch:
            assert width == min(b for b in buckets if b >= LENGTHS[part].max())
        shapes.append(sorted(width for _, width in epoch))
    assert shapes[0] == shapes[1] == shapes[2]
    assert set(batches.widths) == set(shapes[0])


@pytest.mark.parametrize("types", [True, False])
def test_contents(types: bool) -> None:
    examples = rows(LENGTHS, types)
    batches = Batches(examples, 8, (8, 16, 32), seed=1, shuffle=True)
    real = 0
    for i, (part, width) in enumerate(batches.epoch(2)):
        batch = batches.make(2, i)
        assert list(batch) == ["tokens", "attention_mask", *(["token_types"] if types else []), "labels", "weights"]
        assert {name: array.dtype for name, array in batch.items()} == {
            name: np.dtype(np.float32 if name == "weights" else np.int32) for name in batch}
        assert {name: array.shape for name, array in batch.items()} == {
            name: (8,) if name in ("labels", "weights") else (8, width) for name in batch}
        assert batch["weights"].tolist() == [1.0] * len(part) + [0.0] * (8 - len(part))
        real += int(batch["weights"].sum())
        for b, row in enumerate([*part, *[part[0]] * (8 - len(part))]):
            n = LENGTHS[row]
            assert batch["tokens"][b].tolist() == [*examples.ids[row].tolist(), *[PAD] * (width - n)]
            assert batch["attention_mask"][b].tolist() == [1] * n + [0] * (width - n)
            assert batch["labels"][b] == row % 3
            if types:
                assert batch["token_types"][b].tolist() == [*(examples.ids[row] % 2).tolist(), *[0] * (width - n)]
    assert real == 103


def test_a_filler_row_is_a_real_one_so_that_no_mask_is_empty() -> None:
    batch = Batches(rows([3, 5]), 4, (8,), seed=0, shuffle=False).make(0, 0)
    assert (batch["attention_mask"].sum(1) > 0).all()


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, e: int, shuffle: bool = True) -> list[list[int]]:
        return [part.tolist() for part, _ in Batches(rows(LENGTHS), 8, (8, 32), seed=seed, shuffle=shuffle).epoch(e)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 2**40) != order(1, 0)
    assert sorted(map(sorted, order(1, 0))) != sorted(map(sorted, order(1, 1))), "the same rows met again"
    assert order(1, 0, shuffle=False) == order(2, 5, shuffle=False)


def test_the_order_is_the_same_everywhere() -> None:
    """Golden: a checkpoint of another machine or release continues with the same batches."""
    batches = Batches(rows([1, 9, 3, 12, 5, 2, 16, 7, 4]), 2, (4, 8, 16), seed=11, shuffle=True)
    assert [(part.tolist(), width) for part, width in batches.epoch(1)] == [
        ([6], 16), ([3, 1], 16), ([7, 4], 8), ([2, 0], 4), ([5, 8], 4)]
    assert batches.fingerprint == "590d08746d9a2125"


def test_without_shuffle_rows_keep_their_order_from_narrow_to_wide() -> None:
    batches = Batches(rows([1, 9, 3, 12, 5, 2, 16, 7, 4]), 2, (4, 8, 16), seed=0, shuffle=False)
    assert [(part.tolist(), width) for part, width in batches.epoch(0)] == [
        ([0, 2], 4), ([5, 8], 4), ([4, 7], 8), ([1, 3], 16), ([6], 16)]


def test_what_does_not_fill_a_batch_goes_to_the_next_bucket() -> None:
    batches = Batches(rows([1, 1, 1, 6, 6, 12]), 2, (4, 8, 16), seed=0, shuffle=False)
    assert [(part.tolist(), width) for part, width in batches.epoch(0)] == [([0, 1], 4), ([2, 3], 8), ([4, 5], 16)]
    batches = Batches(rows([12, 1, 1]), 2, (4, 8, 16), seed=0, shuffle=False)
    assert [width for _, width in batches.epoch(0)] == [4, 16]
    batches = Batches(rows([1, 1, 1]), 2, (4, 8, 16), seed=0, shuffle=False)
    assert [width for _, width in batches.epoch(0)] == [4, 4], "no wider than the rows that are left"


def test_waste_counts_padding_and_filler() -> None:
    assert Batches(rows([4, 4]), 2, (4, 8), seed=0, shuffle=True).waste() == 0
    assert Batches(rows([4, 2]), 2, (4,), seed=0, shuffle=True).waste() == pytest.approx(1 - 6 / 8)
    assert Batches(rows([4]), 2, (4,), seed=0, shuffle=True).waste() == pytest.approx(0.5)
    batches = Batches(rows(LENGTHS), 8, (8, 16, 32), seed=0, shuffle=True)
    made = [batches.make(4, i)["attention_mask"] * batches.make(4, i)["weights"][:, None] for i in range(len(batches))]
    assert batches.waste() == pytest.approx(1 - sum(m.sum() for m in made) / sum(m.size for m in made))


def test_the_fingerprint_tells_other_batches_apart() -> None:
    examples = rows(LENGTHS)
    arguments: dict[str, Any] = {"batch_size": 8, "buckets": (8, 32), "seed": 1, "shuffle": True}
    one = Batches(examples, **arguments).fingerprint
    assert one == Batches(rows(LENGTHS), **arguments).fingerprint
    other = [Batches(examples, **{**arguments, **change}).fingerprint
             for change in ({"batch_size": 9}, {"buckets": (16, 32)}, {"seed": 2}, {"shuffle": False})]
    changed = [row.copy() for row in examples.ids]
    changed[5][0] += 1
    other += [Batches(e, **arguments).fingerprint for e in (
        examples.take(range(102)), examples.take(np.arange(103)[::-1]), rows(LENGTHS, types=False),
        dataclasses.replace(examples, ids=changed), dataclasses.replace(examples, labels=examples.labels[::-1]),
        dataclasses.replace(examples, pad_id=0))]
    assert len({one, *other}) == 11


def test_callers_cannot_spoil_an_epoch() -> None:
    batches = Batches(rows([1, 2, 3, 4]), 2, (4,), seed=0, shuffle=True)
    before = [part.tolist() for part, _ in batches.epoch(0)]
    batches.epoch(0).clear()
    with pytest.raises(ValueError, match="read-only"):
        batches.epoch(0)[0][0][0] = 3
    batches.make(0, 0)["tokens"][:] = 0
    assert [part.tolist() for part, _ in batches.epoch(0)] == before
    assert batches.make(0, 0)["tokens"].any()


@pytest.mark.parametrize(("change", "kind", "said"), [
    ({"examples": rows([])}, EmptyDataError, "no rows to make batches of; check the filter and the sizes of the split"),
    ({"buckets": (2, 4)}, RowLengthError, r"row 1 has 6 tokens, more than .* bucket of 4; add a bucket, or .*=4$"),
    ({"buckets": ()}, BatchingError, r"buckets are \(\), must be widths in tokens, ascending"),
    ({"buckets": (8, 4)}, BatchingError, r"buckets are \(8, 4\)"),
    ({"buckets": (8, 8)}, BatchingError, "ascending"),
    ({"buckets": (0, 8)}, BatchingError, "buckets are"),
    ({"buckets": (8.0,)}, BatchingError, "buckets are"),
    ({"buckets": 64}, BatchingError, "buckets are 64"),
    ({"buckets": "64"}, BatchingError, "buckets are '64'"),
    ({"batch_size": 0}, BatchingError, "batch_size is 0, must be a whole number of rows, 1 or more"),
    ({"batch_size": 2.0}, BatchingError, r"batch_size is 2\.0"),
    ({"batch_size": True}, BatchingError, "batch_size is True"),
    ({"seed": -1}, BatchingError, "seed is -1, must be an integer from 0"),
    ({"seed": None}, BatchingError, "seed is None"),
])
def test_what_does_not_fit_is_an_error(change: dict[str, Any], kind: type[JpeftError], said: str) -> None:
    arguments: dict[str, Any] = {"examples": rows([3, 6]), "batch_size": 2, "buckets": (8,), "seed": 0, "shuffle": True}
    with pytest.raises(kind, match=said) as caught:
        Batches(**{**arguments, **change})
    assert isinstance(caught.value, DataError)
    assert "\n" not in str(caught.value)


def test_batches_that_are_not_there() -> None:
    batches = Batches(rows([3, 6]), 2, (8,), seed=0, shuffle=True)
    for i in (1, -1, 0.0):
        with pytest.raises(BatchingError, match=f"there is no batch {i}; an epoch has 1 batches, counted from 0"):
            batches.make(0, i)  # type: ignore[arg-type]
    with pytest.raises(BatchingError, match="epoch is -1, must be an integer, 0 or more"):
        batches.epoch(-1)
