"""AdaLoRA: singular values that compete for a budget of ranks (see `allocation` for the competition)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import ops
from jpeft.core.method import Method, Schedule, Theta
from jpeft.core.ops import Op
from jpeft.core.plan import Entry
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods import allocation
from jpeft.methods._lowrank import check_rank, check_rate, dropout_key


@dataclasses.dataclass(frozen=True)
class AdaLoRA(Method):
    """Train a change in the form of a singular value decomposition, whose ranks go where they matter.

    `W' = W + s A diag(e * mask) B`, `s = alpha / init_r`: A `[*stack, *in, r]` and B `[*stack, r, *out]` are held near
    orthogonal by the penalty `orth_reg_weight (|A^T A - I|^2 + |B B^T - I|^2)`, e `[*stack, r]` starts at zero. All
    leaves start with `init_r` ranks, and those of the greatest importance stay, `target_r` for each leaf and layer on
    average in the end: `jpeft train` and every optimiser of `jpeft.optim.scheduled` see to it, or call
    `jpeft.adalora_update` after each step of your own. The latter writes which ranks are left into mask `[*stack, r]`,
    frozen in theta; the former holds the e of the others at zero. Shapes never change and nothing is traced again.

    Args:
        init_r: r, before the competition.
        target_r: ranks per leaf and layer after it, on average.
        alpha: numerator of the scale, a frozen scalar of theta.
        dropout: rate of inverted dropout on the input of the adapter path, active when `Call.key` is given.
        tinit: steps before the budget begins to fall.
        tfinal: steps after it has reached its end.
        deltaT: steps between two allocations.
        beta1: smoothing of the importance.
        beta2: smoothing of its uncertainty.
        orth_reg_weight: weight of the penalty.
        total_step: steps of the whole training; `adalora_update` needs it, `jpeft.optim.scheduled` knows it.

    Raises:
        MethodConfigError: a rank, rate or schedule that does not fit.

    Source: arXiv 2303.10512.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.AdaLoRA(init_r=3, target_r=2)}).count()
        39
    """

    init_r: int = 12
    target_r: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.1
    total_step: int | None = None

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    recommended_lr: ClassVar[float] = 2e-2
    formula: ClassVar[str] = "init_r * (in + out + 1)"
    peft_type: ClassVar[str | None] = "ADALORA"

    def __post_init__(self) -> None:
        check_rate(self, self.dropout)
        if not 1 <= self.target_r <= self.init_r:
            raise MethodConfigError(f"AdaLoRA(init_r={self.init_r}, target_r={self.target_r}) does not shrink; use "
                                    "1 <= target_r <= init_r")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1) or self.deltaT < 1 or min(self.tinit, self.tfinal) < 0:
            raise MethodConfigError(f"AdaLoRA(beta1={self.beta1}, beta2={self.beta2}, deltaT={self.deltaT}, tinit="
                                    f"{self.tinit}, tfinal={self.tfinal}) is no schedule; use betas within (0, 1), "
                                    "deltaT of 1 or more, tinit and tfinal of 0 or more")
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            raise MethodConfigError(f"AdaLoRA(tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step}) "
                                    "leaves no step for the budget to fall; use tinit + tfinal < total_step")

    def check(self, site: Site) -> None:
        check_rank(self, site, self.init_r, min(site.in_size, site.out_size), "init_r")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        stack, r, dtype, keys = site.stack_shape, self.init_r, site.theta_dtype, jax.random.split(key)
        # Columns of about unit length, where the penalty holds them; 0.02 in the paper's code, whatever the size.
        a, b = (jax.random.normal(k, shape, jnp.float32) / math.sqrt(n) for k, shape, n in (
            (keys[0], (*stack, *site.in_shape, r), site.in_size),
            (keys[1], (*stack, r, *site.out_shape), site.out_size)))
        return ({"a": a.astype(dtype), "e": jnp.zeros((*stack, r), dtype), "b": b.astype(dtype)},
                {"mask": jnp.ones((*stack, r), dtype), "scale": jnp.asarray(self.alpha / r, dtype)})

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        values = theta["e"] * theta["mask"] * theta["scale"]
        right = theta["b"] * jnp.reshape(values, (*values.shape, *(1,) * len(site.out_dims)))
        return ops.add(base, ops.product(
            site.shape, (theta["a"], (*site.stack_dims, *site.in_dims, "r")),
            (right, (*site.stack_dims, "r", *site.out_dims)), rate=self.dropout,
            key=dropout_key(site, key, self.dropout)))

    def penalty(self, site: Site, theta: Theta) -> jax.Array:
        eye, total = jnp.eye(self.init_r, dtype=theta["a"].dtype), jnp.zeros((), theta["a"].dtype)
        for rows in (jnp.reshape(theta["a"], (*site.stack_shape, -1, self.init_r)),
                     jnp.swapaxes(jnp.reshape(theta["b"], (*site.stack_shape, self.init_r, -1)), -1, -2)):
            gram = jnp.matmul(jnp.swapaxes(rows, -1, -2), rows, precision="highest")
            total = total + jnp.sum(jnp.square(gram - eye))
        return self.orth_reg_weight * total

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"e": jnp.zeros_like(theta["e"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        values = (*site.stack_dims, None)
        return {"a": (*site.stack_dims, *site.in_dims, None), "e": values, "b": (*values, *site.out_dims),
                "mask": values, "scale": ()}

    def flops(self, site: Site) -> tuple[int, int]:
        return 2 * self.init_r * (site.in_size * site.groups + site.out_size), 0

    @classmethod
    def schedule(cls, entries: Sequence[Entry], total: int) -> Schedule:
        mine = []
        for e in entries:
            assert isinstance(e.method, AdaLoRA)
            if (e.method.total_step or 0) > total:
                raise MethodConfigError(f"AdaLoRA(total_step={e.method.total_step}) on {e.path!r} is longer than the "
                                        f"training of {total} steps, which would end with too many ranks; leave "
                                        "total_step out, or train longer")
            method = dataclasses.replace(e.method, total_step=e.method.total_step or total)
            mine.append(dataclasses.replace(e, method=method))
        allocation.check(mine)

        def begin(trainable: dict[str, Theta]) -> Any:
            return allocation.begin(mine, trainable), {e.path: jnp.ones(trainable[e.path]["e"].shape, bool)
                                                       for e in mine}

        def update(trainable: dict[str, Theta], grads: dict[str, Theta], state: Any, step: Any) -> Any:
            importance, left = state
            found = allocation.choose(mine, trainable, grads, importance, step)
            left = {p: jnp.where(found.last, found.keep[p], left[p]) for p in left}
            drop = {p: {"e": ~left[p] | (found.now & ~found.keep[p])} for p in left}
            return drop, (found.importance, left)

        return Schedule(begin, update)
