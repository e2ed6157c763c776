"""ReFT: edits of the residual stream by position."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from support import assert_close, randomise, x64

import jpeft
from jpeft.errors import CallError, MethodConfigError, PlanError, UnsupportedUse

B, T, D = 2, 6, 4


def block(p: Any, h: jax.Array, edit: Any = None) -> jax.Array:
    """Two blocks that mix tokens; `edit(h, path)` changes the residual stream behind each."""
    for i in range(2):
        y = jnp.tanh(jnp.cumsum(h, 1) @ p[f"{i}"]["w"]) @ p[f"{i}"]["out"] + p[f"{i}"]["bias"]
        h = h + y
        h = edit(h, f"{i}/out") if edit else h
    return h


def params(dtype: Any = jnp.float64) -> Any:
    shapes = {"w": (D, D), "out": (D, D), "bias": (D,)}
    return {f"{i}": randomise({k: jnp.zeros(s, dtype) for k, s in shapes.items()}, i) for i in range(2)}


def loreft(t: Any, h: jax.Array) -> jax.Array:
    q, upper = jnp.linalg.qr(t["p"])
    r = (q * jnp.sign(jnp.diag(upper))).T
    assert_close(r @ r.T, jnp.eye(len(r)), 1e-10)
    return h + (h @ t["w"] + t["b"] - h @ r.T) @ r


def direft(t: Any, h: jax.Array) -> jax.Array:
    return h + (h @ t["w"] + t["b"]) @ t["v"]


def here(first: list[range], last: list[range]) -> Any:
    """For each row, 0 at its first tokens, 1 at its last, -1 elsewhere."""
    found = np.full((B, T), -1)
    for row in range(B):
        found[row, list(last[row])] = 1
        found[row, list(first[row])] = 0
    return found


CASES = {
    "first": ({"prefix_positions": 2}, None, here([range(2)] * B, [range(0)] * B)),
    "both": ({"prefix_positions": 2, "suffix_positions": 1}, None, here([range(2)] * B, [range(5, 6)] * B)),
    "tied": ({"prefix_positions": 1, "suffix_positions": 2, "tied_weights": True}, None,
             here([range(1)] * B, [range(4, 6)] * B)),
    "last": ({"prefix_positions": 0, "suffix_positions": 2}, (4, 1), here([range(0)] * B, [range(2, 4), range(1)])),
    "overlap": ({"prefix_positions": 2, "suffix_positions": 3}, (6, 2), here([range(2)] * B, [range(3, 6), range(0)])),
    "all": ({"prefix_positions": None}, None, here([range(T)] * B, [range(0)] * B)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("cls", "equation"), [(jpeft.DiReFT, direft), (jpeft.LoReFT, loreft)])
def test_equation(cls: Any, equation: Any, name: str) -> None:
    fields, lengths, where = CASES[name]
    with x64():
        h = randomise(jnp.zeros((B, T, D)), 3, 1.0)
        plan = jpeft.plan(block, params(), (h,), {"./out": cls(rank=2, **fields)}, tokens=jpeft.Tokens(ids=0))
        start, frozen = jpeft.init(plan, params(), jax.random.key(0))
        spread = randomise(start, 5)
        call = jpeft.Call(lengths=None if lengths is None else jnp.asarray(lengths))

        def edit(h: jax.Array, path: str) -> jax.Array:
            t, own = spread[path], "w_last" in spread[path]
            parts = [{k: t[f"{k}{end}"] for k in ("p", "w", "b", "v") if f"{k}{end}" in t}
                     for end in (("", "_last") if own and "w" in t else ("_last",) * 2 if own else ("", ""))]
            for i, part in enumerate(parts):
                h = jnp.where((where == i)[..., None], equation(part, h), h)
            return h

        adapted = jpeft.adapt(block, plan)
        assert_close(adapted(start, frozen, h, peft=call), block(params(), h), 1e-12)
        assert_close(adapted(spread, frozen, h, peft=call), block(params(), h, edit), 1e-10)


def test_behind_virtual_tokens_the_first_tokens_are_the_real_ones() -> None:
    def apply(p: Any, ids: jax.Array, edit: Any = None) -> jax.Array:
        return block(p, p["embed"][ids], edit)

    with x64():
        ids = jnp.asarray([[1, 2, 3], [4, 5, 6]])
        base = {**params(), "embed": randomise(jnp.zeros((9, D)), 8)}
        rules = {"embed": jpeft.PromptTuning(length=2), "./out": jpeft.DiReFT(rank=1, prefix_positions=1)}
        plan = jpeft.plan(apply, base, (ids,), rules, tokens=jpeft.Tokens(ids=0))
        start, frozen = jpeft.init(plan, base, jax.random.key(0))
        spread = randomise(start, 5)
        both = jnp.concatenate([jnp.broadcast_to(spread["embed"]["p"], (2, 2, D)), base["embed"][ids]], 1)
        want = block(base, both, lambda h, path: h.at[:, 2].set(direft(spread[path], h[:, 2])))
        assert_close(jpeft.adapt(apply, plan)(spread, frozen, ids), want[:, 2:], 1e-10)


def test_dropout_and_a_gain_on_the_way_to_the_stream() -> None:
    """The edit is of the sum that the model makes, whatever scales the output before."""
    drop = nn.Dropout(0.5, deterministic=False)

    def apply(p: Any, h: jax.Array, key: jax.Array) -> jax.Array:
        out = (h @ p["w"] + p["bias"]) * p["gain"]
        return h + drop.apply({}, -out / 2, rngs={"dropout": key})

    with x64():
        h, key = randomise(jnp.zeros((B, T, D)), 3, 1.0), jax.random.key(1)
        base = {**params()["0"], "gain": jnp.arange(1.0, D + 1)}
        method = jpeft.DiReFT(rank=2, prefix_positions=2)
        plan = jpeft.plan(apply, base, (h, key), {"w": method}, tokens=jpeft.Tokens(ids=0))
        start, frozen = jpeft.init(plan, base, jax.random.key(0))
        spread, stream = randomise(start, 5), apply(base, h, key)
        want = stream.at[:, :2].set(direft(spread["w"], stream[:, :2]))
        assert_close(jpeft.adapt(apply, plan)(spread, frozen, h, key), want, 1e-10)


def test_the_output_alone() -> None:
    h = randomise(jnp.zeros((B, T, D)), 3, 1.0)
    method = jpeft.DiReFT(rank=1, prefix_positions=None, residual=False)
    apply = lambda p, h: jnp.tanh(h @ p["w"] + p["bias"])  # noqa: E731
    base = params(jnp.float32)["0"]
    plan = jpeft.plan(apply, base, (h,), {"w": method})
    start, frozen = jpeft.init(plan, base, jax.random.key(0))
    t = randomise(start, 5)
    assert_close(jpeft.adapt(apply, plan)(t, frozen, h), jnp.tanh(direft(t["w"], h @ base["w"] + base["bias"])), 1e-5)


def test_what_cannot_be_edited() -> None:
    h, base, tokens = jnp.ones((B, T, D)), params(jnp.float32), jpeft.Tokens(ids=0)
    with pytest.raises(PlanError, match="DiReFT acts by position; pass tokens="):
        jpeft.plan(block, base, (h,), {"./out": jpeft.DiReFT()})
    with pytest.raises(UnsupportedUse, match="is not added to a residual stream"):
        jpeft.plan(block, base, (h,), {"./w": jpeft.DiReFT()}, tokens=tokens)
    flat = lambda p, h: h + (h.reshape(-1, D) @ p["0"]["w"]).reshape(h.shape)  # noqa: E731
    with pytest.raises(CallError, match="rows without a token axis"):
        jpeft.plan(flat, base, (h,), {"0/w": jpeft.DiReFT()}, tokens=tokens)
    with pytest.raises(MethodConfigError, match="edits no token"):
        jpeft.LoReFT(prefix_positions=0)
    with pytest.raises(MethodConfigError, match="use a rank from 1 to 4"):
        jpeft.plan(block, base, (h,), {"./out": jpeft.LoReFT(rank=5)}, tokens=tokens)
