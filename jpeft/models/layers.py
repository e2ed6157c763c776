"""What the families share: activations by their Hugging Face names, attention, remat policies, stacking of layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.errors import ModelConfigError, nearest

_gelu = functools.partial(jax.nn.gelu, approximate=False)
_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}

REMAT: Mapping[str, Any] = {
    "none": None,
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What a layer keeps for the backward pass: everything; its input alone; its input and the matrix products."""


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


def stacked(layer: type[nn.Module], length: int, remat: str) -> Callable[..., nn.Module]:
    """Make one module of `length` equal layers: a scan over parameters stacked on axis 0, `[L, ...]`.

    Args:
        layer: a module whose call is `(x, *constants) -> (x, None)`.
        length: the number of layers L.
        remat: a key of `REMAT`.
    """
    policy = choose(REMAT, remat, "remat")
    body = layer if remat == "none" else nn.remat(layer, prevent_cse=False, policy=policy)
    return nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
                   in_axes=nn.broadcast, length=length)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None,
              dropout: float = 0.0, rng: jax.Array | None = None) -> jax.Array:
    """Softmax attention, `[B, T, H, d]` in and out.

    Args:
        query: `[B, T, H, d]`.
        key: `[B, S, H, d]`.
        value: `[B, S, H, d]`.
        mask: bool, true = visible, that broadcasts to `[B, H, T, S]`; None: all visible.
        dropout: rate on the attention probabilities; only with `rng`.
        rng: the key for dropout; None: no dropout.

    Example:
        >>> x = jnp.ones((1, 3, 2, 4))
        >>> attention(x, x, x, None).shape
        (1, 3, 2, 4)
    """
    if rng is None or dropout == 0.0:
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    keep = jax.random.bernoulli(rng, 1.0 - dropout, scores.shape)
    weights = jnp.where(keep, jax.nn.softmax(scores, axis=-1) / (1.0 - dropout), 0.0)
    return jnp.einsum("bhts,bshd->bthd", weights.astype(value.dtype), value)


def visible(attention_mask: jax.Array | None) -> jax.Array | None:
    """Turn `[B, S]` or `[B, T, S]`, 1 = visible, into the bool mask `[B, 1, 1 or T, S]` of `attention`."""
    if attention_mask is None:
        return None
    mask = jnp.asarray(attention_mask).astype(bool)
    return mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
