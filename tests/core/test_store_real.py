"""Real plans and adapters on disk; `test_store` has stand-ins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from core.test_store import same
from flax import nnx

import jpeft
from jpeft import errors
from jpeft.core import store


def chain(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ params["in"], params["layers"])
    return x @ params["out"]


@pytest.fixture(scope="module")
def real():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"in": (4, 5), "layers": (3, 5, 5), "out": (5, 2)}
    params = {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=False)}
    x = jax.random.normal(keys[3], (2, 4))
    rules = {
        jpeft.layers("layers", [0, 2]): jpeft.LoRA(rank=2, alpha=16),
        "in": jpeft.LoRA(rank=3, init_weights="pissa"),
    }
    plan = jpeft.plan(chain, params, (x,), rules)
    trainable, frozen = jpeft.init(plan, params, jax.random.key(1))
    return plan, params, jax.tree.map(lambda t: t + 0.1, trainable), frozen, x


def test_a_real_adapter(real, tmp_path):
    plan, params, trainable, frozen, x = real
    store.save(tmp_path, plan, trainable, frozen)
    plan2, trainable2, frozen2 = store.load(tmp_path, params)
    assert plan2 == plan
    assert jax.tree.structure((trainable2, frozen2)) == jax.tree.structure((trainable, frozen))
    same(frozen2.theta, frozen.theta)
    traces = []

    @jax.jit
    def run(trainable, frozen):
        traces.append(1)
        return jpeft.adapt(chain, plan)(trainable, frozen, x)

    np.testing.assert_array_equal(run(trainable, frozen), run(trainable2, frozen2))
    assert len(traces) == 1
    stored = safetensors.numpy.load_file(tmp_path / "adapter.safetensors")
    sizes = [t.size for key, t in stored.items() if key.startswith("trainable/")]
    assert sum(sizes) == plan.count() < sum(t.size for t in jax.tree.leaves(trainable))


def test_a_real_adapter_on_another_container(real, tmp_path):
    plan, params, trainable, frozen, _ = real
    store.save(tmp_path, plan, trainable, frozen)
    state = nnx.State({name: nnx.Param(p) for name, p in params.items()})
    assert store.load(tmp_path, state)[2].base is state
    with pytest.raises(errors.WrongBaseError, match="other values"):
        store.load(tmp_path, {**params, "out": -params["out"]})


def test_a_real_float64_adapter(tmp_path):
    with jax.enable_x64(True):
        params = {"w": jnp.ones((4, 5), jnp.float64)}
        plan = jpeft.plan(lambda p, x: x @ p["w"], params, (jnp.ones((2, 4)),), {"w": jpeft.LoRA(rank=2)})
        trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
        store.save(tmp_path, plan, trainable, frozen)
        same(store.load(tmp_path, params)[1], trainable)
    with pytest.raises(errors.WrongDtypeError, match=r"float64.*jax_enable_x64"):
        store.load(tmp_path, params)
