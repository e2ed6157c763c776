"""From a call to a jaxpr: which arguments are traced, what is static, and the parameters by path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jpeft.core import compat, paths
from jpeft.errors import PathError, PlanError

Apply = Callable[..., Any]


def is_array(x: Any) -> bool:
    """True for what is traced: jax and numpy arrays, numpy scalars and `jax.ShapeDtypeStruct`."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def leaves_of(params: Any) -> tuple[tuple[str, ...], list[Any], Any]:
    """Flatten parameters to paths and arrays.

    Raises:
        PathError: if two leaves have one path or a leaf is not an array.
    """
    names, leaves, treedef = paths.flatten(params)
    for name, leaf in zip(names, leaves, strict=True):
        if not is_array(leaf):
            number = isinstance(leaf, (bool, int, float, complex))
            remedy = "make it an array (jnp.asarray) or close over it" if number else \
                "pass only the array half of the model (eqx.partition, nnx.split)"
            raise PathError(f"params leaf {name!r} is a {type(leaf).__name__}, not an array; {remedy}")
    return names, leaves, treedef


def example(args: Any) -> tuple[Any, ...]:
    """Return the positional arguments of an example call.

    Raises:
        PlanError: they are not in a tuple or a list.
    """
    if not isinstance(args, (tuple, list)):
        raise PlanError(f"example_args is a {type(args).__name__}, not a tuple; pass the arguments after params as "
                        "(x,) and keyword arguments as example_kwargs")
    return tuple(args)


@dataclasses.dataclass(frozen=True)
class Traced:
    """One traced call.

    Attributes:
        jaxpr: the open jaxpr; its inputs are the parameter leaves, then the array arguments.
        consts: values of its constants.
        names: paths of the parameter leaves.
        arrays: the array arguments.
        out_tree: structure of the output.
    """

    jaxpr: Any
    consts: Sequence[Any]
    names: tuple[str, ...]
    arrays: list[Any]
    out_tree: Any


def trace(apply: Apply, params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Traced:
    """Trace `apply(params, *args, **kwargs)` once; arrays are inputs, every other argument is static."""
    names, leaves, params_def = leaves_of(params)
    rest, rest_def = jax.tree_util.tree_flatten((tuple(args), dict(kwargs)))
    traced = [is_array(x) for x in rest]
    arrays = [x for x, t in zip(rest, traced, strict=True) if t]

    def flat(p: Sequence[Any], a: Sequence[Any]) -> Any:
        it = iter(a)
        full = [next(it) if t else x for x, t in zip(rest, traced, strict=True)]
        more, kw = jax.tree_util.tree_unflatten(rest_def, full)
        return apply(jax.tree_util.tree_unflatten(params_def, p), *more, **kw)

    closed, shape = jax.make_jaxpr(flat, return_shape=True)(list(leaves), arrays)
    jaxpr, consts = compat.open_jaxpr(closed)
    return Traced(jaxpr, consts, names, arrays, jax.tree_util.tree_structure(shape))
