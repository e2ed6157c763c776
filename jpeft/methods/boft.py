"""BOFT: orthogonal fine-tuning by a product of butterfly factors."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import maps, ops
from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods.oft import cayley


@dataclasses.dataclass(frozen=True)
class BOFT(Method):
    """Train a product of sparse rotations of the inputs, and a scale for each output, of a frozen weight.

    `y = (x B_m .. B_1) W * s` for W `[in, out]`: each factor `B_i = P_i R_i P_i^T` has a block-diagonal rotation of
    `in / b` blocks `(I + Q) (I - Q)^-1` of size b, whose skew Q `[b, b]` is trained above the diagonal, row by row:
    q `[*stack, m, in / b, b (b - 1) / 2]`, from zero. P_i shuffles half blocks as the i-th stage of a fast Fourier
    transform, so that log2(in / b) + 1 factors mix all inputs. s `[*stack, *out]` starts at one.

    Args:
        block_size: b; it must divide the number of inputs.
        n_butterfly_factor: m; above 1, b and the number of blocks are even, and `2^(m - 1)` divides that number.
        neumann: terms of the series in place of the inverse, as in `OFT`, or 0: solve exactly.

    Raises:
        MethodConfigError: sizes that do not fit the inputs, or `neumann` of 1 or below 0.

    Source: arXiv 2311.06243; the scale is that of Hugging Face PEFT, whose rotations are the transposes of these.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.BOFT(n_butterfly_factor=2)}).count()
        28
    """

    block_size: int = 4
    n_butterfly_factor: int = 1
    neumann: int = 0

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "n_butterfly_factor * in * (block_size - 1) / 2 + out"
    peft_type: ClassVar[str | None] = "BOFT"

    def __post_init__(self) -> None:
        if self.neumann < 0 or self.neumann == 1:
            raise MethodConfigError(f"BOFT(neumann={self.neumann}) is no series; use 0 (solve exactly) or 2 and more")

    def check(self, site: Site) -> None:
        n, b, m = site.in_size, self.block_size, self.n_butterfly_factor
        if m < 1 or b < 2 or n % b or (m > 1 and (b % 2 or (n // b) % 2 ** (m - 1))):
            raise MethodConfigError(f"BOFT(block_size={b}, n_butterfly_factor={m}) does not fit the {n} inputs of "
                                    f"{site.path!r}; use an even block_size whose product with 2^(factors - 1) divides "
                                    "them, and 1 factor or more")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        b = self.block_size
        shape = (*site.stack_shape, self.n_butterfly_factor, site.in_size // b, b * (b - 1) // 2)
        outs = (*site.stack_shape, *site.out_shape)
        return {"q": jnp.zeros(shape, site.theta_dtype), "s": jnp.ones(outs, site.theta_dtype)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        turn = Butterfly(site.in_size, self.block_size)
        r = cayley(theta["q"], self.block_size, self.neumann)
        turned = maps.rotated(base, {"r": r}, turn, site.stack_dims, site.in_dims)
        return ops.scaled(turned, theta["s"], (*site.stack_dims, *site.out_dims))

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"q": jnp.zeros_like(theta["q"]), "s": jnp.ones_like(theta["s"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"q": (*site.stack_dims, None, None, None), "s": (*site.stack_dims, *site.out_dims)}

    def flops(self, site: Site) -> tuple[int, int]:
        m, n, b = self.n_butterfly_factor, site.in_size, self.block_size
        return 2 * m * n * b, site.stack_size * m * n * 2 * b**2 * max(self.neumann - 2, 0)


@dataclasses.dataclass(frozen=True)
class Butterfly:
    """`x B_m .. B_1` for `x` `[..., size]`, with the rotations `r` `[m, size / b, b, b]`."""

    size: int
    block: int

    def order(self, stage: int) -> np.ndarray:
        """The shuffle of one stage: within each block of `2^stage b`, the even half blocks, then the odd ones."""
        half, parts = self.block // 2, 2 ** (stage + 1)
        chosen = np.concatenate([np.arange(0, parts, 2), np.arange(1, parts, 2)])
        return np.arange(self.size).reshape(-1, parts, half)[:, chosen].reshape(-1)

    def __call__(self, theta: maps.Arrays, x: jax.Array) -> jax.Array:
        r = theta["r"]
        for stage in reversed(range(len(r))):
            order = self.order(stage) if stage else None
            x = x if order is None else x[..., np.argsort(order)]
            blocks = jnp.reshape(x, (*x.shape[:-1], -1, self.block))
            x = jnp.reshape(jnp.einsum("...nb,nbc->...nc", blocks, r[stage]), x.shape)
            x = x if order is None else x[..., order]
        return x
