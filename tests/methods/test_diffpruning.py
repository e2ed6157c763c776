"""Diff pruning: gates in training and in evaluation, and the penalty."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import CONV, LINEAR, LOOKUP, PLAIN, Layout, check, each, prepare
from support import assert_close

import jpeft
from jpeft.errors import MethodConfigError


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    gate = jnp.clip(3 / (1 + jnp.exp(-theta["alpha"])) - 1.5, 0, 1)
    return w + gate.reshape(w.shape) * theta["d"].reshape(w.shape)


@pytest.mark.parametrize(**each(LINEAR[4], CONV[0], LOOKUP[0]))
def test_equation(layout: Layout) -> None:
    check(jpeft.DiffPruning(), layout, equation)


def test_gates_are_drawn_in_training() -> None:
    r = prepare(jpeft.DiffPruning(alpha_init=0.0), PLAIN)
    theta = {"w": {"d": jnp.ones((8, 6)), "alpha": r.start["w"]["alpha"]}}
    adapted = jpeft.adapt(lambda p, x: x @ p["w"], r.plan)
    assert_close(adapted(theta, r.frozen, r.x), r.x @ r.frozen.base["w"], 1e-6)
    drawn = adapted(theta, r.frozen, jnp.eye(8), peft=jpeft.Call(key=jax.random.key(1))) - r.frozen.base["w"]
    gates = np.asarray(drawn)
    assert np.any(gates < 1e-6)
    assert np.any(gates > 0.999999)
    assert gates.min() > -1e-6
    assert gates.max() < 1 + 1e-6


def test_the_penalty_counts_entries() -> None:
    r = prepare(jpeft.DiffPruning(sparsity_penalty=0.5, alpha_init=0.0), PLAIN)
    assert_close(jpeft.penalty(r.plan, r.start, r.frozen), jnp.asarray(0.5 * 48 / 2), 1e-6)
    with pytest.raises(MethodConfigError, match="use 0 or more"):
        jpeft.DiffPruning(sparsity_penalty=-1.0)
