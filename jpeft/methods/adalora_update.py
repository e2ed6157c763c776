"""AdaLoRA's competition in a training loop of one's own."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jpeft.core.frozen import Frozen
from jpeft.core.method import Theta
from jpeft.core.plan import Entry, Plan
from jpeft.errors import CallError
from jpeft.methods import allocation
from jpeft.methods.adalora import AdaLoRA


def _entries(plan: Plan) -> list[Entry]:
    return [e for e in plan.entries if isinstance(e.method, AdaLoRA)]


def adalora_init(plan: Plan, trainable: dict[str, Theta]) -> allocation.Importance:
    """Return the state of `adalora_update` before the first step.

    Raises:
        CallError: no leaf of the plan has AdaLoRA.
        MethodConfigError: a method of the plan has no `total_step`, or they have different schedules.
    """
    entries = _entries(plan)
    if not entries:
        raise CallError("the plan has no AdaLoRA, so there are no ranks to allocate; drop the call")
    allocation.check(entries)
    return allocation.begin(entries, trainable)


def adalora_update(plan: Plan, trainable: dict[str, Theta], frozen: Frozen, grads: dict[str, Theta],
                   state: allocation.Importance, step: Any) -> tuple[dict[str, Theta], Frozen, allocation.Importance]:
    """Update the importances and, at a step of the schedule, drop the ranks that matter least in the whole model.

    A pure function for jit: call it after the optimiser's update, with the gradients of that step. Until the budget is
    spent, a rank that loses has its e set to zero and may come back; at step `total_step - tfinal` the ranks that are
    left are written into the masks. `jpeft.optim.scheduled` does the same within an optimiser.

    Args:
        plan: the plan.
        trainable: the trainable partition, after the optimiser's update.
        frozen: the frozen partition.
        grads: gradients of the loss, as `trainable`.
        state: what `adalora_init` or the last call returned.
        step: number of optimiser steps done, 1 after the first; an int or a traced scalar.

    Returns:
        `(trainable, frozen, state)` of the same shapes and dtypes.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
        >>> rules = {"w": jpeft.AdaLoRA(init_r=3, target_r=1, total_step=1)}
        >>> plan = jpeft.plan(lambda p, x: x @ p["w"], params, (x,), rules)
        >>> trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
        >>> state, grads = jpeft.adalora_init(plan, trainable), jax.tree.map(jnp.ones_like, trainable)
        >>> trainable, frozen, state = jpeft.adalora_update(plan, trainable, frozen, grads, state, 1)
        >>> float(frozen.theta["w"]["mask"].sum())
        1.0
    """
    found = allocation.choose(_entries(plan), trainable, grads, state, step)
    trainable, theta = dict(trainable), dict(frozen.theta)
    for p, keep in found.keep.items():
        values, marks = trainable[p]["e"], theta[p]["mask"]
        trainable[p] = {**trainable[p], "e": jnp.where(found.now & ~keep, jnp.zeros((), values.dtype), values)}
        theta[p] = {**theta[p], "mask": jnp.where(found.last, keep.astype(marks.dtype), marks)}
    return trainable, frozen._replace(theta=theta), found.importance
