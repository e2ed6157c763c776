"""Loss scaling for float16 compute: gradients too small for float16 are multiplied into its range and back."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jpeft.errors import TrainConfigError

Scaling = Literal["dynamic"] | float | None
FIRST, LEAST, MOST = 2.0**15, 1.0, 2.0**24
GROW_AFTER = 2000  # steps without a skip after which a dynamic scale doubles


class LossScale(NamedTuple):
    """Part of the state of a training.

    Attributes:
        value: what the loss is multiplied by before the gradients are taken, which are divided by it, a float32 scalar.
        good: steps since the scale has changed, an int32 scalar.
        skipped: steps so far whose gradients were not finite, an int32 scalar.
    """

    value: jax.Array
    good: jax.Array
    skipped: jax.Array


def begin(scaling: Scaling) -> LossScale | None:
    """Return the scale before the first step.

    Args:
        scaling: "dynamic": from 2^15, doubled after 2,000 steps without a skip, up to 2^24, and halved, down to 1,
            whenever a step is skipped; a number: always that; None: no scaling.

    Raises:
        TrainConfigError: it is something else.

    Example:
        >>> float(begin("dynamic").value)
        32768.0
    """
    number = isinstance(scaling, float | int) and not isinstance(scaling, bool)
    if scaling is None:
        return None
    if not (scaling == "dynamic" or (number and 0 < float(scaling) < float("inf"))):
        raise TrainConfigError(f"loss_scale = {scaling!r} must be 'dynamic', a number above 0, or None")
    first = FIRST if scaling == "dynamic" else scaling
    return LossScale(jnp.float32(first), jnp.int32(0), jnp.int32(0))


def after(scale: LossScale, finite: jax.Array, scaling: Scaling) -> LossScale:
    """Return the scale after a step whose gradients were finite or not.

    Example:
        >>> import jax.numpy as jnp
        >>> float(after(begin("dynamic"), jnp.array(False), "dynamic").value)
        16384.0
    """
    skipped = scale.skipped + jnp.where(finite, 0, 1)
    if scaling != "dynamic":
        return scale._replace(skipped=skipped)
    good = jnp.where(finite, scale.good + 1, 0)
    grown = jnp.where(good >= GROW_AFTER, jnp.minimum(scale.value * 2, MOST), scale.value)
    value = jnp.where(finite, grown, jnp.maximum(scale.value / 2, LEAST))
    return LossScale(value, jnp.where(good >= GROW_AFTER, 0, good), skipped)


def keep(finite: jax.Array, new: Any, old: Any) -> Any:
    """Return `new` where the gradients were finite, and else `old`: the step is skipped."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
