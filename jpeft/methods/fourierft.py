"""FourierFT: a weight change with few Fourier coefficients."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.method import Method, Theta
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError


@dataclasses.dataclass(frozen=True)
class FourierFT(Method):
    """Train a few entries of the spectrum of the weight change.

    `W' = W + s Re(ifft2(F))`, F `[in, out]` zero but for n entries at fixed random places: c `[*stack, n]`; the places
    loc `[2, n]` (int32, shared by stacked layers) and the scale s are frozen in theta. c starts at zero, so that
    training starts from the base; the paper draws it from N(0, 1) (`init_weights="normal"`).

    The change is a dense matrix, formed once per call in float32 for every layer of a stacked leaf: few parameters, but
    the memory of the adapted leaves.

    Args:
        n_frequency: n.
        scaling: s; another scaling needs no retrace.
        seed: seed of the places.
        init_weights: `zero` or `normal`.

    Raises:
        MethodConfigError: n below 1 or above `in * out`, or an unknown init.

    Source: arXiv 2405.03003.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> rules = {"w": jpeft.FourierFT(n_frequency=5)}
        >>> jpeft.plan(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, (jnp.ones((2, 8)),), rules).count()
        5
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    seed: int = 777
    init_weights: str = "zero"

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding", "tied"})
    recommended_lr: ClassVar[float] = 3e-2
    formula: ClassVar[str] = "n_frequency"
    peft_type: ClassVar[str | None] = "FOURIERFT"

    def __post_init__(self) -> None:
        if self.init_weights not in ("zero", "normal"):
            raise MethodConfigError(f"FourierFT(init_weights={self.init_weights!r}) is unknown; use 'zero' or 'normal'")

    @property
    def dense(self) -> bool:
        return True

    def check(self, site: Site) -> None:
        most = site.in_size * site.out_size
        if not 1 <= self.n_frequency <= most:
            raise MethodConfigError(f"FourierFT(n_frequency={self.n_frequency}) does not fit {site.path!r} of {most} "
                                    f"entries; use 1 to {most}")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        dtype, shape = site.theta_dtype, (*site.stack_shape, self.n_frequency)
        places = np.random.default_rng(self.seed).choice(site.in_size * site.out_size, self.n_frequency, replace=False)
        loc = jnp.asarray(np.stack(np.divmod(places, site.out_size)), jnp.int32)
        c = jnp.zeros(shape, dtype) if self.init_weights == "zero" else jax.random.normal(key, shape, dtype)
        return {"c": c}, {"loc": loc, "scale": jnp.asarray(self.scaling, dtype)}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array:
        c = theta["c"]
        spectrum = jnp.zeros((*site.stack_shape, site.in_size, site.out_size), c.dtype)
        spectrum = spectrum.at[..., theta["loc"][0], theta["loc"][1]].set(c)
        change = site.unmatrix(jnp.fft.ifft2(spectrum).real * theta["scale"])
        return (base.astype(change.dtype) + change).astype(base.dtype)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"c": jnp.zeros_like(theta["c"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"c": (*site.stack_dims, None), "loc": (None, None), "scale": ()}
