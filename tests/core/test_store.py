import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jpeft import errors
from jpeft.core import store
from jpeft.core.frozen import Frozen
from jpeft.core.site import Site


@dataclasses.dataclass(frozen=True)
class Entry:
    """What `save` and `load` read of a plan's entry; `masks` as nested tuples, so that it is JSON."""

    path: str
    site: Site
    trainable: dict
    frozen: dict
    masks: dict

    def live(self):
        return {letter: np.asarray(mask) for letter, mask in self.masks.items()}


@dataclasses.dataclass(frozen=True)
class Plan:
    entries: tuple
    sites: tuple = ()

    def theta_shapes(self):
        return tuple(
            {e.path: {k: jax.ShapeDtypeStruct(*spec) for k, spec in getattr(e, group).items()} for e in self.entries}
            for group in ("trainable", "frozen")
        )

    def to_json(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data):
        def entry(d):
            specs = {group: {k: (tuple(s), t) for k, (s, t) in d[group].items()} for group in ("trainable", "frozen")}
            return Entry(d["path"], Site.from_json(d["site"]), **specs, masks=d["masks"])

        return cls(tuple(entry(d) for d in data["entries"]), tuple(Site.from_json(d) for d in data["sites"]))


RANKS = [[[1, 1, 0]], [[0, 0, 0]], [[1, 1, 1]]]


def make_plan(dtype="float32"):
    def entry(path, shape, trainable, frozen, masks=None):
        return Entry(path, Site(path, shape, "float32", "linear"), trainable, frozen, masks or {})

    entries = (
        entry("w", (4, 5), {"a": ((4, 3), dtype), "b": ((3, 5), dtype)}, {"scale": ((), "float32")}),
        entry("s/0~1x#é", (3, 4), {"a": ((3, 4, 3), dtype)}, {}, {"a": RANKS}),
        entry("s/1", (0,), {"z": ((0,), dtype)}, {"index": ((2, 3), "int32"), "on": ((3,), "bool")}),
    )
    return Plan(entries, (*(e.site for e in entries), Site("other", (3,), "int32", "other")))


def fill(shapes, seed=0):
    rng = np.random.default_rng(seed)

    def one(s):
        return jnp.asarray((5 * rng.normal(size=s.shape)).astype(s.dtype))

    return {path: {letter: one(s) for letter, s in letters.items()} for path, letters in shapes.items()}


def make(seed=0, dtype="float32"):
    plan = make_plan(dtype)
    params = {"w": jnp.ones((4, 5)), "s": {"0/x#é": jnp.ones((3, 4)), "1": jnp.ones(0)}, "other": jnp.arange(3)}
    trainable, frozen = (fill(shapes, seed) for shapes in plan.theta_shapes())
    return plan, params, trainable, Frozen(params, frozen)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(store, "Plan", Plan)


@pytest.fixture
def saved(tmp_path):
    plan, params, trainable, frozen = make()
    store.save(tmp_path / "adapter", plan, trainable, frozen)
    return tmp_path / "adapter", params


def alive(trainable):
    mask = np.broadcast_to(np.asarray(RANKS, bool), (3, 4, 3))
    a = trainable["s/0~1x#é"]["a"]
    return {**trainable, "s/0~1x#é": {"a": jnp.where(mask, a, jnp.zeros_like(a))}}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8"])
def test_round_trip(tmp_path, dtype):
    plan, params, trainable, frozen = make(dtype=dtype)
    store.save(str(tmp_path / "deep" / "adapter"), plan, trainable, frozen)
    assert sorted(p.name for p in (tmp_path / "deep" / "adapter").iterdir()) == ["adapter.safetensors", "plan.json"]
    plan2, trainable2, frozen2 = store.load(tmp_path / "deep" / "adapter", params)
    assert plan2.to_json() == plan.to_json()
    same(trainable2, alive(trainable))
    same(frozen2.theta, frozen.theta)
    assert frozen2.base is params
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((trainable2, frozen2.theta)))


def test_only_live_entries_are_stored(saved):
    folder, _ = saved
    tensors = safetensors.numpy.load_file(folder / "adapter.safetensors")
    _, _, trainable, _ = make()
    assert tensors["trainable/w#a"].shape == (4, 3)
    full = np.asarray(trainable["s/0~1x#é"]["a"])
    live = np.concatenate([np.concatenate([row[:n] for row in full[layer]]) for layer, n in enumerate((2, 0, 3))])
    np.testing.assert_array_equal(tensors["trainable/s/0~1x#é#a"], live)
    record = json.loads((folder / "plan.json").read_text())
    layout = record["tensors"]["trainable/s/0~1x#é#a"]
    assert layout == {"shape": [3, 4, 3], "dtype": "float32", "live": {"shape": [3, 1, 3], "bits": "110000111"}}
    assert record["sha256"] == hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()


