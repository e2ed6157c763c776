"""What the families share: activations by their Hugging Face names, norms, attention, remat, stacked layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.core import compat
from jpeft.errors import ModelConfigError, ModelInputError, nearest


def _lean(fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Keep the input alone for the backward pass: the rest costs less to compute again than to store and fetch."""
    return jax.checkpoint(fn, prevent_cse=False)


_gelu = _lean(functools.partial(jax.nn.gelu, approximate=False))
_gelu_tanh = _lean(functools.partial(jax.nn.gelu, approximate=True))
_silu = _lean(jax.nn.silu)

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "linear": lambda x: x,
    "mish": _lean(jax.nn.mish),
    "quick_gelu": _lean(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": _silu,
    "swish": _silu,
    "tanh": jnp.tanh,
}

NAMES = ("query", "key", "value", "attention_mix", "attention_out", "mlp_out")
"""Names (`jax.ad_checkpoint.checkpoint_name`) of what the remat policy "names" keeps; "mlp_inner" has one as well."""

REMAT: Mapping[str, Any] = {
    "none": None,
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names(*NAMES),
}
"""What a layer keeps for the backward pass, beside its input: everything; nothing; the matrix products; `NAMES`."""


def choose(table: Mapping[str, Any], name: str, what: str) -> Any:
    """Look `name` up in a table of choices.

    Raises:
        ModelConfigError: there is no such choice.

    Example:
        >>> choose(ACTIVATIONS, "tanh", "activation") is jnp.tanh
        True
    """
    if name not in table:
        raise ModelConfigError(f"{what} {name!r} is not implemented, only {sorted(table)} ({nearest(name, table, 1)})")
    return table[name]


def stacked(layer: type[nn.Module], length: int, remat: str, in_axes: Any = nn.broadcast) -> Callable[..., nn.Module]:
    """Make one module of `length` equal layers: a scan over parameters stacked on axis 0, `[L, ...]`.

    Args:
        layer: a module whose call is `(x, *inputs) -> (x, y)`; the `y` come out stacked.
        length: the number of layers L.
        remat: a key of `REMAT`.
        in_axes: for each of `inputs`: `nn.broadcast`, or 0 where it is stacked `[L, ...]` and each layer has its own.
    """
    policy = choose(REMAT, remat, "remat")
    body = layer if remat == "none" else nn.remat(layer, prevent_cse=False, policy=policy)
    return nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
                   in_axes=in_axes, length=length)


class RmsNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + eps)` over the last axis, computed in float32 or wider.

    Attributes:
        eps: added to the mean square.
        centred: the stored scale is the distance from 1 (Gemma).
        dtype: of the result; None: that of the input and the scale.
    """

    eps: float = 1e-6
    centred: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.zeros if self.centred else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scaled = y * scale.astype(y.dtype)
        return (y + scaled if self.centred else scaled).astype(self.dtype or jnp.promote_types(x.dtype, scale.dtype))


class Part(NamedTuple):
    """Keys and values that a query may see.

    Attributes:
        key: `[B, S, K, d]`.
        value: `[B, S, K, d]`.
        mask: bool, true = visible, that broadcasts to `[B, 1, T, S]`; None: all visible.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array | None = None


def attend(query: jax.Array, parts: Sequence[Part], *, scale: Any = None, cap: float | None = None,
           causal: bool = False, window: int | None = None, dropout: float = 0.0,
           rng: jax.Array | None = None) -> jax.Array:
    """Softmax attention of `query` `[B, T, H, d]` over all parts together; returns `[B, T, H, d]`.

    K, the number of key heads, divides H: head h reads key head `h // (H / K)`, and keys are never repeated. It runs
    through `jax.nn.dot_product_attention` where that can do it: no soft cap, no dropout, more than one query, and no
    float16 on a CPU.

    Args:
        query: `[B, T, H, d]`.
        parts: what is visible, in order.
        scale: of the scores; None: `d ** -0.5`.
        cap: c of `c tanh(scores / c)`; None: none.
        causal: token t sees no later one. Only with one part, of the same tokens as the query.
        window: with `causal`, token t sees itself and the `window - 1` tokens before it.
        dropout: rate on the attention probabilities; only with `rng`.
        rng: the key for dropout; None: no dropout.

    Example:
        >>> x = jnp.ones((1, 3, 2, 4))
        >>> attend(x, [Part(x[:, :, :1], x[:, :, :1])], causal=True).shape
        (1, 3, 2, 4)
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    plain = cap is None and (rng is None or dropout == 0.0) and compat.attends_in(query.dtype)
    if plain and (query.shape[1] > 1 or len(parts) == 1):
        return _fused(query, parts, scale, causal, window)
    (b, t, h, d), k = query.shape, parts[0].key.shape[2]
    grouped = query.reshape(b, t, k, h // k, d)
    scores = []
    for part in parts:
        one = jnp.einsum("btkgd,bskd->bkgts", grouped, part.key, preferred_element_type=jnp.float32) * scale
        one = one if cap is None else cap * jnp.tanh(one / cap)
        mask = part.mask if not causal else _causal(t, window)
        low = jnp.finfo(one.dtype).min
        scores.append(one if mask is None else jnp.where(mask[:, :, None], one, low))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    if rng is not None and dropout > 0.0:
        keep = jax.random.bernoulli(rng, 1.0 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout), 0.0)
    ends = [sum(p.key.shape[1] for p in parts[:i + 1]) for i in range(len(parts) - 1)]
    mixed = sum(jnp.einsum("bkgts,bskd->btkgd", w.astype(p.value.dtype), p.value)
                for w, p in zip(jnp.split(weights, ends, axis=-1), parts, strict=True))
    return jnp.reshape(mixed, query.shape)


