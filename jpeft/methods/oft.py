"""OFT: orthogonal fine-tuning, as a rotation of the inputs."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import maps
from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError


@dataclasses.dataclass(frozen=True)
class OFT(Method):
    """Train a block-diagonal rotation of the inputs of a frozen weight.

    `y = (x R) W`, `W' = R W` for W `[in, out]`: R has `in / b` blocks of `R_i = (I + Q_i) (I - Q_i)^-1`, each Q_i skew
    `[b, b]`, of which the entries above the diagonal are trained, row by row: q `[*stack, in / b, b (b - 1) / 2]`, from
    zero. R is made once per call, whatever the number of tokens.

    With `neumann = k > 0` the inverse is its series, `R_i = (I + Q) (I + Q + .. + Q^(k-2))`, as in OFT v2: products
    only, and orthogonal up to `|Q|^(k-1)`. With `neumann = 0` a linear system is solved and R is exactly orthogonal.

    Args:
        block_size: b; it must divide the number of inputs.
        blocks: the number of blocks; it then replaces `block_size`.
        neumann: terms of the series (5 is the default of Hugging Face PEFT, whose R without the series is the transpose
            of this one), or 0.

    Raises:
        MethodConfigError: a block size that does not divide the inputs, or `neumann` of 1 or below 0.

    Source: arXiv 2306.07280; input-centric, with the series: 2506.19847.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.OFT(block_size=4)}).count()
        12
    """

    block_size: int = 32
    blocks: int | None = None
    neumann: int = 5

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "in * (b - 1) / 2"
    peft_type: ClassVar[str | None] = "OFT"

    def __post_init__(self) -> None:
        if self.neumann < 0 or self.neumann == 1:
            raise MethodConfigError(f"OFT(neumann={self.neumann}) is no series; use 0 (solve exactly) or 2 and more")

    def _sizes(self, site: Site) -> tuple[int, int]:
        """Number and size of the blocks."""
        if self.blocks is not None:
            return self.blocks, site.in_size // max(self.blocks, 1)
        return site.in_size // max(self.block_size, 1), self.block_size

    def check(self, site: Site) -> None:
        n, (count, b) = site.in_size, self._sizes(site)
        if count < 1 or b < 2 or count * b != n:
            fit = [d for d in range(2, n + 1) if n % d == 0]
            near = sorted(sorted(fit, key=lambda d: abs(d - b))[:5])
            given = f"block_size={b}" if self.blocks is None else f"blocks={self.blocks}"
            raise MethodConfigError(f"OFT({given}) does not cut the {n} inputs of {site.path!r} into equal blocks of 2 "
                                    f"or more; use a block_size such as {', '.join(map(str, near))}")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        count, b = self._sizes(site)
        return {"q": jnp.zeros((*site.stack_shape, count, b * (b - 1) // 2), site.theta_dtype)}, {}

    def rotation(self, site: Site, q: jax.Array) -> jax.Array:
        """The blocks `R_i`, `[*stack, in / b, b, b]`."""
        return cayley(q, self._sizes(site)[1], self.neumann)

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        return maps.rotated(base, {"r": self.rotation(site, theta["q"])}, rotate, site.stack_dims, site.in_dims)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"q": jnp.zeros_like(theta["q"])}

    def numbers(self, site: Site) -> dict[str, int]:
        return {"b": self._sizes(site)[1]}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"q": (*site.stack_dims, None, None)}

    def flops(self, site: Site) -> tuple[int, int]:
        count, b = self._sizes(site)
        return 2 * site.in_size * b, site.stack_size * count * 2 * b**3 * max(self.neumann - 2, 0)


def cayley(q: jax.Array, b: int, neumann: int) -> jax.Array:
    """`(I + Q) (I - Q)^-1` `[.., b, b]` of the skew Q whose entries above the diagonal are `q`, row by row.

    With `neumann` terms of the series of the inverse; 0: by solving.
    """
    upper = jnp.zeros((*q.shape[:-1], b, b), q.dtype).at[..., *np.triu_indices(b, 1)].set(q)
    skew = upper - jnp.swapaxes(upper, -1, -2)
    eye = jnp.eye(b, dtype=q.dtype)
    if neumann == 0:
        return jnp.linalg.solve(eye - skew, eye + skew)
    series = eye + skew
    if neumann == 2:
        return series
    for _ in range(neumann - 3):
        series = eye + _times(skew, series)
    return series + _times(skew, series)


def rotate(theta: maps.Arrays, x: jax.Array) -> jax.Array:
    """Turn each block of `x` `[..., in]` by its rotation."""
    count, b, _ = theta["r"].shape
    return jnp.reshape(jnp.einsum("...nb,nbc->...nc", jnp.reshape(x, (*x.shape[:-1], count, b)), theta["r"]), x.shape)


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
