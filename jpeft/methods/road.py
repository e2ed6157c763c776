"""RoAd: rotations and scales of pairs of outputs."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import maps
from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError

PARTS = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclasses.dataclass(frozen=True)
class RoAd(Method):
    """Train rotations and scales of pairs of outputs of a frozen weight.

    `y = (x W) M`, M mixing output i of the first half of a group with output i of its second half:

        y_1 = a_1 cos(t_1) z_1 - a_2 sin(t_2) z_2,    y_2 = a_3 cos(t_3) z_2 + a_4 sin(t_4) z_1.

    t and a (`theta`, `alpha`) `[*stack, k out / 2]`, in the order of Hugging Face PEFT: with `road_1`, k = 1, all four
    are one; with `road_2`, the two rows have their own; with `road_4` all differ. Angles start at zero and scales at
    one. M acts on what the leaf gives, and a bias that is added later is not turned (in Hugging Face PEFT it is).

    Args:
        variant: `road_1`, `road_2` or `road_4`.
        group_size: size of a group; it is even and divides the number of outputs.

    Raises:
        MethodConfigError: an unknown variant, or a group size that does not fit.

    Source: arXiv 2409.00119.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.RoAd(group_size=4)}).count()
        4
    """

    variant: str = "road_1"
    group_size: int = 64

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "k * out"
    peft_type: ClassVar[str | None] = "ROAD"

    def __post_init__(self) -> None:
        if self.variant not in PARTS:
            raise MethodConfigError(f"RoAd(variant={self.variant!r}) is unknown; use one of {', '.join(PARTS)}")

    def check(self, site: Site) -> None:
        g = self.group_size
        if g < 2 or g % 2 or site.out_size % g:
            fit = [d for d in range(2, site.out_size + 1, 2) if site.out_size % d == 0]
            near = sorted(sorted(fit, key=lambda d: abs(d - g))[:5])
            remedy = f"use one such as {', '.join(map(str, near))}" if near else "exclude the leaf, its number is odd"
            raise MethodConfigError(f"RoAd(group_size={g}) does not cut the {site.out_size} outputs of {site.path!r} "
                                    f"into even groups; {remedy}")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        shape = (*site.stack_shape, PARTS[self.variant] * site.out_size // 2)
        return {"theta": jnp.zeros(shape, site.theta_dtype), "alpha": jnp.ones(shape, site.theta_dtype)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        k, half = PARTS[self.variant], self.group_size // 2
        angle, scale = (jnp.reshape(theta[n], (*theta[n].shape[:-1], -1, k, half)) for n in ("theta", "alpha"))
        straight, cross = scale * jnp.cos(angle), scale * jnp.sin(angle)
        if k == 4:
            straight, cross = straight[..., :2, :], cross[..., 2:, :]
        full = (*theta["theta"].shape[:-1], site.out_size // self.group_size, 2, half)
        parts = {"c": jnp.broadcast_to(straight, full), "s": jnp.broadcast_to(cross, full)}
        return maps.rotated(base, parts, turn_back, site.stack_dims, site.out_dims)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"theta": jnp.zeros_like(theta["theta"]), "alpha": jnp.ones_like(theta["alpha"])}

    def numbers(self, site: Site) -> dict[str, int]:
        return {"k": PARTS[self.variant]}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return dict.fromkeys(("theta", "alpha"), (*site.stack_dims, None))


def turn_back(theta: maps.Arrays, v: jax.Array) -> jax.Array:
    """`v M^T` for `v` `[..., out]`: an input map of the transposed weight, so that outputs are turned by M."""
    c, s = theta["c"], theta["s"]
    groups = jnp.reshape(v, (*v.shape[:-1], *c.shape))
    swapped = jnp.flip(s * groups, -2)
    signed = jnp.stack([swapped[..., 0, :], -swapped[..., 1, :]], -2)
    return jnp.reshape(c * groups + signed, v.shape)
