"""FourierFT against a sum of cosines, in every layout."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import CONV, LINEAR, LOOKUP, PLAIN, RAGGED, Layout, check, each, prepare

import jpeft
from jpeft.errors import MethodConfigError


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    """`Re ifft2`: every coefficient is a plane wave."""
    n, m = w.shape
    (u, v), row, column = theta["loc"], jnp.arange(n)[:, None, None], jnp.arange(m)[None, :, None]
    waves = jnp.cos(2 * jnp.pi * (u * row / n + v * column / m))
    return w + theta["scale"] / (n * m) * jnp.sum(theta["c"] * waves, -1)


@pytest.mark.parametrize(**each(*LINEAR, RAGGED, *CONV, *LOOKUP))
def test_equation(layout: Layout) -> None:
    check(jpeft.FourierFT(n_frequency=7), layout, equation)


def test_places_are_different_and_come_from_the_seed() -> None:
    most = functools.partial(jpeft.FourierFT, n_frequency=48)
    loc = np.asarray(prepare(most(), PLAIN).theta["loc"])
    assert loc.dtype == np.int32
    assert sorted(map(tuple, loc.T)) == [(i, j) for i in range(8) for j in range(6)]
    few = [np.asarray(prepare(jpeft.FourierFT(n_frequency=9, seed=s), PLAIN).theta["loc"]) for s in (1, 1, 2)]
    assert np.array_equal(few[0], few[1])
    assert not np.array_equal(few[0], few[2])


def test_the_normal_init_of_the_paper() -> None:
    r = prepare(jpeft.FourierFT(n_frequency=40, init_weights="normal"), PLAIN)
    assert 0.5 < np.std(r.start["w"]["c"]) < 1.5


@pytest.mark.parametrize("n", [0, 49])
def test_as_many_as_there_are_entries(n: int) -> None:
    with pytest.raises(MethodConfigError, match="use 1 to 48"):
        prepare(jpeft.FourierFT(n_frequency=n), PLAIN)


def test_unknown_init() -> None:
    with pytest.raises(MethodConfigError, match="'zero' or 'normal'"):
        jpeft.FourierFT(init_weights="ones")
