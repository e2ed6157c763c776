"""Loss functions for `pure_step` and `compiled_step`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jpeft.train.step import LossFn, Metrics

Batch = Mapping[str, Any]
Apply = Callable[..., jax.Array]
Penalty = Callable[[Any, Any], jax.Array]


def classification(apply: Apply, *, penalty: Penalty | None = None) -> LossFn:
    """Return the loss of a classifier: mean softmax cross-entropy of the rows, in float32.

        loss = sum_i w_i CE(logits_i, label_i) / sum_i w_i  (+ penalty)

    Args:
        apply: `(trainable, frozen, tokens, attention_mask, token_types=..., key=...) -> logits [B, C]`; `token_types`
            is passed only where the batch has them, `key` is for dropout.
        penalty: `(trainable, frozen) -> scalar`, added to the loss and reported as `penalty`; for the regularisers of
            methods, `lambda t, f: jpeft.penalty(plan, t, f)`.

    Returns:
        A loss function for batches with `tokens [B, T]`, `attention_mask [B, T]`, `labels [B]`, `weights [B]` (0 for a
        row that only fills the batch) and perhaps `token_types [B, T]`. Its metrics are sums: `correct` and `count`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def apply(trainable, frozen, tokens, attention_mask, key=None):
        ...     return trainable["table"][tokens].mean(1)
        >>> batch = {"tokens": jnp.array([[0, 1], [1, 1]]), "attention_mask": jnp.ones((2, 2), int),
        ...          "labels": jnp.array([0, 1]), "weights": jnp.array([1.0, 0.0])}
        >>> loss, metrics = classification(apply)({"table": jnp.eye(2)}, None, batch, jax.random.key(0))
        >>> round(float(loss), 4), float(metrics["correct"]), float(metrics["count"])
        (0.6931, 1.0, 1.0)
    """

    def loss_fn(trainable: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        total, metrics = sums(logits_of(apply, trainable, frozen, batch, key), batch["labels"], batch["weights"])
        loss = total / jnp.maximum(metrics["count"], jnp.finfo(jnp.float32).tiny)
        return _penalised(loss, metrics, penalty, trainable, frozen)

    return loss_fn


def causal_lm(apply: Apply, *, penalty: Penalty | None = None) -> LossFn:
    """Return the loss of a language model that computes it itself: the mean over the tokens that are learnt.

    Args:
        apply: `(trainable, frozen, batch, key) -> scalar`: the weighted mean that `model.apply` returns as `loss` for
            `batch["tokens"]` and `model_inputs(batch)`; `key` is for dropout.
        penalty: as of `classification`.

    Returns:
        A loss function for batches of `jpeft.data.packing`: `labels [B, T]`, negative where nothing is learnt, and
        `weights [B, T]`. Its metrics are sums over tokens: `loss_sum` and `count`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> batch = {"labels": jnp.array([[-1, 1, 2]]), "weights": jnp.array([[0.0, 1.0, 1.0]])}
        >>> loss_fn = causal_lm(lambda trainable, frozen, batch, key: trainable["x"] ** 2)
        >>> loss, metrics = loss_fn({"x": jnp.array(3.0)}, None, batch, jax.random.key(0))
        >>> float(loss), float(metrics["loss_sum"]), float(metrics["count"])
        (9.0, 18.0, 2.0)
    """

    def loss_fn(trainable: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        loss, count = mean_and_count(apply, trainable, frozen, batch, key)
        return _penalised(loss, {"loss_sum": loss * count, "count": count}, penalty, trainable, frozen)

    return loss_fn


seq2seq = causal_lm  # what differs is in the model: a decoder shifts its labels, an encoder-decoder its inputs


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Return the arguments of `model.apply` besides the tokens, by name.

    Example:
        >>> sorted(model_inputs({"tokens": 0, "attention_mask": 1, "labels": 2, "weights": 3}))
        ['attention_mask', 'label_weights', 'labels']
    """
    return {"label_weights" if name == "weights" else name: value for name, value in batch.items() if name != "tokens"}


def mean_and_count(apply: Apply, trainable: Any, frozen: Any, batch: Batch,
                   key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return the mean loss of a batch and the weight of its learnt tokens, in float32; `key=None` means evaluation."""
    weights = jnp.asarray(batch["weights"], jnp.float32)
    count = jnp.sum(jnp.where(jnp.asarray(batch["labels"]) >= 0, weights, 0.0))
    return apply(trainable, frozen, batch, key).astype(jnp.float32), count


def logits_of(apply: Apply, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
    """Return the logits `[B, C]` of a batch; `key=None` means evaluation."""
    types = {"token_types": batch["token_types"]} if "token_types" in batch else {}
    return apply(trainable, frozen, batch["tokens"], batch["attention_mask"], **types, key=key)


def sums(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, Metrics]:
    """Return the weighted sum of the cross-entropies and the sums `correct` and `count`, in float32."""
    logits, weights = logits.astype(jnp.float32), weights.astype(jnp.float32)
    # Rows that only fill the batch may have logits that are not numbers: 0 * NaN would be NaN.
    logits = jnp.where(weights[:, None] > 0, logits, 0.0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
    return jnp.sum(loss * weights), {"correct": jnp.sum(right * weights), "count": jnp.sum(weights)}


def _penalised(loss: jax.Array, metrics: Metrics, penalty: Penalty | None, trainable: Any,
               frozen: Any) -> tuple[jax.Array, Metrics]:
    if penalty is None:
        return loss, metrics
    extra = penalty(trainable, frozen).astype(jnp.float32)
    return loss + extra, {**metrics, "penalty": extra}