def _causal(t: int, window: int | None) -> jax.Array:
    back = jnp.arange(t)[:, None] - jnp.arange(t)
    return (back >= 0 if window is None else (back >= 0) & (back < window))[None, None]


def _fused(query: jax.Array, parts: Sequence[Part], scale: Any, causal: bool, window: int | None) -> jax.Array:
    if not isinstance(scale, float):
        query, scale = query * jnp.asarray(scale, query.dtype), 1.0
    if len(parts) == 1:
        key, value, mask = parts[0]
        size = (window - 1, 0) if causal and window is not None else None
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, is_causal=causal,
                                            local_window_size=size)
    whole = [jnp.ones((1, 1, 1, 1), bool) if p.mask is None else p.mask for p in parts]
    shape = jnp.broadcast_shapes(*(m.shape[:3] for m in whole), (1, 1, query.shape[1]))
    mask = jnp.concatenate([jnp.broadcast_to(m, (*shape, p.key.shape[1]))
                            for m, p in zip(whole, parts, strict=True)], axis=-1)
    key, value = (jnp.concatenate([getattr(p, name) for p in parts], axis=1) for name in ("key", "value"))
    return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None,
              dropout: float = 0.0, rng: jax.Array | None = None) -> jax.Array:
    """Softmax attention, `[B, T, H, d]` in and out: `attend` with one part.

    Args:
        query: `[B, T, H, d]`.
        key: `[B, S, H, d]`.
        value: `[B, S, H, d]`.
        mask: bool, true = visible, that broadcasts to `[B, 1, T, S]`; None: all visible.
        dropout: rate on the attention probabilities; only with `rng`.
        rng: the key for dropout; None: no dropout.

    Example:
        >>> x = jnp.ones((1, 3, 2, 4))
        >>> attention(x, x, x, None).shape
        (1, 3, 2, 4)
    """
    return attend(query, [Part(key, value, mask)], dropout=dropout, rng=rng)


def check_pair(name: str, pair: Any, layers: int, batch: int, heads: int, size: int) -> None:
    """Raise `ModelInputError` unless `pair` is None, or a key and a value `[L, B or 1, P, K, d]`."""
    if pair is None:
        return
    found = [tuple(jnp.shape(p)) for p in pair]
    fits = len(found) == 2 and found[0] == found[1] and len(found[0]) == 5
    if not fits or (found[0][0], *found[0][3:]) != (layers, heads, size) or found[0][1] not in (1, batch):
        raise ModelInputError(f"{name} has shapes {found}, must be a key and a value [{layers}, {batch} or 1, P, "
                              f"{heads}, {size}]")


def behind(prefix: tuple[jax.Array, jax.Array] | None, key: jax.Array,
           value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return keys and values `[B, P + S, K, d]`: those of a prefix `[B or 1, P, K, d]`, and `[B, S, K, d]`."""
    if prefix is None:
        return key, value

    def joined(first: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.broadcast_to(first.astype(x.dtype), (len(x), *first.shape[1:])), x], axis=1)

    return joined(prefix[0], key), joined(prefix[1], value)


def visible(attention_mask: jax.Array | None, prefix: int = 0) -> jax.Array | None:
    """Turn `[B, S]` or `[B, T, S]`, 1 = visible, into the bool mask `[B, 1, 1 or T, P + S]` of `attention`."""
    if attention_mask is None:
        return None
    mask = jnp.asarray(attention_mask).astype(bool)
    if prefix:
        mask = jnp.pad(mask, (*((0, 0),) * (mask.ndim - 1), (prefix, 0)), constant_values=True)
    return mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
