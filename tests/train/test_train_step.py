"""The pure step: parts of a batch give what the whole gives, on one device and on several; clipping, averages."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import assert_close, distance

import jpeft
from jpeft.errors import LossFunctionError, ShardingError, TrainConfigError
from jpeft.train import batch_shardings, create, make_train_step, pure_step, state_shardings

D, ROWS = 4, 16
needs_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def apply(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"]


@functools.cache
def setting(method: jpeft.Method = jpeft.LoRA(rank=2)) -> tuple[Any, Any, Any]:  # noqa: B008
    """An adapted function, and its partitions away from the start."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"up": jax.random.normal(keys[0], (D, 8)), "down": jax.random.normal(keys[1], (8, D))}
    plan = jpeft.plan(apply, params, (jnp.ones((2, D)),), {"up|down": method})
    trainable, frozen = jpeft.init(plan, params, jax.random.key(1))
    return jpeft.adapt(apply, plan), jax.tree.map(lambda t: t + 0.1, trainable), frozen


def loss_fn(model: Any, batch: Any, key: jax.Array) -> Any:
    """A mean over weights that differ from row to row; `wrong` is a sum, `size` a mean."""
    rows = jnp.sum(jnp.square(model(batch["x"]) - 1.0), -1)
    count = jnp.sum(batch["weights"])
    return jnp.sum(rows * batch["weights"]) / count, {"count": count, "correct": jnp.sum(batch["weights"] > 2.0),
                                                      "size": jnp.sum(rows * batch["weights"]) / count}


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.RandomState(seed)
    return {"x": rng.standard_normal((ROWS, D)).astype(np.float32),
            "weights": rng.randint(0, 5, ROWS).astype(np.float32) + (np.arange(ROWS) % 2)}


TX = optax.sgd(0.05, momentum=0.9)


@functools.cache
def whole() -> list[tuple[Any, Any]]:
    """State and metrics after one step on each of three whole batches, on one device."""
    return _steps(jax.jit(make_train_step(setting()[0], loss_fn, TX)))


def _steps(step: Any, put: Any = lambda batch: batch, change: Any = lambda state: state,
           frozen: Any = None) -> list[tuple[Any, Any]]:
    _, trainable, own = setting()
    start = change(create(trainable, TX, jax.random.key(2)))
    return [step(start, own if frozen is None else frozen, put(rows(n))) for n in range(3)]


def same(found: list[tuple[Any, Any]]) -> None:
    for (state, metrics), (want, wanted) in zip(found, whole(), strict=True):
        assert_close(jax.device_get(state.trainable), jax.device_get(want.trainable), 1e-6)
        assert set(metrics) == set(wanted)
        for name in wanted:
            assert distance(metrics[name], wanted[name]) <= 1e-6, name


def test_accumulated_parts_are_the_large_batch() -> None:
    step = make_train_step(setting()[0], loss_fn, TX, accumulate=4)
    same(_steps(jax.jit(step)))
    uncounted = make_train_step(setting()[0], lambda *args: loss_fn(*args)[0], TX, accumulate=4)
    state, _ = jax.jit(uncounted)(create(setting()[1], TX, jax.random.key(2)), setting()[2], rows())
    gap = max(map(distance, jax.tree.leaves(state.trainable), jax.tree.leaves(whole()[0][0].trainable)))
    assert gap > 1e-4, "without a count, a mean of means is something else"


@needs_devices
def test_pmap_is_the_large_batch() -> None:
    step = make_train_step(setting()[0], loss_fn, TX, axis_name="data", accumulate=2)
    spread = jax.pmap(step, axis_name="data", in_axes=(None, None, 0), out_axes=None)
    same(_steps(spread, lambda batch: jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)))


@needs_devices
def test_shard_map_is_the_large_batch() -> None:
    """At its default checks: the state that comes out is known to be the same on every device."""
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Auto,) * 2)
    step = make_train_step(setting()[0], loss_fn, TX, axis_name=("data", "fsdp"), accumulate=2)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P(("data", "fsdp"))), out_specs=(P(), P()))
    same(_steps(jax.jit(mapped)))


@needs_devices
def test_a_sharded_batch_in_parts() -> None:
    """Each device works on rows of its own in every part: none of them travels."""
    from collectives import moves

    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    step = jax.jit(make_train_step(setting()[0], loss_fn, TX, accumulate=4))
    put, frozen = batch_shardings(rows(), mesh), jax.device_put(setting()[2], everywhere)
    spread = lambda state: jax.device_put(state, everywhere)  # noqa: E731
    same(_steps(step, lambda batch: jax.device_put(batch, put), spread, frozen))
    state = jax.device_put(create(setting()[1], TX, jax.random.key(2)), everywhere)
    text = step.lower(state, frozen, jax.device_put(rows(), put)).compile().as_text()
    assert {move.kind for move in moves(text)} == {"all-reduce"}


