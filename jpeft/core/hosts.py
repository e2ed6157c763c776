"""Several processes that run one program: which of them speaks, how they wait, and arrays that each holds a part of."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def first() -> bool:
    """Tell whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def several() -> bool:
    """Tell whether there are other processes."""
    return jax.process_count() > 1


def wait(where: str) -> None:
    """Go on when every process has come to the same place, named by `where`."""
    if several():
        multihost_utils.sync_global_devices(where)


def whole(x: Any) -> np.ndarray:
    """Return an array on the host, of whatever processes hold its parts; where several do, each of them must ask.

    Example:
        >>> import jax.numpy as jnp
        >>> whole(jnp.arange(3)).tolist()
        [0, 1, 2]
    """
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def stops(step: int) -> bool:
    """Tell whether all processes are to stop after this step, as one of them has got SIGTERM; each must ask each step.

    They agree on the step: none is left waiting for another one's part of the next.
    """
    return several() and multihost_utils.reached_preemption_sync_point(step)
