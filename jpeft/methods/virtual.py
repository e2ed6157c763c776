"""Methods that train virtual tokens: prompts at the embedding, prefixes at the keys and values of every layer."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import compat
from jpeft.core.method import Method, Theta
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError


class _Virtual(Method):
    """A method that overwrites the rows of `length` virtual tokens in an output `[..., T, out]`."""

    hooks: ClassVar[bool] = True
    length: int

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def _check_fields(self, init_weights: str, known: tuple[str, ...]) -> None:
        name = type(self).__name__
        if self.length < 1:
            raise MethodConfigError(f"{name}(length={self.length}) trains nothing; use 1 or more virtual tokens")
        if init_weights not in known:
            raise MethodConfigError(f"{name}(init_weights={init_weights!r}) is unknown; use one of {', '.join(known)}")


def overwrite(y: jax.Array, p: jax.Array, row: int, column: int = 0) -> jax.Array:
    """Put `p` `[V, C]` over the rows from `row` and the columns from `column` of `y` `[..., T, out]`."""
    (v, c), (t, n) = p.shape, y.shape[-2:]
    pads = ((row, t - row - v), (column, n - column - c))
    spread = jnp.broadcast_to(jnp.pad(p.astype(y.dtype), pads), y.shape)
    mine = jnp.broadcast_to(jnp.pad(jnp.ones((v, c), bool), pads), y.shape)
    return jnp.where(compat.match_sharding(mine, y), compat.match_sharding(spread, y), y)


@dataclasses.dataclass(frozen=True)
class PromptTuning(_Virtual):
    """Train the embeddings of virtual tokens that stand before the real ones.

    `E([v_1 .. v_V, x]) = [P; E(x)]`, P (`p`) `[V, *out]`. The batch is padded on the left through `jpeft.Tokens`, and
    the outputs of the virtual tokens are stripped again; of a tied embedding, the output head is left alone.

    Args:
        length: V, the number of virtual tokens.
        init_weights: `random` (normal, deviation 0.02) or `vocabulary` (V different random rows of the embedding).

    Raises:
        MethodConfigError: length below 1, more rows wanted than the vocabulary has, or an unknown init.

    Source: arXiv 2104.08691.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply = lambda p, ids: p["embed"][ids]
        >>> params, ids = {"embed": jnp.ones((20, 4))}, jnp.zeros((2, 6), int)
        >>> rules = {"embed": jpeft.PromptTuning(length=3)}
        >>> jpeft.plan(apply, params, (ids,), rules, tokens=jpeft.Tokens(ids=0)).count()
        12
    """

    length: int = 20
    init_weights: str = "random"

    uses: ClassVar[frozenset[str]] = frozenset({"embedding", "tied"})
    recommended_lr: ClassVar[float] = 3e-2
    formula: ClassVar[str] = "length * out"
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        self._check_fields(self.init_weights, ("random", "vocabulary"))

    def check(self, site: Site) -> None:
        if self.init_weights == "vocabulary" and self.length > site.in_size:
            raise MethodConfigError(f"PromptTuning(length={self.length}) cannot draw as many rows from {site.path!r} "
                                    f"of {site.in_size}; use init_weights='random'")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        shape, dtype = (self.length, *site.out_shape), site.theta_dtype
        if self.init_weights == "random":
            return {"p": 0.02 * jax.random.normal(key, shape, dtype)}, {}
        rows = jax.random.choice(key, site.in_size, (self.length,), replace=False)
        return {"p": jnp.reshape(site.matrix(base)[rows], shape).astype(dtype)}, {}

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        if y.shape[-1] != site.out_size:
            return y
        return overwrite(y, jnp.reshape(theta["p"], (self.length, -1)), start)

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"p": (None, *site.out_dims)}


@dataclasses.dataclass(frozen=True)
class PrefixTuning(_Virtual):
    """Train keys and values of virtual tokens that every layer attends to.

    `K' = [P_K; K]` and `V' = [P_V; V]`: put it on the kernels of the key and of the value projection in every layer.
    The batch is padded on the left through `jpeft.Tokens`, the first V rows of each projection's output (after its
    bias) are replaced by P (`p`) `[*stack, V, *out]`, and the outputs of the virtual tokens are stripped: for the real
    tokens, in causal and in bidirectional attention, this equals attention to a prefix. What the model does to keys
    after the projection (rotary embedding, norm) it does to the prefix as well. It cannot be limited to some layers:
    the others would attend to the padding.

    Args:
        length: V, the number of virtual tokens.
        init_weights: `random` (normal, deviation 0.02) or `zero`.
        channels: `(start, stop)`: the output channels that are keys or values, of a fused kernel; None: all of them.
            P is then `[*stack, V, stop - start]`.

    Raises:
        MethodConfigError: length below 1, channels outside the output, or an unknown init.

    Source: arXiv 2101.00190.

    Example:
        >>> import jpeft
        >>> rules = {".*/(key|value)/kernel": jpeft.PrefixTuning(length=10)}
        >>> fused = {".*/c_attn/kernel": jpeft.PrefixTuning(length=10, channels=(768, 3 * 768))}
    """

    length: int = 20
    init_weights: str = "random"
    channels: tuple[int, int] | None = None

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "length * out"
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"

    def __post_init__(self) -> None:
        if isinstance(self.channels, list):
            object.__setattr__(self, "channels", tuple(self.channels))
        self._check_fields(self.init_weights, ("random", "zero"))

    def check(self, site: Site) -> None:
        if self.channels is not None and not 0 <= self.channels[0] < self.channels[1] <= site.out_size:
            raise MethodConfigError(f"PrefixTuning(channels={self.channels}) lie outside the {site.out_size} outputs "
                                    f"of {site.path!r}; give (start, stop), 0 <= start < stop <= {site.out_size}")

    def _shape(self, site: Site) -> tuple[int, ...]:
        return site.out_shape if self.channels is None else (self.channels[1] - self.channels[0],)

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        shape, dtype = (*site.stack_shape, self.length, *self._shape(site)), site.theta_dtype
        zero = self.init_weights == "zero"
        return {"p": jnp.zeros(shape, dtype) if zero else 0.02 * jax.random.normal(key, shape, dtype)}, {}

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        p = jnp.reshape(theta["p"], (self.length, math.prod(self._shape(site))))
        return overwrite(y, p, start, 0 if self.channels is None else self.channels[0])

    def numbers(self, site: Site) -> dict[str, int]:
        return {"out": math.prod(self._shape(site))}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"p": (*site.stack_dims, None, *(site.out_dims if self.channels is None else (None,)))}
