"""Behaviour of the interpreter that is not an equality with merged weights: dropout, user rules, returned leaves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import randomise

import jpeft
from jpeft.core.interpret import USER_RULES

X = jnp.asarray(np.random.RandomState(0).randn(4, 8), jnp.float32)


def ready(apply, params, *args, method=None, seed=0):
    plan = jpeft.plan(apply, params, args, {"all-linear": method or jpeft.LoRA(rank=2, dropout=0.5)})
    t, f = jpeft.init(plan, params, jax.random.key(0))
    return jpeft.adapt(apply, plan), randomise(t, seed, 0.5), f, plan


def path(y, base):
    return np.asarray(y - base)


def test_dropout_needs_a_key_and_is_inverted():
    params = {"w": jnp.zeros((8, 3))}
    adapted, t, f, _ = ready(lambda p, x: x @ p["w"], params, X)
    clean = adapted(t, f, X)
    noisy = jax.vmap(lambda k: adapted(t, f, X, peft=jpeft.Call(key=k)))(jax.random.split(jax.random.key(1), 4000))
    assert np.abs(noisy[0] - clean).max() > 1e-3
    np.testing.assert_allclose(noisy.mean(0), clean, atol=6 * float(noisy.std(0).max()) / np.sqrt(4000))
    np.testing.assert_array_equal(adapted(t, f, X, peft=jpeft.Call(key=jax.random.key(3))),
                                  adapted(t, f, X, peft=jpeft.Call(key=jax.random.key(3))))


def masks(apply, params, outs):
    """Outputs under one key; equal dropout masks would give equal outputs for equal inputs."""
    adapted, t, f, _ = ready(apply, params, X)
    ys = adapted(t, f, X, peft=jpeft.Call(key=jax.random.key(5)))
    assert len(ys) == outs
    return [np.asarray(y) for y in ys]


def test_every_use_layer_and_step_has_its_own_mask():
    w = jnp.zeros((8, 8))
    twice = masks(lambda p, x: (x @ p["w"], x @ p["w"]), {"w": w}, 2)
    assert np.abs(twice[0] - twice[1]).max() > 1e-3
    stacked = jnp.zeros((3, 8, 8))

    def scanned(p, x):
        return tuple(lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1])

    adapted, t, f, _ = ready(scanned, {"w": stacked}, X)
    t = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), t)
    ys = np.asarray(adapted(t, f, X, peft=jpeft.Call(key=jax.random.key(5))))
    assert min(np.abs(ys[0] - ys[1]).max(), np.abs(ys[1] - ys[2]).max()) > 1e-3

    def recurrent(p, x):
        return tuple(lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, length=2)[1])

    steps = masks(recurrent, {"w": w}, 2)
    assert np.abs(steps[0] - steps[1]).max() > 1e-3

    def loop(p, x):
        def body(i, ys):
            return lax.dynamic_update_index_in_dim(ys, x @ p["w"], i, 0)
        return tuple(lax.fori_loop(0, jnp.asarray(2), body, jnp.zeros((2, *x.shape))))

    rounds = masks(loop, {"w": w}, 2)
    assert np.abs(rounds[0] - rounds[1]).max() > 1e-3


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 simulated devices")
def test_every_shard_has_its_own_mask():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def apply(p, x):
        return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))(p["w"], x)

    same = jnp.broadcast_to(X[:1], X.shape)
    adapted, t, f, _ = ready(apply, {"w": jnp.zeros((8, 8))}, same)
    y = np.asarray(adapted(t, f, same, peft=jpeft.Call(key=jax.random.key(5))))
    assert np.abs(y[0] - y[1]).max() > 1e-3


def test_a_user_rule_serves_an_opaque_function():
    @jax.custom_vjp
    def matmul(x, w):
        return x @ w

    matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    params = {"w": jnp.asarray(np.random.RandomState(1).randn(8, 3), jnp.float32)}

    def apply(p, x):
        return matmul(x, p["w"])

    jpeft.register_rule("custom_vjp_call", lambda x, w, **params: jpeft.multiply(x, w, (1,), (0,)))
    try:
        plan = jpeft.plan(lambda p, x: x @ p["w"], params, (X,), {"w": jpeft.LoRA(rank=2)})
        t, f = jpeft.init(plan, params, jax.random.key(0))
        t = randomise(t, 0, 0.5)
        want = apply(jpeft.merge(plan, t, f), X)
        np.testing.assert_allclose(jpeft.adapt(apply, plan)(t, f, X), want, rtol=1e-5, atol=1e-5)
    finally:
        USER_RULES.clear()
    with pytest.raises(TypeError, match="callable"):
        jpeft.register_rule("custom_vjp_call", None)


def test_a_returned_leaf_is_formed():
    params = {"w": jnp.ones((8, 3))}
    adapted, t, f, plan = ready(lambda p, x: (x @ p["w"], p), params, X, method=jpeft.LoRA(rank=2))
    _, out = adapted(t, f, X)
    np.testing.assert_allclose(out["w"], jpeft.merge(plan, t, f)["w"], rtol=1e-5, atol=1e-5)


def test_a_key_passed_through_params_is_left_alone():
    params = {"w": jnp.ones((8, 3)), "key": jax.random.key(0)}
    adapted, t, f, plan = ready(
        lambda p, x: x @ p["w"] + jax.random.normal(p["key"], (3,)), params, X, method=jpeft.LoRA(rank=2))
    want = X @ jpeft.merge(plan, t, f)["w"] + jax.random.normal(params["key"], (3,))
    np.testing.assert_allclose(adapted(t, f, X), want, rtol=1e-4, atol=1e-4)


def test_bf16_compute_keeps_theta_in_float32():
    params = {"w": jnp.ones((8, 3), jnp.bfloat16)}
    adapted, t, f, plan = ready(lambda p, x: x @ p["w"], params, X.astype(jnp.bfloat16), method=jpeft.LoRA(rank=2))
    assert {a.dtype for a in jax.tree.leaves((t, f.theta))} == {jnp.dtype("float32")}
    assert adapted(t, f, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert jpeft.merge(plan, t, f)["w"].dtype == jnp.bfloat16
    assert 0 < float(jpeft.merge_error(plan, t, f)["w"]) < 2.0 ** -8
