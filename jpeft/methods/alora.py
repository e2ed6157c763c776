"""aLoRA: a low-rank term that acts from an invocation on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from jpeft.core.method import Method, Theta
from jpeft.core.site import Site
from jpeft.errors import CallError
from jpeft.methods._lowrank import check_rank, uniform


@dataclasses.dataclass(frozen=True)
class ALoRA(Method):
    """Train a low-rank term that acts on the tokens of a text from a position on (activated LoRA).

    `y'_t = y_t + s x_t A B` from the invocation on, t >= l, and y_t before: A (`a`) `[*stack, in, r]`, B (`b`)
    `[*stack, r, out]` from zero, `s = alpha / r`, frozen in theta. What stands before the invocation is the base
    model's own, so that a cache of it serves the base and every adapter of this kind.

    The plan needs `jpeft.Tokens`, which says where the token axis is, and a call `jpeft.Call(lengths=l)`, l `[B]`: how
    many tokens of each row come before the invocation; `invocation` finds it. Without lengths every token counts as
    after it, as those of a continued call do. It acts at positions and cannot be merged. In training, the loss function
    of `make_train_step` says so: `model(ids, peft=jpeft.Call(key=key, lengths=invocation(ids, tokens)))`; in generation
    `generator(weights, prompts, lengths=...)` does. Encoder-decoders cannot generate with it, and a job of `jpeft
    train` has no rows that name an invocation.

    Args:
        rank: r.
        alpha: numerator of the scale: another alpha needs no retrace.

    Raises:
        MethodConfigError: a rank below 1 or above the smaller side of the kernel.
        PlanError: the plan has no `jpeft.Tokens`.

    Source: arXiv 2504.12397.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> from jpeft.methods.alora import invocation
        >>> apply, params = (lambda p, ids: p["e"][ids] @ p["w"]), {"e": jnp.ones((9, 4)), "w": jnp.ones((4, 4))}
        >>> ids = jnp.asarray([[1, 2, 7, 8, 3], [7, 8, 1, 2, 3]])
        >>> plan = jpeft.plan(apply, params, (ids,), {"w": jpeft.ALoRA(rank=1, alpha=1)}, tokens=jpeft.Tokens(ids=0))
        >>> trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
        >>> trainable = {"w": {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 4))}}
        >>> call = jpeft.Call(lengths=invocation(ids, (7, 8)))
        >>> jpeft.adapt(apply, plan)(trainable, frozen, ids, peft=call)[..., 0].tolist()
        [[4.0, 4.0, 8.0, 8.0, 8.0], [8.0, 8.0, 8.0, 8.0, 8.0]]
    """

    rank: int = 32
    alpha: float = 32.0

    hooks: ClassVar[bool] = True
    call: ClassVar[frozenset[str]] = frozenset({"lengths"})
    goes_on: ClassVar[bool] = True
    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "rank * (in + out)"
    peft_type: ClassVar[str | None] = "LORA"

    @property
    def positions(self) -> bool:
        return True

    def source(self, site: Site) -> str:
        return site.path

    def check(self, site: Site) -> None:
        check_rank(self, site, self.rank, min(site.in_size, site.out_size))

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        stack, r, dtype = site.stack_shape, self.rank, site.theta_dtype
        return ({"a": uniform(key, (*stack, site.in_size, r), site.in_size, dtype),
                 "b": jnp.zeros((*stack, r, site.out_size), dtype)},
                {"scale": jnp.full(stack, self.alpha / r, dtype)})

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        a, b, scale, x = (theta[k].astype(y.dtype) for k in ("a", "b", "scale", "x"))
        change = (x @ a) @ (b * scale)
        if "lengths" not in theta:
            return y + change
        at, before = jnp.arange(y.shape[-2]) - start, theta["lengths"]
        before = jnp.reshape(before.astype(at.dtype), (*before.shape, *(1,) * (y.ndim - 1 - before.ndim)))
        return y + jnp.where((at >= before)[..., None], change, jnp.zeros((), y.dtype))

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"b": jnp.zeros_like(theta["b"])}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        ins, outs = (dims[0] if len(dims) == 1 else None for dims in (site.in_dims, site.out_dims))
        return {"a": (*site.stack_dims, ins, None), "b": (*site.stack_dims, None, outs), "scale": site.stack_dims}

    def flops(self, site: Site) -> tuple[int, int]:
        return 2 * self.rank * (site.in_size + site.out_size), 0


def invocation(ids: jax.Array, tokens: Sequence[int]) -> jax.Array:
    """Return how many tokens of each row come before the last occurrence of a sequence: what `Call.lengths` wants.

    Args:
        ids: `[B, T]`.
        tokens: the invocation sequence, as the tokenizer writes it.

    Returns:
        `[B]` (int32); T for a row that does not hold the sequence, on which the adapter does nothing then.

    Raises:
        CallError: the sequence is empty.

    Example:
        >>> import jax.numpy as jnp
        >>> invocation(jnp.asarray([[5, 6, 5, 6, 0], [1, 5, 2, 6, 0]]), (5, 6)).tolist()
        [2, 5]
    """
    n, length = len(tokens), ids.shape[-1]
    if not n:
        raise CallError("the invocation sequence is empty; give the ids of its tokens")
    if n > length:
        return jnp.full(ids.shape[:-1], length, jnp.int32)
    places = length - n + 1
    hits = functools.reduce(jnp.logical_and, (ids[..., k:k + places] == token for k, token in enumerate(tokens)))
    last = places - 1 - jnp.argmax(hits[..., ::-1], -1)
    return jnp.where(jnp.any(hits, -1), last, length).astype(jnp.int32)
