"""The loss of a language model in a training step: the mean over learnt tokens, its sums, and the penalty."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jpeft.train.losses import causal_lm, mean_and_count, model_inputs, seq2seq
from jpeft.train.state import create
from jpeft.train.step import compiled_step

KEY = jax.random.key(0)
TABLE = {"table": jax.random.normal(KEY, (7, 7))}


def batch(rows: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.RandomState(seed)
    tokens = random.randint(0, 7, (rows, 5)).astype(np.int32)
    weights = (random.rand(rows, 5) < 0.6).astype(np.float32) * np.float32([0, 1, 1, 0.5, 1])
    return {"tokens": tokens, "labels": np.where(weights > 0, tokens, -1), "weights": weights}


def bigrams(trainable: Any, frozen: Any, batch: Any, key: Any) -> jax.Array:
    """Return the loss of a model in which a token predicts the next one."""
    logs = jax.nn.log_softmax(trainable["table"][batch["tokens"][:, :-1]])
    picked = jnp.take_along_axis(logs, jnp.maximum(batch["labels"][:, 1:, None], 0), -1)[..., 0]
    weights = batch["weights"][:, 1:]
    return -jnp.sum(picked * weights) / jnp.maximum(jnp.sum(weights), 1e-9)


def test_the_mean_and_its_sums() -> None:
    one = batch()
    loss, metrics = causal_lm(bigrams)(TABLE, None, one, KEY)
    logs = np.asarray(jax.nn.log_softmax(TABLE["table"]))
    total = -sum(one["weights"][b, t] * logs[one["tokens"][b, t - 1], one["tokens"][b, t]]
                 for b in range(2) for t in range(1, 5))
    assert float(metrics["count"]) == one["weights"].sum()
    assert float(metrics["loss_sum"]) == pytest.approx(total, rel=1e-6)
    assert float(loss) == pytest.approx(total / one["weights"].sum(), rel=1e-6)
    assert sorted(metrics) == ["count", "loss_sum"]


def test_what_has_no_label_is_not_counted() -> None:
    one = batch()
    one["weights"][:, 1] = 1
    one["labels"][:, 1] = -1
    assert float(mean_and_count(bigrams, TABLE, None, one, None)[1]) == one["weights"].sum() - 2


def test_a_batch_that_teaches_nothing() -> None:
    one = batch()
    one["weights"][:] = 0
    loss, metrics = causal_lm(bigrams)(TABLE, None, one, KEY)
    assert (float(loss), float(metrics["loss_sum"]), float(metrics["count"])) == (0, 0, 0)


def test_half_precision_is_counted_in_single() -> None:
    one = {**batch(), "weights": np.ones((2, 5), jnp.bfloat16), "labels": np.zeros((2, 5), int)}
    loss, metrics = causal_lm(lambda *args: jnp.asarray(3.1, jnp.bfloat16))(TABLE, None, one, KEY)
    assert loss.dtype == metrics["count"].dtype == metrics["loss_sum"].dtype == jnp.float32
    big = {"labels": np.zeros((4, 257), int), "weights": np.ones((4, 257), jnp.bfloat16)}
    assert float(mean_and_count(lambda *args: jnp.zeros(()), None, None, big, None)[1]) == 4 * 257


def test_penalty_is_added_to_the_loss_and_not_to_its_sum() -> None:
    plain, sums = causal_lm(bigrams)(TABLE, None, batch(), KEY)
    loss, metrics = causal_lm(bigrams, penalty=lambda t, f: jnp.asarray(2.0))(TABLE, None, batch(), KEY)
    assert float(loss) == pytest.approx(float(plain) + 2)
    assert float(metrics["loss_sum"]) == float(sums["loss_sum"])
    assert float(metrics["penalty"]) == 2


def test_a_step_learns_and_hands_the_key_on() -> None:
    keys = []

    def apply(trainable: Any, frozen: Any, batch: Any, key: Any) -> jax.Array:
        keys.append(key)
        return bigrams(trainable, frozen, batch, key)

    tx = optax.sgd(1.0)
    step = compiled_step(seq2seq(apply), tx, donate=False)
    state = create(TABLE, tx, KEY)
    losses = []
    for _ in range(3):
        state, metrics = step(state, None, batch())
        losses.append(float(metrics["loss"]))
        assert float(metrics["loss_sum"]) == pytest.approx(losses[-1] * float(metrics["count"]), rel=1e-6)
    assert losses[2] < losses[1] < losses[0]
    assert len(keys) == 1
    assert keys[0] is not None


def test_the_arguments_of_a_model() -> None:
    given = {"tokens": 0, "attention_mask": 1, "positions": 2, "segment_ids": 3, "labels": 4, "weights": 5}
    assert model_inputs(given) == {
        "attention_mask": 1, "positions": 2, "segment_ids": 3, "labels": 4, "label_weights": 5}
