"""Bottleneck adapters: a small network behind a projection; those beside one are in `parallel`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jpeft.core.method import Method, Theta
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "swish": jax.nn.swish, "tanh": jnp.tanh}


@dataclasses.dataclass(frozen=True)
class Pfeiffer(Method):
    """Train a small residual network on the output of a projection, usually the last of the feed-forward part.

    `y' = y + act(y D + b_D) U + b_U`, y being the output after the projection's own bias: D (`down`)
    `[*stack, out, h]`, `b_down` `[*stack, h]`, U (`up`) `[*stack, h, out]`, `b_up` `[*stack, out]`. D starts normal
    with deviation 0.02 and the rest at zero, so that training starts from the base. It acts on activations and cannot
    be merged.

    Args:
        reduction_factor: `h = out / reduction_factor`, rounded down, at least 1.
        bottleneck: h itself; it then replaces `reduction_factor`.
        activation: `relu`, `gelu`, `swish` or `tanh`.

    Raises:
        MethodConfigError: a size that is not positive, h larger than the output, or an unknown activation.

    Source: arXiv 2005.00247; the bottleneck is that of 1902.00751.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> rules = {"w": jpeft.Pfeiffer(bottleneck=2)}
        >>> jpeft.plan(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, (jnp.ones((2, 8)),), rules).count()
        22
    """

    reduction_factor: float = 16.0
    bottleneck: int | None = None
    activation: str = "relu"

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    hooks: ClassVar[bool] = True
    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "h * (2 * out + 1) + out"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.activation not in ACTIVATIONS:
            raise MethodConfigError(f"{name}(activation={self.activation!r}) is unknown; "
                                    f"use one of {', '.join(ACTIVATIONS)}")
        if self.reduction_factor <= 0 or (self.bottleneck is not None and self.bottleneck < 1):
            raise MethodConfigError(f"{name}(reduction_factor={self.reduction_factor}, bottleneck={self.bottleneck}) "
                                    "has no units; both must be positive")

    def width(self, site: Site) -> int:
        """The number of hidden units h."""
        return max(1, int(site.out_size / self.reduction_factor)) if self.bottleneck is None else self.bottleneck

    def check(self, site: Site) -> None:
        if self.width(site) > site.out_size:
            raise MethodConfigError(f"{type(self).__name__} has {self.width(site)} hidden units on {site.path!r} of "
                                    f"{site.out_size} outputs; use a bottleneck from 1 to {site.out_size}")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        stack, d, h, dtype = site.stack_shape, site.out_size, self.width(site), site.theta_dtype
        zeros = {"b_down": (*stack, h), "up": (*stack, h, d), "b_up": (*stack, d)}
        return {"down": self._down(key, (*stack, d, h), dtype),
                **{k: jnp.zeros(shape, dtype) for k, shape in zeros.items()}}, {}

    def _down(self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, dtype)

    def inner(self, theta: Theta, x: jax.Array) -> jax.Array:
        """`act(x D + b_D) U + b_U`."""
        t = {k: v.astype(x.dtype) for k, v in theta.items()}
        hidden = ACTIVATIONS[self.activation](x @ t["down"] + t["b_down"])
        return hidden @ t["up"] + t["b_up"]

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        return y + self.inner(theta, y)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {k: jnp.zeros_like(theta[k]) for k in ("up", "b_up")}

    def numbers(self, site: Site) -> dict[str, int]:
        return {"h": self.width(site)}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        stack, out = site.stack_dims, site.out_dims[0] if len(site.out_dims) == 1 else None
        return {"down": (*stack, out, None), "b_down": (*stack, None), "up": (*stack, None, out), "b_up": (*stack, out)}

    def flops(self, site: Site) -> tuple[int, int]:
        return 4 * site.out_size * self.width(site), 0


@dataclasses.dataclass(frozen=True)
class Houlsby(Pfeiffer):
    """Train a small residual network on the output of both sublayers of a block, attention and feed-forward.

    `y' = y + act(y D + b_D) U + b_U`, as `Pfeiffer`, on the last projection of each: the usual rule is
    `{".*/(out|down)/kernel": jpeft.Houlsby()}`. D is drawn from a normal distribution of deviation 0.01, cut at two
    deviations, as in the paper; U starts at zero, so that training starts from the base and not merely close to it.

    Args:
        reduction_factor: see `Pfeiffer`.
        bottleneck: see `Pfeiffer`.
        activation: see `Pfeiffer`.

    Raises:
        MethodConfigError: as of `Pfeiffer`.

    Source: arXiv 1902.00751.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> rules = {"w": jpeft.Houlsby(bottleneck=2)}
        >>> jpeft.plan(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, (jnp.ones((2, 8)),), rules).count()
        22
    """

    activation: str = "swish"

    def _down(self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return 0.01 * jax.random.truncated_normal(key, -2, 2, shape, dtype)


@dataclasses.dataclass(frozen=True)
class AdapterPlus(Pfeiffer):
    """Train a small residual network and a scale for each of its outputs, behind the feed-forward part.

    `y' = y + s * (act(y D + b_D) U + b_U)`, s `[*stack, out]` from one; the other letters as in `Pfeiffer`. D starts as
    in `Houlsby`, U and `b_up` at zero. The stochastic depth of the paper is left out.

    Args:
        reduction_factor: see `Pfeiffer`.
        bottleneck: see `Pfeiffer`.
        activation: see `Pfeiffer`.

    Raises:
        MethodConfigError: as of `Pfeiffer`.

    Source: arXiv 2406.06820.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> rules = {"w": jpeft.AdapterPlus(bottleneck=2)}
        >>> jpeft.plan(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, (jnp.ones((2, 8)),), rules).count()
        26
    """

    reduction_factor: float = 96.0
    activation: str = "gelu"

    recommended_lr: ClassVar[float] = 3e-3
    formula: ClassVar[str] = "h * (2 * out + 1) + 2 * out"

    def _down(self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return 0.01 * jax.random.truncated_normal(key, -2, 2, shape, dtype)

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        trainable, frozen = super().init(key, site, base)
        return {**trainable, "s": jnp.ones((*site.stack_shape, site.out_size), site.theta_dtype)}, frozen

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        return y + theta["s"].astype(y.dtype) * self.inner(theta, y)

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        axes = super().axes(site)
        return {**axes, "s": axes["b_up"]}
