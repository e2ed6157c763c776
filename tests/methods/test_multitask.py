"""Multitask prompt tuning against prompts written out, one for each row of the batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, randomise, x64

import jpeft
from jpeft.errors import CallError, MethodConfigError

V, D, TASKS, R = 3, 4, 5, 2


def apply(params: Any, ids: jax.Array) -> jax.Array:
    return jnp.cumsum(params["embed"][ids], 1)


def prepare(dtype: Any = jnp.float32, **fields: Any) -> Any:
    base, ids = {"embed": randomise(jnp.zeros((9, D), dtype), 1)}, jnp.asarray([[1, 2], [3, 4], [5, 6]])
    method = jpeft.MultitaskPromptTuning(**{"length": V, "num_tasks": TASKS, "num_ranks": R, **fields})
    plan = jpeft.plan(apply, base, (ids,), {"embed": method}, tokens=jpeft.Tokens(ids=0))
    return plan, base, ids, jpeft.adapt(apply, plan), *jpeft.init(plan, base, jax.random.key(0))


def test_each_row_has_the_prompt_of_its_task() -> None:
    with x64():
        plan, base, ids, adapted, start, frozen = prepare(jnp.float64)
        assert plan.count() == V * D + TASKS * R * (V + D)
        spread, task = randomise(start, 2), np.asarray([4, 0, 4])

        def oracle(t: Any) -> jax.Array:
            prompts = [t["embed"]["p"] * (t["embed"]["u"][i] @ t["embed"]["v"][i]) for i in task]
            return jnp.stack([jnp.sum(p, 0) for p in prompts])[:, None] + apply(base, ids)

        def measure(f: Any) -> Any:
            return f(spread), jax.grad(lambda t: jnp.sum(jnp.sin(f(t))))(spread)

        # The task is an argument of the compiled function.
        call = jax.jit(lambda task: measure(lambda t: adapted(t, frozen, ids, peft=jpeft.Call(task=task))))
        assert_close(call(jnp.asarray(task)), measure(oracle), 1e-10)
        one = adapted(spread, frozen, ids, peft=jpeft.Call(task=jnp.asarray(4)))
        assert_close(one[::2], oracle(spread)[::2], 1e-10)
        assert_close(adapted(spread, frozen, ids, peft=jpeft.Call(task=4)), one, 0.0)


def test_every_task_starts_from_the_shared_prompt() -> None:
    _, _, ids, adapted, start, frozen = prepare(num_ranks=1)
    outs = adapted(start, frozen, ids, peft=jpeft.Call(task=jnp.arange(3)))
    assert_close(outs - apply(frozen.base, ids), jnp.broadcast_to(start["embed"]["p"].sum(0), outs.shape), 1e-5)


def test_what_is_no_task() -> None:
    _, _, ids, adapted, start, frozen = prepare()
    outs = adapted(start, frozen, ids, peft=jpeft.Call(task=jnp.asarray([TASKS, 0, -1])))
    assert np.isnan(outs).all((1, 2)).tolist() == [True, False, True]
    for call, words in ((jpeft.Call(), "has 5 tasks and is not told which"),
                        (jpeft.Call(task=jnp.zeros(2, int)), r"one for each row, of shape \(3,\)"),
                        (jpeft.Call(task=jnp.zeros(3)), "is float32")):
        with pytest.raises(CallError, match=words):
            adapted(start, frozen, ids, peft=call)
    with pytest.raises(MethodConfigError, match="both must be positive"):
        jpeft.MultitaskPromptTuning(num_tasks=0)
