"""What a model returns: one named tuple for all families, with None where a task has nothing to say."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Output(NamedTuple):
    """The result of `model.apply`; a pytree.

    Attributes:
        logits: `[B, classes]` for classification, `[B, T, classes]` for token classification.
        hidden: the last layer's output `[B, T, D]`.
        embedding: one vector per sequence `[B, D]`, for the embedding task.
        pooled: first token after the pooler `[B, D]`, for plain hidden states of a model that has one.

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
