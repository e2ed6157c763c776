"""Patterns met in other people's models (codebooks, recommenders, MLA, MoE, Keras, spectral layers), written small."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gallery.case import BOTH, B, D, Dims, F, Made, T, V, data, lora, table, tokens, weights
from gallery.sharded import explicit_mesh, mesh, placed

CASES, case = table("foreign")
LOOKED_UP = Dims((0,), (1,), (), "embedding")


@case(1, rules=lora("books"), expect={"books": Dims((1,), (2,), (0,), "embedding")}, dtypes=BOTH)
def codebooks_vmapped(dtype: Any) -> Made:
    """One table for each codebook of an audio model, looked up under vmap: a gather with batch dims."""

    def apply(p: Any, ids: jax.Array) -> jax.Array:
        return jax.vmap(lambda table, i: table[i], (0, 1), 1)(p["books"], ids).sum(1)

    return apply, weights(dtype, books=(3, V, D)), (tokens(T, 3),)


@case(1, rules=lora("books"), expect={"books": Dims((0, 1), (2,), (), "embedding")})
def codebooks_indexed_twice(dtype: Any) -> Made:
    def apply(p: Any, ids: jax.Array) -> jax.Array:
        inside = p["books"][jnp.arange(3)[:, None], ids]
        return inside + p["books"].at[jnp.array([[0], [9], [2]]), ids].get(mode="fill", fill_value=0)

    return apply, weights(dtype, books=(3, V, D)), (tokens(3, T),)


@case(2, rules=lora(".*"), expect={"users": LOOKED_UP, "items": LOOKED_UP})
def rows_multiplied(dtype: Any) -> Made:
    """A recommender: scores are products of looked-up rows, no row is a weight."""

    def apply(p: Any, ids: jax.Array) -> jax.Array:
        return jnp.einsum("td,tkd->tk", p["users"][ids[0]], p["items"][ids.T])

    return apply, weights(dtype, users=(V, D), items=(V, D)), (tokens(),)


@case(1, rules=lora("values"), expect={"values": LOOKED_UP})
def rows_weighted(dtype: Any) -> Made:
    def apply(p: Any, ids: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.einsum("btd,bt->bd", p["values"][ids], jax.nn.softmax(x[..., 0]))

    return apply, weights(dtype, values=(V, D)), (tokens(), data(dtype))


@case(1, rules=lora("distance"), expect={"distance": Dims((0,), (1, 2), (), "embedding")})
def relative_positions_as_keys(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        rows = p["distance"][jnp.arange(T)[:, None] - jnp.arange(T) + T]
        return jnp.einsum("btnh,tsnh->bnts", x.reshape(B, T, 2, D // 2), rows)

    return apply, weights(dtype, distance=(2 * T, 2, D // 2)), (data(dtype),)


@case(2, expect={"experts": Dims((1,), (2,), (0,)), "router": Dims((0,), (1,))}, dtypes=BOTH)
def experts_chosen_per_token(dtype: Any) -> Made:
    """Two experts for each token: their kernels are gathered, the sum over them is no input of the kernel."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
        return jnp.einsum("btd,btkdf,btk->btf", x, p["experts"][chosen], gates)

    return apply, weights(dtype, router=(D, 4), experts=(4, D, F)), (data(dtype),)


@case(4, expect={"down": Dims((0,), (1,)), "up": Dims((2,), (0,), (1,)), "out": Dims((0, 1), (2,))})
def latent_attention_absorbed(dtype: Any) -> Made:
    """Keys and values stay latent: `up` is split and contracted from both sides, head by head."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        latent, q = x @ p["down"], jnp.einsum("btd,dnh->btnh", x, p["q"])
        keys, values = p["up"][..., :3], p["up"][..., 3:]
        scores = jnp.einsum("btnc,bsc->bnts", jnp.einsum("btnh,cnh->btnc", q, keys), latent)
        mixed = jnp.einsum("bnts,bsc->btnc", jax.nn.softmax(scores), latent)
        return jnp.einsum("btnc,cnh,nhd->btd", mixed, values, p["out"])

    return apply, weights(dtype, down=(D, 5), q=(D, 2, 3), up=(5, 2, 6), out=(2, 3, D)), (data(dtype),)


@case(1, expect={"key": Dims((0,), (1, 2))})
def heads_repeated_in_the_weight(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("btd,dnh->btnh", x, jnp.repeat(p["key"], 2, axis=1))

    return apply, weights(dtype, key=(D, 2, 4)), (data(dtype),)


@case(1, expect={"w": Dims((0,), (1,))})
def columns_rolled(dtype: Any) -> Made:
    return lambda p, x: x @ jnp.roll(p["w"], 1, axis=1), weights(dtype, w=(D, F)), (data(dtype),)


@case(1, rules=lora("kernel"), expect={"kernel": Dims((0, 1), (2,), (3,), "conv")})
def depthwise_with_multiplier(dtype: Any) -> Made:
    """Keras stores `[H, W, C, 1]` and reshapes to `[H, W, 1, C]`."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        kernel = jnp.reshape(p["kernel"], (3, 2, 1, 4))
        kw = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 4}
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **kw)

    return apply, weights(dtype, kernel=(3, 2, 4, 1)), (data(dtype, B, 5, 5, 4),)


