"""OFT against a dense rotation, in every layout; the Cayley map and its series."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import CONV, LINEAR, PLAIN, Layout, check, each, prepare
from support import assert_close, x64

import jpeft
from jpeft.errors import MethodConfigError


def blocks(q: jax.Array, b: int, neumann: int) -> list[jax.Array]:
    """The rotations of one leaf; entry `number[i, j]` of q is Q[i, j], for i < j row by row."""
    pairs = [(i, j) for i in range(b) for j in range(i + 1, b)]
    number, sign = np.zeros((b, b), int), np.zeros((b, b))
    for n, (i, j) in enumerate(pairs):
        number[i, j] = number[j, i] = n
        sign[i, j], sign[j, i] = 1, -1
    made = []
    for entries in q:
        skew, eye = sign * entries[number], jnp.eye(b)
        powers = [jnp.linalg.matrix_power(skew, n) for n in range(max(neumann - 1, 0))]
        inverse = sum(powers[1:], powers[0]) if neumann else jnp.linalg.inv(eye - skew)
        made.append((eye + skew) @ inverse)
    return made


def equation(theta: dict[str, jax.Array], w: jax.Array, b: int, neumann: int) -> jax.Array:
    return jax.scipy.linalg.block_diag(*blocks(theta["q"], b, neumann)) @ w


@pytest.mark.parametrize(**each(*LINEAR))
def test_equation(layout: Layout) -> None:
    check(jpeft.OFT(block_size=4), layout, functools.partial(equation, b=4, neumann=5))


@pytest.mark.parametrize("neumann", [0, 2, 3, 7])
def test_equation_by_terms(neumann: int) -> None:
    check(jpeft.OFT(blocks=4, neumann=neumann), PLAIN, functools.partial(equation, b=2, neumann=neumann))


def test_solving_gives_a_rotation_and_the_series_comes_close() -> None:
    with x64():
        q = 0.05 * jax.random.normal(jax.random.key(0), (2, 6))
        site = prepare(jpeft.OFT(block_size=4), PLAIN, jnp.float64).plan.entries[0].site
        exact = jpeft.OFT(block_size=4, neumann=0).rotation(site, q)
        assert_close(exact @ jnp.swapaxes(exact, -1, -2), jnp.broadcast_to(jnp.eye(4), (2, 4, 4)), 1e-12)
        series = [jpeft.OFT(block_size=4, neumann=n).rotation(site, q) for n in (3, 5, 9)]
        gaps = [float(jnp.max(jnp.abs(r - exact))) for r in series]
        assert gaps[0] > 20 * gaps[1] > 400 * gaps[2]
        assert gaps[1] < 1e-3


def test_series_of_hugging_face_peft() -> None:
    """Five terms there are `I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4`."""
    with x64():
        site = prepare(jpeft.OFT(block_size=4), PLAIN, jnp.float64).plan.entries[0].site
        theta = 0.3 * np.random.RandomState(0).standard_normal((2, 6))
        upper = np.zeros((2, 4, 4))
        upper[:, *np.triu_indices(4, 1)] = theta
        q = upper - upper.transpose(0, 2, 1)
        want = np.eye(4) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        assert_close(jpeft.OFT(block_size=4).rotation(site, jnp.asarray(theta)), jnp.asarray(want), 1e-12)


@pytest.mark.parametrize("method", [jpeft.OFT(), jpeft.OFT(block_size=3), jpeft.OFT(blocks=3), jpeft.OFT(blocks=8)])
def test_blocks_must_fit(method: jpeft.OFT) -> None:
    with pytest.raises(MethodConfigError, match="block_size such as 2, 4, 8"):
        prepare(method, PLAIN)


def test_one_term_is_no_series() -> None:
    with pytest.raises(MethodConfigError, match="neumann=1"):
        jpeft.OFT(neumann=1)


def test_contractions_only() -> None:
    with pytest.raises(jpeft.errors.WrongUseError, match="it needs linear"):
        prepare(jpeft.OFT(block_size=4), CONV[0])
