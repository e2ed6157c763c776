"""A mixture of experts: each token through its best few MLPs, as one grouped product per matrix."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from jpeft.models.layers import ACTIVATIONS


class _Kernels(nn.Module):
    """The kernels of E experts, `[E, in, out]`, applied to rows sorted by expert."""

    experts: int
    features: int
    start: Any
    dtype: Any = None

    @nn.compact
    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.start, (self.experts, rows.shape[-1], self.features), jnp.float32)
        rows, kernel = promote_dtype(rows, kernel, dtype=self.dtype)
        return jax.lax.ragged_dot(rows, kernel, sizes)


class Experts(nn.Module):
    """`sum over the top k experts of p_e down_e(act(gate_e(x)) * up_e(x))`, `[B, T, D] -> [B, T, D]`.

    `p` is the softmax of the router's logits, in float32. No token is dropped, whatever the balance.

    Attributes:
        experts: E.
        chosen: k.
        mlp_size: inner width of an expert.
        activation: a key of `ACTIVATIONS`.
        renormalise: whether the k probabilities are divided by their sum.
        start: initialiser of the kernels.
        dtype: of compute; None: that of the params.
    """

    experts: int
    chosen: int
    mlp_size: int
    activation: str
    renormalise: bool
    start: Any
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        logits = nn.Dense(self.experts, use_bias=False, dtype=self.dtype, kernel_init=self.start, name="router")(flat)
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), self.chosen)
        if self.renormalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        order = jnp.argsort(experts.reshape(-1), stable=True)
        sizes = jnp.bincount(experts.reshape(-1), length=self.experts).astype(jnp.int32)
        rows = flat[order // self.chosen]

        def kernels(features: int, name: str) -> _Kernels:
            return _Kernels(self.experts, features, self.start, self.dtype, name=name)

        inner = ACTIVATIONS[self.activation](kernels(self.mlp_size, "gate")(rows, sizes))
        outer = kernels(x.shape[-1], "down")(inner * kernels(self.mlp_size, "up")(rows, sizes), sizes)
        back = outer[jnp.argsort(order)].reshape(-1, self.chosen, x.shape[-1])
        return jnp.einsum("nk,nkd->nd", weights.astype(back.dtype), back).reshape(x.shape)
