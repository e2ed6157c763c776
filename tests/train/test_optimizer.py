"""Optimisers by name: each is the Optax one it says, with our schedule, decay and clipping."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.errors import NoMatchError, TrainConfigError
from jpeft.optim import decay_mask
from jpeft.train import compiled_step, create
from jpeft.train.optimizer import Optimizer, make, muon_dimensions, schedule

PARAMS = {"w": {"a": jnp.arange(1.0, 7).reshape(3, 2), "b": jnp.ones((2, 3))}, "s": {"m": jnp.full((1, 3), 2.0)}}
GRADS = jax.tree.map(lambda x: jnp.cos(3 * x), PARAMS)


def after(tx, steps=3):
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), after(ours), after(theirs))


@pytest.mark.parametrize(("optimizer", "theirs"), [
    (Optimizer("adamw", 0.1, weight_decay=0.3), lambda rate: optax.adamw(rate, weight_decay=0.3, mask=decay_mask)),
    (Optimizer("adamw", 0.1, betas=(0.5, 0.7), eps=1e-3),
     lambda rate: optax.adamw(rate, 0.5, 0.7, 1e-3, weight_decay=0.0)),
    (Optimizer("adam", 0.1, betas=(0.5, 0.7)), lambda rate: optax.adam(rate, 0.5, 0.7)),
    (Optimizer("lion", 0.1, weight_decay=0.3), lambda rate: optax.lion(rate, weight_decay=0.3, mask=decay_mask)),
    (Optimizer("sgd", 0.1), optax.sgd),
    (Optimizer("sgd", 0.1, betas=[0.9, 0.999]), lambda rate: optax.sgd(rate, 0.9)),
    (Optimizer("adafactor", 0.1), optax.adafactor),
    (Optimizer("muon", 0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3),
     lambda rate: optax.contrib.muon(rate, eps=1e-6, weight_decay=0.3, adam_b1=0.8, adam_b2=0.9, consistent_rms=0.2,
                                     muon_weight_dimension_numbers=muon_dimensions(PARAMS))),
    (Optimizer("schedule_free", 0.1, "constant"), optax.contrib.schedule_free_adamw),
    (Optimizer("adamw", 0.1, clip=0.5),
     lambda rate: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, weight_decay=0.0))),
    (Optimizer("adamw", 0.1, lora_plus=4.0, weight_decay=0.3),
     lambda rate: jpeft.optim.lora_plus(rate, 4.0, weight_decay=0.3, mask=decay_mask)),
], ids=lambda x: x.name if isinstance(x, Optimizer) else "")
def test_is_what_optax_has(optimizer, theirs):
    tx, rate = make(optimizer, 5, PARAMS)
    assert_same(tx, theirs(rate))


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor", "muon"])
def test_decay_is_decoupled_and_spares_vectors(name):
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    tx, _ = make(Optimizer(name, 0.1, schedule="constant", weight_decay=0.5), 5, PARAMS)
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["w"]["a"], -0.1 * 0.5 * PARAMS["w"]["a"], rtol=1e-6)
    assert not updates["s"]["m"].any()


def test_clip_is_of_all_trainable_gradients_before_lora_plus():
    tx, _ = make(Optimizer("sgd", 1.0, schedule="constant", clip=1.0, lora_plus=2.0), 5, PARAMS)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    norm = float(optax.tree.norm(GRADS))
    assert norm > 1
    np.testing.assert_allclose(updates["w"]["a"], -GRADS["w"]["a"] / norm, rtol=1e-5)
    np.testing.assert_allclose(updates["w"]["b"], -2 * GRADS["w"]["b"] / norm, rtol=1e-5)


@pytest.mark.parametrize(("kind", "warmup", "total", "want"), [
    ("linear", 0, 4, [1, 0.75, 0.5, 0.25]),
    ("linear", 0.5, 4, [0.5, 1, 1, 0.5]),
    ("linear", 4, 4, [0.25, 0.5, 0.75, 1]),
    ("linear", 1, 1, [1]),
    ("cosine", 0, 4, [1, 0.8536, 0.5, 0.1464]),
    ("constant", 2, 4, [0.5, 1, 1, 1]),
    ("constant", 0.0, 2, [1, 1]),
    ("wsd", 2, 10, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]),
])
def test_schedules(kind, warmup, total, want):
    rate = schedule(kind, 2.0, warmup, total)
    np.testing.assert_allclose([float(rate(n)) / 2 for n in range(total)], want, atol=1e-4)
    assert float(jax.jit(rate)(jnp.int32(total - 1))) > 0


@pytest.mark.parametrize(("decay", "want"), [
    (4, [1, 1, 1, 0.75, 0.5, 0.25]), (0.5, [1, 1, 1, 1, 2 / 3, 1 / 3]), (0, [1] * 6)])
def test_the_decay_of_wsd(decay, want):
    _, rate = make(Optimizer("sgd", 2.0, "wsd", decay=decay), 6, PARAMS)
    np.testing.assert_allclose([float(rate(n)) / 2 for n in range(6)], want, atol=1e-6)
    with pytest.raises(TrainConfigError, match="warmup = 4 and decay = 3 steps are longer than the training of 6"):
        schedule("wsd", 1.0, 4, 6, 3)


def stacked():
    """A plan with LoRA on a stack of three matrices, and in full a matrix with two output dims and a bias."""
    params = {"w": jnp.ones((3, 8, 8)), "k": jnp.ones((8, 2, 5)), "b": jnp.zeros(8)}

    def model(p, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w + p["b"]), None), x, p["w"])
        return jnp.einsum("bi,ihk->bhk", x, p["k"])

    rules = {"w": jpeft.LoRA(rank=2), "k": jpeft.Full(), "b": jpeft.Full()}
    plan = jpeft.plan(model, params, (jnp.ones((2, 8)),), rules)
    trainable, _ = jpeft.init(plan, params, jax.random.key(0))
    return plan, trainable


def test_muon_makes_each_matrix_of_a_stack_orthogonal():
    plan, trainable = stacked()
    keys = iter(jax.random.split(jax.random.key(1), 9))
    grads = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), trainable)
    tx, _ = make(Optimizer("muon", 1.0, "constant"), 5, trainable, plan)
    updates, _ = jax.jit(tx.update)(grads, tx.init(trainable), trainable)
    for update, shape in ((updates["w"]["a"], (3, 8, 2)), (updates["w"]["b"], (3, 2, 8)),
                          (updates["k"]["w"], (8, 2, 5))):
        assert update.shape == shape
        matrices = update.reshape(-1, 8, 10) if shape == (8, 2, 5) else update
        for one in matrices:
            sizes = np.linalg.svd(np.asarray(one), compute_uv=False) / (0.2 * math.sqrt(max(one.shape)))
            # The iteration of five steps ends in a band around 1, and not at it.
            assert 0.6 < sizes.min() <= sizes.max() < 1.3, sizes
    sizes = np.abs(updates["b"]["w"])
    assert sizes.max() < 1.001 * sizes.min(), "a bias is Adam's: all of its first updates are of one size"


def test_what_to_evaluate_of_schedule_free_is_its_average():
    """By the equations of the paper: z takes the steps, x is the mean of the z, y is between them."""
    target = np.arange(1.0, 5).reshape(2, 2)
    start = {"w": {"a": jnp.zeros((2, 2))}}
    tx, _ = make(Optimizer("schedule_free", 0.1, "constant", weight_decay=0.3, clip=100.0, rates={"w": 0.05}), 5, start)
    state = create(start, tx, jax.random.key(0))
    step = compiled_step(lambda t, frozen, batch, key: (jnp.sum((t["w"]["a"] - target) ** 2), {}), tx)
    z = x = y = v = np.zeros((2, 2))
    for n in range(1, 6):
        state, _ = step(state, None, None)
        g = 2 * (y - target)
        v = 0.999 * v + 0.001 * g**2
        z = z - 0.05 * (g / (np.sqrt(v / (1 - 0.999**n)) + 1e-8) + 0.3 * y)
        x = x + (z - x) / n
        y = 0.9 * x + 0.1 * z
        np.testing.assert_allclose(state.trainable["w"]["a"], y, rtol=1e-5)
        np.testing.assert_allclose(state.evaluated["w"]["a"], x, rtol=1e-5)
    assert not np.allclose(x, y)


def test_schedule_free_with_a_method_that_drops_values_is_an_error():
    params = {"w": jnp.ones((8, 4))}
    rules = {"w": jpeft.AdaLoRA(init_r=3, target_r=1)}
    plan = jpeft.plan(lambda p, x: x @ p["w"], params, (jnp.ones((2, 8)),), rules)
    trainable, _ = jpeft.init(plan, params, jax.random.key(0))
    with pytest.raises(TrainConfigError, match=r"drops values between steps, .* schedule_free would bring back"):
        make(Optimizer("schedule_free", 0.1, "constant"), 9, trainable, plan)


def test_the_plan_recommends_a_rate():
    params = {"w": jnp.ones((4, 4))}
    plan = jpeft.plan(lambda p, x: x @ p["w"], params, (jnp.ones((1, 4)),), {"w": jpeft.LoRA(rank=2)})
    _, rate = make(Optimizer(schedule="constant"), 5, PARAMS, plan)
    assert float(rate(0)) == pytest.approx(jpeft.LoRA.recommended_lr)
    with pytest.raises(TrainConfigError, match="learning_rate is not set and there is no plan"):
        make(Optimizer(), 5, PARAMS)


@pytest.mark.parametrize(("fields", "text"), [
    ({"name": "adamW"}, r"name = 'adamW' is none of .* \(nearest: 'adam"),
    ({"schedule": "cosin"}, "schedule = 'cosin' is none of .*'cosine'"),
    ({"learning_rate": 0}, "learning_rate = 0 must be a number above 0"),
    ({"learning_rate": float("nan")}, "learning_rate = nan must be"),
    ({"clip": -1.0}, "clip = -1.0 must be"),
    ({"weight_decay": -0.1}, "weight_decay = -0.1 must be 0 or more"),
    ({"name": "adam", "weight_decay": 0.1}, "adam has no weight decay.*use adamw"),
    ({"warmup": 2.5}, "warmup = 2.5 must be a share below 1 or a whole number"),
    ({"warmup": -1}, "warmup = -1 must be"),
    ({"decay": 0.1}, "decay = 0.1 is of the schedule wsd, and this is linear; drop it"),
    ({"schedule": "wsd", "decay": 1.5}, "decay = 1.5 must be a share below 1 or a whole number of steps"),
    ({"name": "schedule_free"}, "averages in place of a schedule, and schedule = 'linear'; set it to 'constant'"),
    ({"name": "schedule_free", "schedule": "constant", "betas": (0.0, 0.9)}, "divides by the first of betas"),
    ({"betas": (0.9, 1.0)}, r"betas = \(0.9, 1.0\) must be two numbers in \[0, 1\)"),
])
def test_fields_that_make_no_sense(fields, text):
    with pytest.raises(TrainConfigError, match=text):
        Optimizer(**fields)


def test_arguments_that_do_not_fit():
    with pytest.raises(TrainConfigError, match="warmup = 9 steps is longer than the training of 5"):
        make(Optimizer(learning_rate=0.1, warmup=9), 5, PARAMS)
    with pytest.raises(TrainConfigError, match="total_steps = 0 must be 1 or more"):
        make(Optimizer(learning_rate=0.1), 0, PARAMS)
    with pytest.raises(NoMatchError, match=r"LoRA\+ needs"):
        make(Optimizer(learning_rate=0.1, lora_plus=4.0), 5, {"s": PARAMS["s"]})


@pytest.mark.parametrize("name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "lion", "sgd", "adafactor", "muon", "schedule_free"))])
def test_a_leaf_may_have_a_rate_of_its_own(name):
    """Which is what training with that rate alone would do to it, decay included."""
    kind = "constant" if name == "schedule_free" else "linear"
    own, _ = make(Optimizer(name, 0.1, kind, weight_decay=0.3, rates={"w": 0.02}), 5, PARAMS)
    mixed, slow, fast = (after(tx) for tx in (own, *(make(Optimizer(name, rate, kind, weight_decay=0.3), 5, PARAMS)[0]
                                                     for rate in (0.02, 0.1))))
    for found, want in ((mixed["w"], slow["w"]), (mixed["s"], fast["s"])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), found, want)
    with pytest.raises(TrainConfigError, match="rates has the path 'v', where nothing trains; nearest: "):
        make(Optimizer(name, 0.1, kind, rates={"v": 1.0}), 5, PARAMS)
    with pytest.raises(TrainConfigError, match="must be a number above 0"):
        Optimizer(name, schedule=kind, rates={"w": 0.0})
