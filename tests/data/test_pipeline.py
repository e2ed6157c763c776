"""The stream: its order, and a position that restores exactly, across epochs, prefetching, processes and failures."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jpeft.data.batches import Batch, Batches
from jpeft.data.classify import Examples
from jpeft.errors import BatchingError, DataPositionError

pytest.importorskip("grain")

from jpeft.data.pipeline import stream

EPOCH = 6  # batches of an epoch


def make(**change: Any) -> Batches:
    lengths = np.random.RandomState(0).randint(1, 17, size=23)
    ids = [np.arange(n, dtype=np.int32) + 100 * i for i, n in enumerate(lengths)]
    examples = Examples(ids, np.zeros(23, np.int32), None, np.zeros(23, bool), 0)
    return Batches(examples, **{"batch_size": 4, "buckets": (8, 16), "seed": 3, "shuffle": True, **change})


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
def test_epochs_follow_each_other(prefetch: int) -> None:
    batches = make()
    expected = [batches.make(e, i) for e in range(3) for i in range(EPOCH)]
    assert same(list(stream(batches, epochs=3, prefetch=prefetch)), expected)
    assert same(list(itertools.islice(stream(batches, prefetch=prefetch), 3 * EPOCH)), expected)
    rows = [int(row) for batch in expected[EPOCH:2 * EPOCH]
            for row in batch["tokens"][batch["weights"] > 0].max(1) // 100]
    assert sorted(rows) == list(range(23)), "the second epoch lacks a row"


@pytest.mark.parametrize("prefetch", [0, 2, 50])
@pytest.mark.parametrize("taken", [0, 1, EPOCH - 1, EPOCH, EPOCH + 1, 3 * EPOCH - 1, 3 * EPOCH])
def test_a_restored_stream_yields_exactly_the_rest(taken: int, prefetch: int) -> None:
    first = stream(make(), epochs=3, prefetch=prefetch)
    for _ in range(taken):
        next(first)
    text = json.dumps(first.get_state())
    rest = list(first)
    again = stream(make(), epochs=3, prefetch=2 - prefetch % 3)
    again.set_state(json.loads(text))
    assert again.get_state() == json.loads(text)
    assert same(list(again), rest)
    assert len(rest) == 3 * EPOCH - taken


def test_going_back_and_forth_in_a_stream_that_is_ahead() -> None:
    one = stream(make(), prefetch=5)
    states, seen = [], []
    for _ in range(2 * EPOCH):
        states.append(one.get_state())
        seen.append(next(one))
    for k in (9, 0, 5, 11):
        one.set_state(states[k])
        assert same([next(one)], [seen[k]])
        assert one.get_state() == [*states, one.get_state()][k + 1]


def test_a_position_with_more_epochs_continues() -> None:
    done = stream(make(), epochs=1)
    assert len(list(done)) == EPOCH
    more = stream(make(), epochs=2)
    more.set_state(done.get_state())
    assert same(list(more), [make().make(1, i) for i in range(EPOCH)])


def test_a_position_holds_in_another_process() -> None:
    one = stream(make())
    for _ in range(EPOCH + 2):
        next(one)
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_pipeline as t
s = t.stream(t.make())
s.set_state(json.loads({json.dumps(one.get_state())!r}))
print(json.dumps([next(s)["tokens"].tolist() for _ in range(EPOCH)]))
""".replace("EPOCH", str(EPOCH))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [next(one)["tokens"].tolist() for _ in range(EPOCH)]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
def test_a_batch_that_failed_is_not_lost(monkeypatch: pytest.MonkeyPatch, prefetch: int,
                                         failure: type[BaseException]) -> None:
    batches = make()
    expected = [batches.make(0, i) for i in range(EPOCH)]
    original, left = batches.make, [1]

    def once(e: int, i: int) -> Batch:
        if i == 2 and left and left.pop():
            raise failure
        return original(e, i)

    monkeypatch.setattr(batches, "make", once)
    one = stream(batches, epochs=1, prefetch=prefetch)
    seen = [next(one), next(one)]
    before = one.get_state()
    with pytest.raises(failure):
        next(one)
    assert one.get_state() == before
    assert same(seen + list(one), expected)


@pytest.mark.parametrize("change", [{"seed": 4}, {"batch_size": 5}, {"buckets": (16,)}, {"shuffle": False}])
def test_a_position_in_other_batches_is_refused(change: dict[str, Any]) -> None:
    state = stream(make()).get_state()
    other = stream(make(**change), epochs=1)
    with pytest.raises(DataPositionError, match=r"one in the batches [0-9a-f]{16}, these are .* start anew"):
        other.set_state(state)
    assert len(list(other)) == len(make(**change))


@pytest.mark.parametrize("bad", [None, {}, {"next_index": 3}, [1], {"grain": {"next_index": 1}}])
def test_what_is_no_position(bad: Any) -> None:
    with pytest.raises(DataPositionError, match="is no position in a stream of batches; pass what get_state gave") as e:
        stream(make()).set_state(bad)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("inner", [{"next_index": 100}, {"next_index": -1}, {"next_index": "3"}, {}, None])
def test_a_position_outside_the_stream_leaves_it_as_it_was(inner: Any) -> None:
    one = stream(make(), epochs=1)
    next(one)
    with pytest.raises(DataPositionError, match=r"is no position in this stream \(.*; give it as many epochs"):
        one.set_state({**one.get_state(), "grain": inner})
    assert same(list(one), [make().make(0, i) for i in range(1, EPOCH)])


@pytest.mark.parametrize(("arguments", "said"), [
    ({"epochs": 0}, "epochs is 0, must be an integer, 1 or more"), ({"epochs": 1.5}, r"epochs is 1\.5"),
    ({"prefetch": -1}, "prefetch is -1, must be an integer, 0 or more"), ({"prefetch": None}, "prefetch is None"),
])
def test_numbers_that_are_none(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(BatchingError, match=said):
        stream(make(), **arguments)


def test_close_stops_the_thread() -> None:
    before = set(threading.enumerate())
    one = stream(make(), prefetch=2)
    next(one)
    started = set(threading.enumerate()) - before
    assert len(started) == 1
    one.close()
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()


def test_only_the_pipeline_loads_grain() -> None:
    code = ("import sys, jpeft.data.table, jpeft.data.split, jpeft.data.classify, jpeft.data.batches;"
            "print(sorted({'grain', 'pyarrow', 'tokenizers', 'transformers'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
