"""Chunked cross-entropy: equal to the plain one, adapted heads inside, and the memory that it saves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.errors import ModelInputError
from jpeft.models.loss import chunked_cross_entropy, token_losses

VOCAB, WIDTH = 37, 8


def data(batch: int = 3, length: int = 11) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (batch, length, WIDTH))
    kernel = jax.random.normal(keys[1], (WIDTH, VOCAB))
    labels = jax.random.randint(keys[2], (batch, length), 0, VOCAB)
    return hidden, kernel, labels, jax.random.uniform(keys[3], (batch, length))


def plain(hidden: Any, kernel: Any, labels: Any, weights: Any, cap: float | None = None) -> jax.Array:
    logits = hidden @ kernel
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    logp = jax.nn.log_softmax(logits)
    weights = weights * (labels >= 0)
    picked = jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(picked * weights) / jnp.sum(weights)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 7, 12, 1000])
def test_equals_plain(chunk: int, cap: float | None) -> None:
    hidden, kernel, labels, weights = data()
    labels = labels.at[0, :4].set(-100)

    def chunked(hidden: Any, kernel: Any, weights: Any) -> jax.Array:
        return chunked_cross_entropy(hidden, kernel, labels, weights, soft_cap=cap, chunk=chunk)

    got = jax.jit(jax.value_and_grad(chunked, (0, 1, 2)))(hidden, kernel, weights)
    want = jax.value_and_grad(lambda h, k, w: plain(h, k, labels, w, cap), (0, 1, 2))(hidden, kernel, weights)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_ignored_labels_pass_no_gradient_and_no_weight_is_zero() -> None:
    hidden, kernel, labels, weights = data()
    labels = labels.at[1].set(-100)
    grads = jax.grad(lambda h: chunked_cross_entropy(h, kernel, labels, chunk=4))(hidden)
    assert not grads[1].any()
    assert grads[0].any()
    loss, grads = jax.value_and_grad(lambda h: chunked_cross_entropy(h, kernel, labels, 0 * weights))(hidden)
    assert loss == 0.0
    assert not grads.any()


def test_a_label_out_of_the_vocabulary_is_seen() -> None:
    hidden, kernel, labels, _ = data()
    assert jnp.isnan(token_losses(hidden, kernel, labels.at[0, 0].set(VOCAB), chunk=5)[0, 0])


@pytest.mark.parametrize(("change", "text"), [
    ({"labels": jnp.zeros((3, 10), int)}, r"found \(3, 11, 8\) and \(3, 10\)"),
    ({"label_weights": jnp.zeros((3, 10))}, r"label_weights has shape \(3, 10\), must be \(3, 11\)"),
    ({"chunk": 0}, "chunk is 0, must be a positive"),
])  # fmt: skip
def test_wrong_inputs(change: dict[str, Any], text: str) -> None:
    hidden, kernel, labels, weights = data()
    with pytest.raises(ModelInputError, match=text):
        chunked_cross_entropy(**{"hidden": hidden, "head": kernel, "labels": labels, "label_weights": weights,
                                 **change})


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_adapted_head_stays_adapted_inside(tied: bool) -> None:
    """The engine sees the head through scan and checkpoint: no weight is formed, and it equals merged weights."""
    _, kernel, labels, weights = data()
    params = {"table": kernel.T} if tied else {"table": kernel.T, "head": kernel[:, ::-1]}

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        hidden = jnp.tanh(params["table"][tokens])
        head = (lambda x: x @ params["table"].T) if tied else params["head"]
        return chunked_cross_entropy(hidden, head, jnp.roll(labels, 1), weights, soft_cap=5.0, chunk=6)

    plan = jpeft.plan(apply, params, (labels,), {"table" if tied else "head": jpeft.LoRA(rank=2, alpha=4)})
    trainable, frozen = jpeft.init(plan, params, jax.random.key(1))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    adapted = jpeft.adapt(apply, plan)
    got, grads = jax.value_and_grad(adapted)(trainable, frozen, labels)
    np.testing.assert_allclose(got, apply(jpeft.merge(plan, trainable, frozen), labels), rtol=1e-5)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    text = str(jax.make_jaxpr(jax.grad(adapted))(trainable, frozen, labels))
    assert f"f32[{WIDTH},{VOCAB}] = dot_general" not in text
    assert f"f32[{VOCAB},{WIDTH}] = dot_general" not in text


def temp_bytes(loss: Any, batch: int, length: int, vocab: int) -> int:
    shapes = (jax.ShapeDtypeStruct((batch, length, 8), jnp.float32), jax.ShapeDtypeStruct((8, vocab), jnp.float32),
              jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch, length), jnp.float32))
    analysis = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def test_memory_at_a_large_vocabulary() -> None:
    """Only compiled. Plain holds all logits at least once; chunked some copies of one chunk's, whatever the tokens."""
    batch, length, vocab, chunk = 4, 128, 131_072, 32
    one = 4 * vocab * chunk
    full = temp_bytes(plain, batch, length, vocab)

    def chunked(*args: Any) -> jax.Array:
        return chunked_cross_entropy(*args, chunk=chunk)

    small = temp_bytes(chunked, batch, length, vocab)
    print(f"temp bytes at {batch * length} tokens, V = {vocab:,}: plain {full:,}, chunks of {chunk} {small:,}")
    assert full >= 4 * batch * length * vocab
    assert small <= 4 * one
    assert temp_bytes(chunked, batch, 2 * length, vocab) <= small + one // 4
