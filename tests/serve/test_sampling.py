"""The filters against numpy, written down token by token, and the draws against their probabilities."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.errors import ModelInputError
from jpeft.serve.sampling import Sampling, filtered, next_token


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def oracle(row: np.ndarray, how: Sampling, seen: np.ndarray) -> np.ndarray:
    """One row in float64, with loops."""
    x = row.astype(np.float64).copy()
    for i in range(len(x)):
        if seen[i] and how.repetition_penalty != 1:
            x[i] = x[i] / how.repetition_penalty if x[i] > 0 else x[i] * how.repetition_penalty
    if how.temperature:
        x /= how.temperature
    order = np.argsort(-x)
    if how.top_k is not None:
        x[order[how.top_k:]] = -np.inf
    if how.top_p is not None:
        total, chance = 0.0, softmax(x)
        for i in order:
            if total >= how.top_p:
                x[i] = -np.inf
            total += chance[i]
    if how.min_p is not None:
        chance = softmax(x)
        x[chance < how.min_p * chance.max()] = -np.inf
    return x


CASES = [
    Sampling(), Sampling(1.3), Sampling(temperature=0.7), Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=2.0, top_k=1), Sampling(temperature=1.0, top_k=500), Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=1.0, top_p=1e-6), Sampling(temperature=1.0, top_p=1.0), Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.0, min_p=1.0), Sampling(1.2, 0.8, 20, 0.9, 0.05), Sampling(0.7, 1.5, 7, 0.5),
]


@pytest.mark.parametrize("how", CASES, ids=str)
def test_filters(how: Sampling) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 40)).astype(np.float32) * 3
    seen = rng.random((6, 40)) < 0.3
    got = np.asarray(jax.jit(filtered)(logits, how.values(), seen))
    want = np.stack([oracle(row, how, mark) for row, mark in zip(logits, seen, strict=True)])
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_draws_follow_the_probabilities() -> None:
    logits = jnp.tile(jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]])), (4000, 1))
    drawn = next_token(logits, Sampling(temperature=1.0, top_k=3).values(), jax.random.key(0))
    share = np.bincount(np.asarray(drawn), minlength=4) / 4000
    np.testing.assert_allclose(share, np.array([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.03)


def test_greedy_and_nan() -> None:
    logits = jnp.asarray([[0.0, 3.0, 1.0], [0.0, jnp.nan, 1.0], [-jnp.inf, 0.0, -jnp.inf]])
    assert next_token(logits, {}, jax.random.key(0)).tolist() == [1, -1, 1]
    assert next_token(logits, {"temperature": 1e-3}, jax.random.key(0)).tolist() == [1, -1, 1]


def test_a_new_value_compiles_nothing() -> None:
    count = 0

    def choose(values: Any) -> jax.Array:
        nonlocal count
        count += 1
        return next_token(jnp.ones((1, 4)), values, jax.random.key(0))

    jitted = jax.jit(choose)
    for k in (1, 2, 3):
        jitted(Sampling(temperature=0.5 * k, top_k=k).values())
    assert count == 1


@pytest.mark.parametrize(("change", "text"), [
    ({"temperature": -1.0}, "temperature = -1.0, must be >= 0"),
    ({"temperature": 1.0, "top_k": 0}, "top_k = 0, must be >= 1"),
    ({"temperature": 1.0, "top_p": 0.0}, r"top_p = 0.0, must be in \(0, 1\]"),
    ({"temperature": 1.0, "min_p": 2.0}, r"min_p = 2.0, must be in \[0, 1\]"),
    ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0, must be > 0"),
    ({"top_k": 5, "top_p": 0.5}, "top_k, top_p without a temperature"),
])  # fmt: skip
def test_wrong_values(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelInputError, match=text):
        Sampling(**change)
