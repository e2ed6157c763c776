"""An adapted function is a pure JAX function: every transformation applies to it, and every training habit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, randomise, x64

import jpeft

L, B, D, F = 3, 2, 8, 12
TOL = 1e-10
RULES = {"all-linear": jpeft.LoRA(rank=2, alpha=4)}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with x64():
        yield


def apply(params: Any, x: jax.Array) -> jax.Array:
    """Scan three rematerialised blocks, then a head."""

    @jax.checkpoint
    def block(h: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return h + jnp.tanh(h @ layer["up"] + layer["bias"]) @ layer["down"], None

    return jax.lax.scan(block, x, params["layers"])[0] @ params["head"]


def make_params() -> Any:
    shapes = {"layers": {"up": (L, D, F), "down": (L, F, D), "bias": (L, F)}, "head": (D, 5)}
    zeros = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda s: isinstance(s, tuple))
    return randomise(zeros, seed=5, scale=0.4)


@dataclasses.dataclass(frozen=True)
class Ready:
    """The model, planned, with every trainable entry random."""

    params: Any
    x: jax.Array
    plan: Any
    trainable: Any
    frozen: Any
    adapted: Callable[..., Any]

    def loss(self, trainable: Any, x: jax.Array | None = None, frozen: Any = None) -> jax.Array:
        out = self.adapted(trainable, frozen or self.frozen, self.x if x is None else x)
        return jnp.mean(jnp.square(out - 1))

    def oracle(self, trainable: Any, x: jax.Array | None = None, frozen: Any = None) -> jax.Array:
        merged = jpeft.merge(self.plan, trainable, frozen or self.frozen)
        return jnp.mean(jnp.square(apply(merged, self.x if x is None else x) - 1))


def prepare(rules: Any = None) -> Ready:
    params, x = make_params(), randomise(jnp.zeros((B, 4, D)), 6, 1.0)
    plan = jpeft.plan(apply, params, (x,), rules or RULES)
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
    return Ready(params, x, plan, randomise(trainable, 7), frozen, jpeft.adapt(apply, plan))


@pytest.fixture
def r() -> Ready:
    return _ready()


@functools.cache
def _ready() -> Ready:
    return prepare()


def test_three_leaves(r: Ready) -> None:
    assert sorted(r.trainable) == ["head", "layers/down", "layers/up"]
    assert {k: v["a"].shape for k, v in r.trainable.items()} == {
        "head": (D, 2),
        "layers/down": (L, F, 2),
        "layers/up": (L, D, 2),
    }


def test_eager_and_jit(r: Ready) -> None:
    want = apply(jpeft.merge(r.plan, r.trainable, r.frozen), r.x)
    assert_close(r.adapted(r.trainable, r.frozen, r.x), want, TOL)
    assert_close(jax.jit(r.adapted)(r.trainable, r.frozen, r.x), want, TOL)


def test_grad(r: Ready) -> None:
    assert_close(
        jax.jit(jax.value_and_grad(r.loss))(r.trainable), jax.jit(jax.value_and_grad(r.oracle))(r.trainable), TOL
    )


def test_jvp(r: Ready) -> None:
    tangent = randomise(r.trainable, 8)
    ours = jax.jit(lambda t, d: jax.jvp(r.loss, (t,), (d,)))(r.trainable, tangent)
    assert_close(ours, jax.jit(lambda t, d: jax.jvp(r.oracle, (t,), (d,)))(r.trainable, tangent), TOL)


def test_hessian_vector_product(r: Ready) -> None:
    tangent = randomise(r.trainable, 8)

    def product(loss: Callable[..., Any]) -> Any:
        return jax.jit(lambda t, d: jax.jvp(jax.grad(loss), (t,), (d,))[1])(r.trainable, tangent)

    assert_close(product(r.loss), product(r.oracle), TOL)


def test_vmap_over_data(r: Ready) -> None:
    xs = randomise(jnp.zeros((3, B, 4, D)), 9, 1.0)
    ours = jax.jit(jax.vmap(lambda x: r.adapted(r.trainable, r.frozen, x)))(xs)
    assert_close(ours, apply(jpeft.merge(r.plan, r.trainable, r.frozen), xs), TOL)


def test_vmap_over_adapters_of_different_alpha(r: Ready) -> None:
    other = prepare({"all-linear": jpeft.LoRA(rank=2, alpha=16)})
    adapters = [(r.trainable, r.frozen.theta), (randomise(r.trainable, 10), other.frozen.theta)]
    trainable, theta = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    served = jax.jit(jax.vmap(lambda t, th: r.adapted(t, r.frozen._replace(theta=th), r.x)))(trainable, theta)
    for i, (plan, (t, th)) in enumerate(zip((r.plan, other.plan), adapters, strict=True)):
        assert_close(served[i], apply(jpeft.merge(plan, t, r.frozen._replace(theta=th)), r.x), TOL)


def test_vmap_over_everything(r: Ready) -> None:
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), (r.trainable, r.frozen.base, r.x))

    def one(trainable: Any, base: Any, x: jax.Array) -> jax.Array:
        return r.loss(trainable, x, r.frozen._replace(base=base))

    def merged(trainable: Any, base: Any, x: jax.Array) -> jax.Array:
        return r.oracle(trainable, x, r.frozen._replace(base=base))

    assert_close(jax.jit(jax.vmap(jax.grad(one)))(*stacked), jax.jit(jax.vmap(jax.grad(merged)))(*stacked), TOL)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_pmap(r: Ready) -> None:
    xs = randomise(jnp.zeros((8, B, 4, D)), 11, 1.0)
    step = jax.pmap(lambda t, x: jax.lax.pmean(jax.grad(r.loss)(t, x), "d"), axis_name="d", in_axes=(None, 0))
    ours = jax.tree.map(lambda leaf: leaf[0], step(r.trainable, xs))
    assert_close(ours, jax.jit(jax.grad(r.oracle))(r.trainable, xs), TOL)


def test_donation_leaves_the_base_alone() -> None:
    r = prepare()
    trainable, frozen = jpeft.init(r.plan, r.params, jax.random.key(1))
    for mine, theirs in zip(jax.tree.leaves(frozen.base), jax.tree.leaves(r.params), strict=True):
        assert mine is theirs
    leaves = jax.tree.leaves((trainable, frozen))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    step = jax.jit(lambda t, f: jax.tree.map(lambda w, g: w - g, t, jax.grad(r.loss)(t, None, f)), donate_argnums=0)
    after = step(step(trainable, frozen), frozen)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((r.params, frozen)))
    assert jnp.isfinite(apply(jpeft.merge(r.plan, after, frozen), r.x)).all()


def test_one_trace_for_a_hundred_steps_and_another_alpha() -> None:
    traces = 0

    def counted(params: Any, x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return apply(params, x)

    params, x = make_params(), randomise(jnp.zeros((B, 4, D)), 6, 1.0)
    plan = jpeft.plan(counted, params, (x,), RULES)
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
    adapted, optimiser = jpeft.adapt(counted, plan), optax.adam(1e-2)

    @jax.jit
    def step(trainable: Any, state: Any, frozen: Any, x: jax.Array) -> Any:
        loss, slope = jax.value_and_grad(lambda t: jnp.mean(jnp.square(adapted(t, frozen, x) - 1)))(trainable)
        updates, state = optimiser.update(slope, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    state, traces, losses = optimiser.init(trainable), 0, []
    for _ in range(100):
        trainable, state, loss = step(trainable, state, frozen, x)
        losses.append(float(loss))
    assert traces == 1
    assert losses[-1] < 0.5 * losses[0]
    louder = jpeft.plan(apply, params, (x,), {"all-linear": jpeft.LoRA(rank=2, alpha=16)})
    step(trainable, state, jpeft.init(louder, params, jax.random.key(0))[1], x)
    assert traces == 1


def test_checkpoint_around(r: Ready) -> None:
    around = jax.checkpoint(r.adapted)
    ours = jax.jit(jax.grad(lambda t: jnp.mean(jnp.square(around(t, r.frozen, r.x) - 1))))(r.trainable)
    assert_close(ours, jax.jit(jax.grad(r.oracle))(r.trainable), TOL)


def test_training_loop_inside_scan(r: Ready) -> None:
    def run(loss: Callable[..., Any], trainable: Any) -> Any:
        step = lambda t, _: (jax.tree.map(lambda w, g: w - 0.1 * g, t, jax.grad(loss)(t)), None)  # noqa: E731
        return jax.lax.scan(step, trainable, None, length=5)[0]

    assert_close(
        jax.jit(run, static_argnums=0)(r.loss, r.trainable), jax.jit(run, static_argnums=0)(r.oracle, r.trainable), 1e-9
    )


def test_abstract_evaluation_and_planning(r: Ready) -> None:
    shapes = jax.eval_shape(lambda *leaves: leaves, r.params, r.x)
    plan = jpeft.plan(apply, shapes[0], shapes[1:], RULES)
    assert plan == r.plan
    assert hash(plan) == hash(r.plan)
    out = jax.eval_shape(r.adapted, r.trainable, r.frozen, r.x)
    assert (out.shape, out.dtype) == ((B, 4, 5), jnp.float64)
    half = jax.eval_shape(r.adapted, r.trainable, r.frozen, jax.ShapeDtypeStruct((7, 3, D), jnp.float64))
    assert half.shape == (7, 3, 5)


def test_gradient_of_the_base_is_right(r: Ready) -> None:
    ours = jax.jit(jax.grad(lambda base: r.loss(r.trainable, None, r.frozen._replace(base=base))))(r.frozen.base)
    oracle = jax.jit(jax.grad(lambda base: r.oracle(r.trainable, None, r.frozen._replace(base=base))))(r.frozen.base)
    assert_close(ours, oracle, TOL)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(ours))


def test_adapt_another_function_of_the_same_params(r: Ready) -> None:
    def first_layer(params: Any, x: jax.Array, *, shift: float) -> tuple[jax.Array, jax.Array]:
        return x @ params["layers"]["up"][0] + shift, params["layers"]["bias"]

    merged = jpeft.merge(r.plan, r.trainable, r.frozen)
    ours = jpeft.adapt(first_layer, r.plan)(r.trainable, r.frozen, r.x, shift=2.0)
    assert_close(ours, first_layer(merged, r.x, shift=2.0), TOL)


def encode(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["enc"])


def decode(params: Any, h: jax.Array, *, scale: float = 1.0) -> jax.Array:
    return scale * (h @ params["dec"])


def test_uses_of_several_functions() -> None:
    params = randomise({"enc": jnp.zeros((D, F)), "dec": jnp.zeros((F, D))}, 3)
    x, h = randomise((jnp.zeros((B, D)), jnp.zeros((B, F))), 4)
    with pytest.raises(jpeft.errors.UnusedLeafError, match="dec"):
        jpeft.plan(encode, params, (x,), {"enc|dec": jpeft.LoRA(rank=2)})
    plan = jpeft.plan(encode, params, (x,), {"enc|dec": jpeft.LoRA(rank=2)}, uses=[(decode, (h,), {"scale": 2.0})])
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
    trainable = randomise(trainable, 5)
    merged = jpeft.merge(plan, trainable, frozen)
    assert sorted(trainable) == ["dec", "enc"]
    assert_close(jpeft.adapt(encode, plan)(trainable, frozen, x), encode(merged, x), TOL)
    assert_close(jpeft.adapt(decode, plan)(trainable, frozen, h, scale=3.0), decode(merged, h, scale=3.0), TOL)


def options(
    params: Any, x: jax.Array, mode: str, mask: jax.Array | None = None, *, double: bool = False, power: int
) -> Any:
    y = x @ params["w"] if mode == "plain" else jnp.sin(x) @ params["w"]
    y = y if mask is None else y * mask
    return {"y": (2 * y if double else y) ** power, "mode": jnp.asarray(len(mode))}


def test_static_arguments() -> None:
    params, x = randomise({"w": jnp.zeros((D, F))}, 3), randomise(jnp.zeros((B, D)), 4)
    plan = jpeft.plan(
        options, params, (x, "plain"), {"w": jpeft.LoRA(rank=2)}, example_kwargs={"double": True, "power": 2}
    )
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
    trainable, adapted = randomise(trainable, 5), jpeft.adapt(options, plan)
    merged, mask = jpeft.merge(plan, trainable, frozen), jnp.arange(F) % 2
    assert_close(adapted(trainable, frozen, x, "plain", power=1), options(merged, x, "plain", power=1), TOL)
    want = options(merged, x, "sine", mask, double=True, power=3)
    assert_close(adapted(trainable, frozen, x, "sine", mask, double=True, power=3), want, TOL)
    jitted = jax.jit(adapted, static_argnums=3, static_argnames=("double", "power"))
    assert_close(jitted(trainable, frozen, x, "sine", mask, double=True, power=3), want, TOL)


def test_call_is_a_pytree_and_evaluation_needs_no_key(r: Ready) -> None:
    plain = r.adapted(r.trainable, r.frozen, r.x)
    assert_close(r.adapted(r.trainable, r.frozen, r.x, peft=jpeft.Call()), plain, 0.0)
    keyed = jax.jit(lambda t, call: r.adapted(t, r.frozen, r.x, peft=call))
    assert_close(keyed(r.trainable, jpeft.Call(key=jax.random.key(0))), plain, TOL)


def test_numpy_parameters_and_inputs(r: Ready) -> None:
    params, x = jax.tree.map(np.asarray, (r.params, r.x))
    plan = jpeft.plan(apply, params, (x,), RULES)
    _, frozen = jpeft.init(plan, params, jax.random.key(0))
    assert_close(jpeft.adapt(apply, plan)(r.trainable, frozen, x), r.adapted(r.trainable, r.frozen, r.x), TOL)


def test_base_turns_the_adapter_off(r: Ready) -> None:
    assert_close(apply(jpeft.base(r.plan, r.frozen), r.x), apply(r.params, r.x), 0.0)
