"""KaSA: low-rank adaptation with singular values, in place of the weight's least ones."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import ops
from jpeft.core.method import Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods.lora import LoRA


@dataclasses.dataclass(frozen=True)
class KaSA(LoRA):
    """Drop the least singular components of a weight and train a low-rank term with singular values of its own.

    `W' = W - C D + s A diag(d) B`: A `[*stack, *in, r]` and B `[*stack, r, *out]` are those of `LoRA`, d `[*stack, r]`
    starts normal; C `[*stack, *in, r]` and D `[*stack, r, *out]`, frozen in theta, hold the r smallest singular
    triplets of W, so that the base itself is not changed. The model therefore starts beside the base, by what KaSA
    takes for noise. The penalty is `beta |d|^2 + gamma (|A^T A - I| + |B B^T - I|)`.

    Args:
        rank: r, one for all layers.
        alpha: see `LoRA`.
        rslora: see `LoRA`.
        dropout: see `LoRA`.
        init_weights: `kaiming`, `gaussian` or `orthogonal`.
        beta: weight of the size of d.
        gamma: weight of the orthogonality.

    Raises:
        MethodConfigError: a rank below 1 or not below the smaller side of the kernel, or another init.

    Source: arXiv 2412.06071.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.KaSA(rank=2)}).count()
        26
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    formula: ClassVar[str] = "rank * (in + out + 1)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in ("kaiming", "gaussian", "orthogonal"):
            raise MethodConfigError(f"KaSA(init_weights={self.init_weights!r}) starts from the weight or the data, "
                                    "where KaSA has its own start; use 'kaiming', 'gaussian' or 'orthogonal'")
        if isinstance(self.rank, tuple):
            raise MethodConfigError(f"KaSA(rank={self.rank}) has a rank for each layer; use one for all")

    def check(self, site: Site) -> None:
        super().check(site)
        if self.width == min(site.in_size, site.out_size):
            raise MethodConfigError(f"KaSA(rank={self.rank}) leaves no component of {site.path!r}; use a rank up to "
                                    f"{self.width - 1}")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        trainable, frozen = super().init(key, site, base)
        dtype, r = site.theta_dtype, self.width
        d = jax.random.normal(jax.random.fold_in(key, 1), (*site.stack_shape, r), jnp.float32).astype(dtype)
        u, s, vt = jnp.linalg.svd(site.matrix(base.astype(dtype)), full_matrices=False)
        dropped = {"c0": self._fold(site, u[..., -r:] * s[..., None, -r:], "a"),
                   "d0": self._fold(site, vt[..., -r:, :], "b")}
        return {**trainable, "d": d}, {**frozen, **dropped}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        values = jnp.reshape(theta["d"], (*theta["d"].shape, *(1,) * len(site.out_dims)))
        dropped = ops.product(site.shape, (theta["c0"], (*site.stack_dims, *site.in_dims, "r")),
                              (-theta["d0"], (*site.stack_dims, "r", *site.out_dims)))
        return ops.add(base, self.term(site, {**theta, "b": theta["b"] * values}, key), dropped)

    def penalty(self, site: Site, theta: Theta) -> jax.Array:
        r, total = self.width, self.beta * jnp.sum(jnp.square(theta["d"]))
        for rows in (jnp.reshape(theta["a"], (*site.stack_shape, -1, r)),
                     jnp.swapaxes(jnp.reshape(theta["b"], (*site.stack_shape, r, -1)), -1, -2)):
            gap = jnp.matmul(jnp.swapaxes(rows, -1, -2), rows, precision="highest") - jnp.eye(r, dtype=rows.dtype)
            total = total + self.gamma * jnp.sum(jnp.sqrt(jnp.sum(jnp.square(gap), (-2, -1)) + 1e-12))
        return total

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"a": theta["c0"], "b": theta["d0"] / theta["scale"], "d": jnp.ones_like(theta["d"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        axes = super().axes(site)
        return {**axes, "c0": axes["a"], "d0": axes["b"], "d": (*site.stack_dims, None)}

    def flops(self, site: Site) -> tuple[int, int]:
        return 2 * super().flops(site)[0], 0
