"""A stand-in for a fused attention kernel: attention in blocks of queries, whose scores never exist as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.errors import EstimateError
from jpeft.models import decoder_layers

BLOCK = 128


def fused_attention(apply: Callable[..., Any], block: int = BLOCK) -> Callable[..., Any]:
    """Return `apply` of a decoder whose attention holds the scores of `block` queries at a time, in both passes.

    Values are those of `apply` up to rounding; it is no faster on any device.

    Args:
        apply: `apply` of a decoder, or a function that calls it, without a cache and without dropout of attention.
        block: queries.

    Example:
        >>> from jpeft.models.decoder import Decoder, DecoderConfig
        >>> model = Decoder(DecoderConfig(9, 8, 2, 2, 1, 4, 16, 32))
        >>> params, tokens = model.init(jax.random.key(0)), jnp.ones((1, 4), int)
        >>> a, b = (f(params, tokens).logits for f in (model.apply, fused_attention(model.apply, 2)))
        >>> bool(jnp.allclose(a, b, atol=1e-5))
        True
    """
    def blocks(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if not isinstance(context.module, decoder_layers.Attention) or context.method_name != "_mix":
            return call(*args, **kwargs)
        query, key, value, here, shared = args
        length = query.shape[1]
        size = block if length % block == 0 else length
        if length > block and size == length:
            raise EstimateError(f"{length} tokens are not a multiple of {block}, which a fused kernel is estimated "
                                f"with; make them {-(-length // block) * block}")

        def one(number: Any) -> Any:
            start = number * size
            part = jax.lax.dynamic_slice_in_dim(query, start, size, 1)
            return _block(part, key, value, here, shared, start, context.module.config)

        mixed = jax.lax.map(jax.checkpoint(one), jnp.arange(length // size))
        return jnp.moveaxis(mixed, 0, 1).reshape(query.shape)

    @functools.wraps(apply)
    def changed(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(blocks):
            return apply(*args, **kwargs)

    return changed


def _block(query: Any, key: Any, value: Any, here: Any, shared: Any, start: Any, config: Any) -> Any:
    """Attention of some queries `[B, t, H, d]` over all keys."""
    b, t, h, d = query.shape
    k, s = key.shape[2], key.shape[1]
    scale = here.scale if here.scale is not None else config.scale if config.scale is not None else d**-0.5
    scores = jnp.einsum("btkgd,bskd->bkgts", query.reshape(b, t, k, h // k, d), key,
                        preferred_element_type=jnp.float32) * scale
    if config.attention_cap is not None:
        scores = config.attention_cap * jnp.tanh(scores / config.attention_cap)
    if shared.masks is None:
        back = start + jnp.arange(t)[:, None] - jnp.arange(s)
        seen = (back >= 0 if config.ring is None else (back >= 0) & (back < config.ring))[None, None]
    else:
        whole = shared.masks[0]
        if shared.local_masks is not None and here.local is not None:
            whole = jnp.where(here.local, shared.local_masks[0], whole)
        seen = jax.lax.dynamic_slice_in_dim(whole, start, t, 2)
    weights = jax.nn.softmax(jnp.where(seen[:, :, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value).reshape(query.shape)
