"""Multitask prompt tuning: one prompt for all tasks, and a small factor of it for each."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.core.method import Theta
from jpeft.core.site import Site
from jpeft.errors import CallError, MethodConfigError
from jpeft.methods.virtual import PromptTuning, overwrite


@dataclasses.dataclass(frozen=True)
class MultitaskPromptTuning(PromptTuning):
    """Train one prompt that all tasks share, and for each task a factor of low rank that it is multiplied with.

    `P_t = P * (u_t v_t)` and `E([v_1 .. v_V, x]) = [P_t; E(x)]`, P (`p`) `[V, *out]`, u `[tasks, V, r]`, v
    `[tasks, r, *out]`. `peft=jpeft.Call(task=...)` says which task it is, or which one each row of the batch `[B]` is
    of; with one task it may be left out. A number that is no task makes the output NaN. A generator takes `task=...`;
    the rows of a job name none, so that `jpeft train` has one task. The first rank starts from one
    and the others close to zero, so that each task starts from P. For a new task, learn another plan with
    `num_tasks=1`, P, u and v from the old one: those of a source task, or their mean.

    Args:
        length: V, the number of virtual tokens.
        init_weights: of P, as in `PromptTuning`.
        init_ids: see `PromptTuning`.
        num_tasks: the number of tasks.
        num_ranks: r.

    Raises:
        MethodConfigError: as of `PromptTuning`, or a number of tasks or ranks below 1.
        CallError: (when called) several tasks and no `Call(task=...)`, or one of the wrong shape.

    Source: arXiv 2303.02861.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> apply = lambda p, ids: p["embed"][ids]
        >>> params, ids = {"embed": jnp.ones((20, 4))}, jnp.zeros((2, 6), int)
        >>> rules = {"embed": jpeft.MultitaskPromptTuning(length=3, num_tasks=2)}
        >>> plan = jpeft.plan(apply, params, (ids,), rules, tokens=jpeft.Tokens(ids=0))
        >>> trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
        >>> out = jpeft.adapt(apply, plan)(trainable, frozen, ids, peft=jpeft.Call(task=jnp.asarray([0, 1])))
        >>> plan.count(), out.shape
        (26, (2, 6, 4))
    """

    num_tasks: int = 1
    num_ranks: int = 1

    call: ClassVar[frozenset[str]] = frozenset({"task"})
    formula: ClassVar[str] = "length * out + num_tasks * num_ranks * (length + out)"
    peft_type: ClassVar[str | None] = "MULTITASK_PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_tasks < 1 or self.num_ranks < 1:
            raise MethodConfigError(f"MultitaskPromptTuning(num_tasks={self.num_tasks}, num_ranks={self.num_ranks}) "
                                    "has no factors; both must be positive")

    @property
    def tasks(self) -> int:
        return self.num_tasks

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        theta, frozen = super().init(key, site, base)
        keys = jax.random.split(jax.random.fold_in(key, 1))
        u, v = (0.02 * jax.random.normal(k, (self.num_tasks, self.num_ranks, n), site.theta_dtype).at[:, 0].set(50.0)
                for k, n in zip(keys, (self.length, site.out_size), strict=True))
        shape = (self.num_tasks, self.num_ranks, *site.out_shape)
        return {**theta, "u": jnp.swapaxes(u, 1, 2), "v": jnp.reshape(v, shape)}, frozen

    def _task(self, theta: Theta, y: jax.Array) -> jax.Array:
        task = theta.get("task")
        if task is None:
            if self.num_tasks > 1:
                raise CallError(f"MultitaskPromptTuning has {self.num_tasks} tasks and is not told which; pass "
                                "peft=jpeft.Call(task=...)")
            return jnp.zeros((), jnp.int32)
        if task.ndim > 1 or not jnp.issubdtype(task.dtype, jnp.integer) or (task.ndim and task.shape != y.shape[:-2]):
            raise CallError(f"peft=Call(task=...) is {task.dtype} {task.shape}; give the number of the task, or one "
                            f"for each row, of shape {y.shape[:-2]}")
        return jnp.where(task < 0, self.num_tasks, task)

    def prompt(self, site: Site, theta: Theta, task: jax.Array) -> jax.Array:
        """Return the virtual tokens of a task, `[V, out]`, or of several, `[B, V, out]`."""
        u, v = (jnp.take(theta[letter], task, axis=0, mode="fill", fill_value=jnp.nan) for letter in "uv")
        v = jnp.reshape(v, (*task.shape, self.num_ranks, site.out_size))
        return jnp.reshape(theta["p"], (self.length, -1)) * jnp.matmul(u, v, precision=lax.Precision.HIGHEST)

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        if y.shape[-1] != site.out_size:
            return y
        return overwrite(y, self.prompt(site, theta, self._task(theta, y)), start)

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {**super().axes(site), "u": (None, None, None), "v": (None, None, *site.out_dims)}

    def flops(self, site: Site) -> tuple[int, int]:
        return 0, 2 * self.length * self.num_ranks * site.out_size
