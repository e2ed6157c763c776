"""UniPELT: its three gates, written out from the equations, alone and together in a model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support import assert_close, randomise, x64

import jpeft
from jpeft.errors import MethodConfigError, NotMergeable
from jpeft.methods.presets import unipelt

B, T, D, V = 2, 4, 6, 3


def apply(params: Any, ids: jax.Array, theta: Any = None) -> jax.Array:
    """One block; `theta` of UniPELT written into it by hand."""
    h = x = params["embed"][ids]

    def gate(x: jax.Array, t: Any) -> jax.Array:
        return 1 / (1 + jnp.exp(-(x @ t["g"] + t["gb"])))[..., None]

    def project(name: str, x: jax.Array) -> jax.Array:
        y = x @ params[name]["kernel"]
        t = None if theta is None else theta[f"{name}/kernel"]
        if name in ("query", "value") and t is not None:
            t = {k.removeprefix("0."): v for k, v in t.items()}
            y = y + gate(x, t) * t["scale"] * (x @ t["a"] @ t["b"])
        return y

    q, k, v = (project(name, x) for name in ("query", "key", "value"))
    if theta is not None:
        own = {n.removeprefix("1."): t for n, t in theta["value/kernel"].items() if n[0] == "1"}
        k, v = (jnp.concatenate([jnp.mean(gate(x, t), 1, keepdims=True) * t["p"], y], 1)
                for t, y in ((theta["key/kernel"], k), (own, v)))
    mixed = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)) @ v
    y = jnp.tanh(h + mixed) @ params["down"]["kernel"]
    if theta is not None:
        t = theta["down/kernel"]
        y = y + gate(y, t) * (jax.nn.swish(y @ t["down"] + t["b_down"]) @ t["up"] + t["b_up"])
    return h + y


def test_the_equations() -> None:
    with x64():
        shapes = {"embed": (9, D), **{n: {"kernel": (D, D)} for n in ("query", "key", "value", "down")}}
        params = randomise(jax.tree.map(jnp.zeros, shapes, is_leaf=lambda s: isinstance(s, tuple)), 1, 0.5)
        ids = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
        rules = unipelt(length=V, rank=2, reduction_factor=3.0)
        plan = jpeft.plan(apply, params, (ids,), rules, tokens=jpeft.Tokens(ids=0))
        lora, prefix, adapter = 2 * 2 * D + D + 1, V * D + D + 1, 2 * 2 * D + 2 + D + D + 1
        assert plan.count() == 2 * lora + 2 * prefix + adapter
        start, frozen = jpeft.init(plan, params, jax.random.key(0))
        spread = randomise(start, 2, 0.7)

        def oracle(t: Any) -> jax.Array:
            return apply(params, ids, {p: {**frozen.theta.get(p, {}), **t[p]} for p in t})

        def measure(f: Any) -> Any:
            return f(spread), jax.grad(lambda t: jnp.sum(jnp.sin(f(t))))(spread)

        ours, want = jax.jit(lambda: (measure(lambda t: jpeft.adapt(apply, plan)(t, frozen, ids)), measure(oracle)))()
        assert_close(ours, want, 1e-10)
        assert all(bool(jnp.any(slope != 0)) for slope in jax.tree.leaves(ours[1]))


def test_a_gate_is_no_part_of_a_weight() -> None:
    params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
    plan = jpeft.plan(lambda p, x: x @ p["w"], params, (x,), {"w": jpeft.GatedLoRA(rank=2)})
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
    assert not trainable["w"]["b"].any()
    with pytest.raises(NotMergeable, match="acts on activations"):
        jpeft.merge(plan, trainable, frozen)
    with pytest.raises(MethodConfigError, match="use a rank from 1 to 4"):
        jpeft.plan(lambda p, x: x @ p["w"], params, (x,), {"w": jpeft.GatedLoRA(rank=5)})
