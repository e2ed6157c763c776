"""RandLoRA: a change of full rank from random low-rank terms."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import maps, ops
from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods._lowrank import check_rank, projection


@dataclasses.dataclass(frozen=True)
class RandLoRA(Method):
    """Train how random low-rank terms, enough of them for full rank, are scaled and summed.

    `W' = W + s sum_n B_n diag(lambda_n) A diag(gamma_n)`, `s = randlora_alpha / r`, with `n = 1 .. N = ceil(min / r)`,
    min and max being the sides of W: A `[min, r]` and the B_n `[max, N, r]` are random, frozen and shared by the layers
    of a stack; lambda `[*stack, N, r]` starts at zero, gamma `[*stack, N, min]` at `1 / max(N, min)`. Of a wide kernel
    (`in <= out`) the A side takes the input, of a tall one it makes the output. Entries of A and B_n depend on the
    seed and their place alone, so that all leaves share them.

    Args:
        rank: r.
        randlora_alpha: numerator of the scale, which is a frozen scalar of theta.
        projection_prng_key: seed of A and B.
        save_projection: keep A and B in theta and on disk. False: draw them again from the seed in every call.
        sparse: entries are -1, 0 and 1 in the proportion 1 : 4 : 1, times `sqrt(3)`.
        very_sparse: the same with `1 : 2 (q - 1) : 1` and `sqrt(q)`, `q = sqrt(min)`.

    Raises:
        MethodConfigError: a rank below 1 or above the smaller side of the kernel, or both kinds of sparsity.

    Source: arXiv 2502.00987.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.RandLoRA(rank=2)}).count()
        12
    """

    rank: int = 32
    randlora_alpha: float = 640.0
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "N * (rank + min(in, out))"
    peft_type: ClassVar[str | None] = "RANDLORA"

    def __post_init__(self) -> None:
        if self.sparse and self.very_sparse:
            raise MethodConfigError("RandLoRA(sparse=True, very_sparse=True) contradicts itself; set one of them")

    def check(self, site: Site) -> None:
        check_rank(self, site, self.rank, min(site.in_size, site.out_size))

    def _sizes(self, site: Site) -> tuple[int, int, int]:
        """`min`, `max`, `N`."""
        small, large = sorted((site.in_size, site.out_size))
        return small, large, math.ceil(small / self.rank)

    def _bases(self, site: Site) -> Theta:
        small, large, n = self._sizes(site)
        dtype, seed = site.theta_dtype, self.projection_prng_key
        a = projection(seed, 0, small, (self.rank,), dtype)
        b = jnp.stack([projection(seed, 1 + i, large, (self.rank,), dtype) for i in range(n)], 1)
        if not (self.sparse or self.very_sparse):
            return {"a0": a, "b0": b}
        q = 3.0 if self.sparse else math.sqrt(small)
        edge = math.sqrt(3.0) * (1 - 1 / q)
        return {k: jnp.where(jnp.abs(v) > edge, jnp.sign(v) * math.sqrt(q), 0).astype(dtype)
                for k, v in (("a0", a), ("b0", b))}

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        small, _, n = self._sizes(site)
        stack, dtype = site.stack_shape, site.theta_dtype
        own = {"lambda": jnp.zeros((*stack, n, self.rank), dtype),
               "gamma": jnp.full((*stack, n, small), 1 / max(n, small), dtype)}
        scale = {"scale": jnp.asarray(self.randlora_alpha / self.rank, dtype)}
        return own, {**scale, **self._bases(site)} if self.save_projection else scale

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        own = {"lambda": theta["lambda"] * theta["scale"], "gamma": theta["gamma"]}
        fixed = {k: theta[k] for k in ("a0", "b0")} if self.save_projection else self._bases(site)
        factors = {**maps.stacked(own, site.stack_dims, len(site.shape)), **maps.stacked(fixed, (), len(site.shape))}
        bases = Bases(site.in_size <= site.out_size)
        return ops.add(base, maps.Linear(factors, site.shape, bases, site.in_dims, site.out_dims))

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"lambda": jnp.zeros_like(theta["lambda"])}

    def numbers(self, site: Site) -> dict[str, int]:
        return {"N": self._sizes(site)[2]}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        own = (*site.stack_dims, None, None)
        return {"lambda": own, "gamma": own, "scale": (), "a0": (None, None), "b0": (None, None, None)}

    def flops(self, site: Site) -> tuple[int, int]:
        n = self._sizes(site)[2]
        return 2 * n * self.rank * (site.in_size + site.out_size), 0


@dataclasses.dataclass(frozen=True)
class Bases:
    """`x [..., in] -> [..., out]` through the `N r` columns of both sides; `wide`: the A side takes the input."""

    wide: bool

    def __call__(self, theta: maps.Arrays, x: jax.Array) -> jax.Array:
        a = theta["a0"][:, None, :] * jnp.transpose(theta["gamma"])[:, :, None] * theta["lambda"]
        a, b = (jnp.reshape(m, (m.shape[0], -1)) for m in (a, theta["b0"]))
        down, up = (a, b) if self.wide else (b, a)
        return (x @ down) @ jnp.transpose(up)
