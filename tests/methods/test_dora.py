"""DoRA against the dense formula of the paper, in every layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import CONV, LINEAR, LOOKUP, PLAIN, RAGGED, Layout, check, each, prepare
from support import assert_close, randomise, x64

import jpeft
from jpeft.errors import MethodConfigError


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    r = theta["a"].shape[-1]
    change = theta["a"].reshape(-1, r) @ theta["b"].reshape(r, -1)
    if "a0" in theta:
        change = change - theta["a0"].reshape(-1, r) @ theta["b0"].reshape(r, -1)
    v = w + theta["scale"] * change
    norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(jnp.square(v), axis=0)))
    return theta["m"].reshape(-1) * v / norm


@pytest.mark.parametrize(**each(*LINEAR, RAGGED, *CONV, *LOOKUP))
def test_equation(layout: Layout) -> None:
    check(jpeft.DoRA(rank=2, alpha=3), layout, equation)


@pytest.mark.parametrize(**each(PLAIN, LINEAR[5]))
def test_equation_with_pissa(layout: Layout) -> None:
    check(jpeft.DoRA(rank=2, alpha=3, init_weights="pissa"), layout, equation)


def test_the_magnitude_is_the_norm_at_the_start() -> None:
    with x64():
        r = prepare(jpeft.DoRA(rank=2), LINEAR[2], jnp.float64)
        want = np.linalg.norm(np.asarray(r.frozen.base["w"]), axis=0)
        assert_close(r.start["w"]["m"], jnp.asarray(want), 1e-12)


def test_a_layer_of_rank_zero_is_left_alone() -> None:
    """Its magnitude is not trained either, nor counted nor stored."""
    with x64():
        layout = LINEAR[4]
        r = prepare(jpeft.DoRA(rank=(2, 0, 1)), layout, jnp.float64)
        assert r.plan.count() == 3 * (8 + 8) + 2 * 8
        merged = jpeft.merge(r.plan, r.spread, r.frozen)["w"]
        assert_close(merged[1], r.frozen.base["w"][1], 1e-12)
        assert not np.allclose(merged[2], r.frozen.base["w"][2])
        loss = lambda t: jnp.sum(jpeft.adapt(lambda p, x: layout.apply(p["w"], x), r.plan)(t, r.frozen, r.x))  # noqa: E731
        slope = jax.jit(jax.grad(loss))(r.spread)["w"]
        assert not np.any(slope["m"][1])
        assert np.any(np.asarray(slope["m"]), axis=1).tolist() == [True, False, True]


def test_an_output_whose_weights_are_zero_stays_finite() -> None:
    w = jnp.ones((4, 3)).at[:, 1].set(0)
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    plan = jpeft.plan(apply, {"w": w}, (w.T,), {"w": jpeft.DoRA(rank=1)})
    start, frozen = jpeft.init(plan, {"w": w}, jax.random.key(0))
    run = jax.jit(jax.value_and_grad(lambda t: jnp.sum(jpeft.adapt(apply, plan)(t, frozen, w.T))))
    for trainable in (start, randomise(start, 1)):
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(run(trainable)))
    assert_close(jpeft.merge(plan, start, frozen)["w"], w, 1e-6)


def test_it_comes_first() -> None:
    with pytest.raises(MethodConfigError, match="put it first"):
        jpeft.Chain((jpeft.LoRA(rank=2), jpeft.DoRA(rank=2)))
    r = prepare(jpeft.DoRA(rank=2), PLAIN)
    site = r.plan.entries[0].site
    scaled = jpeft.IA3().build(site, r.frozen.base["w"], {"l": jnp.ones(6)}, None)
    with pytest.raises(MethodConfigError, match="put it first"):
        jpeft.DoRA(rank=2).build(site, scaled, r.theta, None)


def test_the_norm_of_a_bfloat16_leaf_needs_no_float32_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU, A is rounded for the product with W; the rest is float32."""
    method = jpeft.DoRA(rank=2, alpha=3)
    r = prepare(method, PLAIN, jnp.bfloat16)
    base, site = r.frozen.base["w"], r.plan.entries[0].site
    wide = method.build(site, base, r.theta, None).s.array
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    thin = jax.jit(lambda theta: method.build(site, base, theta, None).s.array)(r.theta)
    copies = [v.aval.shape for eqn in jax.make_jaxpr(lambda w: method._norm(site, w, r.theta))(base).eqns
              if eqn.primitive.name == "convert_element_type" for v in eqn.invars]
    assert thin.dtype == jnp.float32
    assert base.shape not in copies
    assert_close(thin, wide, 1e-2)
