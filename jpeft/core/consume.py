"""Rules for operations that use a leaf up: contraction, convolution, ragged contraction, row look-up."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpeft.core import compat, ops
from jpeft.core.einsum import Dot
from jpeft.core.factor import Unsupported
from jpeft.core.interpret import Context, register
from jpeft.core.leaf import NONE, Leaf, Lookup, Origin, Pending, hook_theta, unhook
from jpeft.errors import CallError, UnsupportedUse


def _token_axis(ctx: Context, eqn: Any) -> int | None:
    """The output axis that grew with the virtual tokens."""
    if not ctx.tokens:
        return None
    shape = tuple(eqn.outvars[0].aval.shape)
    old = ctx.tokens.get(id(eqn), (shape,))[0]
    grown = [d for d, (a, b) in enumerate(zip(shape, old, strict=True)) if a - b == ctx.growth]
    return grown[0] if len(grown) == 1 else None


def _finish(ctx: Context, eqn: Any, leaf: Leaf, y: Any, hooks: Sequence[Any], features: Sequence[int]) -> list[Any]:
    """Wrap an output that awaits a hook, or a bias in an analysis."""
    if ctx.recorder is not None:
        return [Pending(y, leaf.paths, (), tuple(features), None, None)]
    if not hooks:
        return [y]
    bias, token = ctx.biases.get(leaf.paths[0]), _token_axis(ctx, eqn)
    if ctx.tokens and token is None:
        hooks = [h for h in hooks if not _without_rows(ctx, eqn, h.fn)]
    pairs = tuple((h.fn, hook_theta(h)) for h in hooks)
    if token is None and any(h.fn.method.positions for h in hooks):
        raise CallError(f"{ctx.where(eqn)} applies {leaf.paths[0]!r} to rows without a token axis, and its method acts "
                        "by position; keep [B, T, ..] there, or let it act on all positions")
    rows = tuple(n for d, n in enumerate(y.shape) if d not in features)
    inputs = tuple(_input_of(ctx, eqn, h.fn, rows) for h in hooks)
    pending = Pending(y, leaf.paths, pairs, tuple(features), token, bias, inputs, ctx.where(eqn))
    return [pending.settle() if bias is None and pending.late else pending]


def _input_of(ctx: Context, eqn: Any, hook: Any, rows: tuple[int, ...]) -> Any:
    """The input that a hook asks for, `[*rows, in]`."""
    path = hook.method.source(hook.site)
    if path is None:
        return None
    x = ctx.taps.get(path)
    if x is None or math.prod(x.shape[:-1]) != math.prod(rows):
        found = "is contracted with other rows" if x is not None else "is not contracted before it in the same block"
        raise UnsupportedUse(f"{ctx.where(eqn)}: the method on {hook.site.path!r} wants the input of {path!r}, which "
                             f"{found}; name the first projection of the same sublayer")
    return jnp.reshape(x, (*rows, x.shape[-1]))


def _without_rows(ctx: Context, eqn: Any, hook: Any) -> bool:
    """Whether a method has virtual tokens and this use of its leaf does not: a table that a second text reads too."""
    if not hook.method.virtual_tokens:
        return False
    if hook.site.use == "linear":
        raise CallError(f"{ctx.where(eqn)} applies {hook.site.path!r} to tokens that have no virtual ones before them; "
                        f"limit the rule of {type(hook.method).__name__} to the leaves of the text that "
                        "jpeft.Tokens(ids=...) names")
    return True


def _pick(ctx: Context, eqn: Any, values: list[Any]) -> int:
    """Which operand of a product is the weight; the other becomes an array."""
    where = [i for i, v in enumerate(values[:2]) if isinstance(v, Leaf)]
    rows = [i for i in where if values[i].lookup is not None]
    if len(where) == 2 and len(rows) == 1:
        values[rows[0]] = ctx.whole(values[rows[0]], eqn)
        return 1 - rows[0]
    adapted = [i for i in where if values[i].adapted]
    if len(adapted) == 2:
        raise Unsupported("two adapted leaves are multiplied with each other")
    weight = (adapted or where)[-1]
    if len(where) == 2 and not adapted and _weight_first(eqn, values):
        weight = 0
    if len(where) == 2:
        values[1 - weight] = ctx.whole(values[1 - weight], eqn)
    return weight


def _weight_first(eqn: Any, values: Sequence[Leaf]) -> bool:
    """Whether, of two leaves, the first is the weight: `W [out, in]` times the rows of a smaller one (vmapped `W @ x`).

    Elsewhere the second is: learned tokens, latents or positions `[n, in]` times `W [in, out]`.
    """
    con = eqn.params["dimension_numbers"][0]
    last = all(tuple(c) == (v.ndim - 1,) for c, v in zip(con, values, strict=False))
    return last and np.size(values[0].op) > np.size(values[1].op)


@register("dot_general")
def _dot_general(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    values = list(values)
    at = _pick(ctx, eqn, values)
    leaf, x = values[at], values[1 - at]
    con, batch = eqn.params["dimension_numbers"]
    wl = list(range(100, 100 + leaf.ndim))
    xl = list(range(x.ndim))
    for pair in (*zip(*con, strict=True), *zip(*batch, strict=True)):
        wl[pair[at]] = pair[1 - at]
    w_con, w_batch, x_con = con[at], batch[at], con[1 - at]
    lhs, rhs = (wl, xl) if at == 0 else (xl, wl)
    free = [[c for i, c in enumerate(side) if i not in (*con[k], *batch[k])] for k, side in enumerate((lhs, rhs))]
    out = (*(lhs[i] for i in batch[0]), *free[0], *free[1])
    w_free = [i for i in range(leaf.ndim) if i not in (*w_con, *w_batch)]
    if ctx.recorder is not None:
        rows = math.prod(n for i, n in enumerate(x.shape) if i not in x_con) * ctx.trips
        kind = "linear" if w_con else "scale"
        ctx.recorder.contraction(leaf, kind, w_con, w_free, rows, (*ctx.stack, id(eqn)), ctx.where(eqn), 1)
        y = compat.rebind(eqn, [leaf.op, x] if at == 0 else [x, leaf.op])[0]
        return _finish(ctx, eqn, leaf, y, (), [out.index(wl[i]) for i in w_free])
    leaf = ctx.use(leaf, x)
    for path in ctx.tapped.intersection(leaf.paths):
        ins = [c for _, c in sorted(zip(w_con, x_con, strict=True))]
        order = (*(c for c in out if c in xl), *ins)
        ctx.taps[path] = jnp.reshape(jnp.transpose(x, order), (*(x.shape[c] for c in order[: -len(ins)]), -1))
    value, hooks = unhook(leaf.op)
    aval = eqn.outvars[0].aval

    def original(a: Any, w: Any) -> Any:
        return compat.rebind(eqn, [w, a] if at == 0 else [a, w])[0]

    dot = Dot(eqn.params["precision"], aval.dtype, eqn.params["preferred_element_type"], None,
              (tuple(xl), tuple(wl), tuple(out)), original)
    y = ops.contract(value, x, tuple(xl), tuple(wl), tuple(out), dot)
    return _finish(ctx, eqn, leaf, y, hooks, [out.index(wl[i]) for i in w_free])


def multiply(x: jax.Array, leaf: Any, x_dims: Sequence[int], w_dims: Sequence[int]) -> jax.Array:
    """Contract `x` with an adapted leaf without forming its weight; for user rules.

    `y[x's other dims, w's other dims] = sum x[.., i, ..] w[.., i, ..]` over the paired dims.

    Args:
        x: activations.
        leaf: the `Leaf` that a rule was given, or a plain array.
        x_dims: contracted dims of `x`.
        w_dims: contracted dims of the weight, in the same order.

    Returns:
        The product, of the dtype of `x`.
    """
    op = leaf.op if isinstance(leaf, Leaf) else leaf
    value, hooks = unhook(op)
    if hooks:
        raise Unsupported("a hooked leaf in a user rule")
    wl = list(range(100, 100 + len(value.shape)))
    for i, j in zip(x_dims, w_dims, strict=True):
        wl[j] = i
    xl = tuple(range(x.ndim))
    out = (*(c for c in xl if c not in x_dims), *(c for c in wl if c >= 100))
    numbers = ((tuple(x_dims), tuple(w_dims)), ((), ()))
    dot = Dot(None, x.dtype, None, None, (xl, tuple(wl), out),
              lambda a, w: lax.dot_general(a, w.astype(a.dtype), numbers))
    return ops.contract(value, x, xl, tuple(wl), out, dot)


@register("conv_general_dilated")
def _conv(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    x, leaf = values
    if isinstance(x, Leaf):
        x = ctx.whole(x, eqn, "a weight as the left operand of a convolution")
    if not isinstance(leaf, Leaf):
        return compat.rebind(eqn, [x, leaf])
    p = eqn.params
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    c_out, c_in, *spatial = numbers.rhs_spec
    feature = numbers.out_spec[1]
    if p["batch_group_count"] != 1:
        raise Unsupported("batch_group_count")
    if ctx.recorder is not None:
        shape = eqn.outvars[0].aval.shape
        rows = math.prod(n for i, n in enumerate(shape) if i != feature) * ctx.trips
        ctx.recorder.contraction(
            leaf, "conv", (*spatial, c_in), (c_out,), rows, (*ctx.stack, id(eqn)), ctx.where(eqn), groups)
        return _finish(ctx, eqn, leaf, compat.rebind(eqn, [x, leaf.op])[0], (), (feature,))
    leaf = ctx.use(leaf, x)
    value, hooks = unhook(leaf.op)

    def plain(a: Any, w: Any) -> Any:
        return compat.rebind(eqn, [a, w])[0]

    def go(e: Any, a: Any) -> Any:
        if not isinstance(e, ops.Op):
            return plain(a, e)
        if isinstance(e, ops.Sum):
            first, *rest = (go(part, a) for part in e.parts)
            return sum(rest, first)
        if isinstance(e, ops.Scaled):
            where = [d for d, live in enumerate(e.s.live) if live]
            if where == [c_out]:
                y = go(e.of, a)
                return y * _at(e.s.array.astype(y.dtype), feature, y.ndim)
            if where == [c_in] and groups == 1:
                return go(e.of, a * _at(e.s.array.astype(a.dtype), numbers.lhs_spec[1], a.ndim))
        if isinstance(e, ops.Product) and len(e.factors) == 2:
            left, right = e.factors[::-1] if e.factors[0].live[c_out] else e.factors
            if not left.live[c_out] and [d for d, live in enumerate(right.live) if live] in ([c_out], []):
                return _conv_low_rank(eqn, e, left, right, a).astype(eqn.outvars[0].aval.dtype)
        raise Unsupported("a structured adapter in a convolution")

    return _finish(ctx, eqn, leaf, go(value, x), hooks, (feature,))


def _at(s: jax.Array, axis: int, ndim: int) -> jax.Array:
    return jnp.reshape(s, tuple(-1 if d == axis else 1 for d in range(ndim)))


def _conv_low_rank(eqn: Any, term: ops.Product, left: Any, right: Any, x: jax.Array) -> jax.Array:
    """A convolution to `r` channels (per group), then a 1x1 convolution to the outputs."""
    p = eqn.params
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    c_out = numbers.rhs_spec[0]
    if term.key is not None:
        data = jnp.reshape(term.key.array, (-1,))
        keep = jax.random.bernoulli(jax.random.wrap_key_data(data), 1.0 - term.rate, x.shape)
        x = jnp.where(keep, x / jnp.asarray(1.0 - term.rate, x.dtype), jnp.zeros((), x.dtype))
    down = jnp.moveaxis(jnp.squeeze(left.array, c_out), -1, c_out).astype(x.dtype)
    if groups > 1:
        down = jnp.concatenate([down] * groups, c_out)
    y = lax.conv_general_dilated(
        x, down, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], numbers, groups,
        precision=p["precision"])
    n_out, r = right.array.shape[c_out], right.array.shape[-1]
    flat = jnp.reshape(jnp.moveaxis(right.array, c_out, -1), (r, n_out)).astype(x.dtype)
    feature = numbers.out_spec[1]
    y = jnp.moveaxis(y, feature, -1)
    y = jnp.reshape(y, (*y.shape[:-1], groups, r))
    up = jnp.moveaxis(jnp.reshape(flat, (r, groups, n_out // groups)), 1, 0)
    z = jnp.einsum("...gr,gro->...go", y, up, precision=p["precision"])
    return jnp.moveaxis(jnp.reshape(z, (*z.shape[:-2], n_out)), -1, feature)


@register("ragged_dot_general", "ragged_dot")
def _ragged(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    x, leaf, sizes = values[:3]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_con, w_con), (x_batch, w_batch) = numbers.dot_dimension_numbers
    if not isinstance(leaf, Leaf) or isinstance(x, Leaf) or x_batch or w_batch or len(x_con) != 1 or x.ndim != 2 \
            or tuple(numbers.lhs_ragged_dimensions) != (0,) or len(numbers.rhs_group_dimensions) != 1:
        raise Unsupported("this form of ragged_dot")
    group, ins = numbers.rhs_group_dimensions[0], w_con[0]
    outs = next(d for d in range(3) if d not in (group, ins))
    if ctx.recorder is not None:
        rows = x.shape[0] * ctx.trips
        ctx.recorder.contraction(leaf, "linear", (ins,), (outs,), rows, (*ctx.stack, id(eqn)), ctx.where(eqn), 1)
        return _finish(ctx, eqn, leaf, compat.rebind(eqn, [x, leaf.op, sizes])[0], (), (1,))
    leaf = ctx.use(leaf, x)
    value, hooks = unhook(leaf.op)
    perm = (group, ins, outs)

    def owner(s: jax.Array) -> jax.Array:
        return jnp.repeat(s, sizes, axis=0, total_repeat_length=x.shape[0])

    def go(e: Any, a: Any) -> Any:
        if not isinstance(e, ops.Op):
            return compat.rebind(eqn, [a, e, sizes])[0]
        if isinstance(e, ops.Sum):
            first, *rest = (go(part, a) for part in e.parts)
            return sum(rest, first)
        if isinstance(e, ops.Scaled):
            s = jnp.transpose(e.s.array, perm)
            per_row = owner(jnp.broadcast_to(s, (value.shape[group], *s.shape[1:])))
            if not e.s.live[outs]:
                return go(e.of, a * per_row[:, :, 0].astype(a.dtype))
            if not e.s.live[ins]:
                y = go(e.of, a)
                return y * per_row[:, 0, :].astype(y.dtype)
        if isinstance(e, ops.Product) and len(e.factors) == 2 and e.key is None:
            left, right = e.factors if e.factors[0].live[ins] else e.factors[::-1]
            if left.live[group] and right.live[group] and not left.live[outs] and not right.live[ins]:
                down = jnp.squeeze(jnp.transpose(left.array, (*perm, 3)), 2).astype(a.dtype)
                up = jnp.swapaxes(jnp.squeeze(jnp.transpose(right.array, (*perm, 3)), 1), 1, 2).astype(a.dtype)
                t = lax.ragged_dot(a, down, sizes, precision=eqn.params["precision"])
                return lax.ragged_dot(t, up, sizes, precision=eqn.params["precision"]).astype(eqn.outvars[0].aval.dtype)
        raise Unsupported("a structured adapter (or dropout) in ragged_dot")

    return _finish(ctx, eqn, leaf, go(value, x), hooks, (1,))


class _Take:
    """Index one axis by an array of indices, as the model's own gather does; factors are filled with zeros."""

    def __init__(self, indices: jax.Array, params: dict[str, Any]):
        self.indices, self.params = indices, params

    def __call__(self, array: jax.Array, axis: int, fill: Any = None) -> jax.Array:
        n = self.indices.ndim - 1
        rank = array.ndim - 1 + n
        numbers = lax.GatherDimensionNumbers(
            offset_dims=tuple(d for d in range(rank) if not axis <= d < axis + n),
            collapsed_slice_dims=(axis,), start_index_map=(axis,))
        sizes = tuple(1 if d == axis else s for d, s in enumerate(array.shape))
        return lax.gather(array, self.indices, numbers, sizes, indices_are_sorted=self.params["indices_are_sorted"],
                          unique_indices=self.params["unique_indices"], mode=self.params["mode"],
                          fill_value=self.params["fill_value"] if fill is None else fill)

    def inner(self, array: jax.Array, axis: int) -> jax.Array:
        return self(array, axis, 0)


