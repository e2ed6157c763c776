"""A pre-norm transformer in plain JAX, unrolled or scanned, with or without remat: the subject of the cost tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]
SHAPES = {"q": ("d", "d"), "k": ("d", "d"), "v": ("d", "d"), "o": ("d", "d"), "up": ("d", "f"), "down": ("f", "d")}


def init(key: jax.Array, layers: int, d: int, f: int, scanned: bool) -> Params:
    """Random parameters: a list of layers, or one stacked layer."""
    size = {"d": d, "f": f}

    def one(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(SHAPES))
        layer = {n: jax.random.normal(k, (size[a], size[b])) * size[a] ** -0.5
                 for k, (n, (a, b)) in zip(keys, SHAPES.items(), strict=True)}
        return layer | {"norm1": jnp.ones(d), "norm2": jnp.ones(d)}

    keys = jax.random.split(key, layers)
    return {"layers": jax.vmap(one)(keys)} if scanned else {"layers": [one(k) for k in keys]}


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def block(p: Params, x: jax.Array, heads: int) -> jax.Array:
    """One layer, `[B, T, D] -> [B, T, D]`."""
    h = _norm(x, p["norm1"])
    q, k, v = (jnp.reshape(h @ p[n], (*h.shape[:2], heads, -1)) for n in "qkv")
    x = x + jnp.reshape(jax.nn.dot_product_attention(q, k, v, is_causal=True), h.shape) @ p["o"]
    return x + jax.nn.gelu(_norm(x, p["norm2"]) @ p["up"]) @ p["down"]


def apply(params: Params, x: jax.Array, heads: int = 4, remat: bool = False) -> jax.Array:
    """All layers, `[B, T, D] -> [B, T, D]`."""
    def body(x: jax.Array, p: Params) -> jax.Array:
        return block(p, x, heads)

    body = jax.checkpoint(body) if remat else body
    if isinstance(params["layers"], list):
        for p in params["layers"]:
            x = body(x, p)
        return x
    return jax.lax.scan(lambda x, p: (body(x, p), None), x, params["layers"])[0]


def loss(y: jax.Array) -> jax.Array:
    """A loss whose gradient is dense."""
    return jnp.mean(jnp.square(y))
