"""Flax Linen: every contraction layer, the lifted transforms, mixed precision, mutable collections."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gallery.case import BOTH, B, D, Dims, F, Made, T, V, data, fill, lora, table, tokens

CASES, case = table("linen")
KERNELS = lora(".*/kernel")
# Rounding to bfloat16 is exact to 2**-8. Both sides round every product, merged weights once more, the low-rank path A,
# B and its two products: about ten roundings through the layers, forward and back.
BF16 = {"dtypes": ("float32",), "tol": 10 * 2.0**-8}


def made(module: nn.Module, *args: Any) -> Made:
    """Return the case whose params are the module's `params` collection."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return lambda params, *xs: module.apply({"params": params}, *xs), fill(shapes["params"]), args


class Block(nn.Module):
    """Pre-norm MLP block with the carry signature of nn.scan."""

    param_dtype: Any
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        kw = {"param_dtype": self.param_dtype, "dtype": self.dtype}
        y = nn.LayerNorm(**kw)(x)
        y = nn.Dense(F, name="up", **kw)(y)
        return x + nn.Dense(D, name="down", **kw)(nn.gelu(y)), None


class Stack(nn.Module):
    """Two blocks: unrolled, scanned, rematerialised, or both."""

    param_dtype: Any
    dtype: Any = None
    scan_axis: int | None = None
    remat: bool = False
    broadcast: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(Block, prevent_cse=self.scan_axis is None) if self.remat else Block
        if self.broadcast:
            shared = nn.scan(block, variable_broadcast="params", split_rngs={"params": False}, length=2)
            return shared(self.param_dtype, self.dtype, name="layers")(x, None)[0]
        if self.scan_axis is None:
            for i in range(2):
                x, _ = block(self.param_dtype, self.dtype, name=f"layer_{i}")(x)
            return x
        axes = {"params": self.scan_axis}
        layers = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=3)
        return layers(self.param_dtype, self.dtype, name="layers")(x, None)[0]


@case(2, rules=KERNELS, expect={"layers_0/kernel": Dims((0,), (1,))}, dtypes=BOTH)
def dense(dtype: Any) -> Made:
    kw = {"param_dtype": dtype}
    return made(nn.Sequential([nn.Dense(F, **kw), nn.gelu, nn.Dense(D, **kw)]), data(dtype))


@case(2, rules=lora(r"params/.*/kernel"), expect={"params/layers_0/kernel": Dims((0,), (1,))})
def module_apply_itself(dtype: Any) -> Made:
    module = nn.Sequential([nn.Dense(F, param_dtype=dtype), nn.relu, nn.Dense(D, param_dtype=dtype)])
    return module.apply, fill(jax.eval_shape(module.init, jax.random.key(0), data(dtype))), (data(dtype),)


class General(nn.Module):
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.DenseGeneral((3, 4), name="split", param_dtype=self.param_dtype)(x)
        return nn.DenseGeneral(D, axis=(-2, -1), name="join", param_dtype=self.param_dtype)(nn.silu(y))


@case(2, rules=KERNELS, expect={"split/kernel": Dims((0,), (1, 2)), "join/kernel": Dims((0, 1), (2,))}, dtypes=BOTH)
def dense_general(dtype: Any) -> Made:
    return made(General(dtype), data(dtype))


@case(1, rules=lora(".*kernel"), expect={"kernel": Dims((1,), (2,), (0,))})
def dense_general_batch_dims(dtype: Any) -> Made:
    return made(nn.DenseGeneral(F, batch_dims=(0,), param_dtype=dtype), data(dtype))


@case(1, rules=lora("kernel"), expect={"kernel": Dims((0,), (1, 2))})
def einsum(dtype: Any) -> Made:
    return made(nn.Einsum((D, 3, 4), "btd,dnh->btnh", param_dtype=dtype), data(dtype))


@case(1, rules=lora("kernel"), expect={"kernel": Dims((1, 2), (0,))})
def einsum_weight_out_first(dtype: Any) -> Made:
    return made(nn.Einsum((F, 2, 4), "btnh,fnh->bft", param_dtype=dtype), data(dtype, B, T, 2, 4))


CONV = Dims(None, None, (), "conv")


