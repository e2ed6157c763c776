"""Compacter: bottleneck adapters made of sums of Kronecker products."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import maps
from jpeft.core.method import Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods.bottleneck import ACTIVATIONS, Pfeiffer


@dataclasses.dataclass(frozen=True)
class Compacter(Pfeiffer):
    """Train a bottleneck adapter whose two matrices are sums of Kronecker products.

    `y' = y + act(y D + b_D) U + b_U` with `D = sum_i kron(A_i, s_i t_i)`, i of n, and U likewise: A (`a`) `[n, n, n]`,
    shared by both matrices and by the stacked layers; for D, s (`down_s`) `[*stack, n, out / n, r]` and t (`down_t`)
    `[*stack, n, r, h / n]`; for U, `up_s` `[*stack, n, h / n, r]` and `up_t` `[*stack, n, r, out / n]`; biases as in
    `Pfeiffer`. Neither matrix is formed. `up_t` starts at zero, the others so that the entries of D have deviation
    0.02.

    Args:
        reduction_factor: see `Pfeiffer`; h is rounded down to a multiple of n.
        bottleneck: see `Pfeiffer`.
        activation: see `Pfeiffer`.
        phm_dim: n; it must divide the output and h.
        phm_rank: r, the rank of the second factors.

    Raises:
        MethodConfigError: as of `Pfeiffer`; n or r below 1, or an n that does not divide.

    Source: arXiv 2106.04647.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> rules = {"w": jpeft.Compacter(bottleneck=2, phm_dim=2)}
        >>> jpeft.plan(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, (jnp.ones((2, 8)),), rules).count()
        26
    """

    reduction_factor: float = 32.0
    activation: str = "gelu"
    phm_dim: int = 4
    phm_rank: int = 1

    recommended_lr: ClassVar[float] = 3e-3
    formula: ClassVar[str] = "2 * phm_rank * (out + h) + h + out + [phm_dim ** 3]"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.phm_dim < 1 or self.phm_rank < 1:
            raise MethodConfigError(f"Compacter(phm_dim={self.phm_dim}, phm_rank={self.phm_rank}) has no products; "
                                    "both must be positive")

    def width(self, site: Site) -> int:
        n = self.phm_dim
        return max(n, super().width(site) // n * n) if self.bottleneck is None else self.bottleneck

    def check(self, site: Site) -> None:
        super().check(site)
        if site.out_size % self.phm_dim or self.width(site) % self.phm_dim:
            raise MethodConfigError(f"Compacter(phm_dim={self.phm_dim}) does not divide the {site.out_size} outputs of "
                                    f"{site.path!r} and {self.width(site)} hidden units; use a common divisor")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        n, r, d, h, dtype = self.phm_dim, self.phm_rank, site.out_size, self.width(site), site.theta_dtype
        stack, keys = site.stack_shape, jax.random.split(key, 4)
        spread = math.sqrt(0.02 / math.sqrt(r))
        normal = jax.random.normal
        return {"a": normal(keys[0], (n, n, n), dtype) / math.sqrt(n),
                "down_s": spread * normal(keys[1], (*stack, n, d // n, r), dtype),
                "down_t": spread * normal(keys[2], (*stack, n, r, h // n), dtype),
                "b_down": jnp.zeros((*stack, h), dtype),
                "up_s": spread * normal(keys[3], (*stack, n, h // n, r), dtype),
                "up_t": jnp.zeros((*stack, n, r, d // n), dtype),
                "b_up": jnp.zeros((*stack, d), dtype)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        each = {**theta, "a": jnp.broadcast_to(theta["a"], (*site.stack_shape, *theta["a"].shape))}
        return maps.hooked(base, each, maps.Hook(self, site), site.stack_dims)

    def inner(self, theta: Theta, x: jax.Array) -> jax.Array:
        t = {k: v.astype(x.dtype) for k, v in theta.items()}
        hidden = ACTIVATIONS[self.activation](_times(x, t["a"], t["down_s"], t["down_t"]) + t["b_down"])
        return _times(hidden, t["a"], t["up_s"], t["up_t"]) + t["b_up"]

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {k: jnp.zeros_like(theta[k]) for k in ("up_t", "b_up")}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        parts = dict.fromkeys(("down_s", "down_t", "up_s", "up_t"), (*site.stack_dims, None, None, None))
        return {**parts, "a": (None,) * 3, "b_down": (*site.stack_dims, None), "b_up": (*site.stack_dims, None)}

    def flops(self, site: Site) -> tuple[int, int]:
        n, r, d, h = self.phm_dim, self.phm_rank, site.out_size, self.width(site)
        return 2 * n * r * (2 * d + 2 * h + 2 * n * n), 0


def _times(x: jax.Array, a: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
    """`x sum_i kron(a_i, s_i t_i)`, x `[..., n p]`: through the `n r` numbers that are left of each of the n parts."""
    n = a.shape[0]
    parts = jnp.reshape(x, (*x.shape[:-1], n, x.shape[-1] // n))
    thin = jnp.einsum("...mp,ipr->...mir", parts, s)
    mixed = jnp.einsum("...mir,imq->...qir", thin, a)
    y = jnp.einsum("...qir,iro->...qo", mixed, t)
    return jnp.reshape(y, (*x.shape[:-1], n * t.shape[-1]))
