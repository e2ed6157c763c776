"""LoRA-FA: LoRA with a frozen first factor."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core.method import Theta
from jpeft.core.site import Site
from jpeft.methods.lora import LoRA


@dataclasses.dataclass(frozen=True)
class LoRAFA(LoRA):
    """Train the second factor of a low-rank term beside a frozen weight.

    `W' = W + s A B` as in `LoRA`, with A `[*stack, *in, r]` frozen in theta: no gradient for A, and a backward pass
    that keeps `x A` `[.., r]` of the input x alone. A is random (`kaiming`, `gaussian`, `orthogonal`) or comes from the
    weight or the data (`pissa`, `eva`, ..).

    Args:
        rank: see `LoRA`.
        alpha: see `LoRA`.
        rslora: see `LoRA`.
        dropout: see `LoRA`.
        init_weights: see `LoRA`.

    Raises:
        MethodConfigError: as of `LoRA`.

    Source: arXiv 2308.03303.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.LoRAFA(rank=2)}).count()
        8
    """

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    recommended_lr: ClassVar[float] = 2e-3
    formula: ClassVar[str] = "rank * out"
    peft_type: ClassVar[str | None] = "LORA"

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        return _freeze(*super().init(key, site, base))

    def calibrate(self, key: jax.Array, site: Site, base: jax.Array, start: tuple[Theta, Theta],
                  data: dict[str, jax.Array]) -> tuple[Theta, Theta]:
        return _freeze(*super().calibrate(key, site, base, start, data))

    def neutral(self, site: Site, theta: Theta) -> Theta:
        super().neutral(site, theta)
        return {"b": theta["b0"] if "b0" in theta else jnp.zeros_like(theta["b"])}

    def live(self, site: Site) -> dict[str, Any]:
        return {k: v for k, v in super().live(site).items() if k == "b"}


def _freeze(trainable: Theta, frozen: Theta) -> tuple[Theta, Theta]:
    return {"b": trainable["b"]}, {**frozen, "a": trainable["a"]}
