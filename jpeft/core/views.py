"""Rules for operations after which a leaf is still a leaf: layout, slicing, indexing, joining, marking."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.core import arithmetic as arithmetic  # importing it registers its rules
from jpeft.core import compat, ops
from jpeft.core.factor import Factor, Unsupported, join
from jpeft.core.interpret import Context, register
from jpeft.core.leaf import NONE, Leaf, Origin


def _first(values: Sequence[Any]) -> Leaf:
    """The leaf of an operation whose first operand is one; no other may be."""
    if not isinstance(values[0], Leaf) or any(isinstance(v, Leaf) for v in values[1:]):
        raise Unsupported("a leaf as an index or a bound")
    return values[0]


class _Pad:
    """Pad one axis: the base with the given value, factors with zeros."""

    def __init__(self, value: Any, config: tuple[int, int, int]):
        self.value, self.config = value, config

    def __call__(self, array: jax.Array, axis: int) -> jax.Array:
        return self._pad(array, axis, self.value)

    def inner(self, array: jax.Array, axis: int) -> jax.Array:
        return self._pad(array, axis, 0)

    def _pad(self, array: jax.Array, axis: int, value: Any) -> jax.Array:
        config = [(0, 0, 0)] * array.ndim
        config[axis] = self.config
        return lax.pad(array, jnp.asarray(value, array.dtype), config)


@register("transpose")
def _transpose(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    return [_first(values).permute(eqn.params["permutation"])]


@register("reshape", "squeeze", "expand_dims")
def _reshape(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf = _first(values)
    if eqn.primitive.name == "reshape" and eqn.params.get("dimensions") is not None:
        leaf = leaf.permute(eqn.params["dimensions"])
    return [leaf.reshape(eqn.outvars[0].aval.shape)]


def _repeat(n: int, a: jax.Array, axis: int) -> jax.Array:
    return jnp.repeat(a, n, axis)


def _copies(n: int, a: jax.Array, axis: int) -> jax.Array:
    return jnp.concatenate([a] * n, axis)


@register("broadcast_in_dim")
def _broadcast(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf, shape, where = _first(values), tuple(eqn.params["shape"]), eqn.params["broadcast_dimensions"]
    thin = [1] * len(shape)
    for d, at in enumerate(where):
        thin[at] = leaf.shape[d]
    leaf = leaf.reshape(thin)
    for axis, (have, want) in enumerate(zip(thin, shape, strict=True)):
        if have != want:
            leaf = leaf.along(axis, functools.partial(_repeat, want), (want,))
    return [leaf]


@register("convert_element_type")
def _convert(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf, dtype = _first(values), eqn.params["new_dtype"]
    if leaf.adapted and not jnp.issubdtype(dtype, jnp.inexact):
        raise Unsupported(f"conversion to {np.dtype(dtype).name}")
    return [leaf.cast(dtype)]


def _cut(leaf: Leaf, axis: int, start: Any, size: int, stride: int = 1) -> Leaf:
    if not isinstance(start, int):
        return leaf.along(axis, lambda a, ax: lax.dynamic_slice_in_dim(a, start, size, ax), (size,))
    stop = start + (size - 1) * stride + 1
    return leaf.along(axis, lambda a, ax: lax.slice_in_dim(a, start, stop, stride, ax), (size,))


@register("slice")
def _slice(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf, shape = _first(values), eqn.outvars[0].aval.shape
    strides = eqn.params["strides"] or (1,) * leaf.ndim
    for axis, (start, stride) in enumerate(zip(eqn.params["start_indices"], strides, strict=True)):
        if shape[axis] != leaf.shape[axis]:
            leaf = _cut(leaf, axis, int(start), shape[axis], int(stride))
    return [leaf]


@register("dynamic_slice")
def _dynamic_slice(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf, shape = _first(values), eqn.outvars[0].aval.shape
    for axis, start in enumerate(values[1:]):
        if shape[axis] != leaf.shape[axis]:
            leaf = _cut(leaf, axis, jnp.asarray(start), shape[axis])
    return [leaf]


@register("split")
def _split(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf, axis, start, outs = _first(values), eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        outs.append(_cut(leaf, axis, start, int(size)))
        start += int(size)
    return outs


@register("unstack")
def _unstack(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf, axis = _first(values), eqn.params["axis"]
    shape = (*leaf.shape[:axis], *leaf.shape[axis + 1:])
    return [_cut(leaf, axis, i, 1).reshape(shape) for i in range(leaf.shape[axis])]


@register("tile")
def _tile(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf = _first(values)
    for axis, n in enumerate(eqn.params["reps"]):
        if n != 1:
            size = leaf.shape[axis] * n
            leaf = leaf.along(axis, functools.partial(_copies, n), (size,))
    return [leaf]


@register("rev")
def _rev(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf = _first(values)
    for axis in eqn.params["dimensions"]:
        leaf = leaf.along(axis, lambda a, ax: lax.rev(a, (ax,)), (leaf.shape[axis],))
    return [leaf]


@register("pad")
def _pad(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf, shape = _first(values), eqn.outvars[0].aval.shape
    for axis, config in enumerate(eqn.params["padding_config"]):
        if tuple(config) != (0, 0, 0):
            leaf = leaf.along(axis, _Pad(values[1], tuple(config)), (shape[axis],), carry=True)
    return [leaf]


@register("copy", "copy_p", "reduce_precision")
def _copy(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    return [_first(values)]


@register("name", "stop_gradient", "device_put")
def _mark(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    if eqn.primitive.name == "device_put":
        return values
    leaf = _first(values)
    if eqn.primitive.name == "stop_gradient":
        return [leaf.map(lambda a, dims: lax.stop_gradient(a))]
    return [leaf.map(lambda a, dims: checkpoint_name(a, eqn.params["name"]))]


@register("optimization_barrier")
def _barrier(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    return list(lax.optimization_barrier(tuple(values)))


@register("sharding_constraint", "reshard")
def _constraint(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf = _first(values)
    sharding = eqn.params.get("sharding", eqn.params.get("dst_sharding"))
    if not isinstance(sharding, NamedSharding):
        return [leaf]
    spec = (*sharding.spec, *(None,) * (leaf.ndim - len(sharding.spec)))
    put = lax.with_sharding_constraint if eqn.primitive.name == "sharding_constraint" else jax.sharding.reshard

    def one(a: Any, dims: tuple[int | None, ...]) -> Any:
        return put(a, NamedSharding(sharding.mesh, PartitionSpec(*(None if d is None else spec[d] for d in dims))))

    return [leaf.map(one)]


@register("pvary", "pcast")
def _vary(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    axes = eqn.params["axes"]
    axes = axes if isinstance(axes, (tuple, list)) else (axes,)
    return [v.map(lambda a, dims: compat.pvary(a, axes)) if isinstance(v, Leaf) else compat.pvary(v, axes)
            for v in values]


@register("all_gather")
def _all_gather(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf, p = _first(values), eqn.params
    axis = p["all_gather_dimension"]
    if not p["tiled"] or p.get("axis_index_groups") is not None:
        raise Unsupported("all_gather that adds an axis")
    names, size = p["axis_name"], eqn.outvars[0].aval.shape[axis]
    return [leaf.along(axis, lambda a, ax: lax.all_gather(a, names, axis=ax, tiled=True), (size,))]


@register("concatenate", "stack")
def _concatenate(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    axis = eqn.params.get("dimension", eqn.params.get("axis"))
    if eqn.primitive.name == "stack":
        thin = (*values[0].shape[:axis], 1, *values[0].shape[axis:])
        values = [v.reshape(thin) if isinstance(v, Leaf) else jnp.reshape(v, thin) for v in values]
    parts = [v.op if isinstance(v, Leaf) else v for v in values]
    origins = tuple(Origin(o.path, tuple(d if i != axis or v.shape[axis] > 1 else NONE for i, d in enumerate(o.dims)))
                    for v in values if isinstance(v, Leaf) for o in v.origins)
    if any(isinstance(v, Leaf) and v.lookup is not None for v in values):
        raise Unsupported("looked-up rows joined with others")
    return [Leaf(_join(parts, axis), origins, eqn.outvars[0].aval.dtype)]


def _join(parts: list[Any], axis: int) -> Any:
    """Concatenate expressions: bases side by side, additive terms by blocks, scales filled up with ones."""
    sizes = [p.shape[axis] for p in parts]
    if not any(isinstance(p, ops.Op) for p in parts):
        return jnp.concatenate(parts, axis)
    if any(isinstance(p, ops.Scaled) for p in parts):
        some = next(p for p in parts if isinstance(p, ops.Scaled))
        live = tuple(alive and d != axis for d, alive in enumerate(some.s.live))
        ones = [jnp.ones([n if alive else 1 for n, alive in zip(p.shape, live, strict=True)], some.s.array.dtype)
                for p in parts]
        scales = [p.s if isinstance(p, ops.Scaled) else Factor(one, live) for p, one in zip(parts, ones, strict=True)]
        of = _join([p.of if isinstance(p, ops.Scaled) else p for p in parts], axis)
        return ops.Scaled(of, join(scales, axis, sizes), tuple(of.shape))
    split = [p.parts if isinstance(p, ops.Sum) else (p,) for p in parts]
    if any(isinstance(s[0], ops.Op) or any(not isinstance(t, ops.Product) for t in s[1:]) for s in split):
        raise Unsupported("concatenate of structured adapters")
    base = jnp.concatenate([s[0] for s in split], axis)
    terms = [t for s in split for t in s[1:]]
    kinds = {(*((f.live, f.extras) for f in t.factors), t.rate, t.key is None) for t in terms}
    if len(kinds) == 1 and max(len(s) for s in split) == 2 and not any(f.live[axis] for f in terms[0].factors):
        proto = terms[0]
        full = [s[1] if len(s) == 2 else _zero(proto, p.shape) for s, p in zip(split, parts, strict=True)]
        factors = [join([t.factors[i] for t in full], axis, sizes) for i in range(len(proto.factors))]
        key = None if proto.key is None else join([t.key or proto.key for t in full], axis, sizes)
        return ops.add(base, ops.Product(tuple(factors), key, tuple(base.shape), proto.rate))
    blocks, start = [], 0
    for s, n in zip(split, sizes, strict=True):
        pad = _Pad(0, (start, base.shape[axis] - start - n, 0))
        blocks += [ops.along(t, axis, pad, (base.shape[axis],), True) for t in s[1:]]
        start += n
    return ops.add(base, *_blockwise(blocks))


def _zero(like: ops.Product, shape: tuple[int, ...]) -> ops.Product:
    factors = [Factor(jnp.zeros_like(f.array), f.live, f.extras) for f in like.factors]
    return ops.Product(tuple(factors), like.key, tuple(shape), like.rate)


def _blockwise(blocks: list[ops.Product]) -> list[ops.Product]:
    """Merge low-rank terms of one layout into one term whose rank is the sum of theirs."""
    first = blocks[0]
    plain = all(b.key is None and len(b.factors) == 2 and all(len(f.extras) == 1 for f in b.factors) and
                [f.live for f in b.factors] == [f.live for f in first.factors] for b in blocks)
    if len(blocks) == 1 or not plain:
        return blocks
    factors = []
    for i, f in enumerate(first.factors):
        arrays = [b.factors[i].array for b in blocks]
        factors.append(Factor(jnp.concatenate(arrays, -1), f.live, first.factors[0].extras))
    return [ops.Product(tuple(factors), None, first.shape)]
