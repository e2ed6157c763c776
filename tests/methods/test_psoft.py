"""PSOFT against a rotation within the principal part."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import LINEAR, PLAIN, Layout, check, each, prepare
from support import assert_close

import jpeft
from jpeft.errors import MethodConfigError


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    a, b = theta["a0"], theta["b0"]
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)
    r = a.shape[1]
    skew = jnp.zeros((r, r)).at[np.triu_indices(r, 1)].set(theta["q"])
    skew, eye = skew - skew.T, jnp.eye(r)
    turn = (eye + skew) @ jnp.linalg.inv(eye - skew)
    m = jnp.diag(theta["a_magnitude"]) @ turn.T @ jnp.diag(theta["b_magnitude"])
    return w + a @ (m - eye) @ b


@pytest.mark.parametrize(**each(LINEAR[1], LINEAR[2], LINEAR[4]))
def test_equation(layout: Layout) -> None:
    check(jpeft.PSOFT(rank=3), layout, equation)


def test_the_factors_are_the_best_of_their_rank() -> None:
    r = prepare(jpeft.PSOFT(rank=6), PLAIN)
    assert_close(r.theta["a0"] @ r.theta["b0"], r.frozen.base["w"], 1e-5)
    assert prepare(jpeft.PSOFT(rank=3, magnitudes=False, neumann=5), PLAIN).plan.count() == 3


def test_fields() -> None:
    with pytest.raises(MethodConfigError, match="use a rank from 2 to 6"):
        prepare(jpeft.PSOFT(rank=7), PLAIN)
    with pytest.raises(MethodConfigError, match="neumann=1"):
        jpeft.PSOFT(neumann=1)
