"""Flax NNX through split and merge: params are an `nnx.State`, the rest (statistics, keys, caches) an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from support import is_float

from gallery.case import BOTH, B, D, Dims, F, Made, T, V, data, fill, lora, table, tokens

CASES, case = table("nnx")
KERNELS = lora(".*kernel")


def made(build: Callable[[nnx.Rngs], nnx.Module], *args: Any, state: bool = False) -> Made:
    """Return the case of a module; with `state`, the rest is an argument and an output."""
    graph, shapes, rest = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param, ...)
    rest = jax.tree.map(lambda leaf: leaf.astype(args[0].dtype) if is_float(leaf) else leaf, fill(rest))

    def with_state(params: nnx.State, rest: nnx.State, *xs: Any) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        y = model(*xs)
        return y, nnx.split(model, nnx.Param, ...)[2]

    def plain(params: nnx.State, *xs: Any) -> Any:
        return nnx.merge(graph, params, rest, copy=True)(*xs)

    return (with_state, fill(shapes), (rest, *args)) if state else (plain, fill(shapes), args)


class MLP(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(D, param_dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(D, F, param_dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(F, D, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


@case(2, rules=KERNELS, expect={"up/kernel": Dims((0,), (1,))}, dtypes=BOTH)
def linear(dtype: Any) -> Made:
    return made(lambda rngs: MLP(dtype, rngs), data(dtype))


class General(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        kw = {"param_dtype": dtype, "rngs": rngs}
        self.split = nnx.LinearGeneral(D, (3, 4), **kw)
        self.mix = nnx.Einsum("btnh,nhk->btnk", (3, 4, 4), (3, 4), **kw)
        self.join = nnx.LinearGeneral((3, 4), D, axis=(-2, -1), **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.join(self.mix(nnx.silu(self.split(x))))


GENERAL = {"split/kernel": Dims((0,), (1, 2)), "mix/kernel": Dims((1,), (2,), (0,)), "join/kernel": Dims((0, 1), (2,))}


@case(3, rules=KERNELS, expect=GENERAL)
def general_and_einsum(dtype: Any) -> Made:
    return made(lambda rngs: General(dtype, rngs), data(dtype))


class Attention(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        self.attn = nnx.MultiHeadAttention(2, D, decode=False, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.attn(x, mask=nnx.make_causal_mask(x[..., 0]))


@case(
    4,
    rules=KERNELS,
    expect={"attn/query/kernel": Dims((0,), (1, 2)), "attn/out/kernel": Dims((0, 1), (2,))},
    dtypes=BOTH,
)
def attention(dtype: Any) -> Made:
    return made(lambda rngs: Attention(dtype, rngs), data(dtype))


class Tied(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        self.embed = nnx.Embed(V, D, param_dtype=dtype, rngs=rngs)
        self.mlp = MLP(dtype, rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(self.mlp(self.embed(ids)))


@case(3, rules=lora(".*kernel", ".*embedding"), expect={"embed/embedding": Dims(None, None, (), "tied")})
def embed_tied(dtype: Any) -> Made:
    return made(lambda rngs: Tied(dtype, rngs), tokens())


class Images(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        kw = {"param_dtype": dtype, "rngs": rngs}
        self.conv = nnx.Conv(3, 4, (3, 3), strides=2, **kw)
        self.norm = nnx.BatchNorm(4, **kw)
        self.depth = nnx.Conv(4, 8, (3, 3), feature_group_count=4, **kw)
        self.head = nnx.Linear(8, D, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.depth(nnx.relu(self.norm(self.conv(x)))).mean((1, 2)))


@case(3, rules=KERNELS, expect={"conv/kernel": Dims((0, 1, 2), (3,), (), "conv")})
def conv_batch_norm_state(dtype: Any) -> Made:
    return made(lambda rngs: Images(dtype, rngs), data(dtype, B, 6, 6, 3), state=True)


class Dropped(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        self.mlp = MLP(dtype, rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp(self.dropout(x))


@case(2, rules=KERNELS)
def dropout_keys_in_state(dtype: Any) -> Made:
    return made(lambda rngs: Dropped(dtype, rngs), data(dtype), state=True)


class Deep(nnx.Module):
    """Three layers made by nnx.vmap and run by nnx.scan."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs, remat: bool = False):
        self.remat = remat

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs) -> MLP:
            return MLP(dtype, rngs)

        self.layers = create(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        def forward(layer: MLP, x: jax.Array) -> jax.Array:
            return nnx.remat(MLP.__call__)(layer, x) if self.remat else layer(x)

        return nnx.scan(forward, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


LAYERS = {"layers/up/kernel": Dims((1,), (2,), (0,))}


@case(2, rules=KERNELS, expect=LAYERS)
def vmapped_and_scanned(dtype: Any) -> Made:
    return made(lambda rngs: Deep(dtype, rngs), data(dtype))


@case(2, expect=LAYERS)
def scanned_remat(dtype: Any) -> Made:
    return made(lambda rngs: Deep(dtype, rngs, remat=True), data(dtype))


class Remat(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        self.layers = nnx.List([MLP(dtype, rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = nnx.remat(lambda m, x: m(x))(layer, x)
        return x


@case(4, rules=KERNELS, expect={"layers/1/down/kernel": Dims((0,), (1,))})
def remat(dtype: Any) -> Made:
    return made(lambda rngs: Remat(dtype, rngs), data(dtype))


class Heads(nnx.Module):
    """Parallel linear heads: one vmapped call over stacked kernels and a stacked input."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=B)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(D, F, param_dtype=dtype, rngs=rngs)

        self.heads = create(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.vmap(lambda head, x: head(x), in_axes=(0, 0))(self.heads, x)


@case(1, expect={"heads/kernel": Dims((1,), (2,), (0,))})
def vmapped_heads(dtype: Any) -> Made:
    return made(lambda rngs: Heads(dtype, rngs), data(dtype))


class Recurrent(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(D, D, param_dtype=dtype, rngs=rngs), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.rnn(x)


@case(2, rules=KERNELS)
def gru(dtype: Any) -> Made:
    return made(lambda rngs: Recurrent(dtype, rngs), data(dtype, B, T, D), state=True)
