"""Loss and what else judges a model, over a whole set: accuracy, perplexity, F1, ranks, preferences."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.hosts import whole
from jpeft.core.sharding import mesh_of
from jpeft.errors import BatchesError
from jpeft.train import objectives, tagging
from jpeft.train.losses import Apply, Batch, logits_of, mean_and_count, ranked, sums
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


def evaluate_tags(apply_logits: Apply, trainable: Any, frozen: Any, batches: Iterable[Batch],
                  labels: Sequence[str]) -> dict[str, float]:
    """Return the mean loss of all words that have a tag, how many tags are right, and the F1 of entities.

    Args:
        apply_logits: as of `jpeft.train.losses.token_classification`; it is called with `key=None`.
        trainable: the trained parameters.
        frozen: what goes with them.
        batches: those of `jpeft.data.tags.TagBatches`.
        labels: names of the tags; see `jpeft.train.tagging` for what is an entity.

    Returns:
        `{"loss", "accuracy", "count"}` of words, and `{"f1", "precision", "recall", "entities"}`.

    Raises:
        BatchesError: no word has a tag.

    Example:
        >>> import jax.numpy as jnp
        >>> batch = {"tokens": jnp.array([[1, 2, 0]]), "attention_mask": jnp.ones((1, 3), int),
        ...          "labels": jnp.array([[1, -1, 0]]), "weights": jnp.array([[1.0, 0.0, 1.0]])}
        >>> found = evaluate_tags(lambda t, f, tokens, mask, key=None: 9 * jnp.eye(3)[tokens], None, None, [batch],
        ...                       ["O", "B-LOC", "I-LOC"])
        >>> found["f1"], found["accuracy"], found["count"]
        (1.0, 1.0, 2.0)
    """
    loss = correct = count = 0.0
    right: list[list[str]] = []
    given: list[list[str]] = []
    for scores in _fetched(_tagged(apply_logits), trainable, frozen, batches):
        loss, correct = loss + float(scores["loss"]), correct + float(scores["correct"])
        count += float(scores["count"])
        for gold, said, real in zip(scores["labels"], scores["said"], scores["real"], strict=True):
            right.append([labels[n] for n in gold[real]])
            given.append([labels[n] for n in said[real]])
    if count == 0:
        raise BatchesError("there are no words to evaluate on; give batches with labels whose weights are not 0")
    return {"loss": loss / count, "accuracy": correct / count, "count": count, **tagging.f1(right, given)}


def evaluate_embeddings(apply: Apply, trainable: Any, frozen: Any, batches: Iterable[Batch],
                        temperature: float) -> Judged:
    """Return how well anchors find their own positives among all positives and hard negatives of the set.

    Args:
        apply: as of `jpeft.train.losses.embedding`; it is called with `key=None`.
        trainable: the trained parameters.
        frozen: what goes with them.
        batches: those of `jpeft.data.groups.GroupBatches`.
        temperature: of the loss, which is the mean over rows of their loss within their batch.

    Returns:
        `{"loss", "recall_at_1", "mrr", "count"}`, with `spearman` of cosines and scores if the batches have `scores`:
        the rank of a positive is the number of candidates at least as near as it is, itself included, and `mrr` the
        mean of its inverse. `right` is which rows have rank 1.

    Raises:
        BatchesError: there are no pairs, or fewer than two rows with a score.

    Example:
        >>> import jax.numpy as jnp
        >>> batch = {"vectors": jnp.stack([jnp.eye(3), jnp.eye(3)], 1), "weights": jnp.ones(3)}
        >>> evaluate_embeddings(lambda t, f, batch, key: batch["vectors"], None, None, [batch], 0.05).metrics["mrr"]
        1.0
    """
    found = list(_fetched(_embedded(apply, temperature), trainable, frozen, batches))
    if not sum(float(one["count"]) for one in found):
        raise BatchesError("there are no pairs to evaluate on; give batches with rows whose weights are not 0")
    count = sum(float(one["count"]) for one in found)
    loss = sum(float(one["loss"]) * float(one["count"]) for one in found) / count
    vectors, weights = (np.concatenate([one[name] for one in found]) for name in ("vectors", "weights"))
    ranks = _ranks(vectors[weights > 0])
    metrics = {"loss": loss, "recall_at_1": float((ranks == 1).mean()), "mrr": float((1 / ranks).mean()),
               "count": count}
    if "scores" in found[0]:
        scores = np.concatenate([one["scores"] for one in found])
        real = ~np.isnan(scores)
        metrics["spearman"] = _spearman(scores[real], np.sum(vectors[real, 0] * vectors[real, 1], -1))
    return Judged(metrics, ranks == 1)


def evaluate_preferences(apply: Apply, reference: Callable[[Any, Batch], jax.Array], trainable: Any, frozen: Any,
                         batches: Iterable[Batch], **options: Any) -> Judged:
    """Return how far a model prefers the chosen answers, more than its reference does and on its own.

    Args:
        apply: as of `jpeft.train.losses.dpo`; it is called with `key=None`.
        reference: as of `jpeft.train.losses.dpo`.
        trainable: the trained parameters.
        frozen: what goes with them.
        batches: those of `jpeft.data.groups.GroupBatches`, with weights `[B, 2, T]`.
        **options: as of `jpeft.train.objectives.preference`.

    Returns:
        `{"loss", "accuracy", "margin", "likelier", "likelier_before", "count"}`: the share of pairs whose margin is
        above 0, the mean margin, the share whose chosen answer is more probable than the rejected one, and the same
        under the reference. `right` is which margins are above 0.

    Raises:
        BatchesError: there are no pairs.

    Example:
        >>> import jax.numpy as jnp
        >>> batch = {"scores": jnp.array([[-1.0, -3.0]]), "weights": jnp.ones((1, 2, 4))}
        >>> found = evaluate_preferences(lambda t, f, batch, key: batch["scores"], lambda f, batch: jnp.zeros((1, 2)),
        ...                              None, None, [batch], beta=0.5)
        >>> found.metrics["margin"], found.metrics["likelier"]
        (1.0, 1.0)
    """
    found = list(_fetched(_compared(apply, reference), trainable, frozen, batches))
    kept = [np.concatenate([one[name][one["real"]] for one in found] or [np.zeros((0, 2))])
            for name in ("scores", "reference")]
    if not len(kept[0]):
        raise BatchesError("there are no pairs to evaluate on; give batches with weights that are not 0")
    made = objectives.preference(*(jnp.asarray(side) for scores in kept for side in scores.T), **options)
    losses, margins = (np.asarray(x, np.float64) for x in made)
    likelier, before = (float((scores[:, 0] > scores[:, 1]).mean()) for scores in kept)
    return Judged({"loss": float(losses.mean()), "accuracy": float((margins > 0).mean()),
                   "margin": float(margins.mean()), "likelier": likelier, "likelier_before": before,
                   "count": float(len(margins))}, margins > 0)


def _ranks(vectors: np.ndarray) -> np.ndarray:
    """Return the rank of each row's positive among all candidates, from 1, int64 `[N]`."""
    candidates = vectors[:, 1:].swapaxes(0, 1).reshape(-1, vectors.shape[-1]).T
    ranks = []
    for start in range(0, len(vectors), 512):
        near = vectors[start:start + 512, 0] @ candidates
        own = near[np.arange(len(near)), start + np.arange(len(near))]
        ranks.append((near >= own[:, None]).sum(1))
    return np.concatenate(ranks)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation; equal values share their mean rank. 0 if all of one side are equal."""
    if len(a) < 2:
        raise BatchesError(f"{len(a)} rows have a score, which have no order; give two or more")
    ranks = []
    for values in (a, b):
        _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
        mean = np.cumsum(counts) - (counts - 1) / 2
        ranks.append(mean[where] - mean[where].mean())
    size = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / size if size else 0.0


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


@functools.lru_cache(maxsize=16)
def _tagged(apply: Apply) -> Any:
    def score(trainable: Any, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        logits = logits_of(apply, trainable, frozen, batch, None)
        loss, metrics = sums(logits, batch["labels"], batch["weights"])
        return {"loss": loss, **metrics, "labels": batch["labels"], "said": jnp.argmax(logits, -1),
                "real": batch["weights"] > 0}

    return jax.jit(score)


@functools.lru_cache(maxsize=16)
def _embedded(apply: Apply, temperature: float) -> Any:
    def score(trainable: Any, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        vectors = objectives.unit(apply(trainable, frozen, batch, None))
        loss, metrics = ranked(vectors, batch["weights"], temperature)
        scores = {"scores": batch["scores"]} if "scores" in batch else {}
        return {"loss": loss, "count": metrics["count"], "vectors": vectors, "weights": batch["weights"], **scores}

    return jax.jit(score)


@functools.lru_cache(maxsize=16)
def _compared(apply: Apply, reference: Callable[[Any, Batch], jax.Array]) -> Any:
    def score(trainable: Any, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        return {"scores": apply(trainable, frozen, batch, None), "reference": reference(frozen, batch),
                "real": jnp.any(batch["weights"] > 0, (1, 2))}

    return jax.jit(score)
