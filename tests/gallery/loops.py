"""Plain JAX: weights inside loops, branches, checkpoints and custom derivative rules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gallery.case import BOTH, B, D, Dims, F, Made, T, data, lora, numbers, table, weights

CASES, case = table("loops")
STACK = {"w": Dims((1,), (2,), (0,))}
SQUARE = {"w": Dims((0,), (1,))}


def stacked(dtype: Any) -> dict[str, jax.Array]:
    return weights(dtype, w=(3, D, D), b=(3, D))


@case(1, expect=STACK, dtypes=BOTH)
def unrolled_indices(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        for i in range(3):
            x = jnp.tanh(x @ p["w"][i] + p["b"][i])
        return x

    return apply, stacked(dtype), (data(dtype),)


@case(1, expect=STACK, dtypes=BOTH)
def scan_over_indices(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        def body(h: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(h @ p["w"][i] + p["b"][i]), None

        return jax.lax.scan(body, x, jnp.arange(3))[0]

    return apply, stacked(dtype), (data(dtype),)


@case(1, expect=STACK)
def fori_dynamic_index(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        def body(i: jax.Array, h: jax.Array) -> jax.Array:
            return jnp.tanh(h @ jax.lax.dynamic_index_in_dim(p["w"], i, keepdims=False))

        return jax.lax.fori_loop(0, 3, body, x)

    return apply, stacked(dtype), (data(dtype),)


@case(1, expect=STACK)
def scan_reversed_unrolled(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> Any:
        body = lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"]), h.sum())  # noqa: E731
        return jax.lax.scan(body, x, p, reverse=True, unroll=2)

    return apply, stacked(dtype), (data(dtype),)


@case(1, expect={"w": Dims((2,), (3,), (0, 1))})
def scan_nested(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        inner = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return jax.lax.scan(lambda h, ws: jax.lax.scan(inner, h, ws), x, p["w"])[0]

    return apply, weights(dtype, w=(2, 2, D, D)), (data(dtype),)


@case(1, expect={"w": Dims((1,), (2,), (0,))})
def scan_over_a_view(dtype: Any) -> Made:
    """The stacked leaf is sliced, reversed and transposed before the loop."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        ws = jnp.swapaxes(p["w"][1:][::-1], 1, 2)
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w.T), None), x, ws)[0]

    return apply, weights(dtype, w=(4, D, D)), (data(dtype),)


