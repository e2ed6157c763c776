"""DeLoRA: a low-rank change whose directions and strength are trained apart."""

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
from jpeft.methods._lowrank import check_rank, check_rate, dropout_key, uniform

FLOOR = 1e-4  # of the norms, as in Hugging Face PEFT


@dataclasses.dataclass(frozen=True)
class DeLoRA(Method):
    """Train the directions of a low-rank change and, apart from them, its strength.

    `W' = W + N (lambda / r) sum_i a_i b_i / (|a_i| |b_i|)`: A `[*stack, *in, r]`, B `[*stack, r, *out]`, lambda
    `[*stack]`; N `[*stack, *in]`, frozen in theta (`norm`), holds the norm of W's row of each input, so that the change
    is bounded by lambda relative to W. Where the directions are normalised there is no zero to start from: with
    `init_weights="frozen"`, a frozen copy of the change at the start is subtracted (the base itself is not changed).

    Args:
        rank: r.
        delora_lambda: start of lambda.
        dropout: rate of inverted dropout on the input of the adapter path, active when `Call.key` is given.
        init_weights: `frozen`, or `zero`: B starts at zero, as in Hugging Face PEFT, and the first step of any size
            takes the change to its bound.

    Raises:
        MethodConfigError: a rank below 1 or above the smaller side of the kernel, a dropout rate or init that is none.

    Source: arXiv 2503.18225.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.DeLoRA(rank=2)}).count()
        25
    """

    rank: int = 8
    delora_lambda: float = 15.0
    dropout: float = 0.0
    init_weights: str = "frozen"

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "rank * (in + out) + 1"
    peft_type: ClassVar[str | None] = "DELORA"

    def __post_init__(self) -> None:
        check_rate(self, self.dropout)
        if self.init_weights not in ("frozen", "zero"):
            raise MethodConfigError(f"DeLoRA(init_weights={self.init_weights!r}) is unknown; use 'frozen' or 'zero'")

    def check(self, site: Site) -> None:
        check_rank(self, site, self.rank, min(site.in_size, site.out_size))

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        dtype, ka, kb = site.theta_dtype, *jax.random.split(key)
        a = uniform(ka, (*site.stack_shape, *site.in_shape, self.rank), site.in_size, dtype)
        b = jnp.zeros((*site.stack_shape, self.rank, *site.out_shape), dtype)
        matrix = site.matrix(base.astype(dtype))
        norm = jnp.reshape(jnp.sqrt(jnp.sum(jnp.square(matrix), -1)), (*site.stack_shape, *site.in_shape))
        strength = jnp.full(site.stack_shape, self.delora_lambda, dtype)
        if self.init_weights == "zero":
            return {"a": a, "b": b, "lambda": strength}, {"norm": norm}
        b = uniform(kb, b.shape, self.rank, dtype)
        copies = {f"{k}0": jnp.array(v, copy=True) for k, v in (("a", a), ("b", b), ("lambda", strength))}
        return {"a": a, "b": b, "lambda": strength}, {"norm": norm, **copies}

    def _term(self, site: Site, theta: Theta, end: str, sign: float, key: jax.Array | None) -> ops.Product:
        a, b, strength, n = theta[f"a{end}"], theta[f"b{end}"], theta[f"lambda{end}"], len(site.stack_dims)
        a_norm = jnp.maximum(jnp.sqrt(_total(jnp.square(a), range(n, a.ndim - 1))), FLOOR)
        b_norm = jnp.maximum(jnp.sqrt(_total(jnp.square(b), range(n + 1, b.ndim))), FLOOR)
        weight = strength[..., None] * (sign / self.rank) / (a_norm * b_norm)
        right = b * jnp.reshape(weight, (*weight.shape, *(1,) * len(site.out_dims)))
        return ops.product(site.shape, (a * theta["norm"][..., None], (*site.stack_dims, *site.in_dims, "r")),
                           (right, (*site.stack_dims, "r", *site.out_dims)), rate=self.dropout,
                           key=dropout_key(site, key, self.dropout))

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        parts = [base, self._term(site, theta, "", 1.0, key)]
        if "a0" in theta:
            parts.append(self._term(site, theta, "0", -1.0, None))
        return ops.add(*parts)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        if "a0" in theta:
            return {k: theta[f"{k}0"] for k in ("a", "b", "lambda")}
        return {"lambda": jnp.zeros_like(theta["lambda"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        a, b = (*site.stack_dims, *site.in_dims, None), (*site.stack_dims, None, *site.out_dims)
        return {"a": a, "b": b, "lambda": site.stack_dims, "a0": a, "b0": b, "lambda0": site.stack_dims,
                "norm": (*site.stack_dims, *site.in_dims)}

    def flops(self, site: Site) -> tuple[int, int]:
        terms = 2 if self.init_weights == "frozen" else 1
        return terms * 2 * self.rank * (site.in_size * site.groups + site.out_size), 0


def _total(x: jax.Array, axes: range) -> jax.Array:
    # A zero column has no direction: its norm's gradient must be 0, not 0 / 0.
    total = jnp.sum(x, axis=tuple(axes))
    return jnp.maximum(total, jnp.asarray(FLOOR**2, total.dtype))
