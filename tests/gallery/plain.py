"""Plain JAX: the ways in which people store, cut and contract a weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gallery.case import BOTH, B, D, Dims, F, Made, V, attention, data, lora, numbers, table, tokens, weights

CASES, case = table("plain")
IN_OUT = Dims((0,), (1,))


@case(2, expect={"w1": IN_OUT, "b1": Dims((), (0,), (), "bias")}, dtypes=BOTH)
def mlp(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x @ p["w1"] + p["b1"]) @ p["w2"]

    return apply, weights(dtype, w1=(D, F), b1=(F,), w2=(F, D)), (data(dtype),)


@case(2, expect={"qkv": IN_OUT}, dtypes=BOTH)
def qkv_fused(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return attention(*jnp.split(x @ p["qkv"], 3, axis=-1)) @ p["o"]

    return apply, weights(dtype, qkv=(D, 3 * D), o=(D, D)), (data(dtype),)


@case(2, expect={"qkv": IN_OUT})
def qkv_weight_split(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return attention(*(x @ w for w in jnp.split(p["qkv"], 3, axis=1))) @ p["o"]

    return apply, weights(dtype, qkv=(D, 3 * D), o=(D, D)), (data(dtype),)


@case(3, expect={"q": IN_OUT, "v": IN_OUT}, dtypes=BOTH)
def qkv_concatenated(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        qkv = x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)
        return attention(*jnp.split(qkv, (D, 2 * D), axis=-1))

    return apply, weights(dtype, q=(D, D), k=(D, D), v=(D, F)), (data(dtype),)


@case(2, rules=lora("q|v"))
def qkv_concatenated_two_of_three(dtype: Any) -> Made:
    return qkv_concatenated(dtype)


@case(2, expect={"w1": IN_OUT})
def concatenated_inputs(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, jnp.sin(x)], axis=-1) @ jnp.concatenate([p["w1"], p["w2"]], axis=0)

    return apply, weights(dtype, w1=(D, F), w2=(D, F)), (data(dtype),)


@case(1, expect={"w": Dims((1,), (0,))}, dtypes=BOTH)
def stored_out_in(dtype: Any) -> Made:
    return lambda p, x: jnp.tanh(x @ p["w"].T), weights(dtype, w=(F, D)), (data(dtype),)


@case(1, expect={"w": Dims((1,), (0,))})
def dot_general_raw(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.dot_general(p["w"], x, (((1,), (2,)), ((), ())), precision="highest")

    return apply, weights(dtype, w=(F, D)), (data(dtype),)


@case(2, expect={"q": IN_OUT, "o": IN_OUT}, dtypes=BOTH)
def reshaped_heads(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        heads = jnp.einsum("btd,dnh->btnh", x, p["q"].reshape(D, 2, 4))
        return jnp.einsum("btnh,nhd->btd", jnp.tanh(heads), p["o"].reshape(2, 4, D))

    return apply, weights(dtype, q=(D, 8), o=(8, D)), (data(dtype),)


@case(1, expect={"w": Dims((0, 1), (2, 3))})
def reshaped_flat(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"].reshape(D, F)

    return apply, weights(dtype, w=(2, 4, 3, 4)), (data(dtype),)


@case(1, expect={"w": IN_OUT})
def expanded_and_squeezed(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        w = jnp.squeeze(p["w"][None, :, None, :], 2)
        return jnp.matmul(x, jnp.broadcast_to(w, (B, D, F)))

    return apply, weights(dtype, w=(D, F)), (data(dtype),)


@case(1, expect={"w": IN_OUT})
def scaled(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return x @ (p["w"] * 0.5) + x @ (p["w"] / np.sqrt(D)) - x @ -p["w"]

    return apply, weights(dtype, w=(D, F)), (data(dtype),)


@case(1, rules=lora("w"))
def scaled_by_a_traced_scalar(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return x @ (p["w"] * p["gain"])

    return apply, weights(dtype, w=(D, F), gain=()), (data(dtype),)


@case(1, expect={"w": IN_OUT}, dtypes=BOTH)
def sliced_inputs_and_outputs(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        y = x[..., :5] @ p["w"][:5] + x[..., 5:] @ p["w"][5:, :]
        return y[..., :4] * (x[..., ::2] @ p["w"][::2, 4:8])

    return apply, weights(dtype, w=(D, F)), (data(dtype),)


@case(1, expect={"w": IN_OUT})
def dynamic_sliced(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array, i: jax.Array) -> jax.Array:
        return x @ jax.lax.dynamic_slice_in_dim(p["w"], i, 4, axis=1) + x[..., :4] @ jax.lax.dynamic_slice(
            p["w"], (i, i), (4, 4)
        )

    return apply, weights(dtype, w=(D, F)), (data(dtype), jnp.asarray(2, jnp.int32))


@case(1, rules=lora("w"))
def gathered_columns(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"][:, jnp.array([3, 0, 5, 0])]

    return apply, weights(dtype, w=(D, F)), (data(dtype),)


@case(2, expect={"w": IN_OUT})
def padded_reversed_joined(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        wide = jnp.concatenate([jnp.pad(p["w"], ((0, 0), (1, 2))), jnp.zeros((D, 2), dtype)], axis=1)
        return x @ wide[:, ::-1] + x @ jnp.flip(jnp.pad(p["v"], ((2, 1), (0, 0))), 0)

    return apply, weights(dtype, w=(D, F), v=(5, F + 5)), (data(dtype),)


@case(1, expect={"w": IN_OUT})
def used_twice(dtype: Any) -> Made:
    return lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], weights(dtype, w=(D, D)), (data(dtype),)


@case(1)
def tied_transposed(dtype: Any) -> Made:
    return lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, weights(dtype, w=(D, F)), (data(dtype),)


@case(1, rules=lora("emb"), expect={"emb": Dims(None, None, (), "tied")}, dtypes=BOTH)
def embedding_and_head(dtype: Any) -> Made:
    return lambda p, ids: jnp.sin(p["emb"][ids]) @ p["emb"].T, weights(dtype, emb=(V, D)), (tokens(),)


@case(1, rules=lora("emb"), expect={"emb": Dims((0,), (1,), (), "embedding")})
def embedding_take(dtype: Any) -> Made:
    return lambda p, ids: jnp.take(p["emb"], ids, axis=0) * 2.0, weights(dtype, emb=(V, D)), (tokens(),)


@case(1, rules=lora("emb"))
def embedding_one_hot(dtype: Any) -> Made:
    def apply(p: Any, ids: jax.Array) -> jax.Array:
        return jnp.tanh(jax.nn.one_hot(ids, V, dtype=dtype) @ p["emb"]) @ p["emb"].T

    return apply, weights(dtype, emb=(V, D)), (tokens(),)


@case(1, rules=lora("emb"))
def embedding_out_in(dtype: Any) -> Made:
    return lambda p, ids: p["emb"].T[ids] + p["emb"][:, ids[0]].T, weights(dtype, emb=(D, V)), (tokens(),)


@case(3, expect={"w": Dims((0,), (1, 2)), "u": Dims((0, 2), (1,)), "o": Dims((2,), (1,), (0,))}, dtypes=BOTH)
def einsum_weight_first(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        y = jnp.einsum("dnf,btd->nbft", p["w"], x)
        z = jnp.einsum("nof,nbft->tbo", p["u"], y)
        return jnp.einsum("gij,gtbj->gibt", p["o"], jnp.stack([z, jnp.sin(z)]))

    return apply, weights(dtype, w=(D, 2, 3), u=(2, F, 3), o=(2, D, F)), (data(dtype),)


@case(1, expect={"w": Dims((2,), (0, 1))})
def bilinear(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("bti,oij,btj->bto", x, p["w"], jnp.tanh(x), optimize=[(1, 2), (0, 1)])

    return apply, weights(dtype, w=(5, D, D)), (data(dtype),)


@case(2, expect={"up": Dims((1,), (2,), (0,))}, dtypes=BOTH)
def experts_batched(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(x @ jnp.asarray(np.eye(D, 3), dtype))
        routed = jnp.einsum("bte,btd->ebtd", gates, x)
        hidden = jax.nn.silu(jnp.einsum("ebtd,edf->ebtf", routed, p["up"]))
        return jnp.einsum("ebtf,efd->btd", hidden, p["down"])

    return apply, weights(dtype, up=(3, D, F), down=(3, F, D)), (data(dtype),)


@case(2, expect={"up": Dims((1,), (2,), (0,)), "down": Dims((1,), (2,), (0,))}, dtypes=BOTH)
def experts_ragged(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(jax.nn.silu(jax.lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)

    return apply, weights(dtype, up=(3, D, F), down=(3, F, D)), (data(dtype, 12, D), jnp.array([5, 0, 7], jnp.int32))


@case(1, expect={"w": Dims((1,), (2,), (0,))}, dtypes=BOTH)
def experts_gathered(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.einsum("nd,ndf->nf", x, p["w"][ids])

    return apply, weights(dtype, w=(3, D, F)), (data(dtype, 10, D), tokens(10, below=3))


@case(1, expect={"w": Dims((1,), (2,), (0,))})
def vmapped_stack(dtype: Any) -> Made:
    return lambda p, x: jax.vmap(jnp.matmul)(jnp.cos(x), p["w"]), weights(dtype, w=(B, D, F)), (data(dtype),)


@case(1, expect={"w": IN_OUT})
def vmapped_vectors(dtype: Any) -> Made:
    one = lambda w, v: w.T @ v  # noqa: E731
    return (
        lambda p, x: jax.vmap(jax.vmap(one, (None, 0)), (None, 1), 1)(p["w"], x),
        weights(dtype, w=(D, F)),
        (data(dtype),),
    )


@case(1, rules=lora("kernel"), expect={"kernel": Dims((1, 2, 3), (0,), (), "conv")}, dtypes=BOTH)
def conv_nchw_oihw(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        kw = {"window_strides": (1, 2), "padding": "SAME", "dimension_numbers": ("NCHW", "OIHW", "NCHW")}
        return jax.lax.conv_general_dilated(x, p["kernel"], **kw)

    return apply, weights(dtype, kernel=(5, 3, 3, 2)), (data(dtype, B, 3, 6, 5),)


@case(1, rules=lora("kernel"), expect={"kernel": Dims((0, 1, 3), (2,), (), "conv")})
def conv_mixed_layout_dilated(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        kernel = jnp.transpose(p["kernel"], (0, 1, 3, 2))[::-1]
        kw = {"lhs_dilation": (2, 1), "rhs_dilation": (1, 2), "dimension_numbers": ("HWNC", "HWIO", "NHWC")}
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((2, 1), (0, 3)), **kw)

    return apply, weights(dtype, kernel=(3, 2, 5, 3)), (data(dtype, 6, 5, B, 3),)


@case(1, rules=lora("kernel"))
def conv_transposed(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.conv_transpose(x, p["kernel"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    return apply, weights(dtype, kernel=(3, D, F)), (data(dtype),)


@case(3, expect={"w": IN_OUT}, still=("u",))
def barriers_names_stops(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        w, v = jax.lax.optimization_barrier((p["w"], checkpoint_name(p["v"], "v")))
        return (x @ w) @ jnp.copy(v) + x @ jax.lax.stop_gradient(p["u"])

    return apply, weights(dtype, w=(D, F), v=(F, D), u=(D, D)), (data(dtype),)


@case(2, expect={"w": IN_OUT}, dtypes=("float32",), tol=10 * 2.0**-8)
def cast_to_bf16(dtype: Any) -> Made:
    """The bound: ten roundings to bfloat16, 2**-8 each."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        low = {k: w.astype(jnp.bfloat16) for k, w in p.items()}
        return (jax.nn.gelu(x.astype(jnp.bfloat16) @ low["w"]) @ low["v"]).astype(dtype)

    return apply, weights(dtype, w=(D, F), v=(F, D)), (data(dtype),)


@case(2, rules=lora("0/w", "1/0"))
def lists_and_tuples(dtype: Any) -> Made:
    params = [{"w": numbers("a", (D, F), dtype)}, (numbers("b", (F, D), dtype), numbers("c", (D,), dtype))]
    return lambda p, x: (x @ p[0]["w"]) @ p[1][0] * p[1][1], params, (data(dtype),)


@case(rules=lora("w"), error="UnsupportedUse", words=("'w'", "tanh", "plain.py"))
def elementwise(dtype: Any) -> Made:
    return lambda p, x: x @ jnp.tanh(p["w"]), weights(dtype, w=(D, F)), (data(dtype),)


@case(rules=lora("w"), error="UnsupportedUse", words=("'w'", "plain.py"))
def weight_decay_inside(dtype: Any) -> Made:
    return lambda p, x: (x @ p["w"]).sum() + jnp.sum(p["w"] ** 2), weights(dtype, w=(D, F)), (data(dtype),)


@case(rules=lora("flat"), error="JpeftError", words=("'flat'",))
def one_flat_vector(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["flat"][: D * F].reshape(D, F)) @ p["flat"][D * F :].reshape(F, D)

    return apply, weights(dtype, flat=(2 * D * F,)), (data(dtype),)
