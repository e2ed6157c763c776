"""KaSA against its equation; it starts from the weight without its least components."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import LINEAR, PLAIN, Layout, check, prepare, sample
from support import assert_close

import jpeft
from jpeft.errors import MethodConfigError


def without_least(w: jax.Array, r: int) -> jax.Array:
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return (u[:, :-r] * s[:-r]) @ vt[:-r]


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    return without_least(w, 2) + theta["scale"] * theta["a"].reshape(-1, 2) @ jnp.diag(theta["d"]) \
        @ theta["b"].reshape(2, -1)


@pytest.mark.parametrize(**sample(PLAIN, *LINEAR))
def test_equation(layout: Layout) -> None:
    check(jpeft.KaSA(rank=2, alpha=3), layout, equation)


def test_it_starts_without_the_least_components() -> None:
    r = prepare(jpeft.KaSA(rank=2), PLAIN)
    assert_close(jpeft.merge(r.plan, r.start, r.frozen)["w"], without_least(r.frozen.base["w"], 2), 1e-5)


def test_layers_left_out_keep_the_base() -> None:
    params, x = {"w": jax.random.normal(jax.random.key(1), (3, 6, 6))}, jnp.ones((2, 6))
    apply = lambda p, x: jax.lax.scan(lambda h, v: (h @ v, None), x, p["w"])[0]  # noqa: E731
    plan = jpeft.plan(apply, params, (x,), {jpeft.layers("w", [1]): jpeft.KaSA(rank=2)})
    merged = jpeft.merge(plan, *jpeft.init(plan, params, jax.random.key(0)))["w"]
    np.testing.assert_allclose(merged[::2], params["w"][::2], atol=1e-5)
    assert float(jnp.max(jnp.abs(merged[1] - params["w"][1]))) > 1e-2


def test_penalty() -> None:
    r = prepare(jpeft.KaSA(rank=2, beta=0.5, gamma=0.25), PLAIN)
    a, b, d = (np.asarray(r.theta[k], np.float64) for k in "abd")
    want = 0.5 * np.sum(d**2) + 0.25 * sum(np.linalg.norm(m.T @ m - np.eye(2)) for m in (a, b.T))
    np.testing.assert_allclose(jpeft.penalty(r.plan, r.spread, r.frozen), want, rtol=1e-5)


@pytest.mark.parametrize("fields", [{"rank": 6}, {"init_weights": "pissa"}, {"rank": (1, 2)}])
def test_fields(fields: dict[str, object]) -> None:
    with pytest.raises(MethodConfigError, match="; use"):
        prepare(jpeft.KaSA(**fields), PLAIN)
