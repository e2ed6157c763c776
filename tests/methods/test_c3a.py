"""C3A against circulant matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import LINEAR, PLAIN, Layout, check, each, prepare

import jpeft
from jpeft.errors import MethodConfigError


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    kernel = theta["w"]
    b = kernel.shape[-1]
    lag = (np.arange(b)[:, None] - np.arange(b)[None]) % b  # entry [l, k]: what input l adds to output k
    rows = [jnp.concatenate([kernel[i, j][lag] for i in range(kernel.shape[0])], 1) for j in range(kernel.shape[1])]
    return w + jnp.concatenate(rows, 0) / len(w)


@pytest.mark.parametrize(**each(LINEAR[1], LINEAR[2], LINEAR[6]))
def test_equation(layout: Layout) -> None:
    check(jpeft.C3A(block_size=2), layout, equation)


def test_odd_blocks_and_a_weight_used_both_ways() -> None:
    wide = Layout("both ways", (9, 3), (0,), (1,), (), (2, 9), lambda w, x: jnp.tanh(x @ w) @ w.T)
    check(jpeft.C3A(block_size=3), wide, equation)


def test_fields() -> None:
    with pytest.raises(MethodConfigError, match="use one such as 1, 2"):
        prepare(jpeft.C3A(block_size=3), PLAIN)
    with pytest.raises(MethodConfigError, match="'zero' or 'xavier_uniform'"):
        jpeft.C3A(init_weights="ones")
    assert jnp.any(prepare(jpeft.C3A(block_size=2, init_weights="xavier_uniform"), PLAIN).start["w"]["w"])
