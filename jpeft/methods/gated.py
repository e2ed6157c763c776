"""The parts of UniPELT: a gate on each says how much an input wants it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.core import maps
from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods._lowrank import uniform
from jpeft.methods.bottleneck import Pfeiffer
from jpeft.methods.prefix import PrefixTuning
from jpeft.methods.virtual import overwrite


def opened(x: jax.Array, g: jax.Array, b: jax.Array) -> jax.Array:
    """The gate `sigmoid(x g + b)` of inputs `[.., n]`, `[.., 1]`; g `[n]`, b scalar."""
    return jax.nn.sigmoid(jnp.sum(x * g.astype(x.dtype), -1, keepdims=True) + b.astype(x.dtype))


def _gate(key: jax.Array, site: Site, n: int) -> Theta:
    return {"g": uniform(key, (*site.stack_shape, n), n, site.theta_dtype),
            "gb": jnp.zeros(site.stack_shape, site.theta_dtype)}


@dataclasses.dataclass(frozen=True)
class GatedLoRA(Method):
    """Train a low-rank term beside a projection, and a gate that opens it token by token.

    `y' = y + sigmoid(x g + b_g) s (x A) B`, `s = alpha / r`; A (`a`) `[*stack, in, r]`, B (`b`) `[*stack, r, out]`, g
    `[*stack, in]`, b_g (`gb`) `[*stack]`. B starts at zero, so that training starts from the base. The gate depends on
    the input, so that it cannot be merged.

    Args:
        rank: r.
        alpha: numerator of the scale, which is a frozen scalar of theta.

    Raises:
        MethodConfigError: a rank below 1 or above the smaller side of the kernel.

    Source: arXiv 2110.07577.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> params = {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(lambda p, x: x @ p["w"], params, (jnp.ones((2, 8)),), {"w": jpeft.GatedLoRA(rank=2)}).count()
        33
    """

    rank: int = 8
    alpha: float = 16.0

    hooks: ClassVar[bool] = True
    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "rank * (in + out) + in + 1"

    def check(self, site: Site) -> None:
        most = min(site.in_size, site.out_size)
        if not 1 <= self.rank <= most:
            raise MethodConfigError(f"GatedLoRA(rank={self.rank}) does not fit {site.path!r} of {site.in_size} inputs "
                                    f"and {site.out_size} outputs; use a rank from 1 to {most}, or exclude the leaf")

    def source(self, site: Site) -> str:
        return site.path

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        stack, dtype = site.stack_shape, site.theta_dtype
        first, second = jax.random.split(key)
        return {"a": uniform(first, (*stack, site.in_size, self.rank), site.in_size, dtype),
                "b": jnp.zeros((*stack, self.rank, site.out_size), dtype),
                **_gate(second, site, site.in_size)}, {"scale": jnp.asarray(self.alpha / self.rank, dtype)}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        each = {**theta, "scale": jnp.broadcast_to(theta["scale"], site.stack_shape)}
        return maps.hooked(base, each, maps.Hook(self, site), site.stack_dims)

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        t = {k: v.astype(y.dtype) for k, v in theta.items()}
        return y + t["scale"] * opened(t["x"], t["g"], t["gb"]) * ((t["x"] @ t["a"]) @ t["b"])

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"b": jnp.zeros_like(theta["b"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        stack = site.stack_dims
        ins, outs = (d[0] if len(d) == 1 else None for d in (site.in_dims, site.out_dims))
        return {"a": (*stack, ins, None), "b": (*stack, None, outs), "g": (*stack, ins), "gb": stack, "scale": ()}

    def flops(self, site: Site) -> tuple[int, int]:
        return 2 * self.rank * (site.in_size + site.out_size), 0


@dataclasses.dataclass(frozen=True)
class GatedAdapter(Pfeiffer):
    """Train a small residual network on the output of a projection, and a gate that opens it token by token.

    `y' = y + sigmoid(y g + b_g) (act(y D + b_D) U + b_U)`, g `[*stack, out]`, b_g (`gb`) `[*stack]`, the other letters
    as in `Pfeiffer`; fields and errors are its own too.

    Source: arXiv 2110.07577.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> rules = {"w": jpeft.GatedAdapter(bottleneck=2)}
        >>> jpeft.plan(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, (jnp.ones((2, 8)),), rules).count()
        27
    """

    activation: str = "swish"

    formula: ClassVar[str] = "h * (2 * out + 1) + 2 * out + 1"

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        trainable, frozen = super().init(key, site, base)
        return {**trainable, **_gate(jax.random.fold_in(key, 1), site, site.out_size)}, frozen

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        return y + opened(y, theta["g"], theta["gb"]) * self.inner(theta, y)

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        axes = super().axes(site)
        return {**axes, "g": axes["b_up"], "gb": site.stack_dims}


@dataclasses.dataclass(frozen=True)
class GatedPrefixTuning(PrefixTuning):
    """Train keys and values of virtual tokens, and a gate that scales them for each row of the batch.

    `K' = [G P_K; K]` and `V' = [G P_V; V]`, `G = mean_t sigmoid(x_t g + b_g)` over the real tokens of the row, x being
    the input of the projection; g `[*stack, in]`, b_g (`gb`) `[*stack]`, the rest as in `PrefixTuning`. Padding counts
    as a token, as in the paper's code. Fields and errors are those of `PrefixTuning`.

    Source: arXiv 2110.07577.

    Example:
        >>> import jpeft
        >>> rules = {".*/(key|value)/kernel": jpeft.GatedPrefixTuning(length=10)}
    """

    formula: ClassVar[str] = "length * out + in + 1"
    peft_type: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_projection:
            object.__setattr__(self, "formula", f"{self.formula} + in + 1")

    def source(self, site: Site) -> str:
        return site.path

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        trainable, frozen = super().init(key, site, base)
        return {**trainable, **_gate(jax.random.fold_in(key, 1), site, site.in_size)}, frozen

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        each = {"p": self.prefix(site, theta), "g": theta["g"], "gb": theta["gb"]}
        return maps.hooked(base, each, maps.Hook(self, site), site.stack_dims)

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        x = lax.slice_in_dim(theta["x"], start + self.length, None, axis=-2)
        gate = jnp.mean(opened(x, theta["g"], theta["gb"]), -2, keepdims=True)
        p = jnp.reshape(theta["p"], (self.length, math.prod(self._shape(site)))).astype(y.dtype)
        return overwrite(y, gate.astype(y.dtype) * p, start, 0 if self.channels is None else self.channels[0])

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        g = (*site.stack_dims, site.in_dims[0] if len(site.in_dims) == 1 else None)
        return {**super().axes(site), "g": g, "gb": site.stack_dims}
