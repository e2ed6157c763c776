"""GraLoRA: a grid of low-rank blocks."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import maps, ops
from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods._lowrank import check_rank, uniform


@dataclasses.dataclass(frozen=True)
class GraLoRA(Method):
    """Train a low-rank term of its own for every block of a k x k grid on a frozen weight.

    `W'_ij = W_ij + s A_ij B_ij` in every block (i, j), of rank `r / k`, `s = alpha / (r + hybrid_r)`: a
    `[*stack, k, in / k, r]` holds `A_i1 .. A_ik` side by side, b `[*stack, k, r, out / k]` holds `B_1j .. B_kj` one
    above the other. The parameters and the work are those of LoRA of rank r, the rank is up to `k r`. With `hybrid_r`,
    a LoRA term of that rank (ga `[*stack, *in, hybrid_r]`, gb `[*stack, hybrid_r, *out]`) is added, with the same s.
    b and gb start at zero.

    Args:
        rank: r, a multiple of k.
        alpha: numerator of the scale, which is a frozen scalar of theta: another alpha needs no retrace.
        gralora_k: k; it must divide the inputs and the outputs.
        hybrid_r: rank of the LoRA term, or 0.

    Raises:
        MethodConfigError: a k that does not divide, or a rank that does not fit the blocks.

    Source: arXiv 2505.20355.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.GraLoRA(rank=2)}).count()
        24
    """

    rank: int = 32
    alpha: float = 64.0
    gralora_k: int = 2
    hybrid_r: int = 0

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 2e-3
    formula: ClassVar[str] = "(rank + hybrid_r) * (in + out)"
    peft_type: ClassVar[str | None] = "GRALORA"

    def __post_init__(self) -> None:
        if self.gralora_k < 1 or self.rank < 1 or self.rank % self.gralora_k or self.hybrid_r < 0:
            raise MethodConfigError(f"GraLoRA(rank={self.rank}, gralora_k={self.gralora_k}, hybrid_r={self.hybrid_r}) "
                                    "is no grid; use a rank that is a multiple of gralora_k, and hybrid_r from 0")

    def check(self, site: Site) -> None:
        k = self.gralora_k
        if site.in_size % k or site.out_size % k:
            raise MethodConfigError(f"GraLoRA(gralora_k={k}) does not divide {site.path!r} of {site.in_size} inputs "
                                    f"and {site.out_size} outputs; use a divisor of both, or exclude the leaf")
        check_rank(self, site, self.rank, min(site.in_size, site.out_size))
        if self.hybrid_r:
            check_rank(self, site, self.hybrid_r, min(site.in_size, site.out_size), "hybrid_r")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        k, r, h, stack, dtype = self.gralora_k, self.rank, self.hybrid_r, site.stack_shape, site.theta_dtype
        ins, outs, keys = site.in_size // k, site.out_size // k, jax.random.split(key)
        theta = {"a": uniform(keys[0], (*stack, k, ins, r), ins, dtype), "b": jnp.zeros((*stack, k, r, outs), dtype)}
        if h:
            theta["ga"] = uniform(keys[1], (*stack, *site.in_shape, h), site.in_size, dtype)
            theta["gb"] = jnp.zeros((*stack, h, *site.out_shape), dtype)
        return theta, {"scale": jnp.asarray(self.alpha / (r + h), dtype)}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        grid = {"a": theta["a"], "b": theta["b"] * theta["scale"]}
        parts = [base, maps.linear(site.shape, grid, through_grid, site.stack_dims, site.in_dims, site.out_dims)]
        if self.hybrid_r:
            parts.append(ops.product(
                site.shape, (theta["ga"], (*site.stack_dims, *site.in_dims, "h")),
                (theta["gb"] * theta["scale"], (*site.stack_dims, "h", *site.out_dims))))
        return ops.add(*parts)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {k: jnp.zeros_like(theta[k]) for k in ("b", "gb") if k in theta}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        grid = (*site.stack_dims, None, None, None)
        return {"a": grid, "b": grid, "ga": (*site.stack_dims, *site.in_dims, None),
                "gb": (*site.stack_dims, None, *site.out_dims), "scale": ()}

    def flops(self, site: Site) -> tuple[int, int]:
        return 2 * (self.rank + self.hybrid_r) * (site.in_size + site.out_size), 0


def through_grid(theta: maps.Arrays, x: jax.Array) -> jax.Array:
    """`x [..., in] -> [..., out]`: each block of inputs goes down, each block of outputs gathers its share of all."""
    k, ins, r = theta["a"].shape
    h = jnp.einsum("...ni,nir->...nr", jnp.reshape(x, (*x.shape[:-1], k, ins)), theta["a"])
    h = jnp.swapaxes(jnp.reshape(h, (*x.shape[:-1], k, k, r // k)), -3, -2)
    y = jnp.einsum("...nr,nro->...no", jnp.reshape(h, (*x.shape[:-1], k, r)), theta["b"])
    return jnp.reshape(y, (*x.shape[:-1], -1))
