"""HiRA: a low-rank change, relative to the weight."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core.method import Method, Theta
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods._lowrank import check_rank, uniform


@dataclasses.dataclass(frozen=True)
class HiRA(Method):
    """Train a low-rank matrix that multiplies a frozen weight entry by entry.

    `W' = W * (1 + A B)`: A `[*stack, *in, r]` uniform (or `gaussian`), B `[*stack, r, *out]` from zero. The change
    `W * A B` has the rank of W, up to r times over; no low-rank product gives it, so `W'` is formed once per call, in
    float32, for every layer of a stacked leaf: the memory of the adapted leaves, and no cost for each token.

    Args:
        rank: r.
        init_weights: of A: `kaiming` or `gaussian` (deviation 1 / r).

    Raises:
        MethodConfigError: a rank below 1 or above the smaller side of the kernel, or an unknown init.

    Source: ICLR 2025, openreview TwJrTz9cRS.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.HiRA(rank=2)}).count()
        24
    """

    rank: int = 32
    init_weights: str = "kaiming"

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding", "tied"})
    recommended_lr: ClassVar[float] = 2e-2
    formula: ClassVar[str] = "rank * (in + out)"
    peft_type: ClassVar[str | None] = "HIRA"

    def __post_init__(self) -> None:
        if self.init_weights not in ("kaiming", "gaussian"):
            raise MethodConfigError(f"HiRA(init_weights={self.init_weights!r}) is unknown; use 'kaiming' or 'gaussian'")

    @property
    def dense(self) -> bool:
        return True

    def check(self, site: Site) -> None:
        check_rank(self, site, self.rank, min(site.in_size, site.out_size))

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        shape, dtype = (*site.stack_shape, *site.in_shape, self.rank), site.theta_dtype
        a = jax.random.normal(key, shape, dtype) / self.rank if self.init_weights == "gaussian" else \
            uniform(key, shape, site.in_size, dtype)
        return {"a": a, "b": jnp.zeros((*site.stack_shape, self.rank, *site.out_shape), dtype)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array:
        a = jnp.reshape(theta["a"], (*site.stack_shape, site.in_size, self.rank))
        b = jnp.reshape(theta["b"], (*site.stack_shape, self.rank, site.out_size))
        relative = site.unmatrix(jnp.matmul(a, b, precision="highest"))
        wide = base.astype(relative.dtype)
        return (wide + wide * relative).astype(base.dtype)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"b": jnp.zeros_like(theta["b"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"a": (*site.stack_dims, *site.in_dims, None), "b": (*site.stack_dims, None, *site.out_dims)}

    def flops(self, site: Site) -> tuple[int, int]:
        return 0, 2 * self.rank * site.in_size * site.out_size * site.stack_size
