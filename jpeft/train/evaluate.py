"""Loss and accuracy, or perplexity, over a whole set."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.hosts import whole
from jpeft.core.sharding import mesh_of
from jpeft.errors import BatchesError
from jpeft.train.losses import Apply, Batch, logits_of, mean_and_count, sums
from jpeft.train.sharding import put_batch


def evaluate(apply_logits: Apply, trainable: Any, frozen: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the mean loss, the accuracy and the number of rows of all batches.

    Compiled once per shape of batch for one function object, so hand in the same one each time.

    Args:
        apply_logits: as `apply` of `jpeft.train.losses.classification`; it is called with `key=None`.
        trainable: the trained parameters.
        frozen: what goes with them.
        batches: dicts with `tokens`, `attention_mask`, `labels`, `weights` and perhaps `token_types`; rows with weight
            0 count for nothing. If the parameters lie on a mesh, batches on the host go where `batch_shardings` says.

    Returns:
        `{"loss", "accuracy", "count"}`, summed over batches in float64.

    Raises:
        BatchesError: there are no rows.
        ShardingError: the mesh does not divide the rows of a batch.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply(trainable, frozen, tokens, attention_mask, key=None):
        ...     return trainable["table"][tokens].mean(1)
        >>> batch = {"tokens": jnp.array([[0, 0], [1, 1]]), "attention_mask": jnp.ones((2, 2), int),
        ...          "labels": jnp.array([0, 0]), "weights": jnp.ones(2)}
        >>> evaluate(apply, {"table": 20 * jnp.eye(2)}, None, [batch])
        {'loss': 10.0, 'accuracy': 0.5, 'count': 2.0}
    """
    return judged(apply_logits, trainable, frozen, batches).metrics


class Judged(NamedTuple):
    """What `evaluate` returns, and which rows are right: bool `[N]`, in the order of the batches, fillers left out."""

    metrics: dict[str, float]
    right: np.ndarray


def judged(apply_logits: Apply, trainable: Any, frozen: Any, batches: Iterable[Batch]) -> Judged:
    """Return what `evaluate` returns, and row by row which are right: two models are compared on the same rows.

    Args and errors are those of `evaluate`.

    Example:
        >>> import jax.numpy as jnp
        >>> batch = {"tokens": jnp.zeros((3, 1), int), "attention_mask": jnp.ones((3, 1), int),
        ...          "labels": jnp.array([0, 1, 0]), "weights": jnp.array([1.0, 1.0, 0.0])}
        >>> judged(lambda t, f, tokens, mask, key=None: jnp.eye(2)[tokens[:, 0]], None, None, [batch]).right.tolist()
        [True, False]
    """
    loss = correct = count = 0.0
    right: list[np.ndarray] = []
    for scores in _fetched(_classified(apply_logits), trainable, frozen, batches):
        loss, correct = loss + float(scores["loss"]), correct + float(scores["correct"])
        count += float(scores["count"])
        right.append(scores["right"][scores["real"]])
    if count == 0:
        raise BatchesError("there are no rows to evaluate on; give batches with rows whose weights are not 0")
    return Judged({"loss": loss / count, "accuracy": correct / count, "count": count}, np.concatenate(right))


def evaluate_lm(apply_loss: Apply, trainable: Any, frozen: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the mean loss of all tokens that are learnt, its perplexity, and how many tokens there are.

    The mean is over tokens and not over batches: it does not depend on how the rows are put into batches.

    Args:
        apply_loss: as `apply` of `jpeft.train.losses.causal_lm` or `seq2seq`; it is called with `key=None`. Compiled
            once per shape of batch for one function object, so hand in the same one each time.
        trainable: the trained parameters.
        frozen: what goes with them.
        batches: dicts with `tokens`, `labels`, `weights` and what else the model reads. On a mesh, as of `evaluate`.

    Returns:
        `{"loss", "perplexity", "count"}`, summed over batches in float64; the perplexity is exp(loss).

    Raises:
        BatchesError: no token has a label and a weight.

    Example:
        >>> import jax.numpy as jnp
        >>> def batch(tokens, loss):
        ...     ones = jnp.ones((1, tokens))
        ...     return {"labels": ones.astype(int), "weights": ones, "loss": jnp.asarray(loss)}
        >>> found = evaluate_lm(lambda trainable, frozen, batch, key: batch["loss"], None, None,
        ...                     [batch(3, 1.0), batch(1, 5.0)])
        >>> found["loss"], round(found["perplexity"], 3), found["count"]
        (2.0, 7.389, 4.0)
    """
    total = count = 0.0
    for mean, tokens in _fetched(_language(apply_loss), trainable, frozen, batches):
        total, count = total + float(mean) * float(tokens), count + float(tokens)
    if count == 0:
        raise BatchesError("there are no tokens to evaluate on; give batches with labels whose weights are not 0")
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "count": count}


def _fetched(score: Any, trainable: Any, frozen: Any, batches: Iterable[Batch]) -> Iterator[Any]:
    """Yield the scores of each batch, fetched while the next one is computed; on a mesh, each device has its rows."""
    waiting: Any = None
    mesh = mesh_of((trainable, frozen))
    for batch in batches:
        begun = score(trainable, frozen, batch if mesh is None else put_batch(batch, mesh))
        if waiting is not None:
            yield jax.tree.map(whole, waiting)
        waiting = begun
    if waiting is not None:
        yield jax.tree.map(whole, waiting)


@functools.lru_cache(maxsize=16)
def _classified(apply: Apply) -> Any:
    def score(trainable: Any, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        logits, real = logits_of(apply, trainable, frozen, batch, None), batch["weights"] > 0
        loss, metrics = sums(logits, batch["labels"], batch["weights"])
        return {"loss": loss, **metrics, "real": real, "right": real & (jnp.argmax(logits, -1) == batch["labels"])}

    return jax.jit(score)


@functools.lru_cache(maxsize=16)
def _language(apply: Apply) -> Any:
    def score(trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return mean_and_count(apply, trainable, frozen, batch, None)

    return jax.jit(score)
