"""SHiRA and WaveFT against dense changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import CONV, LINEAR, LOOKUP, PLAIN, Layout, check, each, prepare

import jpeft
from jpeft.errors import MethodConfigError


def entries(theta: dict[str, jax.Array], letter: str, shape: tuple[int, ...]) -> jax.Array:
    one = [(theta["loc"][0] == i)[None, :] & (theta["loc"][1][None, :] == jnp.arange(shape[1])[:, None])
           for i in range(shape[0])]
    return jnp.stack(one) @ theta[letter]


def sparse(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    return w + theta["scale"] * entries(theta, "v", w.shape)


def haar(n: int) -> np.ndarray:
    """Row i of the first half: the mean of outputs 2 i and 2 i + 1; of the second, their difference."""
    rows = [np.eye(n)[2 * i] + sign * np.eye(n)[2 * i + 1] for sign in (1, -1) for i in range(n // 2)]
    return np.stack(rows) / np.sqrt(2)


def wavelets(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    """The quarter right of the mean holds differences of rows, that below it of columns."""
    n, m = (s + s % 2 for s in w.shape)
    c = jnp.zeros((n, m), w.dtype).at[: w.shape[0], : w.shape[1]].set(entries(theta, "c", w.shape))
    a, b = n // 2, m // 2
    swapped = jnp.block([[c[:a, :b], jnp.zeros((a, b))], [jnp.zeros((a, b)), c[a:, b:]]])
    change = haar(n).T @ swapped @ haar(m)
    rows, columns = haar(n), haar(m)
    change += rows[a:].T @ c[:a, b:] @ columns[:b] + rows[:a].T @ c[a:, :b] @ columns[b:]
    return w + theta["scale"] * change[: w.shape[0], : w.shape[1]]


@pytest.mark.parametrize(**each(LINEAR[1], LINEAR[5], CONV[0], LOOKUP[1]))
def test_shira(layout: Layout) -> None:
    check(jpeft.SHiRA(rank=1, scaling=2.0), layout, sparse)


@pytest.mark.parametrize(**each(LINEAR[1], LINEAR[5], LOOKUP[1]))
def test_waveft(layout: Layout) -> None:
    check(jpeft.WaveFT(n_frequency=30), layout, wavelets)


def test_odd_sizes_and_the_change_itself() -> None:
    odd = Layout("odd", (5, 3), (0,), (1,), (), (2, 5), lambda w, x: x @ w)
    check(jpeft.WaveFT(n_frequency=15), odd, wavelets)
    check(jpeft.WaveFT(n_frequency=7, use_idwt=False), odd,
          lambda theta, w: w + theta["scale"] * entries(theta, "c", w.shape))


def test_as_many_as_there_are_entries() -> None:
    for method in (jpeft.SHiRA(rank=4), jpeft.SHiRA(rank=0), jpeft.WaveFT(n_frequency=49)):
        with pytest.raises(MethodConfigError, match="use 1 to 48"):
            prepare(method, PLAIN)
    assert prepare(jpeft.SHiRA(rank=2), PLAIN).plan.count() == 28
