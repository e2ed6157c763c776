"""MiSS: one matrix for all shards of the input."""

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
from jpeft.methods._lowrank import check_rank


@dataclasses.dataclass(frozen=True)
class MiSS(Method):
    """Train one small matrix that all shards of the input share.

    `y = x W + (x_1 + x_2 + ..) D`: the inputs are cut into shards of r, the last one filled with zeros; D
    (`block`) `[*stack, r, out]` starts at zero. Entry (i, j) of the weight changes by `D[i mod r, j]`. With `mini = m`,
    D is `[*stack, r, m]` and repeated over the outputs: (i, j) changes by `D[i mod r, j mod m]`.

    Args:
        rank: r.
        mini: m, a divisor of the number of outputs; None: all outputs.

    Raises:
        MethodConfigError: a rank below 1 or above the number of inputs, or an m that does not divide the outputs.

    Source: arXiv 2409.15371.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.MiSS(rank=3)}).count()
        12
    """

    rank: int = 64
    mini: int | None = None

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 3e-4

    def check(self, site: Site) -> None:
        check_rank(self, site, self.rank, site.in_size)
        if self.mini is not None and (self.mini < 1 or site.out_size % self.mini):
            raise MethodConfigError(f"MiSS(mini={self.mini}) does not divide the {site.out_size} outputs of "
                                    f"{site.path!r}; use a divisor, or None")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        columns = site.out_size if self.mini is None else self.mini
        return {"block": jnp.zeros((*site.stack_shape, self.rank, columns), site.theta_dtype)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        return ops.add(base, maps.linear(site.shape, {"block": theta["block"]}, Shards(site.out_size), site.stack_dims,
                                         site.in_dims, site.out_dims))

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"block": jnp.zeros_like(theta["block"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        whole = self.mini is None and len(site.out_dims) == 1
        return {"block": (*site.stack_dims, None, site.out_dims[0] if whole else None)}

    def flops(self, site: Site) -> tuple[int, int]:
        return 2 * self.rank * (site.out_size if self.mini is None else self.mini), 0


@dataclasses.dataclass(frozen=True)
class Shards:
    """`x [..., in] -> [..., out]`: the sum of the shards of x, times `d`, repeated up to the number of outputs."""

    outputs: int

    def __call__(self, theta: maps.Arrays, x: jax.Array) -> jax.Array:
        r, columns = theta["block"].shape
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % r)])
        y = jnp.sum(jnp.reshape(x, (*x.shape[:-1], -1, r)), -2) @ theta["block"]
        return y if columns == self.outputs else jnp.tile(y, (1,) * (y.ndim - 1) + (self.outputs // columns,))
