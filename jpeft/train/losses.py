"""Loss functions for `pure_step` and `compiled_step`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jpeft.train import objectives
from jpeft.train.objectives import Variant
from jpeft.train.step import LossFn, Metrics

Batch = Mapping[str, Any]
Apply = Callable[..., jax.Array]
Penalty = Callable[[Any, Any], jax.Array]


def classification(apply: Apply, *, penalty: Penalty | None = None) -> LossFn:
    """Return the loss of a classifier: mean softmax cross-entropy of the rows, or of their tokens, in float32.

        loss = sum_i w_i CE(logits_i, label_i) / sum_i w_i  (+ penalty)

    Where each token has a class, logits are `[B, T, C]`, labels and weights `[B, T]`, and i is a token.

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
token_classification = classification  # what differs is in the batch: labels and weights of each token


def embedding(apply: Apply, *, temperature: float = 0.05, penalty: Penalty | None = None) -> LossFn:
    """Return the contrastive loss of a model of embeddings: `objectives.contrastive`, the mean over the rows.

    With `accumulate`, and inside `pmap` or `shard_map`, a row competes with those of its own part of the batch.

    Args:
        apply: `(trainable, frozen, batch, key) -> embeddings [B, 2 or more, D]`: anchor, positive, hard negatives.
        temperature: cosines are divided by it.
        penalty: as of `classification`.

    Returns:
        A loss function for batches with `weights [B]`. Its metrics are sums: `correct` (the positive of the row itself
        is the nearest) and `count`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> pairs = jnp.stack([jnp.eye(3), jnp.eye(3)], axis=1)
        >>> loss_fn = embedding(lambda trainable, frozen, batch, key: pairs, temperature=1.0)
        >>> loss, metrics = loss_fn(None, None, {"weights": jnp.array([1.0, 1.0, 0.0])}, jax.random.key(0))
        >>> round(float(loss), 4), float(metrics["correct"]), float(metrics["count"])
        (0.3133, 2.0, 2.0)
    """

    def loss_fn(trainable: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        loss, metrics = ranked(apply(trainable, frozen, batch, key), batch["weights"], temperature)
        return _penalised(loss, metrics, penalty, trainable, frozen)

    return loss_fn


def dpo(apply: Apply, reference: Callable[[Any, Batch], jax.Array], *, beta: float = 0.1, label_smoothing: float = 0.0,
        variant: Variant = "sigmoid", penalty: Penalty | None = None) -> LossFn:
    """Return the loss of direct preference optimisation: `objectives.preference`, the mean over the pairs.

    The reference is the model without its adapter, on the params that are there anyway: there is no second model.

    Args:
        apply: `(trainable, frozen, batch, key) -> log-probabilities [B, 2]` of the chosen and the rejected answers.
        reference: `(frozen, batch) -> [B, 2]`, of the model to stay near: `jpeft.base(plan, frozen)` without adapter.
        beta: how dear it is to leave the reference.
        label_smoothing: share of the pairs whose answers are assumed to be swapped.
        variant: "sigmoid", "ipo" or "hinge".
        penalty: as of `classification`.

    Returns:
        A loss function for batches with `weights [B, 2, T]`: a pair counts if one of its weights is not 0. Its metrics:
        the sums `correct` (pairs of a positive margin) and `count`, the mean `margin`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> apply = lambda trainable, frozen, batch, key: jnp.array([[-1.0, -3.0]])
        >>> loss_fn = dpo(apply, lambda frozen, batch: jnp.array([[-2.0, -2.0]]), beta=0.5)
        >>> loss, metrics = loss_fn(None, None, {"weights": jnp.ones((1, 2, 4))}, jax.random.key(0))
        >>> round(float(loss), 4), float(metrics["margin"])
        (0.3133, 1.0)
    """

    def loss_fn(trainable: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        loss, metrics = preferred(apply(trainable, frozen, batch, key), reference(frozen, batch), batch["weights"],
                                  beta=beta, label_smoothing=label_smoothing, variant=variant)
        return _penalised(loss, metrics, penalty, trainable, frozen)

    return loss_fn


def distillation(apply: Apply, teacher: Callable[[Any, Batch], jax.Array], *, temperature: float = 2.0,
                 alpha: float = 0.5, penalty: Penalty | None = None) -> LossFn:
    """Return the loss of a student that learns from a teacher: `objectives.distillation`, the weighted mean.

    Args:
        apply: `(trainable, frozen, batch, key) -> logits [..., C]`.
        teacher: `(frozen, batch) -> logits [..., C]`: the same model without its adapter (`jpeft.base(plan, frozen)`),
            or under another one, or another model, whose params then are a part of `frozen`.
        temperature: of both softmaxes.
        alpha: the share of the teacher; the rest is that of the labels.
        penalty: as of `classification`.

    Returns:
        A loss function for batches with `labels [...]` (negative where nothing is learnt; for a language model those of
        the next tokens) and `weights [...]`. Its metrics are sums: `correct` and `count`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> batch = {"labels": jnp.array([0, 1]), "weights": jnp.array([1.0, 0.0])}
        >>> loss_fn = distillation(lambda t, f, batch, key: jnp.eye(2), lambda f, batch: jnp.eye(2), alpha=1.0)
        >>> loss, metrics = loss_fn(None, None, batch, jax.random.key(0))
        >>> float(loss), float(metrics["correct"]), float(metrics["count"])
        (0.0, 1.0, 1.0)
    """

    def loss_fn(trainable: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        labels = jnp.asarray(batch["labels"])
        weights = jnp.where(labels >= 0, jnp.asarray(batch["weights"], jnp.float32), 0.0)
        real = weights[..., None] > 0
        student, aim = (jnp.where(real, x, 0.0) for x in (apply(trainable, frozen, batch, key), teacher(frozen, batch)))
        losses = objectives.distillation(student, aim, labels, temperature=temperature, alpha=alpha)
        right = jnp.argmax(student, -1) == labels
        return _penalised(_mean(losses, weights), {"correct": jnp.sum(right * weights), "count": jnp.sum(weights)},
                          penalty, trainable, frozen)

    return loss_fn


def ranked(vectors: jax.Array, weights: jax.Array, temperature: float) -> tuple[jax.Array, Metrics]:
    """Return the mean contrastive loss of embeddings `[B, 2 or more, D]`, and the sums `correct` and `count`."""
    weights = jnp.asarray(weights, jnp.float32)
    negatives = vectors[:, 2:] if vectors.shape[1] > 2 else None
    found = objectives.contrastive(vectors[:, 0], vectors[:, 1], negatives, weights=weights, temperature=temperature)
    return _mean(found.losses, weights), {"correct": jnp.sum(found.right * weights), "count": jnp.sum(weights)}


def preferred(scores: jax.Array, reference: jax.Array, weights: jax.Array, **options: Any) -> tuple[jax.Array, Metrics]:
    """Return the mean preference loss of log-probabilities `[B, 2]`, and its metrics; see `dpo`."""
    real = jnp.any(jnp.asarray(weights) > 0, (1, 2)).astype(jnp.float32)
    (chosen, rejected), (chosen_before, rejected_before) = scores.T, jax.lax.stop_gradient(reference).T
    found = objectives.preference(chosen, rejected, chosen_before, rejected_before, **options)
    return _mean(found.losses, real), {"correct": jnp.sum((found.margins > 0) * real), "count": jnp.sum(real),
                                       "margin": _mean(found.margins, real)}


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
    """Return the logits of a batch, `[B, C]` or `[B, T, C]`; `key=None` means evaluation."""
    types = {"token_types": batch["token_types"]} if "token_types" in batch else {}
    return apply(trainable, frozen, batch["tokens"], batch["attention_mask"], **types, key=key)


def sums(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, Metrics]:
    """Return the weighted sum of the cross-entropies and the sums `correct` and `count`, in float32."""
    weights = jnp.where(labels >= 0, weights, 0).astype(jnp.float32)
    logits, labels = logits.astype(jnp.float32), jnp.maximum(labels, 0)
    # Rows that only fill the batch may have logits that are not numbers: 0 * NaN would be NaN.
    logits = jnp.where(weights[..., None] > 0, logits, 0.0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
    return jnp.sum(loss * weights), {"correct": jnp.sum(right * weights), "count": jnp.sum(weights)}


def _mean(losses: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float32).tiny)


def _penalised(loss: jax.Array, metrics: Metrics, penalty: Penalty | None, trainable: Any,
               frozen: Any) -> tuple[jax.Array, Metrics]:
    if penalty is None:
        return loss, metrics
    extra = penalty(trainable, frozen).astype(jnp.float32)
    return loss + extra, {**metrics, "penalty": extra}
