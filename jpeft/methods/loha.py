"""LoHa: the elementwise product of two low-rank terms."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import ops
from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.methods._lowrank import check_rank, uniform


@dataclasses.dataclass(frozen=True)
class LoHa(Method):
    """Train the elementwise (Hadamard) product of two low-rank matrices beside a frozen weight.

    `W' = W + s (A1 B1) * (A2 B2)`, `s = alpha / r`: w1a, w2a `[*stack, *in, r]` and w1b, w2b `[*stack, r, *out]`, of
    rank up to `r^2`. w2b starts at zero, the others uniform.

    The product is that of the `r^2` columns `a1_p * a2_q` with the rows `b1_p * b2_q`; inputs meet those where this is
    the cheaper way (`r^2 (in + out) <= in out`). Else the change is formed once per call, as one array of the size of
    the leaf, and inputs meet it in one more contraction.

    Args:
        rank: r.
        alpha: numerator of the scale, which is a frozen scalar of theta: another alpha needs no retrace.

    Raises:
        MethodConfigError: a rank below 1 or above the smaller side of the kernel.

    Source: arXiv 2108.06098.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.LoHa(rank=2)}).count()
        48
    """

    rank: int = 8
    alpha: float = 8.0

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    recommended_lr: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "2 * rank * (in + out)"
    peft_type: ClassVar[str | None] = "LOHA"

    def check(self, site: Site) -> None:
        check_rank(self, site, self.rank, min(site.in_size, site.out_size))

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        a, b = (*site.stack_shape, *site.in_shape, self.rank), (*site.stack_shape, self.rank, *site.out_shape)
        theta = {letter: uniform(jax.random.fold_in(key, i), shape, fan, site.theta_dtype)
                 for i, (letter, shape, fan) in enumerate((("w1a", a, self.rank), ("w1b", b, site.out_size),
                                                           ("w2a", a, self.rank)))}
        return {**theta, "w2b": jnp.zeros(b, site.theta_dtype)}, {
            "scale": jnp.asarray(self.alpha / self.rank, site.theta_dtype)}

    def _whole(self, site: Site) -> bool:
        """Whether it is cheaper to form the change."""
        each = self.rank**2 * (site.in_size + site.out_size)
        return site.use == "linear" and each > site.in_size * site.out_size

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        n, r = len(site.stack_dims), self.rank
        stack, ins, outs = site.stack_shape, site.in_shape, site.out_shape
        if self._whole(site):
            first, second = (jnp.matmul(jnp.reshape(theta[a], (*stack, -1, r)), jnp.reshape(theta[b], (*stack, r, -1)),
                                        precision="highest") for a, b in (("w1a", "w1b"), ("w2a", "w2b")))
            change = jnp.reshape(theta["scale"] * first * second, (*stack, *ins, *outs))
            return ops.add(base, ops.product(site.shape, (change, (*site.stack_dims, *site.in_dims, *site.out_dims))))
        left = theta["w1a"][..., :, None] * theta["w2a"][..., None, :]
        right = jnp.expand_dims(theta["w1b"], n + 1) * jnp.expand_dims(theta["w2b"], n) * theta["scale"]
        return ops.add(base, ops.product(
            site.shape, (jnp.reshape(left, (*stack, *ins, r * r)), (*site.stack_dims, *site.in_dims, "r")),
            (jnp.reshape(right, (*stack, r * r, *outs)), (*site.stack_dims, "r", *site.out_dims))))

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"w2b": jnp.zeros_like(theta["w2b"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        a, b = (*site.stack_dims, *site.in_dims, None), (*site.stack_dims, None, *site.out_dims)
        return {"w1a": a, "w1b": b, "w2a": a, "w2b": b, "scale": ()}

    def flops(self, site: Site) -> tuple[int, int]:
        if self._whole(site):
            return 2 * site.in_size * site.out_size, 4 * self.rank * site.in_size * site.out_size * site.stack_size
        return 2 * self.rank**2 * (site.in_size * site.groups + site.out_size), 0
