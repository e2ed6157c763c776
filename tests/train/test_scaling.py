"""Precision: compute in bfloat16 and float16 with float32 adapters and moments, and the loss scale of float16."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train.tinyjob import bits

import jpeft
from jpeft.errors import NonFiniteLossError, TrainConfigError
from jpeft.train import create, make_train_step, scaling
from jpeft.train.checkpoint import Checkpoints
from jpeft.train.loop import fit
from jpeft.train.step import compiled_step

KEY = jax.random.key(0)


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def training(dtype, loss_scale=None, accumulate=1):
    """Return step, state and frozen part of a LoRA training whose base and compute have a dtype."""
    keys = jax.random.split(KEY, 2)
    params = {"up": jax.random.normal(keys[0], (16, 32)) / 4, "down": jax.random.normal(keys[1], (32, 4)) / 6}
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    x = jnp.zeros((8, 16), dtype)
    plan = jpeft.plan(model, params, (x,), {"up|down": jpeft.LoRA(rank=2, alpha=4)})
    trainable, frozen = jpeft.init(plan, params, KEY)
    tx = optax.adamw(1e-2)

    def loss_fn(apply, batch, key):
        y = apply(batch["x"].astype(dtype)).astype(jnp.float32)
        return jnp.mean((y - batch["y"]) ** 2)

    step = jax.jit(make_train_step(jpeft.adapt(model, plan), loss_fn, tx, loss_scale=loss_scale, accumulate=accumulate))
    return step, create(trainable, tx, KEY, loss_scale=loss_scale), frozen


def data(steps=30):
    rng = np.random.RandomState(0)
    for _ in range(steps):
        x = rng.randn(8, 16).astype(np.float32)
        yield {"x": x, "y": np.sin(x[:, :4])}


def losses(dtype, **options):
    step, state, frozen = training(dtype, **options)
    found = []
    for batch in data():
        state, metrics = step(state, frozen, batch)
        found.append(float(metrics["loss"]))
    return found, state, metrics


@pytest.mark.parametrize(("dtype", "scale", "near"), [
    (jnp.bfloat16, None, 3e-2), (jnp.float16, "dynamic", 4e-3), (jnp.float16, 128.0, 4e-3)])
def test_adapters_and_moments_stay_float32(dtype, scale, near):
    """And the losses are those of float32 but for the rounding of `dtype`: 8 and 11 bits."""
    want, *_ = losses(jnp.float32)
    found, state, metrics = losses(dtype, loss_scale=scale)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    moments = {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
    assert moments == {jnp.dtype("float32")}
    np.testing.assert_allclose(found, want, rtol=near)
    assert found != want
    assert found[-1] < 0.8 * found[0]
    if scale is not None:
        assert (float(metrics["loss_scale"]), float(metrics["skipped"])) == ({"dynamic": 2.0**15}.get(scale, scale), 0)


def test_gradients_are_float32_and_unscaled():
    step, state, frozen = training(jnp.float32)
    scaled, begun, _ = training(jnp.float32, loss_scale=1024.0)
    parts, other, _ = training(jnp.float32, loss_scale=1024.0, accumulate=4)
    batch = next(data())
    want = step(state, frozen, batch)
    for found in (scaled(begun, frozen, batch), parts(other, frozen, batch)):
        assert float(found[1]["loss"]) == pytest.approx(float(want[1]["loss"]), rel=1e-6)
        assert float(found[1]["grad_norm"]) == pytest.approx(float(want[1]["grad_norm"]), rel=1e-5)
        assert found[1]["grad_norm"].dtype == jnp.float32


def test_small_gradients_survive_in_float16():
    """The gradient is 1e-8, which float16 does not have."""
    def loss_fn(t, frozen, batch, key):
        return (t["w"].astype(jnp.float16) * jnp.float16(1)).astype(jnp.float32).sum() * 1e-8, {}

    found = []
    for scale in (None, "dynamic"):
        state = create({"w": jnp.ones(3)}, optax.sgd(1.0), KEY, loss_scale=scale)
        _, metrics = compiled_step(loss_fn, optax.sgd(1.0), loss_scale=scale)(state, None, None)
        found.append(float(metrics["grad_norm"]))
    assert found[0] == 0
    assert found[1] == pytest.approx(1e-8 * math.sqrt(3), rel=2e-3)


def squares(t, frozen, batch, key):
    return jnp.sum((t["w"] * batch) ** 2), {}


def run(batches, scale="dynamic"):
    tx = optax.adam(0.1)
    state = create({"w": jnp.ones(2)}, tx, KEY, loss_scale=scale, ema=True)
    step = compiled_step(squares, tx, loss_scale=scale, ema=0.5, schedule=lambda n: n * 1.0, donate=False)
    seen = []
    for batch in batches:
        before = state
        state, metrics = step(state, None, jnp.full(2, batch, jnp.float32))
        seen.append((before, state, {k: float(v) for k, v in metrics.items()}))
    return seen


def test_a_step_that_overflows_is_skipped_and_the_scale_halved():
    seen = run([1.0, np.inf, np.nan, 1.0])
    assert [m["skipped"] for *_, m in seen] == [0, 1, 1, 0]
    assert [m["loss_scale"] for *_, m in seen] == [2.0**15, 2.0**15, 2.0**14, 2.0**13]
    assert [m["learning_rate"] for *_, m in seen] == [0, 1, 1, 1], "a skipped step is no update"
    for before, state, metrics in seen:
        same = bits((before.trainable, before.opt_state, before.ema)) == bits(
            (state.trainable, state.opt_state, state.ema))
        assert same == bool(metrics["skipped"])
    assert int(seen[-1][1].step) == 4
    assert int(seen[-1][1].scale.skipped) == 2


def test_the_scale_doubles_after_good_steps_up_to_its_limit(monkeypatch):
    monkeypatch.setattr(scaling, "GROW_AFTER", 2)
    monkeypatch.setattr(scaling, "MOST", 2.0**17)
    found = [m["loss_scale"] / 2.0**15 for *_, m in run([1.0, 1.0, 1.0, np.inf, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])]
    assert found == [1, 1, 2, 2, 1, 1, 2, 2, 4, 4, 4]
    assert {m["loss_scale"] for *_, m in run([1.0, np.inf, 1.0, 1.0], scale=8.0)} == {8.0}


class Batches:
    """Batches of ones; some of them infinite."""

    def __init__(self, bad):
        self.n, self.bad = 0, bad

    def __next__(self):
        self.n += 1
        return np.full(2, np.inf if self.n in self.bad else 1.0, np.float32)

    def get_state(self):
        return self.n

    def set_state(self, n):
        self.n = n


def begun(bad, scale="dynamic"):
    tx = optax.adam(0.1)
    return (compiled_step(squares, tx, loss_scale=scale),
            create({"w": jnp.ones(2)}, tx, KEY, loss_scale=scale), None, Batches(bad))


def test_the_loop_goes_on_after_skips_and_a_resumed_run_is_the_same(tmp_path):
    whole = fit(*begun({2, 3, 7}), total_steps=9)
    assert [row["skipped"] for row in whole.history] == [0, 1, 1, 0, 0, 0, 1, 0, 0]
    fit(*begun({2, 3, 7}), total_steps=4, checkpoints=Checkpoints(tmp_path))
    step, state, frozen, batches = begun({2, 3, 7})
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore(state)
    assert float(restored.state.scale.value) == 2.0**13
    batches.set_state(restored.data_position)
    again = fit(step, restored.state, frozen, batches, total_steps=9, checkpoints=checkpoints)
    assert bits(again.state) == bits(whole.state)


@pytest.mark.parametrize(("scale", "steps"), [("dynamic", 16), (4.0, 20)])
def test_skipping_without_end_is_an_error(scale, steps):
    with pytest.raises(NonFiniteLossError, match=rf"not finite after step {steps}, {steps} in a row, .* loss scale of "
                                                 r"[14]; compute in bfloat16 or float32.*there is no checkpoint"):
        fit(*begun(set(range(99)), scale), total_steps=50)
    fit(*begun(set(range(15)), scale), total_steps=20)


@pytest.mark.parametrize("scale", ["static", 0, -1.0, float("inf"), True])
def test_scales_that_are_none(scale):
    with pytest.raises(TrainConfigError, match=r"loss_scale = .* must be 'dynamic', a number above 0, or None"):
        create({"w": jnp.ones(2)}, optax.sgd(0.1), KEY, loss_scale=scale)
    with pytest.raises(TrainConfigError, match="loss_scale = "):
        compiled_step(squares, optax.sgd(0.1), loss_scale=scale)


def test_state_and_step_must_agree():
    tx = optax.sgd(0.1)
    for step, state in itertools.permutations((None, "dynamic")):
        with pytest.raises(TrainConfigError, match=r"loss_scale = .* and the state has (no|a) scale; give both"):
            compiled_step(squares, tx, loss_scale=step)(
                create({"w": jnp.ones(2)}, tx, KEY, loss_scale=state), None, jnp.ones(2))
