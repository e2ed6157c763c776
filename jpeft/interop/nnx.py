"""Flax NNX: from a stateful module to the pure function that the transform takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

Apply = Callable[..., tuple[Any, Any]]


def from_nnx(model: Any, method: str = "__call__") -> tuple[Apply, Any, Any]:
    """Split an NNX module into a pure function, its parameters and all its other state.

    The module is not changed, and later changes to it are not seen: set `model.train()`, `model.eval()` or
    `model.init_cache(...)` before. A parameter that the method overwrites is not handed back.

    Args:
        model: any `flax.nnx.Module`, concrete or abstract (`nnx.eval_shape`).
        method: name of the method to call.

    Returns:
        `(apply, params, rest)`, where `apply(params, rest, *args, **kwargs) -> (out, new_rest)` is pure. `params` is an
        `nnx.State` of every `nnx.Param` and subclass of it, one shared by two modules once; `rest` is an `nnx.State` of
        everything else: batch statistics, PRNG streams, caches. What the call records anew (`Module.sow`) is in
        `new_rest`, and is left aside when that is passed on.

    Raises:
        AttributeError: the module has no such method.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> from flax import nnx
        >>> apply, params, rest = jpeft.from_nnx(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
        >>> plan = jpeft.plan(apply, params, (rest, jnp.ones((2, 8))), {"kernel": jpeft.LoRA(rank=2)})
        >>> trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
        >>> y, rest = jpeft.adapt(apply, plan)(trainable, frozen, rest, jnp.ones((2, 8)))
        >>> y.shape
        (2, 4)
    """
    from flax import nnx

    getattr(model, method)
    graph, *states = nnx.split(model, nnx.Param, ...)
    params, rest = jax.tree.map(lambda array: array, states)  # variables of our own around the module's arrays
    known = {path for path, _ in nnx.to_flat_state(rest)}

    def apply(params: Any, rest: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        kept = nnx.from_flat_state([(path, value) for path, value in nnx.to_flat_state(rest) if path in known])
        # A copy: NNX updates variables in place, and those of a caller outside jit must stay as they are.
        module = nnx.merge(graph, params, kept, copy=True)
        out = getattr(module, method)(*args, **kwargs)
        return out, nnx.state(module, nnx.Not(nnx.Param))

    return apply, params, rest