def test_float64_needs_x64(tmp_path):
    with jax.enable_x64(True):
        plan, params, trainable, frozen = make(dtype="float64")
        params = jax.tree.map(lambda x: x.astype(x.dtype.name.replace("64", "32")), params)
        store.save(tmp_path, plan, trainable, Frozen(params, frozen.theta))
        same(store.load(tmp_path, params)[1], alive(trainable))
    with pytest.raises(errors.WrongDtypeError, match=r"float64.*jax_enable_x64"):
        store.load(tmp_path, params)


def test_loaded_arrays_share_no_buffer(saved):
    folder, params = saved
    _, trainable, frozen = store.load(folder, params)
    leaves = [x for x in jax.tree.leaves((trainable, frozen)) if x.size]
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


def edit_theta(change):
    plan, _, trainable, frozen = make()
    trainable = jax.tree.map(lambda x: x, trainable)
    change(trainable)
    return plan, trainable, frozen


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (errors.MissingKeyError, r"lacks trainable/w#a", lambda t: t["w"].pop("a")),
        (errors.MissingKeyError, r"lacks trainable/w#a, trainable/w#b", lambda t: t.pop("w")),
        (errors.ExtraKeyError, r"trainable/w#c", lambda t: t["w"].update(c=t["w"]["a"])),
        (errors.WrongShapeError, r"\[3, 4\] and the plan says \[4, 3\]", lambda t: t["w"].update(a=t["w"]["a"].T)),
        (errors.WrongDtypeError, r"cast it to float32", lambda t: t["w"].update(a=t["w"]["a"].astype("bfloat16"))),
        (errors.WrongDtypeError, r"is list and the plan", lambda t: t["w"].update(a=np.zeros((4, 3)).tolist())),
        (errors.WrongDtypeError, r"key<fry>", lambda t: t["w"].update(a=jax.random.split(jax.random.key(0), (4, 3)))),
    ],
)
def test_save_refuses_what_load_would_refuse(tmp_path, error, text, change):
    plan, trainable, frozen = edit_theta(change)
    with pytest.raises(error, match=text):
        store.save(tmp_path / "x", plan, trainable, frozen)
    assert not (tmp_path / "x").exists()


def rewrite(folder, change, sign=True):
    """Change the stored tensors; with `sign`, make the sums in plan.json fit again."""
    path = folder / "adapter.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    if sign:
        edit_record(folder, lambda r: r.update(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))


def edit_record(folder, change, sign=True):
    record = json.loads((folder / "plan.json").read_text())
    change(record)
    if sign:
        record["checksum"] = store._checksum(record)
    (folder / "plan.json").write_text(json.dumps(record))


@pytest.mark.parametrize("sign", [True, False])
@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (errors.MissingKeyError, "lacks trainable/w#a;", lambda t: t.pop("trainable/w#a")),
        (errors.ExtraKeyError, "trainable/w#c;", lambda t: t.update({"trainable/w#c": t["trainable/w#a"]})),
        (errors.WrongShapeError, r"\[12\]", lambda t: t.update({"trainable/w#a": t["trainable/w#a"].ravel()})),
        (
            errors.WrongShapeError,
            r"the plan says \[20\]",
            lambda t: t.update({"trainable/s/0~1x#é#a": np.ones(21, "float32")}),
        ),
        (errors.WrongDtypeError, "float16", lambda t: t.update({"trainable/w#a": np.ones((4, 3), "float16")})),
        (errors.WrongDtypeError, "enable_x64", lambda t: t.update({"trainable/w#a": np.ones((4, 3))})),
        (errors.WrongDtypeError, "C64|complex64", lambda t: t.update({"trainable/w#a": np.ones((4, 3), "complex64")})),
    ],
)
def test_load_names_what_differs(saved, error, text, change, sign):
    folder, params = saved
    rewrite(folder, change, sign)
    with pytest.raises(error, match=text) as caught:
        store.load(folder, params)
    assert "\n" not in str(caught.value)


def test_wrong_base(saved):
    folder, params = saved
    for bad, text in [
        ({**params, "w": params["w"].at[0, 0].set(2.0)}, "other values"),
        ({**params, "other": params["other"] + 1}, "other values"),
        (
            {**params, "more": params["other"]},
            r"'more' of the base parameters is int32\[3\] and the plan says that",
        ),
        ({**params, "w": params["w"].T}, r"'w' .* is float32\[5, 4\] and the plan says float32\[4, 5\]"),
        ({**params, "other": params["other"].astype("int8")}, r"'other' .* is int8\[3\] and the plan says int32\[3\]"),
        ({k: v for k, v in params.items() if k != "w"}, r"'w' .* is missing and the plan says float32\[4, 5\]"),
    ]:
        with pytest.raises(errors.WrongBaseError, match=text):
            store.load(folder, bad)
    plan, _, trainable, frozen = make()
    with pytest.raises(errors.WrongBaseError, match="'other' of the base parameters is missing"):
        store.save(folder, plan, trainable, frozen._replace(base={}))
    same(store.load(folder, jax.tree.map(np.asarray, params))[1], alive(trainable))


