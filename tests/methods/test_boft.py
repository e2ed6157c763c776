"""BOFT against dense butterfly factors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import LINEAR, PLAIN, Layout, check, prepare, sample

import jpeft
from jpeft.errors import MethodConfigError
from jpeft.methods.boft import Butterfly


def rotations(q: jax.Array, b: int) -> list[jax.Array]:
    made = []
    for entries in q:
        skew = jnp.zeros((b, b)).at[np.triu_indices(b, 1)].set(entries)
        skew, eye = skew - skew.T, jnp.eye(b)
        made.append((eye + skew) @ jnp.linalg.inv(eye - skew))
    return made


def equation(theta: dict[str, jax.Array], w: jax.Array, b: int) -> jax.Array:
    n = len(w)
    for stage, q in enumerate(theta["q"]):
        half = np.arange(n) // (b // 2)
        big = half // 2 ** (stage + 1)
        inner = half % 2 ** (stage + 1)
        place = sorted(range(n), key=lambda i: (big[i], inner[i] % 2, inner[i] // 2, i % (b // 2)))
        shuffle = np.eye(n)[place]
        turn = jax.scipy.linalg.block_diag(*rotations(q, b))
        w = shuffle @ turn @ shuffle.T @ w
    return w * theta["s"].reshape(-1)


@pytest.mark.parametrize(**sample(LINEAR[1], LINEAR[3], LINEAR[4]))
def test_equation(layout: Layout) -> None:
    check(jpeft.BOFT(block_size=2, n_butterfly_factor=3), layout, functools.partial(equation, b=2))


def test_one_factor_is_blocks() -> None:
    check(jpeft.BOFT(block_size=4), PLAIN, functools.partial(equation, b=4))


def test_factors_reach_every_input() -> None:
    """With log2(n / b) + 1 factors of blocks of 2, each output depends on each input."""
    r = jnp.broadcast_to(jnp.asarray([[0.8, 0.6], [-0.6, 0.8]]), (3, 4, 2, 2))
    assert bool(jnp.all(jnp.abs(Butterfly(8, 2)({"r": r}, jnp.eye(8))) > 1e-3))


@pytest.mark.parametrize("method", [jpeft.BOFT(block_size=3), jpeft.BOFT(block_size=4, n_butterfly_factor=3),
                                    jpeft.BOFT(n_butterfly_factor=0), jpeft.BOFT(block_size=1)])
def test_sizes_must_fit(method: jpeft.BOFT) -> None:
    with pytest.raises(MethodConfigError, match="does not fit the 8 inputs"):
        prepare(method, PLAIN)
    with pytest.raises(MethodConfigError, match="neumann=1"):
        jpeft.BOFT(neumann=1)
