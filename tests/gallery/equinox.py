"""Equinox: array halves of a module, `[out, in]` storage, everything under vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from gallery.case import BOTH, B, D, Dims, F, Made, V, data, fill, lora, table, tokens

CASES, case = table("equinox")
WEIGHTS = lora(".*weight")


def made(build: Callable[[jax.Array], Any], forward: Callable[..., Any], *args: Any) -> Made:
    """Return the case of `forward(model, *args)`."""
    shapes = eqx.filter_eval_shape(build, jax.random.key(0))
    params, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return lambda params, *xs: forward(eqx.combine(params, static), *xs), fill(params), args


def each_token(model: Callable[..., Any], x: jax.Array) -> jax.Array:
    return jax.vmap(jax.vmap(model))(x)


@case(3, rules=WEIGHTS, expect={"layers/0/weight": Dims((1,), (0,)), "layers/2/weight": Dims((1,), (0,))}, dtypes=BOTH)
def mlp_under_vmap(dtype: Any) -> Made:
    build = lambda key: eqx.nn.MLP(D, D, F, 2, dtype=dtype, key=key)  # noqa: E731
    return made(build, each_token, data(dtype))


class Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, dtype: Any, key: jax.Array):
        a, b = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(D, dtype=dtype)
        self.up = eqx.nn.Linear(D, F, dtype=dtype, key=a)
        self.down = eqx.nn.Linear(F, D, dtype=dtype, key=b)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


def scanned(model: Block, x: jax.Array, remat: bool = False) -> jax.Array:
    params, static = eqx.partition(model, eqx.is_array)

    def body(h: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return eqx.combine(layer, static)(h), None

    def run(h: jax.Array) -> jax.Array:
        return jax.lax.scan(eqx.filter_checkpoint(body) if remat else body, h, params)[0]

    return jax.vmap(jax.vmap(run))(x)


def layers(dtype: Any) -> Callable[[jax.Array], Block]:
    return lambda key: eqx.filter_vmap(lambda k: Block(dtype, k))(jax.random.split(key, 3))


LAYERS = {"up/weight": Dims((2,), (1,), (0,)), "down/weight": Dims((2,), (1,), (0,))}


@case(2, expect=LAYERS, dtypes=BOTH)
def scanned_layers(dtype: Any) -> Made:
    return made(layers(dtype), scanned, data(dtype))


@case(2, expect=LAYERS)
def scanned_layers_remat(dtype: Any) -> Made:
    return made(layers(dtype), lambda model, x: scanned(model, x, remat=True), data(dtype))


@case(4, rules=WEIGHTS, expect={"query_proj/weight": Dims((1,), (0,))})
def attention(dtype: Any) -> Made:
    def forward(model: Any, x: jax.Array) -> jax.Array:
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        return jax.vmap(lambda y: model(y, y, y, mask=mask))(x)

    return made(lambda key: eqx.nn.MultiheadAttention(2, D, dtype=dtype, key=key), forward, data(dtype))


@case(2, rules=WEIGHTS, expect={"layers/0/weight": Dims((1, 2, 3), (0,), (), "conv")})
def conv(dtype: Any) -> Made:
    def build(key: jax.Array) -> Any:
        first = eqx.nn.Conv2d(3, 4, 3, stride=2, dtype=dtype, key=key)
        second = eqx.nn.Conv2d(4, 8, 2, groups=2, dtype=dtype, key=key)
        return eqx.nn.Sequential([first, eqx.nn.Lambda(jax.nn.relu), second])

    return made(build, lambda model, x: jax.vmap(model)(x), data(dtype, B, 3, 7, 6))


@case(1, rules=WEIGHTS, expect={"weight": Dims((0,), (1,), (), "embedding")})
def embedding(dtype: Any) -> Made:
    return made(lambda key: eqx.nn.Embedding(V, D, dtype=dtype, key=key), each_token, tokens())


@case(1, rules=WEIGHTS, expect={"weight": Dims(None, None, (), "tied")})
def embedding_shared(dtype: Any) -> Made:
    def forward(model: Any, ids: jax.Array) -> jax.Array:
        return jnp.tanh(each_token(model, ids)) @ model.weight.T

    return made(lambda key: eqx.nn.Embedding(V, D, dtype=dtype, key=key), forward, tokens())


@case(2, rules=lora("weight_.h"), expect={"weight_ih": Dims((1,), (0,)), "weight_hh": Dims((1,), (0,))})
def gru(dtype: Any) -> Made:
    def run(cell: Any, xs: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, x: (cell(x, h), h), jnp.zeros(D, xs.dtype), xs)[0]

    forward = lambda cell, x: jax.vmap(lambda xs: run(cell, xs))(x)  # noqa: E731
    return made(lambda key: eqx.nn.GRUCell(D, D, dtype=dtype, key=key), forward, data(dtype))


@case(3, expect={"layers/0/weight": Dims((2,), (1,), (0,))})
def ensemble(dtype: Any) -> Made:
    def build(key: jax.Array) -> Any:
        return eqx.filter_vmap(lambda k: eqx.nn.MLP(D, D, F, 2, dtype=dtype, key=k))(jax.random.split(key, B))

    def forward(models: Any, x: jax.Array) -> jax.Array:
        return eqx.filter_vmap(lambda m, xs: jax.vmap(m)(xs))(models, x)

    return made(build, forward, data(dtype))


@case(3, rules=WEIGHTS)
def filter_jit_inside(dtype: Any) -> Made:
    build = lambda key: eqx.nn.MLP(D, D, F, 2, dtype=dtype, key=key)  # noqa: E731
    return made(build, eqx.filter_jit(each_token), data(dtype))
