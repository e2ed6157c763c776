"""DoRA: weight-decomposed low-rank adaptation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpeft.core import compat, ops
from jpeft.core.method import Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods.lora import LoRA


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """Train the direction of a weight by LoRA and its magnitude, one number for each output.

    `W' = m * (W + s A B) / ||W + s A B||`, the norm over the inputs of each output (of an embedding: over the rows),
    held constant in the gradient as in the paper. m `[*stack, *out]` starts at `||W||`; A and B are those of `LoRA`.

    No dense delta is formed: with `D = s A B`, `||W + D||^2 = ||W||^2 + 2 <W, D> + ||D||^2`, where `||W||^2` is frozen
    in theta (`w_sq`), `<W, D>` needs `A^T W` once per call and `||D||^2` the Gram matrix `A^T A`.

    Args:
        rank: see `LoRA`.
        alpha: see `LoRA`.
        rslora: see `LoRA`.
        dropout: see `LoRA`; it acts on the input of the low-rank path, not on the norm.
        init_weights: see `LoRA`; not `loftq`.

    Raises:
        MethodConfigError: as of `LoRA`; or it is not the first of a `Chain`: earlier methods would change `||W||`.

    Source: arXiv 2402.09353.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.DoRA(rank=2)}).count()
        28
    """

    formula: ClassVar[str] = "rank * (in + out) + out"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights.startswith("loftq"):
            raise MethodConfigError(f"DoRA(init_weights={self.init_weights!r}) would have the norm of the weight and "
                                    "the directions of a quantised one; use LoRA, or another init")

    @property
    def leads(self) -> bool:
        return True

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        trainable, frozen = super().init(key, site, base)
        square = _over_inputs(site, jnp.square(base.astype(site.theta_dtype)))
        return {**trainable, "m": jnp.sqrt(square)}, {**frozen, "w_sq": square}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        if isinstance(base, Op):
            raise MethodConfigError(f"DoRA on {site.path!r} comes after another method, but its norm is that of the "
                                    "frozen weight; put it first in the Chain")
        m = theta["m"]
        if "mask" in theta:
            live = theta["mask"][..., :1].reshape((*site.stack_shape, *(1,) * len(site.out_dims)))
            m = jnp.where(live > 0, m, jnp.sqrt(theta["w_sq"]))
        gain = m / lax.stop_gradient(self._norm(site, base, theta))
        return ops.scaled(super().build(site, base, theta, key), gain, (*site.stack_dims, *site.out_dims))

    def _norm(self, site: Site, base: jax.Array, theta: Theta) -> jax.Array:
        """`||W + s A B||` over the inputs, `[*stack, *out]`."""
        n, a, b = len(site.stack_dims), theta["a"], self._right(site, theta, "b")
        if "a0" in theta:
            a = jnp.concatenate([a, theta["a0"]], -1)
            b = jnp.concatenate([b, -self._right(site, theta, "b0")], n)
        stack, ins = tuple(range(n)), tuple(range(n, a.ndim - 1))
        # A float32 copy of a bfloat16 leaf would double its memory; XLA on CPU has no such mixed product.
        narrow = base.dtype.itemsize < a.dtype.itemsize and jax.default_backend() != "cpu"
        thin, w = (a.astype(base.dtype), base) if narrow else (a, base.astype(a.dtype))
        cross = _dot(thin, w, (ins, site.in_dims), (stack, site.stack_dims), a.dtype)
        gram = _dot(a, a, (ins, ins), (stack, stack), a.dtype)
        spread = _dot(gram, b, ((n + 1,), (n,)), (stack, stack), a.dtype)
        square = theta["w_sq"] + jnp.sum(b * (2 * cross + spread), axis=n)
        floor = jnp.finfo(a.dtype)
        return jnp.sqrt(jnp.maximum(square, floor.eps * theta["w_sq"] + floor.tiny))

    def _right(self, site: Site, theta: Theta, letter: str) -> jax.Array:
        """`s B`, dead columns zeroed, `[*stack, r, *out]`."""
        b, n, outs = theta[letter], len(site.stack_dims), len(site.out_dims)
        scale = theta["scale"]
        b = b * scale.reshape(scale.shape + (1,) * (b.ndim - scale.ndim))
        return b * theta["mask"].reshape(b.shape[: n + 1] + (1,) * outs) if "mask" in theta else b

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {**super().neutral(site, theta), "m": jnp.sqrt(theta["w_sq"])}

    def live(self, site: Site) -> dict[str, Any]:
        mask = self._mask(site)
        if mask is None:
            return {}
        some = mask[..., :1].reshape((*site.stack_shape, *(1,) * len(site.out_dims)))
        return {**super().live(site), "m": np.broadcast_to(some, (*site.stack_shape, *site.out_shape))}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        outs = (*site.stack_dims, *site.out_dims)
        return {**super().axes(site), "m": outs, "w_sq": outs}

    def flops(self, site: Site) -> tuple[int, int]:
        r = self.width * (2 if self.keeps_start else 1)
        once = site.in_size * site.out_size * r + site.in_size * r * r + site.out_size * r * r
        return super().flops(site)[0], 2 * math.prod(site.stack_shape) * once


def _over_inputs(site: Site, array: jax.Array) -> jax.Array:
    """Sum over the input dims and lay the rest out as `[*stack, *out]`."""
    rest = sorted((*site.stack_dims, *site.out_dims))
    order = tuple(rest.index(d) for d in (*site.stack_dims, *site.out_dims))
    return jnp.transpose(jnp.sum(array, axis=site.in_dims), order)


def _dot(x: jax.Array, y: jax.Array, contract: Any, batch: Any, dtype: Any) -> jax.Array:
    numbers = (contract, batch)
    return lax.dot_general(x, y, numbers, precision=lax.Precision.HIGHEST, preferred_element_type=dtype,
                           out_sharding=compat.contraction_sharding(x, y, numbers))
