"""VB-LoRA: low-rank factors put together from a bank of vectors."""

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
class VBLoRA(Method):
    """Train a bank of vectors, and which few of them each piece of the low-rank factors is mixed from.

    `W' = W + A B - A0 B0`: the columns of A and the rows of B are cut into pieces of length l, and each piece is a
    mixture of the k vectors of the bank v `[h, l]` with the largest logits, weighted by the softmax of those logits:
    la `[*stack, r, in / l, h]` and lb `[*stack, r, out / l, h]`. The bank is shared by all layers of a stacked leaf, so
    it cannot be limited to some of them. A0 `[*stack, r, *in]` and B0 `[*stack, r, *out]` are frozen copies of the
    start.

    Args:
        rank: r.
        num_vectors: h.
        vector_length: l; it must divide the inputs and the outputs.
        topk: k.
        init_vector_bank_bound: the bank starts uniform within it.
        init_logits_std: deviation of the logits at the start.
        init_weights: `frozen`, or `plain`: as in the paper, without A0 and B0; the model then starts beside the base.

    Raises:
        MethodConfigError: a length that does not divide, a k outside the bank, or an unknown init.

    Source: arXiv 2405.15179.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> method = jpeft.VBLoRA(rank=2, num_vectors=6, vector_length=2)
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": method}).count()
        84
    """

    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    init_weights: str = "frozen"

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank * (in + out) / vector_length * num_vectors + [num_vectors * vector_length]"
    peft_type: ClassVar[str | None] = "VBLORA"

    def __post_init__(self) -> None:
        if self.init_weights not in ("frozen", "plain"):
            raise MethodConfigError(f"VBLoRA(init_weights={self.init_weights!r}) is unknown; use 'frozen' or 'plain'")
        if not 1 <= self.topk <= self.num_vectors or self.rank < 1 or self.vector_length < 1:
            raise MethodConfigError(f"VBLoRA(rank={self.rank}, topk={self.topk}, num_vectors={self.num_vectors}, "
                                    f"vector_length={self.vector_length}) has nothing to mix; use topk from 1 to "
                                    "num_vectors, rank and vector_length of 1 or more")

    def check(self, site: Site) -> None:
        if site.in_size % self.vector_length or site.out_size % self.vector_length:
            raise MethodConfigError(f"VBLoRA(vector_length={self.vector_length}) does not divide {site.path!r} of "
                                    f"{site.in_size} inputs and {site.out_size} outputs; use a divisor of both")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        dtype, keys, h = site.theta_dtype, jax.random.split(key, 3), self.num_vectors
        bound = self.init_vector_bank_bound
        shapes = {"la": (*site.stack_shape, self.rank, site.in_size // self.vector_length, h),
                  "lb": (*site.stack_shape, self.rank, site.out_size // self.vector_length, h)}
        theta = {n: (self.init_logits_std * jax.random.normal(k, shape, jnp.float32)).astype(dtype)
                 for k, (n, shape) in zip(keys, shapes.items(), strict=False)}
        bank = jax.random.uniform(keys[2], (h, self.vector_length), jnp.float32, -bound, bound).astype(dtype)
        theta["v"] = bank
        return theta, dict(zip(("a0", "b0"), self._factors(site, theta), strict=True)) \
            if self.init_weights == "frozen" else {}

    def _factors(self, site: Site, theta: Theta) -> tuple[jax.Array, jax.Array]:
        """A `[*stack, r, *in]` and B `[*stack, r, *out]`."""
        made = []
        for letter, shape in (("la", site.in_shape), ("lb", site.out_shape)):
            top, which = jax.lax.top_k(theta[letter], self.topk)
            pieces = jnp.sum(jax.nn.softmax(top)[..., None] * theta["v"][which], -2)
            made.append(jnp.reshape(pieces, (*site.stack_shape, self.rank, *shape)))
        return made[0], made[1]

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        ins: tuple[int | str, ...] = (*site.stack_dims, "r", *site.in_dims)
        outs: tuple[int | str, ...] = (*site.stack_dims, "r", *site.out_dims)
        terms = [self._factors(site, theta)]
        if "a0" in theta:
            terms.append((theta["a0"], -theta["b0"]))
        return ops.add(base, *(ops.product(site.shape, (a, ins), (b, outs)) for a, b in terms))

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        logits = (*site.stack_dims, None, None, None)
        return {"la": logits, "lb": logits, "v": (None, None), "a0": (*site.stack_dims, None, *site.in_dims),
                "b0": (*site.stack_dims, None, *site.out_dims)}

    def flops(self, site: Site) -> tuple[int, int]:
        return (2 if self.init_weights == "frozen" else 1) * 2 * self.rank * (site.in_size + site.out_size), 0
