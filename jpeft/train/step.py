"""The compiled training step: loss, gradients of the trainable part, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jpeft.errors import LossFunctionError
from jpeft.train.state import TrainState

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Metrics]]
Step = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]

OWN = ("loss", "grad_norm", "learning_rate")


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, schedule: optax.Schedule | None = None, donate: bool = True
) -> Any:
    """Return `step(state, frozen, batch) -> (state, metrics)`, a `jax.jit` function.

    Only `state.trainable` is differentiated; `frozen` is an argument, never copied and never donated. Step `n` hands
    `loss_fn` the key `fold_in(state.key, n)`.

    Args:
        loss_fn: `(trainable, frozen, batch, key) -> (loss, metrics)`: a scalar and a dict of scalars.
        tx: the optimiser.
        schedule: the learning rate by step, for the metric `learning_rate`.
        donate: let the new state take the memory of the old one, which is then gone.

    Returns:
        The step; its metrics are `loss`, `grad_norm` (before any clipping), `learning_rate` if there is a schedule, and
        those of `loss_fn`.

    Raises:
        LossFunctionError: (when called) `loss_fn` returns something else.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jpeft.train.state import create
        >>> def loss_fn(trainable, frozen, batch, key):
        ...     return jnp.mean((batch @ trainable["w"]) ** 2), {}
        >>> tx = optax.sgd(0.1)
        >>> step = make_train_step(loss_fn, tx)
        >>> state, metrics = step(create({"w": jnp.ones(2)}, tx, jax.random.key(0)), None, jnp.eye(2))
        >>> float(metrics["loss"]), state.trainable["w"].tolist()
        (1.0, [0.8999999761581421, 0.8999999761581421])
    """

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        value_and_grad = jax.value_and_grad(lambda t: _checked(loss_fn(t, frozen, batch, key)), has_aux=True)
        (loss, extra), grads = value_and_grad(state.trainable)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": loss, "grad_norm": _norm(grads)}
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return TrainState(state.step + 1, trainable, opt_state, state.key), {**metrics, **extra}

    return jax.jit(step, donate_argnums=(0,) if donate else ())


def _norm(grads: Any) -> jax.Array:
    """Return the global norm, in float32 or wider: the square of a float16 overflows at 256."""
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads))


def _checked(returned: Any) -> tuple[jax.Array, Metrics]:
    """Return what a loss function returned if a step can use it."""
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)):
        raise LossFunctionError(
            f"loss_fn returned a {type(returned).__name__}, not (loss, metrics); return a scalar and a dict of scalars"
        )
    loss, metrics = returned
    for name, value in {"the loss": loss, **{repr(k): v for k, v in metrics.items()}}.items():
        if jnp.shape(value) != ():
            raise LossFunctionError(f"loss_fn returned {name} of shape {jnp.shape(value)}; reduce it to a scalar")
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise LossFunctionError(f"loss_fn returned a loss of dtype {jnp.result_type(loss)}; return a floating scalar")
    if taken := [name for name in OWN if name in metrics]:
        raise LossFunctionError(f"loss_fn returned the metric {taken[0]!r}, which the step itself reports; rename it")
    return loss, dict(metrics)
