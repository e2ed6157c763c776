"""VB-LoRA against its mixtures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from layouts import LINEAR, PLAIN, Layout, check, prepare, sample
from support import assert_close

import jpeft
from jpeft.errors import MethodConfigError

VB = jpeft.VBLoRA(rank=3, num_vectors=7, vector_length=2, topk=2, init_vector_bank_bound=1.0)


def mixed(logits: jax.Array, bank: jax.Array) -> jax.Array:
    rows = []
    for row in logits:
        pieces = []
        for piece in row:
            best = jnp.argsort(piece)[-2:]
            weights = jnp.exp(piece[best])
            pieces.append((weights / weights.sum()) @ bank[best])
        rows.append(jnp.concatenate(pieces))
    return jnp.stack(rows)


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    change = mixed(theta["la"], theta["v"]).T @ mixed(theta["lb"], theta["v"])
    return w + change - (theta["a0"].reshape(3, -1).T @ theta["b0"].reshape(3, -1) if "a0" in theta else 0.0)


@pytest.mark.parametrize("init", ["frozen", "plain"])
@pytest.mark.parametrize(**sample(PLAIN, LINEAR[2], LINEAR[5], LINEAR[6]))
def test_equation(layout: Layout, init: str) -> None:
    check(jpeft.VBLoRA(**{**vars(VB), "init_weights": init}), layout, equation)


def test_frozen_copies_start_from_the_base() -> None:
    r = prepare(VB, PLAIN)
    assert_close(jpeft.merge(r.plan, r.start, r.frozen), r.frozen.base, 1e-6)


def test_fields() -> None:
    with pytest.raises(MethodConfigError, match="topk from 1"):
        jpeft.VBLoRA(topk=0)
    with pytest.raises(MethodConfigError, match="divisor of both"):
        prepare(jpeft.VBLoRA(vector_length=4), PLAIN)
