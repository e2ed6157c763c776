"""LLaMA-Adapter: learned tokens in every attention, behind a gate that starts closed."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core.method import Method, Theta
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError


@dataclasses.dataclass(frozen=True)
class LLaMAAdapter(Method):
    """Train tokens that the attention of a decoder sees beside the text, with a softmax of their own and a gate.

    `mix' = softmax(q K^T) V + tanh(g) softmax(q (P W_K)^T) P W_V`, P `[*stack, n, D]` and g `[*stack, H]`, one for each
    head: the projections are those of the model, without rotary positions. P starts normal and g at zero, so that
    training starts from the base. The sum is inside attention, where no method reaches: the model has to offer the
    places. The decoders of the zoo do: `model, params = model.with_adapter(params, 10)` (a job makes them itself), and
    the rule is `{".*/adapter_(prompt|gate)": jpeft.LLaMAAdapter()}`, for the last layers alone
    `{jpeft.layers(".*/adapter_(prompt|gate)", range(2, 32)): ..}`. `jpeft.merge` gives params for that model.

    `W' = p`, p of the leaf's shape, from the leaf times a normal: its places hold ones for P and zeros for g.

    Args:
        length: n; None: as many as there are places for, of which a job makes 10.

    Raises:
        MethodConfigError: a length below 1, or places for another one.

    Source: arXiv 2303.16199.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> def apply(p, x):
        ...     weights = jax.nn.softmax(x @ p["adapter_prompt"].T)
        ...     return x + jnp.tanh(p["adapter_gate"]) * (weights @ p["adapter_prompt"])
        >>> params = {"adapter_prompt": jnp.ones((3, 8)), "adapter_gate": jnp.zeros(1)}
        >>> rules = {"adapter_(prompt|gate)": jpeft.LLaMAAdapter()}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), rules).count()
        25
    """

    length: int | None = None

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "scale", "bias", "other"})
    recommended_lr: ClassVar[float] = 5e-3
    formula: ClassVar[str] = "size"
    peft_type: ClassVar[str | None] = "ADAPTION_PROMPT"

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise MethodConfigError(f"LLaMAAdapter(length={self.length}) learns nothing; use 1 or more")

    @property
    def places(self) -> dict[str, int]:
        return {"adapter_length": self.length or 10}

    @property
    def dense(self) -> bool:
        return True

    @property
    def leads(self) -> bool:
        return True

    def check(self, site: Site) -> None:
        weight = site.use == "linear" and "adapter" not in site.path
        if weight or not jnp.issubdtype(site.dtype, jnp.floating):
            raise MethodConfigError(f"LLaMAAdapter cannot train {site.path!r}, a weight of dtype {site.dtype}, which "
                                    "it would replace; name the places, '.*/adapter_(prompt|gate)', that `model."
                                    "with_adapter(params, length)` or a job makes")
        if self.length is not None and site.path.endswith("adapter_prompt") and site.shape[-2] != self.length:
            raise MethodConfigError(f"LLaMAAdapter(length={self.length}) does not fit {site.path!r}, which has places "
                                    f"for {site.shape[-2]}; leave length out, or make the places with it")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        return {"p": base.astype(site.theta_dtype) * jax.random.normal(key, site.shape, site.theta_dtype)}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array:
        return theta["p"].astype(base.dtype)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"p": jnp.zeros_like(theta["p"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"p": tuple(range(len(site.shape)))}
