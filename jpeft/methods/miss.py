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

    With `bat`, the change depends on the weight: each of the r x r blocks of W becomes `W_ij + D_j^T (W_ij + I)`, with
    a D_j for each r outputs, `[*stack, out / r, r, r]`. The whole adapted weight is formed once per call.

    Args:
        rank: r.
        mini: m, a divisor of the number of outputs; None: all outputs.
        bat: multiply the blocks of the weight as well; r divides the inputs and the outputs then.

    Raises:
        MethodConfigError: a rank below 1 or above the number of inputs, an m or (with `bat`) an r that does not divide,
            or both variants at once.

    Source: arXiv 2409.15371.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.MiSS(rank=3)}).count()
        12
    """

    rank: int = 64
    mini: int | None = None
    bat: bool = False

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 3e-4
    formula: ClassVar[str] = "rank * (mini or out)"
    peft_type: ClassVar[str | None] = "MISS"

    def __post_init__(self) -> None:
        if self.bat and self.mini is not None:
            raise MethodConfigError(f"MiSS(mini={self.mini}, bat=True) is two variants at once; use one of them")

    @property
    def dense(self) -> bool:
        return self.bat

    def check(self, site: Site) -> None:
        check_rank(self, site, self.rank, site.in_size)
        if self.bat and (site.in_size % self.rank or site.out_size % self.rank):
            raise MethodConfigError(f"MiSS(rank={self.rank}, bat=True) does not cut {site.path!r} of {site.in_size} "
                                    f"inputs and {site.out_size} outputs into square blocks; use a common divisor")
        if self.mini is not None and (self.mini < 1 or site.out_size % self.mini):
            raise MethodConfigError(f"MiSS(mini={self.mini}) does not divide the {site.out_size} outputs of "
                                    f"{site.path!r}; use a divisor, or None")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        if self.bat:
            shape = (*site.stack_shape, site.out_size // self.rank, self.rank, self.rank)
            return {"block": jnp.zeros(shape, site.theta_dtype)}, {}
        columns = site.out_size if self.mini is None else self.mini
        return {"block": jnp.zeros((*site.stack_shape, self.rank, columns), site.theta_dtype)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        if self.bat:
            return self._blocks(site, base, theta["block"])
        return ops.add(base, maps.linear(site.shape, {"block": theta["block"]}, Shards(site.out_size), site.stack_dims,
                                         site.in_dims, site.out_dims))

    def _blocks(self, site: Site, base: jax.Array, block: jax.Array) -> jax.Array:
        r, matrix = self.rank, site.matrix(base).astype(block.dtype)
        grid = jnp.reshape(matrix, (*site.stack_shape, site.in_size // r, r, site.out_size // r, r))
        turned = jnp.einsum("...iajo,...jac->...icjo", grid, block, precision="highest")
        plain = jnp.moveaxis(block, -1, -3)[..., None, :, :, :]  # [*stack, 1, c, j, o]
        return site.unmatrix(jnp.reshape(grid + turned + plain, matrix.shape)).astype(base.dtype)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"block": jnp.zeros_like(theta["block"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        if self.bat:
            return {"block": (*site.stack_dims, None, None, None)}
        whole = self.mini is None and len(site.out_dims) == 1
        return {"block": (*site.stack_dims, None, site.out_dims[0] if whole else None)}

    def flops(self, site: Site) -> tuple[int, int]:
        if self.bat:
            return 0, 2 * self.rank * site.in_size * site.out_size * site.stack_size
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
