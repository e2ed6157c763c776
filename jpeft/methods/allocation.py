"""Which ranks AdaLoRA keeps: importances, and a budget that falls with the steps; pure functions for jit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.method import Theta
from jpeft.core.plan import Entry
from jpeft.errors import MethodConfigError

LETTERS = ("a", "e", "b")
Trainable = dict[str, Theta]


class Importance(NamedTuple):
    """Smoothed sensitivity of every trained value and its uncertainty, both `{path: {letter: array}}`."""

    mean: Trainable
    spread: Trainable


class Choice(NamedTuple):
    """What one step says.

    Attributes:
        keep: the ranks that matter most, `{path: bool [*stack, r]}`.
        now: whether the others are dropped at this step.
        last: whether it is the last allocation.
        importance: the next state.
    """

    keep: dict[str, jax.Array]
    now: jax.Array
    last: jax.Array
    importance: Importance


def check(entries: Sequence[Entry]) -> None:
    """Raise `MethodConfigError` unless all leaves have one schedule, and its length."""
    methods: list[Any] = [e.method for e in entries]
    schedules = sorted({(m.total_step or 0, m.tinit, m.tfinal, m.deltaT) for m in methods})
    if len(schedules) > 1 or not schedules[0][0]:
        raise MethodConfigError(f"AdaLoRA has the schedules (total_step, tinit, tfinal, deltaT) = {schedules}; give "
                                "every leaf one schedule, with the total_step of the training")


def begin(entries: Sequence[Entry], trainable: Trainable) -> Importance:
    """Return the state before the first step."""
    zeros = {e.path: {k: jnp.zeros_like(trainable[e.path][k]) for k in LETTERS} for e in entries}
    return Importance(zeros, jax.tree.map(jnp.array, zeros))


def choose(entries: Sequence[Entry], trainable: Trainable, grads: Trainable, state: Importance, step: Any) -> Choice:
    """Score every rank of every leaf and say which the budget of this step keeps.

    The importance of rank i is `s(e_i) + mean s(a_i) + mean s(b_i)` with `s = smoothed |w dL/dw|` times its smoothed
    deviation; the budget falls by a cubic from all ranks to `target_r` for each leaf and layer on average.
    """
    step = jnp.asarray(step)
    method: Any = entries[0].method
    end = (method.total_step or 0) - method.tfinal
    mean: Trainable = {}
    spread: Trainable = {}
    scores: dict[str, jax.Array] = {}
    live: dict[str, np.ndarray] = {}
    target = 0
    for e in entries:
        m: Any = e.method
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
    last = step == end
    now = ((step > method.tinit) & (step < end) & (step % method.deltaT == 0)) | last
    keep, at = {}, 0
    for p, score in scores.items():
        keep[p] = jnp.reshape(keep_flat[at: at + score.size], score.shape)
        at += score.size
    return Choice(keep, now, last, Importance(mean, spread))


def _smoothed(method: Any, theta: Theta, grads: Theta, mean: Theta, spread: Theta,
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
