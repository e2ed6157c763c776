"""Diff pruning: a sparse change of a weight whose places are learned."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core.method import Method, Theta
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError


@dataclasses.dataclass(frozen=True)
class DiffPruning(Method):
    """Train a change of a weight and, for each entry, the probability that it is there.

    `W' = W + z * d`, d of the leaf's shape, from zero, and hard-concrete gates
    `z = clip(s (r - l) + l, 0, 1)`, `s = sigmoid(log u - log(1 - u) + alpha)`, u uniform, l = -1.5, r = 1.5, `alpha` of
    the leaf's shape. In training (with `Call(key=...)`) u is drawn anew; in evaluation and in merged weights
    `s = sigmoid(alpha)`, so that an entry with `alpha <= 0` is exactly that of the base. `jpeft.penalty` is the weight
    times the expected number of entries that are there, `sum sigmoid(alpha - log(-l / r))`: add it to the loss.

    It trains two numbers for each of the leaf's and saves memory nowhere: what is small is the change.

    Args:
        sparsity_penalty: weight of the penalty.
        alpha_init: where `alpha` starts.

    Raises:
        MethodConfigError: a negative weight, or a leaf that does not hold floating-point numbers.

    Source: arXiv 2012.07463, unstructured.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.DiffPruning()}).count()
        64
    """

    sparsity_penalty: float = 1.25e-7
    alpha_init: float = 5.0

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding", "tied", "bias", "scale", "other"})
    recommended_lr: ClassVar[float] = 5e-4
    formula: ClassVar[str] = "2 * size"

    def __post_init__(self) -> None:
        if self.sparsity_penalty < 0:
            raise MethodConfigError(f"DiffPruning(sparsity_penalty={self.sparsity_penalty}) rewards entries; "
                                    "use 0 or more")

    @property
    def dense(self) -> bool:
        return True

    def check(self, site: Site) -> None:
        if not jnp.issubdtype(site.dtype, jnp.floating):
            raise MethodConfigError(f"DiffPruning cannot train {site.path!r} of dtype {site.dtype}; "
                                    "exclude it, only floating-point leaves have gradients")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        dtype = site.theta_dtype
        return {"d": jnp.zeros(site.shape, dtype), "alpha": jnp.full(site.shape, self.alpha_init, dtype)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array:
        d, alpha = theta["d"], theta["alpha"]
        noise = 0.0 if key is None else jax.random.logistic(key, alpha.shape, alpha.dtype)
        gate = jnp.clip(jax.nn.sigmoid(alpha + noise) * 3.0 - 1.5, 0.0, 1.0)
        return (base.astype(d.dtype) + gate * d).astype(base.dtype)

    def penalty(self, site: Site, theta: Theta) -> jax.Array:
        return self.sparsity_penalty * jnp.sum(jax.nn.sigmoid(theta["alpha"]))

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"d": jnp.zeros_like(theta["d"]), "alpha": jnp.full_like(theta["alpha"], -jnp.inf)}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return dict.fromkeys(("d", "alpha"), tuple(range(len(site.shape))))
