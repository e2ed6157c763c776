"""What a model returns: one named tuple for all families, with None where a task has nothing to say."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class Output(NamedTuple):
    """The result of `model.apply`; a pytree.

    Attributes:
        logits: `[B, classes]` for classification, `[B, T, classes]` for token classification, `[B, T, V]` of a language
            model that was given no labels.
        hidden: the last layer's output `[B, T, D]`.
        embedding: one vector per sequence `[B, D]`, for the embedding task.
        pooled: first token after the pooler `[B, D]`, for plain hidden states of a model that has one.
        cache: keys and values of all tokens so far, of a language model that was given a cache.
        loss: mean cross-entropy over the labels, a scalar, where there were labels.
        log_probs: of a decoder that was given labels, how probable those of each row are, `[B]`.

    Example:
        >>> import jax.numpy as jnp
        >>> out = Output(hidden=jnp.zeros((1, 2, 3)))
        >>> out.logits is None, len(jax.tree.leaves(out))
        (True, 1)
    """

    logits: jax.Array | None = None
    hidden: jax.Array | None = None
    embedding: jax.Array | None = None
    pooled: jax.Array | None = None
    cache: Any = None
    loss: jax.Array | None = None
    log_probs: jax.Array | None = None
