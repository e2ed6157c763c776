"""PSOFT: orthogonal fine-tuning within the principal subspace of a weight."""

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
from jpeft.methods.oft import cayley


@dataclasses.dataclass(frozen=True)
class PSOFT(Method):
    """Train a rotation of the principal part of a frozen weight.

    `W' = W + A (M - I) B` for W `[in, out]`, `M = diag(m_a) R^T diag(m_b)`, with the frozen factors `A B` the best
    approximation of rank r of W: A (`a0`) `[*stack, *in, r]` orthonormal, B (`b0`) `[*stack, r, *out]`. R is a rotation
    `(I + Q) (I - Q)^-1` or, with `neumann`, its series as in `OFT`; Q is skew `[r, r]`, trained above the diagonal, row
    by row: q `[*stack, r (r - 1) / 2]` from zero; the magnitudes `a_magnitude`, `b_magnitude` `[*stack, r]` start at
    one. The `alpha` of Hugging Face PEFT cancels and is left out.

    Args:
        rank: r.
        neumann: terms of the series, or 0: solve exactly.
        magnitudes: train m_a and m_b.

    Raises:
        MethodConfigError: a rank below 2 or above the smaller side, or `neumann` of 1 or below 0.

    Source: openreview FSHrinMArK.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.PSOFT(rank=3)}).count()
        9
    """

    rank: int = 32
    neumann: int = 0
    magnitudes: bool = True

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 3e-3
    formula: ClassVar[str] = "rank * (rank - 1) / 2 + 2 * rank * magnitudes"
    peft_type: ClassVar[str | None] = "PSOFT"

    def __post_init__(self) -> None:
        if self.neumann < 0 or self.neumann == 1:
            raise MethodConfigError(f"PSOFT(neumann={self.neumann}) is no series; use 0 (solve exactly) or 2 and more")

    def check(self, site: Site) -> None:
        most = min(site.in_size, site.out_size)
        if not 2 <= self.rank <= most:
            raise MethodConfigError(f"PSOFT(rank={self.rank}) does not fit {site.path!r} of {site.in_size} inputs and "
                                    f"{site.out_size} outputs; use a rank from 2 to {most}")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        r, dtype, stack = self.rank, site.theta_dtype, site.stack_shape
        u, s, vt = jnp.linalg.svd(site.matrix(base.astype(dtype)), full_matrices=False)
        trainable = {"q": jnp.zeros((*stack, r * (r - 1) // 2), dtype)}
        if self.magnitudes:
            trainable |= {k: jnp.ones((*stack, r), dtype) for k in ("a_magnitude", "b_magnitude")}
        return trainable, {"a0": jnp.reshape(u[..., :r], (*stack, *site.in_shape, r)),
                           "b0": jnp.reshape(s[..., :r, None] * vt[..., :r, :], (*stack, r, *site.out_shape))}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        m = jnp.swapaxes(cayley(theta["q"], self.rank, self.neumann), -1, -2)
        if self.magnitudes:
            m = theta["a_magnitude"][..., :, None] * m * theta["b_magnitude"][..., None, :]
        term = ops.product(site.shape, (theta["a0"], (*site.stack_dims, *site.in_dims, "r")),
                           (m - jnp.eye(self.rank, dtype=m.dtype), (*site.stack_dims, "r", "k")),
                           (theta["b0"], (*site.stack_dims, "k", *site.out_dims)))
        return ops.add(base, term)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        ones: Theta = {k: jnp.ones_like(theta[k]) for k in ("a_magnitude", "b_magnitude") if k in theta}
        return {"q": jnp.zeros_like(theta["q"]), **ones}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        stack = site.stack_dims
        return {"q": (*stack, None), "a_magnitude": (*stack, None), "b_magnitude": (*stack, None),
                "a0": (*stack, *site.in_dims, None), "b0": (*stack, None, *site.out_dims)}

    def flops(self, site: Site) -> tuple[int, int]:
        r = self.rank
        return 2 * r * (site.in_size + r + site.out_size), 2 * site.stack_size * r**3 * max(self.neumann - 2, 0)
