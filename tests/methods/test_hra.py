"""HRA against its reflections one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from layouts import CONV, LINEAR, Layout, check, each, prepare

import jpeft
from jpeft.errors import MethodConfigError, WrongUseError


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    for u in theta["u"].T:
        w = w - 2 * jnp.outer(u, u @ w) / (u @ u)
    return w


@pytest.mark.parametrize(**each(LINEAR[1], LINEAR[3], LINEAR[4], LINEAR[6]))
def test_equation(layout: Layout) -> None:
    check(jpeft.HRA(rank=4), layout, equation)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_reflections_start_in_pairs(rank: int) -> None:
    with pytest.raises(MethodConfigError, match="use an even rank"):
        jpeft.HRA(rank=rank)


def test_contractions_only() -> None:
    with pytest.raises(WrongUseError, match="it needs linear"):
        prepare(jpeft.HRA(rank=2), CONV[0])
