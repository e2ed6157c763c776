"""Haiku: two-level dicts whose module names hold slashes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from gallery.case import BOTH, B, D, F, Made, T, V, data, fill, lora, table, tokens

CASES, case = table("haiku")
WEIGHTS = lora(".*/w")


def made(forward: Callable[..., Any], *args: Any) -> Made:
    net = hk.without_apply_rng(hk.transform(forward))
    return net.apply, fill(jax.eval_shape(net.init, jax.random.key(0), *args)), args


@case(2, rules=WEIGHTS, dtypes=BOTH)
def mlp(dtype: Any) -> Made:
    return made(lambda x: hk.nets.MLP([F, D], activation=jax.nn.gelu)(x), data(dtype))


@case(4, rules=WEIGHTS)
def attention(dtype: Any) -> Made:
    def forward(x: jax.Array) -> jax.Array:
        init = hk.initializers.VarianceScaling(1.0)
        mask = jnp.tril(jnp.ones((1, 1, T, T), bool))
        return x + hk.MultiHeadAttention(2, 4, w_init=init, model_size=D)(x, x, x, mask)

    return made(forward, data(dtype))


@case(2, rules=WEIGHTS)
def layer_stack(dtype: Any) -> Made:
    def forward(x: jax.Array) -> jax.Array:
        def block(h: jax.Array) -> jax.Array:
            return h + hk.Linear(D, name="down")(jax.nn.silu(hk.Linear(F, name="up")(h)))

        return hk.experimental.layer_stack(3)(block)(x)

    return made(forward, data(dtype))


@case(2, rules=WEIGHTS)
def conv(dtype: Any) -> Made:
    def forward(x: jax.Array) -> jax.Array:
        x = jax.nn.relu(hk.Conv2D(4, 3, stride=2)(x))
        return hk.Conv2DTranspose(3, 3, stride=2)(x)

    return made(forward, data(dtype, B, 6, 5, 3))


@case(2, rules=lora(".*/w", ".*/embeddings"))
def embed(dtype: Any) -> Made:
    def forward(ids: jax.Array) -> jax.Array:
        x = hk.Embed(V, D, lookup_style="ARRAY_INDEX")(ids)
        return hk.Linear(F)(x)

    apply, params, args = made(forward, tokens())
    return apply, jax.tree.map(lambda w: w.astype(dtype), params), args


@case(1, rules=WEIGHTS)
def lstm(dtype: Any) -> Made:
    def forward(x: jax.Array) -> Any:
        core = hk.LSTM(D)
        state = jax.tree.map(lambda s: s.astype(x.dtype), core.initial_state(x.shape[0]))
        return hk.dynamic_unroll(core, x, state, time_major=False)

    return made(forward, data(dtype))


@case(4, rules=WEIGHTS)
def remat_and_cond(dtype: Any) -> Made:
    def forward(x: jax.Array) -> jax.Array:
        x = hk.remat(hk.nets.MLP([F, D]))(x)
        mlp = hk.nets.MLP([F, D], name="second")
        return hk.cond(x.sum() > 0, mlp, lambda h: 2 * mlp(h), x)

    return made(forward, data(dtype))
