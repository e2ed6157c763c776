"""Bottleneck adapters behind and beside every kind of projection."""

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


def test_near_the_identity_as_in_the_paper() -> None:
    down = prepare(jpeft.Houlsby(bottleneck=6), PLAIN).start["w"]["down"]
    assert 0.005 < float(jnp.std(down)) < 0.015
    assert float(jnp.max(jnp.abs(down))) <= 0.02


def test_a_scale_for_each_output() -> None:
    with x64():
        r = prepare(jpeft.AdapterPlus(bottleneck=2, activation="tanh"), LINEAR[2], jnp.float64)
        y = LINEAR[2].apply(r.frozen.base["w"], r.x)
        flat = y.reshape(len(y), -1)
        want = flat + r.spread["w"]["s"] * (adapter(r.spread["w"], flat, 1, jnp.tanh) - flat)
        adapted = jpeft.adapt(lambda p, x: LINEAR[2].apply(p["w"], x), r.plan)
        assert_close(adapted(r.spread, r.frozen, r.x), want.reshape(y.shape), 1e-10)


@pytest.mark.parametrize(**each(LINEAR[1], LINEAR[3]))
def test_beside_a_projection(layout: Layout) -> None:
    """The input of the leaf itself, whatever its layout."""
    with x64():
        method = jpeft.ParallelAdapter(bottleneck=2, activation="tanh", scaling=3.0)
        r = prepare(method, layout, jnp.float64)
        x = r.x.reshape(*r.x.shape[: -len(layout.ins)], 8)
        t = r.spread["w"]
        scale = r.frozen.theta["w"]["s"]
        want = layout.apply(r.frozen.base["w"], r.x) + scale * (jnp.tanh(x @ t["down"] + t["b_down"]) @ t["up"]
                                                                + t["b_up"])
        adapted = jpeft.adapt(lambda p, x: layout.apply(p["w"], x), r.plan)
        assert_close(adapted(r.spread, r.frozen, r.x), want, 1e-10)


def feed_forward(p: Any, x: jax.Array) -> jax.Array:
    """Tokens are one axis while they are mixed, and the output is transposed before the bias is added."""
    flat = x.reshape(-1, x.shape[-1])
    y = jnp.einsum("nf,fd->dn", jnp.tanh(flat @ p["mlp"]["up"]), p["mlp"]["down"])
    return x + (y.T.reshape(x.shape) + p["mlp"]["bias"])


def test_beside_a_sublayer() -> None:
    params = {"mlp": {"up": jnp.ones((4, 6)) / 4, "down": jnp.ones((6, 4)) / 6, "bias": jnp.arange(4.0)}}
    x = jnp.asarray(np.random.RandomState(0).standard_normal((2, 3, 4)), jnp.float32)
    method = jpeft.ParallelAdapter(bottleneck=2, learned=True, input_of="up")
    plan = jpeft.plan(feed_forward, params, (x,), {"mlp/down": method})
    start, frozen = jpeft.init(plan, params, jax.random.key(0))
    t = {k: v + 0.5 for k, v in start["mlp/down"].items()}
    want = feed_forward(params, x) + t["s"] * (jax.nn.relu(x @ t["down"] + t["b_down"]) @ t["up"] + t["b_up"])
    assert_close(jpeft.adapt(feed_forward, plan)({"mlp/down": t}, frozen, x), want, 1e-5)


@pytest.mark.parametrize(("source", "words"), [("down2", "is not contracted before it"), ("late", "is not contracted"),
                                               ("other", "is contracted with other rows")])
def test_an_input_that_is_not_there(source: str, words: str) -> None:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        y = (x[:1] @ p["other"]) + x @ p["w"]
        return y @ p["late"]

    params = {k: jnp.ones((4, 4)) for k in ("other", "w", "late")}
    with pytest.raises(jpeft.errors.UnsupportedUse, match=words):
        jpeft.plan(apply, params, (jnp.ones((3, 4)),), {"w": jpeft.ParallelAdapter(input_of=source)})


def test_an_input_of_another_size() -> None:
    params = {"up": jnp.ones((3, 6)), "down": jnp.ones((6, 4))}
    with pytest.raises(jpeft.errors.UnsupportedUse, match="expects 4 features from 'up', found 3"):
        jpeft.plan(lambda p, x: x @ p["up"] @ p["down"], params, (jnp.ones((2, 3)),),
                   {"down": jpeft.ParallelAdapter(input_of="up")})


@pytest.mark.parametrize("fields", [{"phm_dim": 3}, {"phm_dim": 4, "bottleneck": 6}])
def test_kronecker_factors_must_fit(fields: dict[str, Any]) -> None:
    with pytest.raises(MethodConfigError, match="use a common divisor"):
        prepare(jpeft.Compacter(**fields), LINEAR[4])


def test_the_hidden_units_of_compacter_are_a_multiple() -> None:
    r = prepare(jpeft.Compacter(reduction_factor=1.4, phm_dim=4), LINEAR[4])
    assert r.start["w"]["b_down"].shape == (3, 4)
    assert not np.any(r.start["w"]["up_t"])
    with pytest.raises(MethodConfigError, match="both must be positive"):
        jpeft.Compacter(phm_rank=0)
