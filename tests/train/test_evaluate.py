"""The loss of a set of tokens: the mean over tokens, however they are batched, and its perplexity."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.errors import BatchesError
from jpeft.train.evaluate import evaluate_lm


def batch(losses: list[float], weights: list[float]) -> dict[str, np.ndarray]:
    return {"losses": np.float32([losses]), "labels": np.zeros((1, len(losses)), np.int32),
            "weights": np.float32([weights])}


def mean(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
    assert key is None
    count = jnp.sum(batch["weights"])
    return trainable * jnp.sum(batch["losses"] * batch["weights"]) / jnp.where(count > 0, count, 1)


def test_the_mean_is_over_tokens_and_not_over_batches() -> None:
    parts = [batch([1, 2, 3], [1, 1, 1]), batch([8, 9, 9], [1, 0, 0]), batch([7, 7, 7], [0, 0, 0]), batch([4], [0.5])]
    found = evaluate_lm(mean, 1.0, None, parts)
    want = (1 + 2 + 3 + 8 + 4 * 0.5) / 4.5
    assert found == {"loss": pytest.approx(want, rel=1e-7), "count": 4.5, "perplexity": pytest.approx(math.exp(want))}
    whole = batch([1, 2, 3, 8, 4], [1, 1, 1, 1, 0.5])
    assert evaluate_lm(mean, 1.0, None, [whole])["loss"] == pytest.approx(want, rel=1e-6)
    assert evaluate_lm(mean, 2.0, None, iter(parts))["loss"] == pytest.approx(2 * want, rel=1e-7)


def test_many_batches_add_up_in_double() -> None:
    parts = [batch([0.1], [1])] * 5000
    assert evaluate_lm(mean, 1.0, None, parts)["loss"] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_one_trace_for_each_shape() -> None:
    traces = []

    def apply(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
        traces.append(batch["labels"].shape)
        return mean(trainable, frozen, batch, key)

    parts = [batch([1, 2], [1, 1]), batch([1], [1]), batch([3, 4], [1, 1])]
    assert evaluate_lm(apply, 1.0, None, parts) == evaluate_lm(apply, 1.0, None, parts)
    assert sorted(traces) == [(1, 1), (1, 2)]


def test_a_loss_beyond_all_perplexities() -> None:
    found = evaluate_lm(mean, 1.0, None, [batch([1e4], [1])])
    assert (found["loss"], found["perplexity"]) == (1e4, math.inf)


def test_a_loss_that_is_no_number_is_one_that_shows() -> None:
    found = evaluate_lm(mean, 1.0, None, [batch([math.nan], [1]), batch([1], [1])])
    assert math.isnan(found["loss"])
    assert not found["perplexity"] < math.inf


@pytest.mark.parametrize("parts", [[], [batch([1], [0])]])
def test_nothing_to_evaluate_on(parts: Any) -> None:
    with pytest.raises(BatchesError, match=r"^there are no tokens to evaluate on; give batches with labels"):
        evaluate_lm(mean, 1.0, None, parts)