@case(1, expect=STACK)
def scan_with_checkpoint(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        body = jax.checkpoint(lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"]), None), prevent_cse=False)
        return jax.lax.scan(body, x, p)[0]

    return apply, stacked(dtype), (data(dtype),)


@case(3, expect={"0/w": Dims((0,), (1,))}, dtypes=BOTH)
def list_stacked_then_scanned(dtype: Any) -> Made:
    def apply(layers: Any, x: jax.Array) -> jax.Array:
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        return jax.lax.scan(lambda h, p: (jnp.tanh(h @ p["w"] + p["b"]), None), x, params)[0]

    layers = [{"w": numbers(f"w{i}", (D, D), dtype, 0.4), "b": numbers(f"b{i}", (D,), dtype)} for i in range(3)]
    return apply, layers, (data(dtype),)


@case(1, rules=lora("1/w"))
def list_stacked_one_adapted(dtype: Any) -> Made:
    return list_stacked_then_scanned(dtype)


@case(2, expect={"w": Dims((0,), (1,)), "u": Dims((0,), (1,))}, dtypes=BOTH)
def recurrent_cell(dtype: Any) -> Made:
    """The weight is a constant of a scan over time."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        def cell(h: jax.Array, xt: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jnp.tanh(xt @ p["w"] + h @ p["u"])
            return h, h

        return jax.lax.scan(cell, jnp.zeros((B, F), x.dtype), jnp.swapaxes(x, 0, 1))[1]

    return apply, weights(dtype, w=(D, F), u=(F, F)), (data(dtype),)


@case(1, expect=SQUARE, reverse=False)
def while_constant(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array, n: jax.Array) -> jax.Array:
        step = lambda state: (state[0] + 1, jnp.tanh(state[1] @ p["w"]))  # noqa: E731
        return jax.lax.while_loop(lambda state: state[0] < n, step, (0, x))[1]

    return apply, weights(dtype, w=(D, D)), (data(dtype), jnp.asarray(3))


@case(1, expect=SQUARE, reverse=False)
def while_unchanged_carry(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array, n: jax.Array) -> jax.Array:
        step = lambda state: (state[0] + 1, state[1], jnp.tanh(state[2] @ state[1]))  # noqa: E731
        return jax.lax.while_loop(lambda state: state[0] < n, step, (0, p["w"], x))[2]

    return apply, weights(dtype, w=(D, D)), (data(dtype), jnp.asarray(3))


@case(1, expect=SQUARE)
def fori_constant(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]), x)

    return apply, weights(dtype, w=(D, D)), (data(dtype),)


@case(1, expect=SQUARE)
def scan_unchanged_carry(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        body = lambda carry, _: ((carry[0], jnp.tanh(carry[1] @ carry[0])), None)  # noqa: E731
        return jax.lax.scan(body, (p["w"], x), None, length=3)[0][1]

    return apply, weights(dtype, w=(D, D)), (data(dtype),)


@case(1, expect=STACK)
def scan_unchanged_carry_indexed(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        body = lambda carry, i: ((carry[0], jnp.tanh(carry[1] @ carry[0][i])), None)  # noqa: E731
        return jax.lax.scan(body, (p["w"], x), jnp.arange(3))[0][1]

    return apply, stacked(dtype), (data(dtype),)


@case(2, expect=SQUARE)
def cond_branches(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        y = jax.lax.cond(x.sum() > 0, lambda h: h @ p["w"], lambda h: jnp.sin(h) @ p["v"], x)
        return jax.lax.switch(2, [lambda h: h, lambda h: h @ p["v"], lambda h: h @ p["w"].T], y)

    return apply, weights(dtype, w=(D, D), v=(D, D)), (data(dtype),)


@case(1, expect=SQUARE)
def cond_returns_a_view(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return x @ jax.lax.cond(x.sum() > 0, lambda w: 2 * w, lambda w: w, p["w"])

    return apply, weights(dtype, w=(D, F)), (data(dtype),)


@case(1, expect=STACK)
def cond_chooses_a_layer(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return x @ jax.lax.cond(x.sum() > 0, lambda w: w[1], lambda w: w[2], p["w"])

    return apply, weights(dtype, w=(3, D, F)), (data(dtype),)


@case(2, expect=SQUARE)
def checkpoint_returns_views(dtype: Any) -> Made:
    """A checkpoint hands back its weights beside its output, as nnx.remat does."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        block = jax.checkpoint(lambda p, h: (p, p["w"].T, jnp.tanh(h @ p["w"])))
        p, turned, x = block(p, x)
        return (x @ p["v"]) @ turned

    return apply, weights(dtype, w=(D, F), v=(F, F)), (data(dtype),)


@case(1)
def checkpoint_policy(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        for i in range(3):
            policy = jax.checkpoint_policies.everything_saveable if i else jax.checkpoint_policies.nothing_saveable
            x = jax.checkpoint(lambda h, w: jnp.sin(h @ w), policy=policy)(x, p["w"][i])
        return x

    return apply, stacked(dtype), (data(dtype),)


@case(1)
def jit_inside(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        layer = jax.jit(lambda w, h: (w.T, jnp.tanh(h @ w)))
        turned, x = layer(p["w"], x)
        return layer(turned, x)[1]

    return apply, weights(dtype, w=(D, F)), (data(dtype),)


@jax.custom_vjp
def clipped(x: jax.Array) -> jax.Array:
    return x * 1.0


clipped.defvjp(lambda x: (x * 1.0, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_jvp
def softsign(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.abs(x))


softsign.defjvps(lambda t, y, x: t * (1 - jnp.abs(y)) ** 2)


@case(2, dtypes=BOTH)
def custom_rules_on_activations(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return clipped(softsign(clipped(x @ p["w"])) @ p["v"])

    return apply, weights(dtype, w=(D, F), v=(F, D)), (data(dtype),)


@case(1)
def custom_vjp_in_scan_and_checkpoint(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        body = jax.checkpoint(lambda h, w: (softsign(clipped(h @ w)), None))
        return jax.lax.scan(body, x, p["w"])[0]

    return apply, weights(dtype, w=(3, D, D)), (data(dtype),)


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (g @ saved[1].T, jnp.tensordot(saved[0], g, ((0, 1), (0, 1)))),
)


@case(rules=lora("w"), error="UnsupportedUse", words=("'w'", "custom_vjp", "loops.py"))
def custom_vjp_takes_the_weight(dtype: Any) -> Made:
    return lambda p, x: product(x, p["w"]), weights(dtype, w=(D, F)), (data(dtype),)


@case(1, rules=lora("v"))
def custom_vjp_takes_another_weight(dtype: Any) -> Made:
    return lambda p, x: product(x @ p["v"], p["w"]), weights(dtype, w=(D, F), v=(D, D)), (data(dtype),)


@case(rules=lora("w"), error="UnsupportedUse", words=("'w'", "loops.py"))
def changing_carry(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        body = lambda carry, _: ((jnp.tanh(carry[0]), carry[1] @ carry[0]), None)  # noqa: E731
        return jax.lax.scan(body, (p["w"], x), None, length=3)[0][1]

    return apply, weights(dtype, w=(D, D)), (data(dtype),)


@case(1, expect=SQUARE)
def mapped_tokens(dtype: Any) -> Made:
    return (
        lambda p, x: jax.lax.map(lambda xt: jnp.tanh(xt @ p["w"]), x, batch_size=2),
        weights(dtype, w=(D, F)),
        (data(dtype, 5, T, D),),
    )