def test_clipping_is_by_the_norm_of_the_trainable_gradients() -> None:
    adapted, trainable, frozen = setting()
    results = []
    for tx, clip in ((optax.chain(optax.clip_by_global_norm(0.01), TX), None), (TX, 0.01), (TX, 1e6)):
        state, metrics = jax.jit(make_train_step(adapted, loss_fn, tx, clip=clip))(
            create(trainable, tx, jax.random.key(2)), frozen, rows())
        results.append(state.trainable)
        assert float(metrics["grad_norm"]) > 0.1, "as it was before"
    assert_close(results[1], results[0], 1e-6)
    assert_close(results[2], whole()[0][0].trainable, 1e-6)


def test_the_average_of_the_parameters() -> None:
    adapted, trainable, frozen = setting()
    step = jax.jit(make_train_step(adapted, loss_fn, TX, ema=0.75))
    state, mean = create(trainable, TX, jax.random.key(2), ema=True), trainable
    assert state.evaluated is state.ema
    for n in range(3):
        state, _ = step(state, frozen, rows(n))
        mean = jax.tree.map(lambda e, t: 0.75 * e + 0.25 * t, mean, state.trainable)
    assert_close(state.ema, mean, 1e-6)
    plain = create(trainable, TX, jax.random.key(2))
    assert plain.evaluated is plain.trainable
    with pytest.raises(TrainConfigError, match=r"ema = 0.75 and the state has no average; make the state with create"):
        step(plain, frozen, rows())
    with pytest.raises(TrainConfigError, match="ema = None and the state has an average"):
        make_train_step(adapted, loss_fn, TX)(state, frozen, rows())


def test_regularisers_and_dropout_keys_come_with_the_adapted_function() -> None:
    adapted, trainable, frozen = setting(jpeft.AdaLoRA(init_r=3, target_r=2))
    def mean(model: Any, batch: Any, key: jax.Array) -> Any:
        return jnp.mean(model(batch["x"])), {"noise": jax.random.uniform(key)}

    key = jax.random.key(2)
    _, metrics = jax.jit(make_train_step(adapted, mean, TX))(create(trainable, TX, key), frozen, rows())
    want = jpeft.penalty(adapted.plan, trainable, frozen)
    assert distance(metrics["penalty"], want) <= 1e-6
    assert float(want) > 0
    assert distance(metrics["loss"], want + jnp.mean(adapted(trainable, frozen, rows()["x"]))) <= 1e-6
    assert float(metrics["noise"]) == float(jax.random.uniform(jax.random.fold_in(key, 0)))


@needs_devices
def test_a_state_is_born_where_it_belongs() -> None:
    """Slots lie as their parameters, the rest everywhere; the abstract answer is what the arrays have."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    trainable = {"w": jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh, P("fsdp", "tensor"))),
                 "b": jax.device_put(jnp.ones(8), NamedSharding(mesh, P("tensor")))}
    for tx in (optax.adamw(0.1), optax.chain(optax.clip_by_global_norm(1.0), optax.adafactor(0.1))):
        state = create(trainable, tx, jax.random.key(0), ema=True)
        places = jax.tree.map(lambda x: x.sharding, trainable)
        where = state_shardings(jax.eval_shape(lambda: trainable), places, tx, ema=True)
        assert jax.tree.all(jax.tree.map(lambda x, one: x.sharding == one, state, where))
        assert {x.sharding.spec for x in jax.tree.leaves(state.opt_state) if x.shape == (4, 8)} <= {P("fsdp", "tensor")}
        assert state.trainable["w"] is not trainable["w"]


def test_what_makes_no_sense() -> None:
    adapted, trainable, frozen = setting()
    for options, text in (({"accumulate": 0}, "accumulate = 0 must be"), ({"clip": 0.0}, "clip = 0.0 must be"),
                          ({"ema": 1.0}, "ema = 1.0 must be")):
        with pytest.raises(TrainConfigError, match=text):
            make_train_step(adapted, loss_fn, TX, **options)
    with pytest.raises(TrainConfigError, match="both must be functions"):
        make_train_step(adapted, None, TX)
    state = create(trainable, TX, jax.random.key(2))
    with pytest.raises(TrainConfigError, match="accumulate = 3 does not divide a batch of 16 rows"):
        make_train_step(adapted, loss_fn, TX, accumulate=3)(state, frozen, rows())
    with pytest.raises(LossFunctionError, match=r"returned the loss of shape \(16, 4\)"):
        make_train_step(adapted, lambda model, batch, key: model(batch["x"]), TX)(state, frozen, rows())
    with pytest.raises(LossFunctionError, match=r"not \(loss, metrics\)"):
        pure_step(lambda *args: jnp.zeros(()), TX)(state, frozen, rows())


@needs_devices
def test_batches_that_a_mesh_does_not_divide() -> None:
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "sequence"), (AxisType.Auto,) * 3)
    struct = jax.ShapeDtypeStruct((4, 6), jnp.int32)
    assert batch_shardings(struct, mesh).spec == P(("data", "fsdp"), "sequence")
    for shape, text in (((6, 6), "6 rows, which data, fsdp of 4 devices do not divide; make it 8 rows"),
                        ((4, 5), "5 tokens, which sequence of 2 devices do not divide; make it 6 tokens")):
        with pytest.raises(ShardingError, match=text):
            batch_shardings(jax.ShapeDtypeStruct(shape, jnp.int32), mesh)
