"""What changes from step to step: all of it, and nothing that does not."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jpeft.errors import LossFunctionError
from jpeft.train.scaling import LossScale, Scaling, begin
from jpeft.train.sharding import like_parameters, replicated


class TrainState(NamedTuple):
    """A pytree; the whole of what a checkpoint must hold besides the position in the data.

    Attributes:
        step: number of updates so far, an int32 scalar.
        trainable: the parameters that are trained.
        opt_state: the optimiser's.
        key: a PRNG key that never changes; step `n` draws from `fold_in(key, n)`, so a resumed run draws the same.
        ema: the average of the parameters over the steps, or None.
        scale: of the loss, or None.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    key: jax.Array
    ema: Any = None
    scale: LossScale | None = None

    @property
    def evaluated(self) -> Any:
        """The parameters to evaluate and to keep: the average where there is one, be it the optimiser's own."""
        if self.ema is not None:
            return self.ema
        own = [x for x in jax.tree.leaves(self.opt_state, is_leaf=_schedule_free) if _schedule_free(x)]
        return optax.contrib.schedule_free_eval_params(own[0], self.trainable) if own else self.trainable


def _schedule_free(x: Any) -> bool:
    return isinstance(x, optax.contrib.ScheduleFreeState)


def create(trainable: Any, tx: optax.GradientTransformation, key: jax.Array, *, ema: bool = False,
           loss_scale: Scaling = None) -> TrainState:
    """Return the state before the first step, in buffers of its own: a step may donate it and `trainable` stays valid.

    On a mesh, each slot of the optimiser is made where its parameter lies, and never whole.

    Args:
        trainable: any pytree of floating arrays, such as `jpeft.init` returns.
        tx: the optimiser.
        key: a PRNG key.
        ema: keep an average of the parameters too, for a step that has a decay.
        loss_scale: that of the step; see `jpeft.train.scaling.begin`.

    Raises:
        LossFunctionError: there is nothing to train, or a leaf has a dtype that has no gradient.
        TrainConfigError: `loss_scale` is none.

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

    def build(trainable: Any, key: jax.Array) -> TrainState:
        state = TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable), key, trainable if ema else None,
                           begin(loss_scale))
        return jax.tree.map(jnp.copy, state)

    if any(isinstance(leaf, jax.core.Tracer) for _, leaf in leaves):
        return build(trainable, key)
    places = [getattr(leaf, "sharding", None) for _, leaf in leaves]
    if not all(isinstance(place, NamedSharding) for place in places):
        return build(trainable, key)
    over = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    where = state_shardings(trainable, over, tx, ema=ema, scaled=loss_scale is not None)
    return jax.jit(build, out_shardings=where)(trainable, key)


def state_shardings(shapes: Any, shardings: Any, tx: optax.GradientTransformation, *, ema: bool = False,
                    scaled: bool = False) -> TrainState:
    """Return where a state lies on a mesh, for `in_shardings` and `out_shardings` of a step.

    Args:
        shapes: the trainable partition, arrays or `jax.ShapeDtypeStruct` (as of `plan.theta_shapes()`).
        shardings: its shardings, as `jpeft.shardings` returned them.
        tx: the optimiser.
        ema: whether the state has an average.
        scaled: whether it has a loss scale.

    Returns:
        A `TrainState` with a sharding for each leaf; what is neither a parameter nor its slot is on every device.
    """
    rest: Any = replicated(shardings)
    return TrainState(rest, shardings, like_parameters(tx, shapes, shardings), rest, shardings if ema else None,
                      LossScale(rest, rest, rest) if scaled else None)
