"""Loss and accuracy over a whole set."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax

from jpeft.errors import BatchesError
from jpeft.train.losses import Apply, Batch, logits_of, sums


def evaluate(apply_logits: Apply, trainable: Any, frozen: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the mean loss, the accuracy and the number of rows of all batches.

    Compiled once per shape of batch for one function object, so hand in the same one each time.

    Args:
        apply_logits: as `apply` of `jpeft.train.losses.classification`; it is called with `key=None`.
        trainable: the trained parameters.
        frozen: what goes with them.
        batches: dicts with `tokens`, `attention_mask`, `labels`, `weights` and perhaps `token_types`; rows with weight
            0 count for nothing.

    Returns:
        `{"loss", "accuracy", "count"}`, summed over batches in float64.

    Raises:
        BatchesError: there are no rows.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply(trainable, frozen, tokens, attention_mask, key=None):
        ...     return trainable["table"][tokens].mean(1)
        >>> batch = {"tokens": jnp.array([[0, 0], [1, 1]]), "attention_mask": jnp.ones((2, 2), int),
        ...          "labels": jnp.array([0, 0]), "weights": jnp.ones(2)}
        >>> evaluate(apply, {"table": 20 * jnp.eye(2)}, None, [batch])
        {'loss': 10.0, 'accuracy': 0.5, 'count': 2.0}
    """
    score = _compiled(apply_logits)
    totals = {"loss": 0.0, "correct": 0.0, "count": 0.0}
    waiting: list[Any] = []

    def take(scores: Any) -> None:
        for name, value in jax.device_get(scores).items():
            totals[name] += float(value)

    for batch in batches:
        waiting.append(score(trainable, frozen, batch))
        if len(waiting) > 1:
            take(waiting.pop(0))
    for scores in waiting:
        take(scores)
    if totals["count"] == 0:
        raise BatchesError("there are no rows to evaluate on; give batches with rows whose weights are not 0")
    count = totals["count"]
    return {"loss": totals["loss"] / count, "accuracy": totals["correct"] / count, "count": count}


@functools.lru_cache(maxsize=16)
def _compiled(apply: Apply) -> Any:
    def score(trainable: Any, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        loss, metrics = sums(logits_of(apply, trainable, frozen, batch, None), batch["labels"], batch["weights"])
        return {"loss": loss, **metrics}

    return jax.jit(score)
