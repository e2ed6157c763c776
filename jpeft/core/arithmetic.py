"""Rules for elementwise arithmetic: scalars, gains along some dims of a weight, sums of weights, biases."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpeft.core import compat, ops
from jpeft.core.factor import Factor, Unsupported
from jpeft.core.interpret import Context, register
from jpeft.core.leaf import Leaf


def _scalar(ctx: Context, eqn: Any, values: list[Any], fn: Callable[[Any], Any]) -> Sequence[Any]:
    leaves = [v for v in values if isinstance(v, Leaf)]
    others = [v for v in values if not isinstance(v, Leaf)]
    if len(leaves) != 1 or any(np.size(o) != 1 for o in others):
        raise Unsupported("multiplication by an array")
    return [leaves[0].scale(fn(others[0]) if others else fn(None)).cast(eqn.outvars[0].aval.dtype)]


def _scalars(ctx: Context, eqn: Any, values: list[Any]) -> list[Any]:
    """Take tracked leaves of one element, that meet a larger one, as the scalars they are."""
    if sum(isinstance(v, Leaf) for v in values) < 2 or all(np.size(v.op) == 1 for v in values if isinstance(v, Leaf)):
        return values
    result = []
    for v in values:
        if isinstance(v, Leaf) and not v.adapted and np.size(v.op) == 1:
            if ctx.recorder is not None:
                ctx.recorder.other(v, "scale", ctx.where(eqn), problem=True)
            v = v.op
        result.append(v)
    return result


def _width(leaf: Leaf) -> int:
    """How many dims of the view run over dims of a parameter."""
    return sum(1 for d, n in enumerate(leaf.shape) if n > 1 and any(o.dims[d] for o in leaf.origins))


def _is_weight(v: Any) -> bool:
    return isinstance(v, Leaf) and v.lookup is None and _width(v) > 1


def _thin(ctx: Context, atom: Any, value: Any) -> jax.Array:
    """An operand before it was broadcast, with size 1 along the dims where it is constant."""
    if isinstance(value, Leaf):
        array = value.op
        for d, n in enumerate(value.shape):
            if n > 1 and not any(o.dims[d] for o in value.origins):
                array = lax.slice_in_dim(array, 0, 1, axis=d)
        return array
    known = not isinstance(atom, compat.Literal) and atom in ctx.thin
    return jnp.reshape(*ctx.thin[atom]) if known else value


def _widen(leaf: Leaf, shape: tuple[int, ...]) -> Leaf:
    """Repeat a leaf along the dims of size 1 that the operation broadcasts."""
    for axis, (have, want) in enumerate(zip(leaf.shape, shape, strict=True)):
        if have != want:
            leaf = leaf.along(axis, functools.partial(_repeat, want), (want,))
    return leaf


def _repeat(n: int, a: jax.Array, axis: int) -> jax.Array:
    return jnp.repeat(a, n, axis)


def _gain(ctx: Context, eqn: Any, values: list[Any], at: int, invert: bool) -> Sequence[Any] | None:
    """A weight, operand `at`, times a vector along some of its dims; None: the other operand is no such vector."""
    other, shape = values[1 - at], tuple(eqn.outvars[0].aval.shape)
    if isinstance(other, Leaf) and other.adapted:
        return None
    leaf, s = _widen(values[at], shape), _thin(ctx, eqn.invars[1 - at], other)
    if s.size == math.prod(shape):
        return None
    if ctx.recorder is not None:
        if isinstance(other, Leaf):
            ctx.record(other, "scale", ctx.where(eqn))
        y = compat.rebind(eqn, [v.op if isinstance(v, Leaf) else v for v in values])[0]
        return [dataclasses.replace(leaf, op=y)]
    live = tuple(n > 1 for n in s.shape)
    return [dataclasses.replace(leaf, op=ops.Scaled(leaf.op, Factor(1 / s if invert else s, live), leaf.shape))]


@register("mul")
def _mul(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    values = _scalars(ctx, eqn, values)
    if any(np.size(v) == 1 for v in values if not isinstance(v, Leaf)):
        return _scalar(ctx, eqn, values, lambda s: jnp.reshape(s, ()))
    weights = [i for i, v in enumerate(values) if _is_weight(v) and (v.adapted or ctx.recorder is not None)]
    weights.sort(key=lambda i: _width(values[i]), reverse=True)
    alone = len(weights) == 1 or (len(weights) == 2 and len({_width(v) for v in values}) == 2)
    done = _gain(ctx, eqn, values, weights[0], False) if alone else None
    if done is not None:
        return done
    if ctx.recorder is not None:
        return _elementwise(ctx, eqn, values, "scale")
    raise Unsupported("multiplication by an array")


@register("neg")
def _neg(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    return _scalar(ctx, eqn, values, lambda s: -1)


@register("div")
def _div(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    values = _scalars(ctx, eqn, values)
    if isinstance(values[0], Leaf) and not isinstance(values[1], Leaf) and np.size(values[1]) == 1:
        leaf = values[0]
        return _scalar(ctx, eqn, values, lambda s: jnp.reshape(1 / jnp.asarray(s, leaf.dtype), ()))
    narrow = not _is_weight(values[1]) or (_is_weight(values[0]) and _width(values[1]) < _width(values[0]))
    if narrow and _is_weight(values[0]) and (values[0].adapted or ctx.recorder is not None):
        done = _gain(ctx, eqn, values, 0, True)
        if done is not None:
            return done
    if ctx.recorder is not None:
        return _elementwise(ctx, eqn, values, "scale")
    raise Unsupported("division")


@register("add", "sub", "add_any")
def _add(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    values = _scalars(ctx, eqn, values)
    leaves = [v for v in values if isinstance(v, Leaf)]
    plain = [v.op if isinstance(v, Leaf) else v for v in values]
    if all(not leaf.adapted for leaf in leaves):
        if len(leaves) == 1 and all(np.size(v) == 1 for v in values if not isinstance(v, Leaf)):
            return [dataclasses.replace(leaves[0], op=compat.rebind(eqn, plain)[0])]
        if ctx.recorder is None:
            return compat.rebind(eqn, plain)
        if not all(_is_weight(v) for v in values):
            return _elementwise(ctx, eqn, values, "bias")
        out = compat.rebind(eqn, plain)[0]
        return [_together([_widen(v, tuple(out.shape)) for v in leaves], out)]
    shape = tuple(eqn.outvars[0].aval.shape)
    if any(leaf.lookup is not None for leaf in leaves):
        raise Unsupported("addition to looked-up rows")
    values = [_widen(v, shape) if isinstance(v, Leaf) else jnp.broadcast_to(v, shape) for v in values]
    return [_together([v for v in values if isinstance(v, Leaf)],
                      _sum(eqn, [v.op if isinstance(v, Leaf) else v for v in values]))]


def _together(leaves: Sequence[Leaf], op: Any) -> Leaf:
    return Leaf(op, tuple(o for leaf in leaves for o in leaf.origins), leaves[0].dtype)


def _sum(eqn: Any, parts: list[Any]) -> Any:
    """The sum (or difference) of two expressions: bases as the model adds them, additive terms side by side."""
    minus = eqn.primitive.name == "sub"
    split = [p.parts if isinstance(p, ops.Sum) else (p,) for p in parts]
    shaped = [i for i, s in enumerate(split) if isinstance(s[0], ops.Op)]
    if minus:
        split[1] = (split[1][0], *(ops.scale(t, -1) for t in split[1][1:]))
    if not shaped:
        return ops.add(compat.rebind(eqn, [s[0] for s in split])[0], *split[0][1:], *split[1][1:])
    if len(shaped) == 2 or len(split[1 - shaped[0]]) > 1:
        raise Unsupported("addition of two structured adapters")
    first, second = (ops.scale(p, -1) if minus and i == 1 else p for i, p in enumerate(parts))
    return ops.add(first, second) if shaped == [0] else ops.add(second, first)


@register("complex")
def _complex(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    dtype = eqn.outvars[0].aval.dtype
    leaves = [v for v in values if isinstance(v, Leaf)]
    if any(leaf.lookup is not None for leaf in leaves):
        raise Unsupported("complex looked-up rows")
    turned = [ops.scale(ops.cast(v.op if isinstance(v, Leaf) else v, dtype), by) for v, by in
              zip(values, (1, 1j), strict=True)]
    split = [p.parts if isinstance(p, ops.Sum) else (p,) for p in turned]
    if any(isinstance(s[0], ops.Op) for s in split):
        raise Unsupported("a structured adapter in a complex number")
    op: Any = split[0][0] + split[1][0]
    terms = (*split[0][1:], *split[1][1:])
    return [dataclasses.replace(_together(leaves, ops.add(op, *terms) if terms else op), dtype=dtype)]


def _elementwise(ctx: Context, eqn: Any, values: list[Any], kind: str) -> Sequence[Any]:
    """Record an elementwise meeting of a leaf with activations: a bias or a scale if the leaf is a vector."""
    assert ctx.recorder is not None
    for v in values:
        if isinstance(v, Leaf):
            ctx.record(v, kind if _width(v) <= 1 else eqn.primitive.name, ctx.where(eqn))
    return compat.rebind(eqn, [v.op if isinstance(v, Leaf) else v for v in values])
