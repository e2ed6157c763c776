"""VeRA: two vectors around random projections."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import ops
from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods._lowrank import check_rate, dropout_key, projection


@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    """Train two vectors that scale frozen random projections.

    `W' = W + A diag(d) B diag(b)`: A `[*in, r]` and B `[r, *out]` are random, frozen and shared by the layers of a
    stack; d `[*stack, r]` starts at `d_initial`, b `[*stack, *out]` at zero. Row i of A depends on the seed and i
    alone, column j of B on the seed and j alone: leaves of all sizes share one pair of projections, as in the paper,
    up to the scale of their He-uniform distribution.

    Args:
        rank: r; it may exceed the sides of the kernel.
        projection_prng_key: seed of A and B.
        save_projection: keep A and B in theta and on disk. False: draw them again from the seed in every call, and
            store two vectors for each layer.
        dropout: rate of inverted dropout on the input of the adapter path, active when `Call.key` is given.
        d_initial: start of d.

    Raises:
        MethodConfigError: a rank below 1, or a dropout rate that is none.

    Source: arXiv 2310.11454.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.VeRA(rank=16)}).count()
        20
    """

    rank: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    dropout: float = 0.0
    d_initial: float = 0.1

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank + out"
    peft_type: ClassVar[str | None] = "VERA"

    def __post_init__(self) -> None:
        check_rate(self, self.dropout)
        if self.rank < 1:
            raise MethodConfigError(f"VeRA(rank={self.rank}) has no columns; use a rank of 1 or more")

    def _projections(self, site: Site) -> Theta:
        """A `[*in, r]` and B `[r, *out]`."""
        a, b = (projection(self.projection_prng_key, i, n, (self.rank,), site.theta_dtype)
                for i, n in enumerate((site.in_size, site.out_size)))
        # He-uniform: a deviation of sqrt(2 / fan_in).
        a, b = a * (2 / site.in_size) ** 0.5, b * (2 / self.rank) ** 0.5
        return {"a0": jnp.reshape(a, (*site.in_shape, self.rank)), "b0": jnp.reshape(b.T, (self.rank, *site.out_shape))}

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        d = jnp.full((*site.stack_shape, self.rank), self.d_initial, site.theta_dtype)
        b = jnp.zeros((*site.stack_shape, *site.out_shape), site.theta_dtype)
        return {"d": d, "b": b}, self._projections(site) if self.save_projection else {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        fixed = theta if self.save_projection else self._projections(site)
        term = ops.product(site.shape, (fixed["a0"], (*site.in_dims, "r")), (theta["d"], (*site.stack_dims, "r")),
                           (fixed["b0"], ("r", *site.out_dims)), rate=self.dropout,
                           key=dropout_key(site, key, self.dropout))
        return ops.add(base, ops.scaled(term, theta["b"], (*site.stack_dims, *site.out_dims)))

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"b": jnp.zeros_like(theta["b"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"d": (*site.stack_dims, None), "b": (*site.stack_dims, *site.out_dims),
                "a0": (*site.in_dims, None), "b0": (None, *site.out_dims)}

    def flops(self, site: Site) -> tuple[int, int]:
        return 2 * self.rank * (site.in_size + site.out_size), 0
