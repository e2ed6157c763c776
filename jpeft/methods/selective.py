"""Methods that train leaves of the model themselves: biases, norms, or any leaf in full."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core.method import Method, Theta
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError


class _Whole(Method):
    """A method with one trainable entry of the leaf's own shape."""

    letter: ClassVar[str]

    @property
    def dense(self) -> bool:
        return True

    def check(self, site: Site) -> None:
        if not jnp.issubdtype(site.dtype, jnp.floating):
            raise MethodConfigError(f"{type(self).__name__} cannot train {site.path!r} of dtype {site.dtype}; "
                                    "exclude it, only floating-point leaves have gradients")

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {self.letter: tuple(range(len(site.shape)))}


class _Delta(_Whole):
    """`W' = W + d`, d of the leaf's shape, from zero."""

    letter: ClassVar[str] = "d"

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        return {"d": jnp.zeros(site.shape, site.theta_dtype)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array:
        return (base.astype(theta["d"].dtype) + theta["d"]).astype(base.dtype)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"d": jnp.zeros_like(theta["d"])}


@dataclasses.dataclass(frozen=True)
class BitFit(_Delta):
    """Train the biases.

    `b' = b + d`, d of the bias's shape, from zero. The usual rule is `{"bias": jpeft.BitFit()}`: every bias of the
    model, those of norms included, as in the paper. A model whose projections have no bias offers nothing to train.

    Source: arXiv 2106.10199.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
        >>> plan = jpeft.plan(lambda p, x: x @ p["w"] + p["b"], params, (jnp.ones((2, 8)),), {"bias": jpeft.BitFit()})
        >>> plan.count()
        4
    """

    uses: ClassVar[frozenset[str]] = frozenset({"bias"})
    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "size"


@dataclasses.dataclass(frozen=True)
class LayerNormTuning(_Delta):
    """Train the scales and biases of the norms.

    `g' = g + d` and `b' = b + d`, d of the leaf's shape, from zero. The usual rule is
    `{"norm": jpeft.LayerNormTuning()}`: every scale, and every bias that lies beside one.

    Source: arXiv 2312.11420.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> params = {"norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)}}
        >>> apply = lambda p, x: x * p["norm"]["scale"] + p["norm"]["bias"]
        >>> jpeft.plan(apply, params, (jnp.ones((2, 4)),), {"norm": jpeft.LayerNormTuning()}).count()
        8
    """

    uses: ClassVar[frozenset[str]] = frozenset({"scale", "bias"})
    recommended_lr: ClassVar[float] = 4e-3
    formula: ClassVar[str] = "size"
    peft_type: ClassVar[str | None] = "LN_TUNING"


@dataclasses.dataclass(frozen=True)
class Full(_Whole):
    """Train a leaf in full: a new head, an embedding, or (with the rule `.*`) the whole model.

    `W' = w`, w a copy of the leaf in a buffer of its own, in float32 (float64 for a float64 leaf): the master copy of a
    bfloat16 leaf. Neither the adapted function nor `jpeft.merge` reads the leaf of `frozen.base` any more.

    Args:
        keep_base: True: `frozen.base` keeps the leaf, and `jpeft.base` switches the training off again. False: the leaf
            may be dropped from memory; there is no way back to the base.

    Raises:
        MethodConfigError: the leaf does not hold floating-point numbers.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> params = {"head": jnp.ones((8, 4))}
        >>> plan = jpeft.plan(lambda p, x: x @ p["head"], params, (jnp.ones((2, 8)),), {"head": jpeft.Full()})
        >>> trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
        >>> plan.count(), bool((trainable["head"]["w"] == params["head"]).all())
        (32, True)
    """

    keep_base: bool = True

    letter: ClassVar[str] = "w"
    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding", "tied", "bias", "scale", "other"})
    recommended_lr: ClassVar[float] = 2e-5
    formula: ClassVar[str] = "size"

    @property
    def leads(self) -> bool:
        return True

    @property
    def drops_base(self) -> bool:
        return not self.keep_base

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        return {"w": jnp.array(base, site.theta_dtype, copy=True)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array:
        return theta["w"].astype(base.dtype)
