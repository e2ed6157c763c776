"""The FLOP counter of `jpeft.train.hlo` for functions: lowered, compiled, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jpeft.errors import UncountedError
from jpeft.train.hlo import Flops, count_text

__all__ = ["Flops", "UncountedError", "compile_for", "count", "count_text", "temp_bytes"]


def compile_for(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Return a compiled program: `target` itself, a lowered one compiled, or a function lowered for `args`."""
    if hasattr(target, "as_text") and hasattr(target, "memory_analysis"):
        return target
    if not hasattr(target, "compile"):
        target = (target if hasattr(target, "lower") else jax.jit(target)).lower(*args, **kwargs)
    return target.compile()


def count(
    target: Callable[..., Any] | Any, *args: Any, trips: int | None = None, ignore: Iterable[str] = (), **kwargs: Any
) -> Flops:
    """Count the dot and convolution FLOPs of one call, loop trips included.

    Args:
        target: a function (jitted or not), a lowered or a compiled one.
        *args: arguments to lower the function for; `jax.ShapeDtypeStruct` will do.
        trips: trips to assume for loops whose number depends on data; without it they raise.
        ignore: prefixes of custom call targets that may be left out (`"lapack_"`).
        **kwargs: keyword arguments to lower the function for.

    Raises:
        UncountedError: something may hide a product, or trips are not known.
    """
    return count_text(compile_for(target, *args, **kwargs).as_text(), trips=trips, ignore=ignore)


def temp_bytes(target: Callable[..., Any] | Any, *args: Any, **kwargs: Any) -> int:
    """Return the bytes that one call needs beside its arguments and outputs, per device."""
    return int(compile_for(target, *args, **kwargs).memory_analysis().temp_size_in_bytes)