@case(2, rules=KERNELS, expect={"layers_0/kernel": Dims((0, 1), (2,), (), "conv")}, dtypes=BOTH)
def conv_1d(dtype: Any) -> Made:
    kw = {"param_dtype": dtype}
    layers = [nn.Conv(F, (3,), **kw), nn.relu, nn.Conv(D, (3,), padding="CAUSAL", kernel_dilation=2, **kw)]
    return made(nn.Sequential(layers), data(dtype))


@case(
    3,
    rules=KERNELS,
    expect={"layers_0/kernel": Dims((0, 1, 2), (3,), (), "conv"), "layers_2/kernel": CONV},
)
def conv_2d(dtype: Any) -> Made:
    kw = {"param_dtype": dtype}
    layers = [
        nn.Conv(8, (3, 3), strides=(2, 1), **kw),
        nn.relu,
        nn.Conv(4, (3, 2), kernel_dilation=(1, 2), padding="VALID", **kw),
        nn.relu,
        nn.Conv(5, (2, 1), input_dilation=(2, 1), padding=((1, 0), (0, 0)), **kw),
    ]
    return made(nn.Sequential(layers), data(dtype, B, 6, 5, 3))


@case(2, rules=KERNELS, expect={"layers_0/kernel": CONV, "layers_2/kernel": CONV})
def conv_grouped(dtype: Any) -> Made:
    kw = {"param_dtype": dtype}
    layers = [nn.Conv(8, (3,), feature_group_count=2, **kw), nn.relu, nn.Conv(16, (3,), feature_group_count=8, **kw)]
    return made(nn.Sequential(layers), data(dtype))


@case(2, rules=KERNELS)
def conv_transpose(dtype: Any) -> Made:
    kw = {"param_dtype": dtype}
    up = nn.ConvTranspose(5, (3, 3), strides=(2, 2), transpose_kernel=True, **kw)
    return made(
        nn.Sequential([nn.ConvTranspose(4, (2, 3), strides=(2, 1), **kw), nn.relu, up]), data(dtype, B, 3, 4, 3)
    )


class Tied(nn.Module):
    param_dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(V, D, name="embed", param_dtype=self.param_dtype)
        return embed.attend(nn.gelu(nn.Dense(D, name="mid", param_dtype=self.param_dtype)(embed(ids))))


@case(2, rules=lora(".*/kernel", ".*/embedding"), dtypes=BOTH, expect={"embed/embedding": Dims(None, None, (), "tied")})
def embed_tied(dtype: Any) -> Made:
    return made(Tied(dtype), tokens())


@case(1, rules=lora(".*embedding"), expect={"embedding": Dims((0,), (1,), (), "embedding")})
def embed(dtype: Any) -> Made:
    return made(nn.Embed(V, D, param_dtype=dtype), tokens())


class Attention(nn.Module):
    param_dtype: Any
    decode: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = None if self.decode else nn.make_causal_mask(x[..., 0])
        kw = {"num_heads": 2, "param_dtype": self.param_dtype, "decode": self.decode, "deterministic": True}
        return x + nn.MultiHeadDotProductAttention(name="attn", **kw)(
            nn.RMSNorm(param_dtype=self.param_dtype)(x), mask=mask
        )


HEADS = {"attn/query/kernel": Dims((0,), (1, 2)), "attn/out/kernel": Dims((0, 1), (2,))}


@case(4, rules=KERNELS, expect=HEADS)
def attention(dtype: Any) -> Made:
    return made(Attention(dtype), data(dtype))


@case(2, rules=lora(r".*/(query|value)/kernel"), expect=HEADS)
def attention_cache(dtype: Any) -> Made:
    module = Attention(dtype, decode=True)
    variables = fill(jax.eval_shape(module.init, jax.random.key(0), data(dtype)))

    def apply(params: Any, cache: Any, x: jax.Array) -> Any:
        return module.apply({"params": params, "cache": cache}, x, mutable=["cache"])

    cache = jax.tree.map(lambda leaf: leaf if leaf.ndim else leaf + 2, variables["cache"])
    return apply, variables["params"], (cache, data(dtype, B, 1, D))


LAYERS = {"layers/up/kernel": Dims((1,), (2,), (0,))}
LAYERS_1 = {"layers/up/kernel": Dims((0,), (2,), (1,)), "layers/down/kernel": Dims((0,), (2,), (1,))}


@case(2, expect=LAYERS)
def scan(dtype: Any) -> Made:
    return made(Stack(dtype, scan_axis=0), data(dtype))


@case(2, expect=LAYERS_1)
def scan_axis_1(dtype: Any) -> Made:
    return made(Stack(dtype, scan_axis=1), data(dtype))


