"""Which ranks AdaLoRA keeps: importances, and a budget that falls with the steps; pure functions for jit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.frozen import Frozen
from jpeft.core.method import Theta
from jpeft.core.plan import Entry, Plan
from jpeft.errors import CallError, MethodConfigError
from jpeft.methods.adalora import AdaLoRA

LETTERS = ("a", "e", "b")


class Importance(NamedTuple):
    """Smoothed sensitivity of every trained value and its uncertainty, both `{path: {letter: array}}`."""

    mean: dict[str, Theta]
    spread: dict[str, Theta]


def _entries(plan: Plan) -> Iterator[tuple[Entry, AdaLoRA]]:
    return ((e, e.method) for e in plan.entries if isinstance(e.method, AdaLoRA))


def adalora_init(plan: Plan, trainable: dict[str, Theta]) -> Importance:
    """Return the state of `adalora_update` before the first step.

    Raises:
        CallError: no leaf of the plan has AdaLoRA.
        MethodConfigError: a method of the plan has no `total_step`, or they have different schedules.
    """
    methods = [m for _, m in _entries(plan)]
    if not methods:
        raise CallError("the plan has no AdaLoRA, so there are no ranks to allocate; drop the call")
    schedules = sorted({(m.total_step or 0, m.tinit, m.tfinal, m.deltaT) for m in methods})
    if len(schedules) > 1 or not schedules[0][0]:
        raise MethodConfigError(f"AdaLoRA has the schedules (total_step, tinit, tfinal, deltaT) = {schedules}; give "
                                "every leaf one schedule, with the total_step of the training")
    zeros = {e.path: {k: jnp.zeros_like(trainable[e.path][k]) for k in LETTERS} for e, _ in _entries(plan)}
    return Importance(zeros, jax.tree.map(jnp.array, zeros))


def adalora_update(plan: Plan, trainable: dict[str, Theta], frozen: Frozen, grads: dict[str, Theta],
                   state: Importance, step: Any) -> tuple[dict[str, Theta], Frozen, Importance]:
    """Update the importances and, at a step of the schedule, drop the ranks that matter least in the whole model.

    A pure function for jit: call it after the optimiser's update, with the gradients of that step. The importance of
    rank i is `s(e_i) + mean s(a_i) + mean s(b_i)` with `s = smoothed |w dL/dw|` times its smoothed deviation. Until the
    budget is spent, a rank that loses has its e set to zero and may come back; at step `total_step - tfinal` the ranks
    that are left are written into the masks.

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
    step = jnp.asarray(step)
    method = next(m for _, m in _entries(plan))
    end = (method.total_step or 0) - method.tfinal
    mean: dict[str, Theta] = {}
    spread: dict[str, Theta] = {}
    scores: dict[str, jax.Array] = {}
    live: dict[str, np.ndarray] = {}
    target = 0
    for e, m in _entries(plan):
        mean[e.path], spread[e.path] = _smoothed(m, trainable[e.path], grads[e.path], state.mean[e.path],
                                                 state.spread[e.path], step < end)
        n = len(e.site.stack_dims)
        s = {k: mean[e.path][k] * spread[e.path][k] for k in LETTERS}
        scores[e.path] = s["e"] + jnp.mean(s["a"], tuple(range(n, s["a"].ndim - 1))) \
            + jnp.mean(s["b"], tuple(range(n + 1, s["b"].ndim)))
        mask = e.layer_mask("e", n + 1)
        whole = np.ones(s["e"].shape, bool)
        live[e.path] = whole if mask is None else whole & mask
        target += m.target_r * int(live[e.path].sum()) // m.init_r
    flat = jnp.concatenate([jnp.ravel(jnp.where(live[p], scores[p], -1.0)) for p in scores])
    total = sum(int(v.sum()) for v in live.values())
    rest = jnp.clip(1 - (step - method.tinit) / (end - method.tinit), 0, 1)
    budget = jnp.floor((total - target) * rest**3 + target)
    keep_flat = jnp.argsort(jnp.argsort(-flat)) < budget
    allocate = ((step > method.tinit) & (step < end) & (step % method.deltaT == 0)) | (step == end)
    trainable, theta, at = dict(trainable), dict(frozen.theta), 0
    for p, score in scores.items():
        keep = jnp.reshape(keep_flat[at: at + score.size], score.shape)
        at += score.size
        values, marks = trainable[p]["e"], theta[p]["mask"]
        trainable[p] = {**trainable[p], "e": jnp.where(allocate & ~keep, jnp.zeros((), values.dtype), values)}
        theta[p] = {**theta[p], "mask": jnp.where(step == end, keep.astype(marks.dtype), marks)}
    return trainable, frozen._replace(theta=theta), Importance(mean, spread)


def _smoothed(method: AdaLoRA, theta: Theta, grads: Theta, mean: Theta, spread: Theta,
              moving: jax.Array) -> tuple[Theta, Theta]:
    """The running means of `|w g|` and of its distance from them."""
    new_mean: Theta = {}
    new_spread: Theta = {}
    for k in LETTERS:
        now = jnp.abs(theta[k] * grads[k])
        m = method.beta1 * mean[k] + (1 - method.beta1) * now
        s = method.beta2 * spread[k] + (1 - method.beta2) * jnp.abs(now - m)
        new_mean[k], new_spread[k] = jnp.where(moving, m, mean[k]), jnp.where(moving, s, spread[k])
    return new_mean, new_spread
