"""Site semantics: an adapter on integer codes enters at the contraction, behind the model's own dequantisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft


def _grouped(p, x):
    codes = jnp.reshape(p["w"], (4, 4, 8)).astype(jnp.float32)
    return x @ jnp.reshape((codes - p["zero"]) * p["scale"], (16, 8))


@pytest.fixture
def params():
    rng = np.random.RandomState(0)
    return {"w": jnp.asarray(rng.randint(-127, 127, (16, 8)), jnp.int8),
            "scale": jnp.asarray(rng.rand(4, 1, 8), jnp.float32),
            "zero": jnp.asarray(rng.randn(4, 1, 8), jnp.float32)}


def test_integer_leaf_keeps_its_adapter_through_the_dequantisation(params):
    x = jnp.asarray(np.random.RandomState(1).randn(3, 16), jnp.float32)
    plan = jpeft.plan(_grouped, params, (x,), {"w": jpeft.LoRA(rank=2, alpha=4)})
    site = plan.entries[0].site
    assert (site.use, site.in_dims, site.out_dims) == ("linear", (0,), (1,))
    t, f = jpeft.init(plan, params, jax.random.key(0))
    t = jax.tree.map(lambda a: jnp.asarray(np.random.RandomState(2).randn(*a.shape), a.dtype), t)
    want = _grouped(params, x) + 2.0 * x @ t["w"]["a"] @ t["w"]["b"]
    got = jax.jit(jpeft.adapt(_grouped, plan))(t, f, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


def test_integer_leaf_does_not_merge(params):
    x = jnp.ones((3, 16))
    plan = jpeft.plan(_grouped, params, (x,), {"w": jpeft.LoRA(rank=2)})
    t, f = jpeft.init(plan, params, jax.random.key(0))
    with pytest.raises(jpeft.NotMergeable, match="dequantise the base first"):
        jpeft.merge(plan, t, f)
    kept, rest = jpeft.merge(plan, t, f, partial=True)
    assert kept["w"] is params["w"]
    assert set(rest) == {"w"}


def test_site_semantics_by_choice():
    def apply(p, x):
        return x @ (p["w"] * p["mask"])

    rng = np.random.RandomState(0)
    params = {"w": jnp.asarray(rng.randn(6, 4), jnp.float32), "mask": jnp.asarray(rng.rand(6, 4) > 0.5, jnp.float32)}
    x = jnp.asarray(rng.randn(2, 6), jnp.float32)
    with pytest.raises(jpeft.errors.UnsupportedUse, match="mul @"):
        jpeft.plan(apply, params, (x,), {"w": jpeft.LoRA(rank=2)})
    plan = jpeft.plan(apply, params, (x,), {"w": jpeft.LoRA(rank=2, alpha=2)}, site=["w"])
    assert jpeft.Plan.from_json(plan.to_json()) == plan
    t, f = jpeft.init(plan, params, jax.random.key(0))
    t = jax.tree.map(lambda a: jnp.ones_like(a), t)
    want = apply(params, x) + x @ t["w"]["a"] @ t["w"]["b"]
    np.testing.assert_allclose(jpeft.adapt(apply, plan)(t, f, x), want, rtol=1e-5)


def test_float8_leaf_is_adapted_in_float32_and_merged_back():
    params = {"w": jnp.asarray(np.random.RandomState(0).randn(6, 4), jnp.float8_e4m3fn)}
    x = jnp.asarray(np.random.RandomState(1).randn(2, 6), jnp.float32)

    def apply(p, x):
        return x @ p["w"].astype(x.dtype)

    plan = jpeft.plan(apply, params, (x,), {"w": jpeft.LoRA(rank=2, alpha=2)})
    t, f = jpeft.init(plan, params, jax.random.key(0))
    assert {v.dtype.name for v in t["w"].values()} == {"float32"}
    t = jax.tree.map(jnp.ones_like, t)
    want = apply(params, x) + x @ t["w"]["a"] @ t["w"]["b"]
    np.testing.assert_allclose(jpeft.adapt(apply, plan)(t, f, x), want, rtol=1e-5)
    merged = jpeft.merge(plan, t, f)["w"]
    np.testing.assert_array_equal(merged, (params["w"].astype(jnp.float32) + 2.0).astype(merged.dtype))
