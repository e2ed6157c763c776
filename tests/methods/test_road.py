"""RoAd against 2 x 2 matrices on pairs of outputs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from layouts import LINEAR, PLAIN, Layout, check, each, prepare

import jpeft
from jpeft.errors import MethodConfigError


def equation(theta: dict[str, jax.Array], w: jax.Array, k: int, g: int) -> jax.Array:
    half, columns = g // 2, [None] * w.shape[1]
    angle, scale = (theta[n].reshape(-1, k, half) for n in ("theta", "alpha"))
    rows = {1: (0, 0, 0, 0), 2: (0, 0, 1, 1), 4: (0, 2, 1, 3)}[k]
    for n in range(w.shape[1] // g):
        for i in range(half):
            first, second = n * g + i, n * g + half + i
            (c1, _), (_, s1), (c2, _), (_, s2) = ((scale[n, j, i] * jnp.cos(angle[n, j, i]),
                                                   scale[n, j, i] * jnp.sin(angle[n, j, i])) for j in rows)
            columns[first] = c1 * w[:, first] - s1 * w[:, second]
            columns[second] = c2 * w[:, second] + s2 * w[:, first]
    return jnp.stack(columns, 1)


@pytest.mark.parametrize(**each(LINEAR[1], LINEAR[2], LINEAR[6]))
def test_equation(layout: Layout) -> None:
    check(jpeft.RoAd(group_size=2), layout, functools.partial(equation, k=1, g=2))


@pytest.mark.parametrize(("variant", "k"), [("road_2", 2), ("road_4", 4)])
def test_variants(variant: str, k: int) -> None:
    check(jpeft.RoAd(variant=variant, group_size=4), LINEAR[4], functools.partial(equation, k=k, g=4))


def test_groups_must_fit() -> None:
    with pytest.raises(MethodConfigError, match="such as 2, 6"):
        prepare(jpeft.RoAd(group_size=4), PLAIN)
    with pytest.raises(MethodConfigError, match="road_1, road_2, road_4"):
        jpeft.RoAd(variant="road_3")
