"""Trainable tokens against a table with other rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from layouts import LINEAR, LOOKUP, Layout, check, each, prepare

import jpeft
from jpeft.errors import MethodConfigError, WrongUseError

METHOD = jpeft.TrainableTokens(token_indices=(9, 4))


@pytest.mark.parametrize(**each(*LOOKUP))
def test_equation(layout: Layout) -> None:
    check(METHOD, layout, lambda theta, w: w.at[theta["rows"]].add(theta["d"]))


def test_no_table_of_gradients() -> None:
    layout = LOOKUP[0]
    big = Layout("big", (5000, 4), (0,), (1,), (), None, layout.apply, "embedding")
    r = prepare(METHOD, big)
    loss = lambda t, f: jnp.sum(jpeft.adapt(lambda p, x: big.apply(p["w"], x), r.plan)(t, f, r.x) ** 2)  # noqa: E731
    memory = jax.jit(jax.grad(loss)).lower(r.spread, r.frozen).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5000 * 4 * 4


def test_fields() -> None:
    with pytest.raises(MethodConfigError, match="a token twice"):
        jpeft.TrainableTokens(token_indices=(1, 1))
    with pytest.raises(MethodConfigError, match="no token"):
        jpeft.TrainableTokens()
    with pytest.raises(MethodConfigError, match=r"\[10\] outside the 10 rows"):
        prepare(jpeft.TrainableTokens(token_indices=(10,)), LOOKUP[0])
    with pytest.raises(WrongUseError, match="it needs embedding"):
        prepare(METHOD, LINEAR[0])
