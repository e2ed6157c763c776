"""HiRA against its equation."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from layouts import CONV, LINEAR, LOOKUP, PLAIN, Layout, check, prepare, sample

import jpeft
from jpeft.errors import MethodConfigError


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    return w + w * (theta["a"].reshape(-1, 2) @ theta["b"].reshape(2, -1))


@pytest.mark.parametrize(**sample(LINEAR[4], *LINEAR, CONV[1], LOOKUP[0]))
def test_equation(layout: Layout) -> None:
    check(jpeft.HiRA(rank=2), layout, equation)


def test_inits() -> None:
    a = prepare(jpeft.HiRA(rank=4, init_weights="gaussian"), PLAIN).start["w"]["a"]
    assert 0.5 < np.std(a) * 4 < 1.5
    with pytest.raises(MethodConfigError, match="gaussian"):
        jpeft.HiRA(init_weights="ones")
