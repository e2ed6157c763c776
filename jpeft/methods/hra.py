"""HRA: a chain of Householder reflections of the inputs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.core import maps
from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError


@dataclasses.dataclass(frozen=True)
class HRA(Method):
    """Train r Householder reflections of the inputs of a frozen weight.

    `y = (x H_r .. H_1) W` for W `[in, out]`, `H_i = I - 2 u_i u_i^T / |u_i|^2`, u_i the columns of U (`u`)
    `[*stack, in, r]`. Columns start in equal pairs, which cancel, so that training starts from the base: r is even.

    The reflections are one product in their compact form, `H_r .. H_1 = I - U T^T U^T` with the columns of U
    normalised and `T^-1 = I / 2 +` the strict upper triangle of `U^T U`: 4 in r operations for a row, not the r passes
    over it that the equation reads as.

    Args:
        rank: r, the number of reflections.

    Raises:
        MethodConfigError: an odd rank, or one below 2.

    Source: arXiv 2405.17484; without its Gram-Schmidt variant, for which pairs of equal columns are no basis.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.HRA(rank=2)}).count()
        16
    """

    rank: int = 8

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "rank * in"
    peft_type: ClassVar[str | None] = "HRA"

    def __post_init__(self) -> None:
        if self.rank < 2 or self.rank % 2:
            raise MethodConfigError(f"HRA(rank={self.rank}) cannot start from the base; use an even rank, as its "
                                    "reflections start in pairs")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        bound = 1.0 / math.sqrt(site.in_size)
        half = jax.random.uniform(key, (*site.stack_shape, site.in_size, self.rank // 2), site.theta_dtype,
                                  -bound, bound)
        return {"u": jnp.repeat(half, 2, axis=-1)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        u = theta["u"]
        u = u / jnp.linalg.norm(u, axis=-2, keepdims=True)
        rows = jnp.swapaxes(u, -1, -2)
        gram = jnp.matmul(rows, u, precision=lax.Precision.HIGHEST)
        v = jnp.matmul(_compact(gram), rows, precision=lax.Precision.HIGHEST)
        return maps.rotated(base, {"u": u, "v": v}, reflect, site.stack_dims, site.in_dims)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"u": jnp.repeat(theta["u"][..., ::2], 2, axis=-1)}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"u": (*site.stack_dims, site.in_dims[0] if len(site.in_dims) == 1 else None, None)}

    def flops(self, site: Site) -> tuple[int, int]:
        return 4 * site.in_size * self.rank, 4 * site.stack_size * site.in_size * self.rank**2


def _compact(gram: jax.Array) -> jax.Array:
    """`T^T` by substitution: row j is `2 (e_j - sum_{i < j} gram_ij row_i)`; sums of r numbers, no products."""
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)

    def step(x: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        column, e = one
        row = 2 * (e - jnp.sum(column[..., :, None] * x, -2))
        return x + e[:, None] * row[..., None, :], None

    return lax.scan(step, jnp.zeros_like(gram), (jnp.moveaxis(gram, -1, 0), eye))[0]


def reflect(theta: maps.Arrays, x: jax.Array) -> jax.Array:
    """`x (I - U V)` for `x` `[..., in]`."""
    return x - (x @ theta["u"]) @ theta["v"]