@pytest.mark.parametrize("name", ["plan.json", "adapter.safetensors"])
def test_corrupt_files(saved, name):
    folder, params = saved
    path = folder / name
    good = path.read_bytes()
    bad = [good[:n] for n in (0, 1, 7, 9, len(good) // 2, len(good) - 2)]
    bad += [b"\xff" * len(good), good + good, b"[]", b"[" * 100_000, b'{"format": "other"}']
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(errors.CorruptFileError, match=name) as caught:
            store.load(folder, params)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(errors.CorruptFileError, match=f"{name} is missing"):
        store.load(folder, params)
    path.mkdir()
    with pytest.raises(errors.CorruptFileError, match=name):
        store.load(folder, params)


@pytest.mark.parametrize("name", ["plan.json", "adapter.safetensors"])
def test_any_flipped_bit_is_found(saved, name):
    folder, params = saved
    path = folder / name
    good = path.read_bytes()
    for at in np.linspace(0, len(good) - 2, 150).astype(int):
        for bit in (1, 32):
            path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
            with pytest.raises(errors.StoreError):
                store.load(folder, params)


def test_records_that_do_not_fit(saved):
    folder, params = saved
    good = (folder / "plan.json").read_bytes()
    for change, sign, text in [
        (lambda r: r.update(version=2), True, "version 2 and this jpeft reads 1; update jpeft"),
        (lambda r: r.update(base="0" * 64), False, "changed after it was saved"),
        (lambda r: r["plan"].clear(), True, "holds no plan"),
        (lambda r: r.update(plan=3), True, "lacks 'plan'"),
        (lambda r: r["tensors"].pop("trainable/w#a"), True, "lists other tensors"),
        (lambda r: r["tensors"]["trainable/s/0~1x#é#a"]["live"].update(bits="011000111"), True, "lists other tensors"),
        (lambda r: r.pop("sha256"), True, "lacks 'sha256'"),
    ]:
        edit_record(folder, change, sign)
        with pytest.raises(errors.CorruptFileError, match=text):
            store.load(folder, params)
        (folder / "plan.json").write_bytes(good)


class Crash(BaseException):
    """The power is gone: nothing that the program does afterwards reaches the disk."""


@contextlib.contextmanager
def crash_at(monkeypatch, step):
    calls = []

    def dying(real):
        def call(*args, **kwargs):
            calls.append(real.__name__)
            if len(calls) >= step:
                raise Crash
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as m:
        for where, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            m.setattr(where, name, dying(getattr(where, name)))
        yield calls


def test_a_crash_at_any_moment_leaves_the_old_adapter_or_the_new(tmp_path, monkeypatch):
    plan, params, old, frozen = make(0)
    _, _, new, _ = make(1)
    outcomes = []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        store.save(folder, plan, old, frozen)
        with crash_at(monkeypatch, step) as calls:
            try:
                store.save(folder, plan, new, frozen)
            except Crash:
                crashed = True
            else:
                crashed = False
        found = store.load(folder, params)[1]
        outcomes.append("new" if np.array_equal(found["w"]["a"], new["w"]["a"]) else "old")
        same(found, alive(new if outcomes[-1] == "new" else old))
        store.save(folder, plan, old, frozen)
        same(store.load(folder, params)[1], alive(old))
        assert sorted(p.name for p in folder.iterdir()) == ["adapter.safetensors", "plan.json"]
        if not crashed:
            break
    assert calls.count("replace") == 3
    assert outcomes == sorted(outcomes, reverse=True)
    assert {"old", "new"} == set(outcomes)


def test_a_crash_of_the_first_save_leaves_nothing_to_load(tmp_path, monkeypatch):
    plan, params, trainable, frozen = make()
    for step in range(1, 9):
        folder = tmp_path / str(step)
        with crash_at(monkeypatch, step), contextlib.suppress(Crash):
            store.save(folder, plan, trainable, frozen)
        if (folder / "plan.json").exists():
            same(store.load(folder, params)[1], alive(trainable))
        else:
            with pytest.raises(errors.CorruptFileError, match=r"plan\.json is missing"):
                store.load(folder, params)


def test_a_failed_save_leaves_no_draft(saved, monkeypatch):
    folder, params = saved
    plan, _, new, frozen = make(1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.save(folder, plan, new, frozen)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.safetensors", "plan.json"]
    same(store.load(folder, params)[1], alive(make(0)[2]))


def test_load_during_a_save(saved, monkeypatch):
    folder, params = saved
    plan, _, new, frozen = make(1)
    real = store._read_tensors

    def late(*args):
        monkeypatch.setattr(store, "_read_tensors", real)
        store.save(folder, plan, new, frozen)
        return real(*args)

    monkeypatch.setattr(store, "_read_tensors", late)
    same(store.load(folder, params)[1], alive(new))


def test_other_files_are_left_alone(saved):
    folder, _ = saved
    (folder / "README.md").write_text("mine")
    (folder / "adapter-mine.safetensors").write_text("mine")
    plan, _, trainable, frozen = make(1)
    store.save(folder, plan, trainable, frozen)
    assert (folder / "README.md").read_text() == (folder / "adapter-mine.safetensors").read_text() == "mine"
