"""Activated LoRA: by the base before the invocation, by LoRA from it on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, randomise

import jpeft
from jpeft.cli.rules import to_methods
from jpeft.errors import CallError, ConfigError, PlanError
from jpeft.methods.alora import invocation

B, T, D = 3, 5, 4
LENGTHS = jnp.asarray([2, 0, T])
METHOD = jpeft.ALoRA(rank=2, alpha=6)


def apply(p: Any, x: jax.Array, terms: Any = None) -> jax.Array:
    """Two scanned layers `[D, 2, 2]`; `terms` `[L, B, T, ..]` is added to the output of each."""
    def layer(h: jax.Array, i: Any) -> tuple[jax.Array, None]:
        y = jnp.einsum("btd,dhk->bthk", h, p["w"][i])
        y = y if terms is None else y + terms(h, i).reshape(y.shape)
        return h + jnp.tanh(y.reshape(h.shape)), None

    return jax.lax.scan(layer, x, jnp.arange(2))[0]


def ready() -> Any:
    params = {"w": randomise(jnp.zeros((2, D, 2, 2)), 1, 0.5)}
    x = randomise(jnp.zeros((B, T, D)), 2, 1.0)
    plan = jpeft.plan(apply, params, (x,), {"w": METHOD}, tokens=jpeft.Tokens(ids=0))
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
    return plan, params, x, randomise(trainable, 3), frozen


def test_from_the_invocation_on() -> None:
    plan, params, x, trainable, frozen = ready()
    a, b = trainable["w"]["a"], trainable["w"]["b"]
    adapted = jpeft.adapt(apply, plan)

    def oracle(lengths: jax.Array) -> jax.Array:
        acts = (jnp.arange(T) >= lengths[:, None])[..., None]
        return apply(params, x, lambda h, i: acts * (3 * (h @ a[i]) @ b[i]))

    @jax.jit
    def run(trainable: Any, lengths: jax.Array) -> Any:
        part = adapted(trainable, frozen, x, peft=jpeft.Call(lengths=lengths))
        rest = adapted(trainable, frozen, x[:, 2:], peft=jpeft.Call(continued=True))
        return part, adapted(trainable, frozen, x), rest

    part, whole, rest = run(trainable, LENGTHS)
    assert_close(part, oracle(LENGTHS), 1e-5)
    assert_close(whole, oracle(jnp.zeros(B, int)), 1e-5)
    assert_close(rest, whole[:, 2:], 1e-5)
    assert_close(part[2], apply(params, x)[2], 1e-6)
    assert float(jnp.abs(part - whole)[0, 2:].max()) < 1e-5 < float(jnp.abs(part - whole)[0, :2].min())


def test_where_the_invocation_is() -> None:
    ids = jnp.asarray([[7, 8, 1, 7, 8], [1, 7, 8, 2, 7], [8, 7, 1, 2, 3]])
    np.testing.assert_array_equal(invocation(ids, (7, 8)), [3, 1, 5])
    np.testing.assert_array_equal(invocation(ids, range(6)), [5, 5, 5])
    with pytest.raises(CallError, match="give the ids"):
        invocation(ids, ())


def test_mistakes() -> None:
    with pytest.raises(PlanError, match="acts by position"):
        jpeft.plan(apply, {"w": jnp.ones((2, D, 2, 2))}, (jnp.ones((B, T, D)),), {"w": METHOD})
    with pytest.raises(ConfigError, match=r"rules.attention has ALoRA.*use LoRA"):
        to_methods({"attention": {"method": "ALoRA"}})
