"""Which steps of a program make an array of a weight's shape out of what is not a weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jpeft.core import compat

Shape = tuple[int, ...]
VIEWS = ("reshape", "transpose", "broadcast_in_dim", "squeeze", "convert_element_type", "copy", "slice")


def dense_steps(f: Callable[..., Any], weights: Any, *others: Any, shapes: Collection[Shape]) -> list[str]:
    """Return the equations of `f(weights, *others)` whose result depends on `others` and has one of the shapes.

    The order of dims does not count, nor do dims of 1; a mere view of such a result is not listed again.
    """
    closed = jax.make_jaxpr(f)(weights, *others)
    held = len(jax.tree.leaves(weights))
    found: dict[int, str] = {}
    wanted = {_plain(shape) for shape in shapes}
    _walk(closed.jaxpr, [i >= held for i in range(len(closed.jaxpr.invars))], wanted, found)
    return sorted(set(found.values()))


def _plain(shape: Sequence[int]) -> Shape:
    return tuple(sorted(n for n in shape if n != 1))


def _walk(jaxpr: Jaxpr, marks: Sequence[bool], wanted: Collection[Shape], found: dict[int, str]) -> list[bool]:
    """Return which results depend on the marked arguments, and note the dense steps on the way."""
    marked = {var for var, mark in zip(jaxpr.invars, marks, strict=True) if mark}
    for eqn in jaxpr.eqns:
        given = [not isinstance(v, Literal) and v in marked for v in eqn.invars]
        inner = [sub for value in eqn.params.values() for sub in _jaxprs(value)]
        out = [any(given)] * len(eqn.outvars)
        if eqn.primitive.name == "scan":
            out = _scan(eqn, inner[0], given, wanted, found)
        elif inner:
            for sub in inner:
                fits = len(sub.invars) <= len(given)
                ends = _walk(sub, given[len(given) - len(sub.invars):] if fits else [True] * len(sub.invars), wanted,
                             found)
                out = ends if len(inner) == 1 and len(ends) == len(out) else out
        elif any(given) and eqn.primitive.name not in VIEWS:
            found.update({id(eqn): f"{eqn.primitive.name} -> {list(v.aval.shape)}" for v in eqn.outvars
                          if _plain(getattr(v.aval, "shape", ())) in wanted})
        marked |= {var for var, mark in zip(eqn.outvars, out, strict=True) if mark}
    return [not isinstance(v, Literal) and v in marked for v in jaxpr.outvars]


def _scan(eqn: Any, body: Jaxpr, given: list[bool], wanted: Collection[Shape], found: dict[int, str]) -> list[bool]:
    """Go round until what the carry depends on no longer grows."""
    parts = compat.scan_parts(eqn)
    first, carried = parts.n_consts, parts.n_carry
    while True:
        out = _walk(body, given, wanted, found)
        grown = [a or b for a, b in zip(given[first:first + carried], out[:carried], strict=True)]
        if grown == given[first:first + carried]:
            return out
        given = [*given[:first], *grown, *given[first + carried:]]


def _jaxprs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [sub for one in value for sub in _jaxprs(one)] if isinstance(value, list | tuple) else []
