"""Sparse changes of a weight: in the weight itself (SHiRA) and among the coefficients of its wavelets (WaveFT)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.method import Method, Theta
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError


class _Places(Method):
    """A method that trains n numbers at fixed random places of a matrix `[in, out]`, alike in stacked layers."""

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding", "tied"})
    letter: ClassVar[str]
    seed: int
    scaling: float

    @property
    def dense(self) -> bool:
        return True

    def entries(self, site: Site) -> int:
        """How many numbers of each matrix are trained."""
        raise MethodConfigError(f"{type(self).__name__} does not say how many entries it trains")

    def check(self, site: Site) -> None:
        n, most = self.entries(site), site.in_size * site.out_size
        if not 1 <= n <= most:
            raise MethodConfigError(f"{self} trains {n} entries of {site.path!r}, which has {most}; use 1 to {most}")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        n, dtype = self.entries(site), site.theta_dtype
        places = np.random.default_rng(self.seed).choice(site.in_size * site.out_size, n, replace=False)
        loc = jnp.asarray(np.stack(np.divmod(places, site.out_size)), jnp.int32)
        return ({self.letter: jnp.zeros((*site.stack_shape, n), dtype)},
                {"loc": loc, "scale": jnp.asarray(self.scaling, dtype)})

    def change(self, site: Site, theta: Theta) -> jax.Array:
        """The change `[*stack, in, out]`, before it is scaled."""
        values = theta[self.letter]
        zero = jnp.zeros((*site.stack_shape, site.in_size, site.out_size), values.dtype)
        return zero.at[..., theta["loc"][0], theta["loc"][1]].set(values)

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array:
        change = site.unmatrix(self.change(site, theta) * theta["scale"])
        return (base.astype(change.dtype) + change).astype(base.dtype)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {self.letter: jnp.zeros_like(theta[self.letter])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {self.letter: (*site.stack_dims, None), "loc": (None, None), "scale": ()}


@dataclasses.dataclass(frozen=True)
class SHiRA(_Places):
    """Train few entries of a weight, as many as LoRA of the same rank would.

    `W' = W + s S`, S `[in, out]` zero but for n = r (in + out) entries at fixed random places: v `[*stack, n]`, from
    zero; the places loc `[2, n]` (int32, shared by stacked layers) and the scale s are frozen in theta. The gradient of
    a random entry needs the product of activations that the whole gradient is made of: memory is that of the leaf.

    Args:
        rank: r.
        scaling: s; another scaling needs no retrace.
        seed: seed of the places.

    Raises:
        MethodConfigError: more entries than the leaf has, or none.

    Source: arXiv 2406.13175.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.SHiRA(rank=2)}).count()
        24
    """

    rank: int = 8
    scaling: float = 1.0
    seed: int = 777

    letter: ClassVar[str] = "v"
    recommended_lr: ClassVar[float] = 4e-3
    formula: ClassVar[str] = "rank * (in + out)"
    peft_type: ClassVar[str | None] = "SHIRA"

    def entries(self, site: Site) -> int:
        return self.rank * (site.in_size + site.out_size)


@dataclasses.dataclass(frozen=True)
class WaveFT(_Places):
    """Train a few wavelet coefficients of the weight change.

    `W' = W + s iwt2(C)`, C `[in, out]` zero but for n entries at fixed random places: c `[*stack, n]`, from zero; loc
    and s as in `SHiRA`. `iwt2` is one level of the inverse Haar transform (`db1`), which makes each entry of C a patch
    of 2 x 2 in the weight; odd sizes are widened by one. The change is formed once per call for every stacked layer.

    Args:
        n_frequency: n.
        scaling: s; another scaling needs no retrace.
        seed: seed of the places.
        use_idwt: False: C is the change itself.

    Raises:
        MethodConfigError: n below 1 or above `in * out`.

    Source: arXiv 2505.12532.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> rules = {"w": jpeft.WaveFT(n_frequency=5)}
        >>> jpeft.plan(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, (jnp.ones((2, 8)),), rules).count()
        5
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    seed: int = 777
    use_idwt: bool = True

    letter: ClassVar[str] = "c"
    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "n_frequency"
    peft_type: ClassVar[str | None] = "WAVEFT"

    def entries(self, site: Site) -> int:
        return self.n_frequency

    def change(self, site: Site, theta: Theta) -> jax.Array:
        spectrum = super().change(site, theta)
        if not self.use_idwt:
            return spectrum
        wide = [(0, 0)] * (spectrum.ndim - 2) + [(0, site.in_size % 2), (0, site.out_size % 2)]
        return _haar(jnp.pad(spectrum, wide))[..., : site.in_size, : site.out_size]


def _haar(c: jax.Array) -> jax.Array:
    """Inverse Haar transform of the four quarters of `c` `[.., 2 m, 2 n]`."""
    m, n = c.shape[-2] // 2, c.shape[-1] // 2
    mean, right, low, both = c[..., :m, :n], c[..., :m, n:], c[..., m:, :n], c[..., m:, n:]
    rows = [jnp.stack([mean + right + low + both, mean + right - low - both], -1),
            jnp.stack([mean - right + low - both, mean - right - low + both], -1)]
    return jnp.reshape(jnp.stack(rows, -3), c.shape) * jnp.asarray(0.5, c.dtype)
