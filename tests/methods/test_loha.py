"""LoHa against the elementwise product of two low-rank matrices, in both orders of work."""

from __future__ import annotations

import jax
import pytest
from layouts import CONV, LINEAR, PLAIN, Layout, check, prepare, sample

import jpeft
from jpeft.errors import MethodConfigError


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    r = theta["w1a"].shape[-1]
    first, second = (theta[f"w{i}a"].reshape(-1, r) @ theta[f"w{i}b"].reshape(r, -1) for i in (1, 2))
    return w + theta["scale"] * first * second


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(**sample(LINEAR[4], *LINEAR))
def test_equation(layout: Layout, rank: int) -> None:
    """With rank 3 the change is formed: 9 (8 + 6) > 8 * 6."""
    check(jpeft.LoHa(rank=rank, alpha=2), layout, equation)
    whole = jpeft.LoHa(rank=rank)._whole(prepare(jpeft.LoHa(rank=rank), layout).plan.entries[0].site)
    assert whole == (rank == 3)


@pytest.mark.slow
def test_convolution() -> None:
    check(jpeft.LoHa(rank=3, alpha=2), CONV[0], equation)


def test_rank_must_fit() -> None:
    with pytest.raises(MethodConfigError, match="from 1 to 6"):
        prepare(jpeft.LoHa(rank=7), PLAIN)
