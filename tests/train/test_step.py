"""State, step, loss and evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train.tinyjob import Job, bits

import jpeft
from jpeft.errors import BatchesError, LossFunctionError
from jpeft.train import losses
from jpeft.train import state as states
from jpeft.train.evaluate import evaluate
from jpeft.train.step import compiled_step

KEY = jax.random.key(0)


def quadratic(trainable, frozen, batch, key):
    return jnp.sum((trainable["w"] - batch) ** 2), {"noise": jax.random.uniform(key)}


def fresh(tx=None, key=KEY, **leaves):
    tx = tx or optax.adam(0.1)
    return states.create(leaves or {"w": jnp.zeros(3)}, tx, key), tx


def test_step_is_the_plain_update():
    state, tx = fresh(optax.adamw(0.1))
    step = compiled_step(quadratic, tx, schedule=lambda n: 0.5 * n, donate=False)
    trainable, opt_state = {"w": jnp.zeros(3)}, tx.init({"w": jnp.zeros(3)})
    batch = jnp.arange(3.0)
    for n in range(3):
        grads = {"w": 2 * (trainable["w"] - batch)}
        norm = float(jnp.linalg.norm(grads["w"]))
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        state, metrics = step(state, None, batch)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-6)
        assert float(metrics["learning_rate"]) == 0.5 * n
        assert float(metrics["noise"]) == float(jax.random.uniform(jax.random.fold_in(KEY, n)))
    np.testing.assert_allclose(state.trainable["w"], trainable["w"], rtol=1e-6)
    assert int(state.step) == 3
    assert state.step.dtype == jnp.int32


def test_one_trace_for_many_steps():
    state, tx = fresh(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)))
    traces = []

    def counted(*args):
        traces.append(1)
        return quadratic(*args)

    step = compiled_step(counted, tx)
    for _ in range(3):
        state, _ = step(state, None, jnp.ones(3))
    assert len(traces) == 1


def test_state_is_donated_and_what_it_was_made_from_is_not():
    shared = jnp.zeros(3)
    state, tx = fresh(None, w=shared, v=shared)
    before = state.trainable["w"]
    frozen = {"base": jnp.ones(3)}
    state, _ = compiled_step(quadratic, tx)(state, frozen, jnp.ones(3))
    assert before.is_deleted()
    assert not shared.is_deleted()
    assert not frozen["base"].is_deleted()
    kept, _ = compiled_step(quadratic, tx, donate=False)(state, frozen, jnp.ones(3))
    assert not state.trainable["w"].is_deleted()
    assert float(kept.step) == 2


def test_create_keeps_shardings_and_old_style_keys():
    mesh = jax.make_mesh((2,), ("x",))
    spread = jax.device_put(jnp.zeros(4), jax.NamedSharding(mesh, jax.P("x")))
    state, tx = fresh(optax.sgd(0.1), jax.random.PRNGKey(3), w=spread)
    assert state.trainable["w"].sharding == spread.sharding
    state, metrics = compiled_step(quadratic, tx)(state, None, jnp.ones(4))
    assert float(metrics["loss"]) == 4.0


def test_nothing_of_the_base_is_trained():
    job = Job(None, 4)
    before = bits(job.frozen)
    state, metrics = job.step(job.state, job.frozen, next(job.batches))
    assert bits(job.frozen) == before
    assert set(metrics) == {"loss", "grad_norm", "learning_rate", "correct", "count"}
    inside = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert not inside & {leaf.shape for leaf in jax.tree.leaves(job.frozen.base)}


@pytest.mark.parametrize(("leaves", "text"), [
    ({"w": jnp.zeros(3, jnp.int32)}, r"trainable\['w'\] is int32, which has no gradient; keep it in frozen"),
    ({"w": {}}, "trainable has no leaves.*give a method to some leaf"),
])
def test_create_rejects_what_cannot_be_trained(leaves, text):
    with pytest.raises(LossFunctionError, match=text):
        fresh(**leaves)


@pytest.mark.parametrize(("returned", "text"), [
    (lambda w: w.sum(), r"returned a \w+, not \(loss, metrics\)"),
    (lambda w: (w, {}), r"returned the loss of shape \(3,\); reduce it"),
    (lambda w: (w.sum(), {"x": w}), r"returned 'x' of shape \(3,\); reduce it"),
    (lambda w: (w.sum().astype(int), {}), "loss of dtype int32; return a floating scalar"),
    (lambda w: (w.sum(), {"loss": w.sum()}), "metric 'loss', which the step itself reports; rename it"),
])
def test_loss_functions_that_return_something_else(returned, text):
    state, tx = fresh()
    step = compiled_step(lambda t, frozen, batch, key: returned(t["w"]), tx)
    with pytest.raises(LossFunctionError, match=text):
        step(state, None, None)


def test_float16_gradients_have_a_norm():
    state, tx = fresh(optax.sgd(0.0), w=jnp.zeros(2, jnp.float16))
    step = compiled_step(lambda t, frozen, batch, key: ((t["w"] * 300).astype(jnp.float32).sum(), {}), tx)
    assert float(step(state, None, None)[1]["grad_norm"]) == pytest.approx(300 * 2**0.5)


def classifier(trainable, frozen, tokens, attention_mask, token_types=None, key=None):
    x = trainable["table"][tokens] * attention_mask[..., None]
    if token_types is not None:
        x = x + token_types[..., None]
    if key is not None:
        x = x * jax.random.bernoulli(key, 0.5, x.shape)
    return x.mean(1).astype(jnp.bfloat16)


def batch(rows=4, filler=0, types=False):
    rng = np.random.RandomState(rows)
    made = {"tokens": rng.randint(0, 5, (rows + filler, 3)), "attention_mask": np.ones((rows + filler, 3), int),
            "labels": rng.randint(0, 2, rows + filler), "weights": np.float32([1] * rows + [0] * filler)}
    return {**made, "token_types": np.arange(3)[None] * np.ones((rows + filler, 1))} if types else made


TABLE = {"table": jax.random.normal(KEY, (5, 2))}


@pytest.mark.parametrize("types", [False, True])
def test_classification_is_the_mean_over_rows_with_weight(types):
    loss_fn = losses.classification(classifier)
    padded = batch(4, 3, types)
    plain = {name: value[:4] for name, value in padded.items()}
    loss, metrics = loss_fn(TABLE, None, plain, KEY)
    args = (plain["tokens"], plain["attention_mask"], plain.get("token_types"), KEY)
    rows = jax.nn.log_softmax(classifier(TABLE, None, *args).astype(jnp.float32))
    assert float(loss) == pytest.approx(float(-rows[np.arange(4), plain["labels"]].mean()), rel=1e-6)
    assert loss.dtype == jnp.float32
    assert float(metrics["count"]) == 4
    assert float(metrics["correct"]) == float((rows.argmax(-1) == plain["labels"]).sum())

    def still(*args, key=None, **types):  # no dropout: its mask depends on the shape
        return classifier(*args, **types)

    loss, _ = losses.classification(still)(TABLE, None, plain, KEY)
    assert float(losses.classification(still)(TABLE, None, padded, KEY)[0]) == pytest.approx(float(loss), rel=1e-6)


def test_filler_rows_that_are_not_numbers_do_no_harm():
    def apply(trainable, frozen, tokens, attention_mask, key):
        return jnp.where(attention_mask[:, :1] > 0, trainable["table"][tokens].mean(1), jnp.nan)

    padded = batch(3, 2)
    padded["attention_mask"][3:] = 0
    loss_fn = jax.value_and_grad(losses.classification(apply), has_aux=True)
    (loss, metrics), grads = loss_fn(TABLE, None, padded, KEY)
    assert np.isfinite(loss)
    assert np.isfinite(grads["table"]).all()
    assert float(metrics["count"]) == 3


def test_penalty_is_added():
    params = {"w": jnp.ones((4, 4))}
    plan = jpeft.plan(lambda p, x: x @ p["w"], params, (jnp.ones((1, 4)),), {"w": jpeft.LoRA(rank=2)})
    trainable, frozen = jpeft.init(plan, params, KEY)

    def apply(trainable, frozen, tokens, attention_mask, key):
        return trainable["w"]["a"][tokens].mean(1)

    plain, _ = losses.classification(apply)(trainable, frozen, batch() | {"tokens": np.zeros((4, 3), int)}, KEY)
    loss_fn = losses.classification(apply, penalty=lambda t, f: jpeft.penalty(plan, t, f) + 2.0)
    loss, metrics = loss_fn(trainable, frozen, batch() | {"tokens": np.zeros((4, 3), int)}, KEY)
    assert float(loss) == pytest.approx(float(plain) + 2.0)
    assert float(metrics["penalty"]) == 2.0


def test_evaluate_is_the_mean_over_all_rows_and_compiles_once_per_shape():
    traces = []

    def apply(trainable, frozen, tokens, attention_mask, key=None):
        traces.append(tokens.shape)
        assert key is None
        return classifier(trainable, frozen, tokens, attention_mask)

    parts = [batch(4), batch(2, 2), batch(5)]
    found = evaluate(apply, TABLE, None, parts)
    loss_fn = losses.classification(classifier)
    each = [(jax.jit(lambda b: loss_fn(TABLE, None, b, None))(part)) for part in parts]
    assert found["count"] == 11
    assert found["loss"] == pytest.approx(sum(float(x) * float(m["count"]) for x, m in each) / 11, rel=1e-6)
    assert found["accuracy"] == sum(float(m["correct"]) for _, m in each) / 11
    assert evaluate(apply, TABLE, None, iter(parts)) == found
    assert sorted(traces) == [(4, 3), (5, 3)]


@pytest.mark.parametrize("parts", [[], [batch(0, 2)]])
def test_evaluate_on_nothing(parts):
    with pytest.raises(BatchesError, match="no rows to evaluate on"):
        evaluate(classifier, TABLE, None, parts)