@case(1, expect={"w": Dims((0,), (1,))})
def complex_activations(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        wave = jnp.fft.fft(x, axis=1)
        return jnp.abs(wave @ p["w"].astype(wave.dtype))

    return apply, weights(dtype, w=(D, F)), (data(dtype),)


@case(2, rules=lora("table", "up"), expect={"table": LOOKED_UP}, context=explicit_mesh)
def explicit_lookup(dtype: Any) -> Made:
    """A look-up with an out_sharding: traced under a mesh of another kind than its surroundings."""
    specs = {"table": P("m", None), "up": P(None, "m")}

    def apply(p: Any, ids: jax.Array) -> jax.Array:
        return p["table"].at[ids].get(out_sharding=P()) @ p["up"]

    params = placed(mesh(AxisType.Explicit), weights(dtype, table=(12, D), up=(D, F)), specs)
    return apply, params, (tokens(),)


@case(rules=lora("w"), error="UnsupportedUse", words=("'w'", "select_n", "foreign.py"))
def masked_weight(dtype: Any) -> Made:
    """Raised inside a jitted function of jnp: the line is the model's."""
    return lambda p, x: x @ jnp.tril(p["w"]), weights(dtype, w=(D, D)), (data(dtype),)


@case(rules=lora("w"), error="UnsupportedUse", words=("'w'", "foreign.py"))
def normalised_weight(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["g"])

    return apply, weights(dtype, w=(D, F), g=(F,)), (data(dtype),)


@case(1, expect={"w": Dims((0,), (1,))}, dtypes=BOTH)
def weight_with_gains(dtype: Any) -> Made:
    """Learned gains sit on the weight, along its outputs and along its inputs."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return x @ (p["w"] * p["gain"] / p["spread"][:, None])

    return apply, weights(dtype, w=(D, F), gain=(F,), spread=(D,)), (data(dtype),)


@case(1, expect={"w": Dims((1,), (2,), (0,))})
def stacked_weight_with_gains(dtype: Any) -> Made:
    """One gain per layer and output, put on before the scan over layers."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"] * p["gain"][:, None, :])[0]

    return apply, weights(dtype, w=(3, D, D), gain=(3, D)), (data(dtype),)


@case(1, rules=lora("kernel"), expect={"kernel": Dims((0, 1), (2,), (), "conv")})
def kernel_with_gain(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, p["kernel"] * p["gain"], (1,), "SAME", dimension_numbers=numbers)

    return apply, weights(dtype, kernel=(3, D, F), gain=(F,)), (data(dtype),)


@case(2, rules=lora("real", "imag"), expect={"real": Dims((1,), (0,)), "imag": Dims((1,), (0,))})
def complex_weight_in_two_parts(dtype: Any) -> Made:
    """A linear recurrent unit: the input matrix is `(real + i imag)` with a gain per state."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        matrix = (p["real"] + 1j * p["imag"]) * jnp.exp(p["gain"])[:, None]
        return jnp.abs(jax.vmap(jax.vmap(lambda u: matrix @ u))(x.astype(matrix.dtype)))

    return apply, weights(dtype, real=(F, D), imag=(F, D), gain=(F,)), (data(dtype),)


@case(2, rules=lora("real", "imag"), expect={"real": Dims((0,), (1,))})
def complex_weight_joined(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jnp.abs(x @ jax.lax.complex(p["real"], p["imag"]))

    return apply, weights(dtype, real=(D, F), imag=(D, F)), (data(dtype),)


@case(1, rules=lora("w"), expect={"w": Dims((1,), (2,), (0,))})
def complex_weight(dtype: Any) -> Made:
    """A Fourier layer: one complex matrix for each mode. The factors stay real, of the base's precision."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        modes = jnp.einsum("bkd,kdf->bkf", jnp.fft.rfft(x, axis=1), p["w"])
        return jnp.fft.irfft(modes, axis=1)

    parts = weights(dtype, real=(T // 2 + 1, D, F), imag=(T // 2 + 1, D, F))
    return apply, {"w": parts["real"] + 1j * parts["imag"]}, (data(dtype),)


@case(2, expect={"own": Dims((1,), (2,), (0,)), "shared": Dims((0,), (1,))})
def weight_shared_by_layers(dtype: Any) -> Made:
    """Every layer's weight is its own part plus one that all share."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ (w - p["shared"])), None), x, p["own"])[0]

    return apply, weights(dtype, own=(3, D, D), shared=(D, D)), (data(dtype),)


@case(1, expect={"w": Dims((0,), (1,))})
def symmetric_weight(dtype: Any) -> Made:
    return lambda p, x: x @ (p["w"] + p["w"].T), weights(dtype, w=(D, D)), (data(dtype),)


@case(1)
def inner_step(dtype: Any) -> Made:
    """Meta-learning: the model takes one step of gradient descent on its own weight, then applies it."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        slope = jax.grad(lambda w: (jnp.tanh(x @ w) ** 2).sum())(p["w"])
        return x @ (p["w"] - 0.1 * slope)

    return apply, weights(dtype, w=(D, F)), (data(dtype),)


@case(1, rules=lora("kernels"), expect={"kernels": Dims((1, 2), (0, 3), (), "conv")})
def kernels_vmapped(dtype: Any) -> Made:
    """An ensemble of convolutions over one input: vmap folds the ensemble into the output channels."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        numbers = ("NWC", "WIO", "NWC")
        conv = lambda k: jax.lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=numbers)  # noqa: E731
        return jax.vmap(conv)(p["kernels"])

    return apply, weights(dtype, kernels=(2, 3, D, F)), (data(dtype),)
