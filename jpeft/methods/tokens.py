"""Trainable tokens: a few rows of an embedding."""

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
class TrainableTokens(Method):
    """Train the rows of a few tokens of an embedding: new special tokens, say.

    `E'[t] = E[t] + d_t` for the chosen t, d `[n, *out]` from zero; all other rows stay. Of a tied embedding the output
    head sees the same rows. Neither a copy of the table nor a gradient of its size is formed: the change is a product
    with n columns of zeros and ones.

    Args:
        token_indices: the tokens.

    Raises:
        MethodConfigError: no token, a token twice, or one outside the vocabulary.

    Source: the trainable tokens of Hugging Face PEFT, which stores the rows themselves.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, ids: p["embed"][ids]), {"embed": jnp.ones((20, 4))}
        >>> rules = {"embed": jpeft.TrainableTokens(token_indices=(3, 19))}
        >>> jpeft.plan(apply, params, (jnp.zeros((2, 6), int),), rules).count()
        8
    """

    token_indices: tuple[int, ...] = ()

    uses: ClassVar[frozenset[str]] = frozenset({"embedding", "tied"})
    recommended_lr: ClassVar[float] = 3e-3
    formula: ClassVar[str] = "len(token_indices) * out"
    peft_type: ClassVar[str | None] = "TRAINABLE_TOKENS"

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_indices", tuple(self.token_indices))
        if not self.token_indices or len(set(self.token_indices)) < len(self.token_indices):
            raise MethodConfigError(f"TrainableTokens(token_indices={self.token_indices}) names "
                                    f"{'a token twice' if self.token_indices else 'no token'}; give each token once")

    def check(self, site: Site) -> None:
        outside = [t for t in self.token_indices if not 0 <= t < site.in_size]
        if outside:
            raise MethodConfigError(f"TrainableTokens has tokens {outside} outside the {site.in_size} rows of "
                                    f"{site.path!r}; use 0 to {site.in_size - 1}")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        shape = (*site.stack_shape, len(self.token_indices), *site.out_shape)
        return {"d": jnp.zeros(shape, site.theta_dtype)}, {"rows": jnp.asarray(self.token_indices, jnp.int32)}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        d, rows = theta["d"], theta["rows"]
        pick = (jnp.arange(site.in_size, dtype=rows.dtype)[:, None] == rows).astype(d.dtype)
        pick = jnp.reshape(pick, (*site.in_shape, len(self.token_indices)))
        return ops.add(base, ops.product(site.shape, (pick, (*site.in_dims, "t")),
                                         (d, (*site.stack_dims, "t", *site.out_dims))))

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"d": jnp.zeros_like(theta["d"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"d": (*site.stack_dims, None, *site.out_dims), "rows": (None,)}

    def flops(self, site: Site) -> tuple[int, int]:
        ins = 0 if site.use == "embedding" else site.in_size
        return 2 * len(self.token_indices) * (ins + site.out_size), 0
