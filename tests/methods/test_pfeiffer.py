"""Pfeiffer's adapter on every kind of output."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import CONV, LINEAR, PLAIN, Layout, each, prepare
from support import assert_close, x64

import jpeft
from jpeft.errors import MethodConfigError


def adapter(theta: dict[str, jax.Array], y: jax.Array, n_out: int, act: Any) -> jax.Array:
    flat = y.reshape(*y.shape[: y.ndim - n_out], -1)
    return y + (act(flat @ theta["down"] + theta["b_down"]) @ theta["up"] + theta["b_up"]).reshape(y.shape)


@pytest.mark.parametrize(**each(*LINEAR[:4], *CONV))
def test_equation(layout: Layout) -> None:
    with x64():
        r = prepare(jpeft.Pfeiffer(bottleneck=2, activation="tanh"), layout, jnp.float64)
        ours = lambda t: jpeft.adapt(lambda p, x: layout.apply(p["w"], x), r.plan)(t, r.frozen, r.x)  # noqa: E731
        oracle = lambda t: adapter(t["w"], layout.apply(r.frozen.base["w"], r.x), len(layout.outs), jnp.tanh)  # noqa: E731
        both = jax.jit(lambda t: [(f(t), jax.grad(lambda t, f=f: jnp.sum(jnp.sin(f(t))))(t)) for f in (ours, oracle)])
        assert_close(*both(r.spread), 1e-10)


@pytest.mark.parametrize(**each(*LINEAR[4:6]))
def test_every_layer_has_its_own(layout: Layout) -> None:
    with x64():
        r = prepare(jpeft.Pfeiffer(bottleneck=2, activation="swish"), layout, jnp.float64)
        h, w = r.x, jnp.moveaxis(r.frozen.base["w"], layout.stack[0], 0)
        for i in range(len(w)):
            h = h + jnp.tanh(adapter({k: v[i] for k, v in r.spread["w"].items()}, h @ w[i], 1, jax.nn.swish))
        assert_close(jpeft.adapt(lambda p, x: layout.apply(p["w"], x), r.plan)(r.spread, r.frozen, r.x), h, 1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_after_the_bias_and_before_the_next_operation(dtype: Any) -> None:
    def apply(p: Any, x: jax.Array, extra: Any = None) -> jax.Array:
        y = x.astype(dtype) @ p["w"].astype(dtype) + p["b"].astype(dtype)
        y = adapter(jax.tree.map(lambda v: v.astype(dtype), extra), y, 1, jax.nn.relu) if extra else y
        return jnp.sin(y)

    params = {"w": jnp.ones((3, 4)) / 3, "b": jnp.arange(4.0)}
    x = jnp.asarray(np.random.RandomState(0).standard_normal((5, 3)), jnp.float32)
    plan = jpeft.plan(apply, params, (x,), {"w": jpeft.Pfeiffer(bottleneck=4)})
    start, frozen = jpeft.init(plan, params, jax.random.key(0))
    spread = jax.tree.map(lambda v: v + 0.5, start)
    assert_close(jpeft.adapt(apply, plan)(start, frozen, x), jax.jit(apply)(params, x), 1e-6)
    assert_close(jpeft.adapt(apply, plan)(spread, frozen, x), jax.jit(apply)(params, x, spread["w"]),
                 1e-6 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize(("method", "h"), [
    (jpeft.Pfeiffer(), 1), (jpeft.Pfeiffer(reduction_factor=2), 3), (jpeft.Pfeiffer(reduction_factor=0.5), None),
    (jpeft.Pfeiffer(bottleneck=6), 6), (jpeft.Pfeiffer(bottleneck=7), None)])
def test_width(method: jpeft.Pfeiffer, h: int | None) -> None:
    if h is None:
        with pytest.raises(MethodConfigError, match="use a bottleneck from 1 to 6"):
            prepare(method, PLAIN)
    else:
        r = prepare(method, PLAIN)
        assert r.start["w"]["down"].shape == (6, h)
        assert not np.any(r.start["w"]["up"])


@pytest.mark.parametrize(("fields", "words"), [
    ({"activation": "sine"}, "relu"), ({"reduction_factor": 0}, "positive"), ({"bottleneck": 0}, "positive")])
def test_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodConfigError, match=words):
        jpeft.Pfeiffer(**fields)


def test_it_does_not_merge() -> None:
    r = prepare(jpeft.Pfeiffer(bottleneck=2), PLAIN)
    with pytest.raises(jpeft.NotMergeable, match="Pfeiffer on 'w' acts on activations"):
        jpeft.merge(r.plan, r.spread, r.frozen)
    params, rest = jpeft.merge(r.plan, r.spread, r.frozen, partial=True)
    assert_close((params, rest), (r.frozen.base, r.spread), 0.0)