@case(4, expect={"layer_1/down/kernel": Dims((0,), (1,))})
def remat(dtype: Any) -> Made:
    return made(Stack(dtype, remat=True), data(dtype))


@case(2, expect=LAYERS, dtypes=BOTH)
def scan_remat(dtype: Any) -> Made:
    return made(Stack(dtype, scan_axis=0, remat=True), data(dtype))


@case(2, expect=LAYERS_1)
def scan_remat_axis_1(dtype: Any) -> Made:
    return made(Stack(dtype, scan_axis=1, remat=True), data(dtype))


@case(2, expect={"layers/up/kernel": Dims((0,), (1,))})
def scan_shared(dtype: Any) -> Made:
    return made(Stack(dtype, broadcast=True), data(dtype))


@case(4, **BF16)
def bf16_compute(dtype: Any) -> Made:
    return made(Stack(dtype, dtype=jnp.bfloat16), data(dtype))


@case(2, expect=LAYERS, **BF16)
def bf16_scan_remat(dtype: Any) -> Made:
    return made(Stack(dtype, dtype=jnp.bfloat16, scan_axis=0, remat=True), data(dtype))


class Nested(nn.Module):
    """Scan over two groups of three layers: leaves `[2, 3, in, out]`."""

    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        inner = functools.partial(nn.scan, variable_axes={"params": 0}, split_rngs={"params": True})
        return inner(Block, length=3)(self.param_dtype, name="inner")(x, None)[0], None


@case(2, expect={"inner/up/kernel": Dims((2,), (3,), (0, 1))})
def scan_nested(dtype: Any) -> Made:
    outer = nn.scan(Nested, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(dtype)
    apply, params, args = made(outer, data(dtype), None)
    return lambda p, x: apply(p, x, None)[0], params, args[:1]


class Policy(nn.Module):
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.remat(nn.Dense, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        return dense(D, param_dtype=self.param_dtype)(nn.gelu(nn.jit(nn.Dense)(F, param_dtype=self.param_dtype)(x)))


@case(2)
def remat_policy_and_jit(dtype: Any) -> Made:
    return made(Policy(dtype), data(dtype))


@case(2, expect={"Dense_0/kernel": Dims((1,), (2,), (0,))})
def vmap_ensemble(dtype: Any) -> Made:
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(D, param_dtype=dtype)(nn.tanh(nn.Dense(F, param_dtype=dtype)(x)))

    return made(nn.vmap(Two, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=B)(), data(dtype))


class Normed(nn.Module):
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kw = {"param_dtype": self.param_dtype}
        y = nn.BatchNorm(use_running_average=False, **kw)(nn.Dense(F, **kw)(x))
        return nn.Dense(D, **kw)(nn.relu(y))


@case(2, rules=KERNELS)
def batch_norm_state(dtype: Any) -> Made:
    module = Normed(dtype)
    variables = fill(jax.eval_shape(module.init, jax.random.key(0), data(dtype)))

    def apply(params: Any, stats: Any, x: jax.Array) -> Any:
        return module.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

    return apply, variables["params"], (variables["batch_stats"], data(dtype))


@case(2, rules=KERNELS)
def dropout_key_argument(dtype: Any) -> Made:
    kw = {"param_dtype": dtype}
    module = nn.Sequential([nn.Dense(F, **kw), nn.Dropout(0.5, deterministic=False), nn.Dense(D, **kw)])
    params = fill(jax.eval_shape(module.init, jax.random.key(0), data(dtype)))["params"]
    apply = lambda p, key, x: module.apply({"params": p}, x, rngs={"dropout": key})  # noqa: E731
    return apply, params, (jax.random.key(3), data(dtype))


@case(8, rules=KERNELS)
def lstm(dtype: Any) -> Made:
    return made(nn.RNN(nn.LSTMCell(D, param_dtype=dtype)), data(dtype))


@case(8, rules=KERNELS)
def lstm_concatenated_kernels(dtype: Any) -> Made:
    return made(nn.RNN(nn.OptimizedLSTMCell(D, param_dtype=dtype)), data(dtype))


@case(rules=lora(".*kernel"), error="UnsupportedUse", words=("kernel",))
def weight_norm(dtype: Any) -> Made:
    return made(nn.WeightNorm(nn.Dense(F, param_dtype=dtype), param_dtype=dtype), data(dtype))
