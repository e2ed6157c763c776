"""DeLoRA against its equation; the change has the strength that lambda says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import CONV, LINEAR, PLAIN, Layout, check, prepare, sample

import jpeft
from jpeft.errors import MethodConfigError


def change(a: jax.Array, b: jax.Array, strength: jax.Array, w: jax.Array) -> jax.Array:
    r = a.shape[-1]
    a, b = a.reshape(-1, r), b.reshape(r, -1)
    unit = sum(jnp.outer(a[:, i] / jnp.linalg.norm(a[:, i]), b[i] / jnp.linalg.norm(b[i])) for i in range(r))
    return strength / r * jnp.linalg.norm(w, axis=1)[:, None] * unit


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    frozen = change(theta["a0"], theta["b0"], theta["lambda0"], w) if "a0" in theta else 0.0
    return w + change(theta["a"], theta["b"], theta["lambda"], w) - frozen


@pytest.mark.parametrize("init", ["frozen", "zero"])
@pytest.mark.parametrize(**sample(LINEAR[4], *LINEAR, CONV[0]))
def test_equation(layout: Layout, init: str) -> None:
    check(jpeft.DeLoRA(rank=2, delora_lambda=3, init_weights=init), layout, equation)


def test_zero_columns_have_finite_gradients() -> None:
    r = prepare(jpeft.DeLoRA(rank=2, init_weights="zero"), PLAIN)
    slope = jax.grad(lambda t: jnp.sum(jpeft.merge(r.plan, t, r.frozen)["w"]))(r.start)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))
    assert np.any(slope["w"]["b"] != 0)


def test_the_change_is_bounded() -> None:
    r = prepare(jpeft.DeLoRA(rank=2, delora_lambda=0.5, init_weights="zero"), PLAIN)
    start = {"w": {**r.start["w"], "b": 1e3 * r.spread["w"]["b"]}}
    w = np.asarray(r.frozen.base["w"])
    moved = np.asarray(jpeft.merge(r.plan, start, r.frozen)["w"]) - w
    assert np.linalg.norm(moved / np.linalg.norm(w, axis=1, keepdims=True)) < 0.5 + 1e-6


def test_fields() -> None:
    with pytest.raises(MethodConfigError, match="'frozen' or 'zero'"):
        jpeft.DeLoRA(init_weights="ones")