@register("gather")
def _gather(ctx: Context, eqn: Any, values: list[Any], wanted: Any) -> Sequence[Any]:
    leaf, indices = values
    if not isinstance(leaf, Leaf) or isinstance(indices, Leaf):
        raise Unsupported("a weight as an index")
    p = eqn.params
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    collapsed, start = tuple(numbers.collapsed_slice_dims), tuple(numbers.start_index_map)
    cut = [d for d in range(leaf.ndim) if sizes[d] != leaf.shape[d]] or list(collapsed) or list(start)
    exact = all(sizes[d] == leaf.shape[d] == 1 or d == cut[0] for d in collapsed)
    clipped = p["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    if numbers.operand_batching_dims or len(cut) != 1 or sizes[cut[0]] != 1 or cut[0] not in start \
            or not exact or (len(start) > 1 and not clipped):
        return _rows(ctx, eqn, leaf, indices)
    axis = cut[0]
    column = lax.slice_in_dim(indices, start.index(axis), start.index(axis) + 1, axis=-1)
    n = indices.ndim - 1
    shape = eqn.outvars[0].aval.shape
    take = _Take(column, p)
    dims = tuple(o.dims[axis] for o in leaf.origins)
    value, hooks = unhook(leaf.op)
    now = ctx.recorder is None and n > 0 and all(q in ctx.embeddings for q in leaf.paths)
    taken = Leaf(value if now else leaf.op, leaf.origins, leaf.dtype).along(axis, take, tuple(indices.shape[:-1]))
    kept = [d for d in range(leaf.ndim) if d not in collapsed]
    thin = [s for d, s in enumerate(taken.shape) if axis <= d < axis + n or _source(d, axis, n) not in collapsed]
    taken = taken.reshape(thin) if axis in collapsed else _put_one(taken, axis, n, collapsed)
    batch = [d for d in range(len(shape)) if d not in numbers.offset_dims]
    first = sum(1 for d in kept if d < axis)
    layout = [0] * len(shape)
    for k, d in enumerate(numbers.offset_dims):
        layout[d] = k if k < first else k + n
    for k, d in enumerate(batch):
        layout[d] = first + k
    taken = taken.permute(layout)
    if now:
        return _finish(ctx, eqn, leaf, taken.dense(), hooks, numbers.offset_dims)
    if n == 0:
        return [dataclasses.replace(taken, lookup=leaf.lookup)]
    rows = math.prod(indices.shape[:-1]) * ctx.trips
    return [dataclasses.replace(taken, lookup=Lookup(dims, rows, (*ctx.stack, id(eqn)), ctx.where(eqn)))]


def _rows(ctx: Context, eqn: Any, leaf: Leaf, indices: jax.Array) -> Sequence[Any]:
    """Rows chosen by several indices at once, or table by table under vmap: a look-up at once."""
    p = eqn.params
    numbers, n = p["dimension_numbers"], indices.ndim - 1
    chosen, tables = tuple(numbers.collapsed_slice_dims), tuple(numbers.operand_batching_dims)
    kept = [d for d in range(leaf.ndim) if d not in (*chosen, *tables)]
    whole = all(p["slice_sizes"][d] == leaf.shape[d] for d in kept)
    if n == 0 or sorted(numbers.start_index_map) != sorted(chosen) or not whole:
        raise Unsupported("this form of gather")
    if ctx.recorder is not None:
        origins = tuple(Origin(o.path, tuple(o.dims[d] for d in kept)) for o in leaf.origins)
        dims = tuple(NONE.union(*(o.dims[d] for d in chosen)) for o in leaf.origins)
        look = Lookup(dims, math.prod(indices.shape[:-1]) * ctx.trips, (*ctx.stack, id(eqn)), ctx.where(eqn))
        ctx.recorder.rows(Leaf(leaf.op, origins, leaf.dtype, look))
        return _finish(ctx, eqn, leaf, compat.rebind(eqn, [leaf.op, indices])[0], (), numbers.offset_dims)
    if not all(q in ctx.embeddings for q in leaf.paths):
        raise Unsupported("this form of gather")
    value, hooks = unhook(leaf.op)
    columns = {d: (indices[..., i], tuple(range(n))) for i, d in enumerate(numbers.start_index_map)}
    places = zip(tables, numbers.start_indices_batching_dims, strict=True)
    columns |= {d: (jnp.arange(leaf.shape[d]), (k,)) for d, k in places}

    def row(at: dict[int, jax.Array]) -> jax.Array:
        view = Leaf(value, leaf.origins, leaf.dtype)
        for d, i in at.items():
            start = jnp.clip(i, 0, leaf.shape[d] - 1)
            view = view.along(d, functools.partial(_one, start), (1,))
        return view.reshape([leaf.shape[d] for d in kept]).dense()

    run = row
    for k in reversed(range(n)):
        run = jax.vmap(run, in_axes=({d: 0 if k in carried else None for d, (_, carried) in columns.items()},))
    y = run({d: column for d, (column, _) in columns.items()})
    if p["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        inside = [(columns[d][0] >= 0) & (columns[d][0] < leaf.shape[d]) for d in chosen]
        fill = jnp.nan if p["fill_value"] is None else p["fill_value"]
        y = jnp.where(jnp.expand_dims(functools.reduce(jnp.logical_and, inside), tuple(range(n, y.ndim))), y, fill)
    others = [d for d in range(y.ndim) if d not in numbers.offset_dims]
    order = [n + numbers.offset_dims.index(d) if d in numbers.offset_dims else others.index(d) for d in range(y.ndim)]
    return _finish(ctx, eqn, leaf, jnp.transpose(y, order), hooks, numbers.offset_dims)


def _one(start: jax.Array, array: jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, start, 1, axis)


def _source(d: int, axis: int, n: int) -> int:
    """The operand dim that dim `d` is, after `axis` gave way to `n` index dims."""
    return d if d < axis else d - n + 1


def _put_one(taken: Leaf, axis: int, n: int, collapsed: Sequence[int]) -> Leaf:
    """Where the gather keeps the indexed dim (of size 1), put it behind the index dims."""
    shape = [s for d, s in enumerate(taken.shape) if axis <= d < axis + n or _source(d, axis, n) not in collapsed]
    at = sum(1 for d in range(axis) if d not in collapsed) + n
    return taken.reshape((*shape[:at], 1, *shape[at:]))
