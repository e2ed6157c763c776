"""Cross-entropy over a large vocabulary, some tokens at a time: the float32 logits `[B, T, V]` never exist."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jpeft.errors import ModelInputError

Head = jax.Array | Callable[[jax.Array], jax.Array]


def chunked_cross_entropy(hidden: jax.Array, head: Head, labels: jax.Array, label_weights: jax.Array | None = None, *,
                          soft_cap: float | None = None, chunk: int = 1024) -> jax.Array:
    """Return the mean over tokens of `-log softmax(head(hidden))[label]`, weighted, in float32.

    The backward pass computes each chunk's logits again, so both passes hold `[chunk, V]` of them and no more. What
    `head` closes over is a constant of a `lax.scan`: an adapted or tied weight stays what it is in there.

    Args:
        hidden: `[B, T, D]`.
        head: a kernel `[D, V]`, or a function from `[..., D]` to logits `[..., V]`.
        labels: ids `[B, T]`: what position t should predict (not shifted here). A negative label counts for nothing.
        label_weights: `[B, T]`, 0 = ignored; None: 1 everywhere.
        soft_cap: c of `c tanh(logits / c)`; None: no cap.
        chunk: tokens whose logits exist at one time.

    Returns:
        A scalar; 0 if all weights are 0. A label of V or more makes it NaN.

    Raises:
        ModelInputError: the shapes do not fit, or `chunk` is not positive.

    Example:
        >>> loss = chunked_cross_entropy(jnp.ones((1, 3, 2)), jnp.zeros((2, 4)), jnp.zeros((1, 3), int), chunk=2)
        >>> bool(jnp.isclose(loss, jnp.log(4.0)))
        True
    """
    losses, weights = weighted_losses(hidden, head, labels, label_weights, soft_cap=soft_cap, chunk=chunk)
    return weighted_mean(losses, weights)


def weighted_losses(hidden: jax.Array, head: Head, labels: jax.Array, label_weights: jax.Array | None = None, *,
                    soft_cap: float | None = None, chunk: int = 1024) -> tuple[jax.Array, jax.Array]:
    """Return the loss of every token and its weight, float32 `[B, T]` each.

    Args and errors are those of `chunked_cross_entropy`.

    Example:
        >>> weighted_losses(jnp.ones((1, 2, 2)), jnp.zeros((2, 4)), jnp.asarray([[3, -1]]))[1].tolist()
        [[1.0, 0.0]]
    """
    losses = token_losses(hidden, head, labels, soft_cap=soft_cap, chunk=chunk)
    weights = (labels >= 0).astype(jnp.float32)
    if label_weights is not None:
        if jnp.shape(label_weights) != labels.shape:
            raise ModelInputError(f"label_weights has shape {jnp.shape(label_weights)}, must be {labels.shape}")
        weights = weights * jnp.asarray(label_weights, jnp.float32)
    return losses, weights


def weighted_mean(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the mean of what weighs something; 0 if nothing does.

    Example:
        >>> float(weighted_mean(jnp.asarray([[2.0, 9.0]]), jnp.asarray([[1.0, 0.0]])))
        2.0
    """
    total = jnp.sum(weights)
    return jnp.sum(losses * weights) / jnp.where(total == 0, 1.0, total)


def token_losses(hidden: jax.Array, head: Head, labels: jax.Array, *, soft_cap: float | None = None,
                 chunk: int = 1024) -> jax.Array:
    """Return `-log softmax(head(hidden))[label]` of every token, float32 `[B, T]`; 0 where the label is negative.

    Args and errors are those of `chunked_cross_entropy`. Chunks run along T, so a sharded batch stays sharded.

    Example:
        >>> token_losses(jnp.ones((1, 2, 2)), jnp.zeros((2, 4)), jnp.asarray([[3, -100]])).round(3).tolist()
        [[1.3860000371932983, 0.0]]
    """
    if hidden.ndim != 3 or jnp.shape(labels) != hidden.shape[:2]:
        raise ModelInputError(f"hidden must be [B, T, D] and labels [B, T], found {hidden.shape} and "
                              f"{jnp.shape(labels)}")
    if chunk < 1:
        raise ModelInputError(f"chunk is {chunk}, must be a positive number of tokens")
    batch, length, width = hidden.shape
    if batch > chunk:
        return token_losses(hidden.reshape(1, batch * length, width), head, labels.reshape(1, -1),
                            soft_cap=soft_cap, chunk=chunk).reshape(batch, length)
    step = min(max(chunk // max(batch, 1), 1), max(length, 1))

    def some(x: jax.Array, y: jax.Array) -> jax.Array:
        logits = head(x) if callable(head) else jnp.dot(x, head, preferred_element_type=jnp.float32)
        logits = logits.astype(jnp.float32)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        picked = jnp.take_along_axis(logits, jnp.maximum(y, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(y >= 0, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)

    count = -(-length // step)
    if count <= 1:
        return some(hidden, labels)
    rest = count * step - length
    x = jnp.pad(hidden, ((0, 0), (0, rest), (0, 0))).reshape(batch, count, step, width).swapaxes(0, 1)
    y = jnp.pad(labels, ((0, 0), (0, rest)), constant_values=-1).reshape(batch, count, step).swapaxes(0, 1)
    body = jax.checkpoint(some, prevent_cse=False)
    _, losses = jax.lax.scan(lambda carry, one: (carry, body(*one)), None, (x, y))
    return losses.swapaxes(0, 1).reshape(batch, count * step)[:, :length]
