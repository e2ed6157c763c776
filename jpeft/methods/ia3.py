"""IA3: rescale the outputs or the inputs of a weight."""

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


@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """Train one factor for each output (or input) of a frozen weight.

    `W' = W * l`, l `[*stack, *out]` (`on="out"`: keys and values in the paper) or `[*stack, *in]` (`on="in"`: the
    second projection of the feed-forward part), which multiplies the activations; it starts at one.

    Args:
        on: `out` or `in`; `in` rides on contraction weights only.

    Raises:
        MethodConfigError: `on` is something else, or is `in` on a convolution or an embedding.

    Source: arXiv 2205.05638.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.IA3(on="in")}).count()
        8
    """

    on: str = "out"

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding", "tied"})
    recommended_lr: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "out if on == 'out' else in"
    peft_type: ClassVar[str | None] = "IA3"

    def __post_init__(self) -> None:
        if self.on not in ("out", "in"):
            raise MethodConfigError(f"IA3(on={self.on!r}) is unknown; use 'out' or 'in'")

    def check(self, site: Site) -> None:
        if self.on == "in" and site.use != "linear":
            raise MethodConfigError(f"IA3(on='in') rides on contraction weights, and the model uses {site.path!r} as "
                                    f"{site.use}; use IA3(on='out')")

    def _layout(self, site: Site) -> tuple[int, ...]:
        return (*site.stack_dims, *(site.out_dims if self.on == "out" else site.in_dims))

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        return {"l": jnp.ones([site.shape[d] for d in self._layout(site)], site.theta_dtype)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        return ops.scaled(base, theta["l"], self._layout(site))

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"l": jnp.ones_like(theta["l"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"l": self._layout(site)}
