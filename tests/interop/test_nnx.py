"""`from_nnx`: a module becomes a pure function of its parameters and of the rest of its state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support import assert_close, randomise

import jpeft
from jpeft.interop.nnx import from_nnx

D = 8
X = jax.random.normal(jax.random.key(0), (4, D))


class Net(nnx.Module):
    """Statistics, keys, a layer used twice under two names, and a subclass of Param."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(D, D, rngs=rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.twice = self.first
        self.side = nnx.LoRA(D, 2, D, rngs=rngs)

    def __call__(self, x: jax.Array, scale: float = 1.0) -> jax.Array:
        return self.twice(self.drop(self.norm(self.first(x)))) * scale + self.side(x)

    def encode(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.first(x))


@pytest.fixture
def net() -> Net:
    return Net(nnx.Rngs(0))


def test_params_are_every_kind_of_param_and_rest_is_the_rest(net: Net) -> None:
    _, params, rest = from_nnx(net)
    assert set(jpeft.core.paths.flatten(params)[0]) == {
        "first/kernel", "first/bias", "norm/scale", "norm/bias", "side/lora_a", "side/lora_b"}
    assert set(jpeft.core.paths.flatten(rest)[0]) == {"norm/mean", "norm/var", "drop/rngs/count", "drop/rngs/key"}


def test_equals_the_module_and_leaves_it_alone(net: Net) -> None:
    apply, params, rest = from_nnx(net)
    before = jax.tree.map(jnp.copy, rest)
    out, new = apply(params, rest, X, scale=2.0)
    again, _ = apply(params, rest, X, scale=2.0)
    assert_close(rest, before, 0.0)
    assert_close(again, out, 0.0)
    assert_close(nnx.state(net, nnx.Not(nnx.Param)), before, 0.0)
    assert_close(net(X, scale=2.0), out, 1e-6)
    assert_close(nnx.state(net, nnx.Not(nnx.Param)), new, 1e-6)
    assert jnp.any(apply(params, new, X)[0] != apply(params, rest, X)[0])


def test_under_jit_and_grad(net: Net) -> None:
    apply, params, rest = from_nnx(net)

    def loss(params: Any, rest: Any) -> tuple[jax.Array, Any]:
        out, rest = apply(params, rest, X)
        return jnp.sum(out**2), rest

    gradient, new = jax.jit(jax.grad(loss, has_aux=True))(params, rest)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert jax.tree.structure(new) == jax.tree.structure(rest)
    graph, _, _ = nnx.split(net, nnx.Param, ...)
    oracle = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p, rest, copy=True)(X) ** 2))(params)
    assert_close(gradient, oracle, 1e-5)


def test_adapted_equals_merged_with_state(net: Net) -> None:
    apply, params, rest = from_nnx(net)
    plan = jpeft.plan(apply, params, (rest, X), {"all-linear": jpeft.LoRA(rank=2)})
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
    trainable = randomise(trainable)
    ours = jax.jit(jpeft.adapt(apply, plan))(trainable, frozen, rest, X)
    assert_close(ours, jax.jit(apply)(jpeft.merge(plan, trainable, frozen), rest, X), 1e-5)


def test_another_method_and_an_abstract_module() -> None:
    apply, params, rest = from_nnx(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), method="encode")
    out, new = jax.eval_shape(apply, params, rest, X)
    assert out.shape == X.shape
    assert jax.tree.structure(new) == jax.tree.structure(rest)
    assert jpeft.inspect(apply, params, (rest, X))["side/lora_a"].use == "unused"


def test_a_cache_goes_round() -> None:
    attention = nnx.MultiHeadAttention(2, D, decode=True, rngs=nnx.Rngs(0))
    attention.init_cache((1, 3, D))
    apply, params, rest = from_nnx(attention)
    for _ in range(2):
        _, rest = apply(params, rest, X[None, :1])
    assert int(rest["cache_index"][...]) == 2


@pytest.mark.filterwarnings("ignore:.*sow:DeprecationWarning")
def test_what_is_sown_comes_out_and_may_go_in_again() -> None:
    class Sowing(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(D, D, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            x = self.linear(x)
            self.sow(nnx.Intermediate, "hidden", x)
            return x

    apply, params, rest = from_nnx(Sowing())
    out, new = apply(params, rest, X)
    assert_close(jax.tree.leaves(new), [out], 0.0)
    _, last = apply(params, new, X)
    assert jax.tree.structure(last) == jax.tree.structure(new)


def test_no_such_method_is_an_error_at_once(net: Net) -> None:
    with pytest.raises(AttributeError, match="decode"):
        from_nnx(net, method="decode")
