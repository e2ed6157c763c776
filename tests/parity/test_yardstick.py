"""The yardstick measures itself: bootstrap, what it refuses to compare, and the file that both sides read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from parity import batchfile, compare, yardstick
from parity.batchfile import Batch, BatchFile
from parity.compare import Result
from parity.memory import Memory

from jpeft.train.bootstrap import Gain, gain


def test_bootstrap_of_equals_is_zero() -> None:
    right = np.random.default_rng(0).random((3, 50)) < 0.8
    assert gain(right, right, 200) == Gain(0.0, 0.0, 0.0)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.random((2, 800)) < 0.85, rng.random((3, 800)) < 0.75
    found = gain(ours, theirs)
    each = ours.mean(0) - theirs.mean(0)
    half = 1.96 * each.std() / np.sqrt(800)
    assert found.mean == pytest.approx(each.mean())
    assert [found.low, found.high] == pytest.approx([each.mean() - half, each.mean() + half], abs=0.1 * half)
    assert gain(ours, theirs) == found
    other = gain(theirs, ours)
    assert [other.low, other.high] == pytest.approx([-found.high, -found.low], abs=0.1 * half)


def test_bootstrap_is_paired() -> None:
    """Ours is right where theirs is, and on 20 of 400 examples more: unpaired noise would hide that."""
    theirs = np.random.default_rng(2).random(400) < 0.5
    ours = theirs.copy()
    ours[np.flatnonzero(~theirs)[:20]] = True
    found = gain(ours, theirs)
    assert found.mean == pytest.approx(0.05)
    assert 0.02 < found.low < 0.05 < found.high < 0.08


def test_bootstrap_of_other_examples() -> None:
    with pytest.raises(ValueError, match="accuracies on 4 and 5 rows cannot be paired"):
        gain(np.ones(4), np.ones(5))


def result(side: str = "jpeft", method: str = "lora", seed: int = 0, right: int = 8) -> Result:
    speed = {"jpeft": 50.0, "peft": 100.0}[side]
    return Result(side, method, seed, f"b{seed}", "t", np.arange(10) < right, 1000, 7, speed, 0.7, 2**30,
                  None if side == "jpeft" else 2**20)


RESULTS = [result(), result(seed=1, right=6), result("peft"), result("peft", seed=1), result(method="full", right=9)]


def test_the_table() -> None:
    rows = {" ".join(line.split()) for line in compare.table(RESULTS, 400).splitlines()}
    assert rows >= {"lora after compilation, MiB 1,024.0 1,024.0 1.000",
                    "lora jpeft 70.00 (80.00 60.00)", "lora peft 80.00 (80.00 80.00)", "full jpeft 90.00 (90.00)",
                    "lora ms per step, median 50.0 100.0 0.500", "full ms per step, median 50.0 - -",
                    "lora growth in training, MiB - 1.0 -", "lora trainable parameters 1,000 1,000 1.000"}
    starts = [row.split("[")[0].strip() for row in rows]
    assert "lora jpeft - peft -10.00" in starts
    assert "jpeft lora - full -20.00" in starts
    assert not [start for start in starts if start.startswith(("peft lora - full", "full jpeft - peft"))]


@pytest.mark.parametrize(("change", "says"), [
    ({"tests": "other"}, "not of the same test examples: .*peft lora seed 1: t, .*full seed 0: other"),
    ({"batches": "other"}, "seed 0: jpeft full and jpeft lora had other settings or batches"),
    ({"steps": 3}, r"had other settings or batches \(3 and 7 steps\)"),
    ({"method": "lora"}, "two results of jpeft lora seed 0"),
])
def test_what_is_not_compared(change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compare.table([*RESULTS[:-1], dataclasses.replace(RESULTS[-1], **change)])
    with pytest.raises(ValueError, match="there are no results"):
        compare.table([])


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    values = dataclasses.asdict(RESULTS[0])
    compare.write(tmp_path / "a" / "r.json", values)
    again = compare.read(tmp_path / "a" / "r.json")
    np.testing.assert_array_equal(again.correct, RESULTS[0].correct)
    assert dataclasses.replace(again, correct=None) == dataclasses.replace(RESULTS[0], correct=None)
    del values["steps"]
    with pytest.raises(ValueError, match="a result has the fields"):
        compare.write(tmp_path / "r.json", values)


def batch(rows: list[list[int]], width: int, index: list[int]) -> Batch:
    tokens, mask = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    labels = np.array([sum(row) % 2 for row in rows], np.int32)
    return Batch({"tokens": tokens, "attention_mask": mask}, labels, (np.array(index) >= 0).astype(np.float32),
                 np.array(index, np.int32))


def contents(width: int = 4) -> BatchFile:
    wide, short = batch([[5, 6], [7]], width, [1, 0]), batch([[8, 9, 9], [8, 9, 9]], width + 1, [2, -1])
    return BatchFile({"seed": 3, "betas": [0.9, 0.999]}, np.array([0.5, 1.0]), (short, wide), (wide,), (wide, short))


def test_a_batch_file_comes_back(tmp_path: Path) -> None:
    batchfile.write(tmp_path / "b.npz", contents())
    again = batchfile.read(tmp_path / "b.npz")
    assert (again.settings, again.rates.tolist()) == (contents().settings, [0.5, 1.0])
    for split in batchfile.SPLITS:
        for ours, theirs in zip(getattr(again, split), getattr(contents(), split), strict=True):
            for name, value in theirs.inputs.items():
                np.testing.assert_array_equal(ours.inputs[name], value)
            for name in ("labels", "weights", "index"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    real = again.train[0].real()
    assert (real.index.tolist(), real.inputs["tokens"].tolist()) == ([2], [[8, 9, 9, 0, 0]])


def test_hashes_tell_examples_from_batches() -> None:
    one, wider = contents(), contents(width=6)
    turned = dataclasses.replace(one, train=one.train[::-1], test=one.test[::-1])
    assert one.identity() == contents().identity()
    other = dataclasses.replace(one, settings={**one.settings, "seed": 4})
    assert len({one.identity(), wider.identity(), turned.identity(), other.identity()}) == 4
    assert one.examples("test") == wider.examples("test") == turned.examples("test") != one.examples("validation")


def test_the_driver_does_what_is_missing_and_no_more(tmp_path: Path) -> None:
    done, work = [], tmp_path / "work"

    def execute(command: list[str]) -> None:
        script = Path(command[1]).name
        seed = int(command[-1].removeprefix("seed=")) if script != "torch_peft.py" else int(command[2][-5])
        if script == "export_batches.py":
            values = {**contents().settings, "seed": seed, "rate": rate}
            batchfile.write(Path(command[2]), dataclasses.replace(contents(), settings=values))
            return
        done.append((script, command[command.index("--method") + 1], seed))
        if len(done) == 6 and fails:
            raise SystemExit("killed")
        one = result({"jpeft_side.py": "jpeft", "torch_peft.py": "peft"}[script], command[5], seed)
        found = batchfile.read(Path(command[2])).identity()
        compare.write(Path(command[3]), {**dataclasses.asdict(one), "batches": found})

    def go(*methods: str) -> None:
        files = {m: tmp_path / f"{m}.yaml" for m in compare.METHODS}
        yardstick.drive(work, files, methods, [0, 1], "torch-python", 2, ["train.epochs=1"], execute)

    rate, fails = 1, True
    with pytest.raises(SystemExit, match="killed"):
        go("lora", "full")
    assert done[-1] == ("torch_peft.py", "lora", 1)
    fails = False
    go("lora", "full")
    assert len(done) == 9
    assert done[-3:] == [("torch_peft.py", "lora", 1), ("jpeft_side.py", "full", 1), ("torch_peft.py", "full", 1)]
    go("lora", "full")
    assert len(done) == 9
    assert len(yardstick.results(work)) == 8
    assert "lora  jpeft - peft   +0.00" in compare.table(yardstick.results(work), 100)
    rate = 2
    with pytest.raises(SystemExit, match="is of other settings or batches"):
        go("lora")


def test_the_configurations_of_the_three_methods(tmp_path: Path) -> None:
    for name in ("a.yaml", "a_full.yaml"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match=r"there is no .*a_head\.yaml"):
        yardstick.configs(tmp_path / "a.yaml")
    (tmp_path / "a_head.yaml").touch()
    found = yardstick.configs(tmp_path / "a.yaml")
    assert [path.name for path in found.values()] == ["a.yaml", "a_full.yaml", "a_head.yaml"]


def test_memory_is_that_of_the_phase() -> None:
    memory = Memory()
    if memory.growth is None:
        pytest.skip("this system does not let a process forget its high-water mark")
    block = np.ones(2**23)
    size = block.nbytes
    del block
    memory.mark()
    assert 0.9 * size < memory.growth < 3 * size
    memory.stop()
    assert memory.growth > 0.9 * size
    assert memory.last < memory.peak - 0.8 * size
