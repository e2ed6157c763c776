"""C3A: a block-circulant matrix beside a frozen weight."""

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


@dataclasses.dataclass(frozen=True)
class C3A(Method):
    """Train circular convolutions of the inputs beside a frozen weight.

    `y_i = (x W)_i + sum_j w_ij * x_j / in`: inputs and outputs are cut into blocks of b, and `w * x` is the circular
    correlation `(w * x)[k] = sum_l w[l] x[k + l mod b]`: w `[*stack, out / b, in / b, b]`. It is computed by fast
    Fourier transforms, in float32 at least, and the change is never formed. w starts at zero, so that training starts
    from the base; Hugging Face PEFT draws it (`xavier_uniform`).

    Args:
        block_size: b; it must divide inputs and outputs.
        init_weights: `zero` or `xavier_uniform`.

    Raises:
        MethodConfigError: a block size that does not divide, or an unknown init.

    Source: arXiv 2407.19342.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.C3A(block_size=4)}).count()
        8
    """

    block_size: int = 256
    init_weights: str = "zero"

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 1e-1
    formula: ClassVar[str] = "in * out / block_size"
    peft_type: ClassVar[str | None] = "C3A"

    def __post_init__(self) -> None:
        if self.init_weights not in ("zero", "xavier_uniform"):
            raise MethodConfigError(f"C3A(init_weights={self.init_weights!r}) is unknown; use 'zero' or "
                                    "'xavier_uniform'")

    def check(self, site: Site) -> None:
        b, common = self.block_size, math.gcd(site.in_size, site.out_size)
        if b < 1 or common % b:
            fit = sorted(sorted((d for d in range(1, common + 1) if common % d == 0), key=lambda d: abs(d - b))[:5])
            raise MethodConfigError(f"C3A(block_size={b}) does not divide the {site.in_size} inputs and "
                                    f"{site.out_size} outputs of {site.path!r}; use one such as "
                                    f"{', '.join(map(str, fit))}")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        b, dtype = self.block_size, site.theta_dtype
        shape = (*site.stack_shape, site.out_size // b, site.in_size // b, b)
        if self.init_weights == "zero":
            return {"w": jnp.zeros(shape, dtype)}, {}
        bound = math.sqrt(6.0 / (site.in_size + site.out_size))
        return {"w": jax.random.uniform(key, shape, dtype, -bound, bound)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        w = theta["w"] / jnp.asarray(site.in_size, theta["w"].dtype)
        return ops.add(base, maps.linear(site.shape, {"w": w}, correlate, site.stack_dims, site.in_dims, site.out_dims))

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"w": jnp.zeros_like(theta["w"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"w": (*site.stack_dims, None, None, None)}

    def flops(self, site: Site) -> tuple[int, int]:
        b = self.block_size
        return 8 * (site.out_size // b) * (site.in_size // b) * (b // 2 + 1), 0


def correlate(theta: maps.Arrays, x: jax.Array) -> jax.Array:
    """`x` `[..., n b]` to `[..., m b]`, with w `[m, n, b]`; a product of real matrices for each frequency."""
    w = theta["w"].astype(x.dtype if x.dtype.itemsize > 2 else jnp.float32)
    m, n, b = w.shape
    blocks = jnp.reshape(x.astype(w.dtype), (*x.shape[:-1], n, b))
    have, want = jnp.fft.rfft(blocks), jnp.fft.rfft(w)
    left = jnp.concatenate([have.real, have.imag], -2)
    by_real = jnp.concatenate([want.real, want.imag], 1)
    by_imag = jnp.concatenate([-want.imag, want.real], 1)
    y = jnp.einsum("...nf,mnf->...mf", left, jnp.concatenate([by_real, by_imag], 0))
    turned = jnp.fft.irfft(jax.lax.complex(y[..., :m, :], y[..., m:, :]), b)
    return jnp.reshape(turned, (*x.shape[:-1], m * b)).astype(x.dtype)
