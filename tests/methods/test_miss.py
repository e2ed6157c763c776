"""MiSS against its equation, with shards that do and do not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from layouts import LINEAR, PLAIN, Layout, check, prepare, sample

import jpeft
from jpeft.errors import MethodConfigError


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    i, j = jnp.meshgrid(*map(jnp.arange, w.shape), indexing="ij")
    r, m = theta["block"].shape
    return w + theta["block"][i % r, j % m]


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize(**sample(LINEAR[4], *LINEAR))
def test_equation(layout: Layout, rank: int) -> None:
    check(jpeft.MiSS(rank=rank), layout, equation)


def test_mini() -> None:
    check(jpeft.MiSS(rank=3, mini=2), PLAIN, equation)


@pytest.mark.parametrize("fields", [{"rank": 9}, {"rank": 2, "mini": 4}])
def test_fields(fields: dict[str, int]) -> None:
    with pytest.raises(MethodConfigError, match="; use"):
        prepare(jpeft.MiSS(**fields), PLAIN)


@pytest.mark.parametrize(**sample(LINEAR[4], *LINEAR))
def test_bat(layout: Layout) -> None:
    def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
        blocks = [[w[i:i + 2, 2 * j:2 * j + 2] for j in range(w.shape[1] // 2)] for i in range(0, len(w), 2)]
        return jnp.block([[b + d.T @ (b + jnp.eye(2)) for b, d in zip(row, theta["block"], strict=True)]
                          for row in blocks])

    check(jpeft.MiSS(rank=2, bat=True), layout, equation)


def test_fields_of_bat() -> None:
    with pytest.raises(MethodConfigError, match="use a common divisor"):
        prepare(jpeft.MiSS(rank=4, bat=True), PLAIN)
    with pytest.raises(MethodConfigError, match="use one of them"):
        jpeft.MiSS(rank=2, mini=2, bat=True)
