"""What changes from step to step: all of it, and nothing that does not."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jpeft.errors import LossFunctionError


class TrainState(NamedTuple):
    """A pytree; the whole of what a checkpoint must hold besides the position in the data.

    Attributes:
        step: number of updates so far, an int32 scalar.
        trainable: the parameters that are trained.
        opt_state: the optimiser's.
        key: a PRNG key that never changes; step `n` draws from `fold_in(key, n)`, so a resumed run draws the same.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    key: jax.Array


def create(trainable: Any, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Return the state before the first step, in buffers of its own: a step may donate it and `trainable` stays valid.

    Args:
        trainable: any pytree of floating arrays, such as `jpeft.init` returns.
        tx: the optimiser.
        key: a PRNG key.

    Raises:
        LossFunctionError: there is nothing to train, or a leaf has a dtype that has no gradient.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> state = create({"w": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(0))
        >>> int(state.step), state.trainable["w"].shape
        (0, (3,))
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(trainable)
    if not leaves:
        raise LossFunctionError("trainable has no leaves, so there is nothing to train; give a method to some leaf")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            name = f"trainable{jax.tree_util.keystr(path)}"
            raise LossFunctionError(f"{name} is {jnp.result_type(leaf)}, which has no gradient; keep it in frozen")
    state = TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable), key)
    return jax.tree.map(jnp.copy, state)
