"""Rules for control flow and closed calls: each is rebuilt with the public function that made it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jpeft.core import compat
from jpeft.core.factor import Unsupported
from jpeft.core.interpret import Context, flush, forwarded, register, run
from jpeft.core.leaf import Leaf


def _spread(flags: Sequence[bool], chosen: Sequence[Any], rest: Any = None) -> list[Any]:
    """Put `chosen` where `flags` is True, `rest` elsewhere."""
    it = iter(chosen)
    return [next(it) if f else rest for f in flags]


def _arrays(ctx: Context, eqn: Any, values: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """Make the wanted outputs of an inner jaxpr arrays; what is still adapted would have to be formed whole."""
    done = [flush(v) if w else None for v, w in zip(values, wanted, strict=True)]
    return [ctx.whole(v, eqn, "it leaves the loop") if isinstance(v, Leaf) else v for v in done]


@register("jit", "pjit", "closed_call", "core_call", "custom_lin")
def _jit(ctx: Context, eqn: Any, values: list[Any], wanted: list[bool]) -> Sequence[Any]:
    jaxpr, consts = compat.open_jaxpr(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
    ins = eqn.params.get("in_shardings", ())
    for i, sharding in enumerate(ins):
        if compat.specified(sharding) and not isinstance(values[i], Leaf):
            values[i] = lax.with_sharding_constraint(values[i], sharding)
    inner = ctx.enter(eqn)
    outs = run(inner, jaxpr, consts, values, wanted)
    ctx.taps.update(inner.taps)
    for i, sharding in enumerate(eqn.params.get("out_shardings", ())):
        if compat.specified(sharding) and wanted[i] and not isinstance(outs[i], Leaf):
            outs[i] = lax.with_sharding_constraint(flush(outs[i]), sharding)
    return outs


@register("checkpoint")
def _checkpoint(ctx: Context, eqn: Any, values: list[Any], wanted: list[bool]) -> Sequence[Any]:
    parts = compat.remat_parts(eqn)
    assert parts is not None
    closed, policy, prevent_cse = parts
    jaxpr, consts = compat.open_jaxpr(closed)
    same = [i if i is not None and isinstance(values[i], Leaf) else None for i in forwarded(jaxpr)]
    inside = [w and s is None for w, s in zip(wanted, same, strict=True)]
    inner = ctx.enter(eqn)

    def body(args: Any) -> Any:
        outs = run(inner, jaxpr, consts, args, inside)
        return [flush(v) for v, w in zip(outs, inside, strict=True) if w]

    outs = jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(values)
    return [values[s] if s is not None else v for s, v in zip(same, _spread(inside, outs), strict=True)]


class _Slices:
    """The live arrays of a leaf along axis 0, to be fed to `lax.scan`, and the leaf of one slice."""

    def __init__(self, leaf: Leaf):
        self.leaf = leaf
        self.arrays: list[jax.Array] = []

        def collect(a: jax.Array, axis: int) -> jax.Array:
            self.arrays.append(a)
            return lax.slice_in_dim(a, 0, 1, axis=axis)

        leaf.along(0, collect, (1,))

    def one(self, slices: Sequence[jax.Array]) -> Leaf:
        it = iter(slices)
        # The slice as it comes, without an axis put in and taken out: it is then known to be part of what was scanned
        # over, and the backward pass reads that instead of a stacked copy.
        return self.leaf.along(0, lambda a, axis: next(it), ())


@register("scan")
def _scan(ctx: Context, eqn: Any, values: list[Any], wanted: list[bool]) -> Sequence[Any]:
    p = compat.scan_parts(eqn)
    jaxpr, jconsts = compat.open_jaxpr(p.jaxpr)
    n_in = p.n_consts + p.n_carry
    forward = forwarded(jaxpr)
    fixed = [isinstance(values[p.n_consts + i], Leaf) and forward[i] == p.n_consts + i for i in range(p.n_carry)]
    init = [ctx.whole(v, eqn, "a weight changed by the loop") if isinstance(v, Leaf) and not f else v
            for v, f in zip(values[p.n_consts:n_in], fixed, strict=True)]
    xs = [_Slices(v) if isinstance(v, Leaf) else v for v in values[n_in:]]
    feed = [x.arrays if isinstance(x, _Slices) else x for x in xs]
    keyed = any(isinstance(v, Leaf) and v.keyed for v in (*values[:p.n_consts], *init))
    steps = jnp.arange(p.length, dtype=jnp.uint32) if keyed else None
    inside = [not f for f in fixed]
    passed: list[Any] = [None] * (len(jaxpr.outvars) - p.n_carry)
    for j in range(len(passed)):
        i = forward[p.n_carry + j]
        if i is not None and i >= n_in and isinstance(values[i], Leaf):
            passed[j] = values[i]
        elif i is not None and i < n_in and isinstance(values[i], Leaf) and (i < p.n_consts or fixed[i - p.n_consts]):
            wide = values[i].reshape((1, *values[i].shape))
            passed[j] = wide.along(0, lambda a, ax: jnp.repeat(a, p.length, ax), (p.length,))
    ys_in = [w and s is None for w, s in zip(wanted[p.n_carry:], passed, strict=True)]
    inner = ctx.enter(eqn, p.length)

    def body(carry: Any, fed: Any) -> Any:
        step, fed = fed
        consts = [v.fold(step) if keyed and isinstance(v, Leaf) else v for v in (*values[:p.n_consts], *init)]
        state = [v if f else c for v, f, c in zip(consts[p.n_consts:], fixed, _spread(inside, carry), strict=True)]
        args = [x.one(s) if isinstance(x, _Slices) else s for x, s in zip(xs, fed, strict=True)]
        want = [*inside, *ys_in]
        outs = run(inner, jaxpr, jconsts, (*consts[:p.n_consts], *state, *args), want)
        outs = _arrays(inner, eqn, outs, want)
        new = [_typed(v, var) for v, var, w in zip(outs[:p.n_carry], jaxpr.outvars, inside, strict=False) if w]
        return new, [v for v, w in zip(outs[p.n_carry:], ys_in, strict=True) if w]

    start = [_typed(v, var) for v, var, w in zip(init, jaxpr.outvars, inside, strict=False) if w]
    carry, ys = lax.scan(body, start, (steps, feed), length=p.length, reverse=p.reverse, unroll=p.unroll)
    final = [v if f else c for v, f, c in zip(init, fixed, _spread(inside, carry), strict=True)]
    return [*final, *(s if s is not None else y for s, y in zip(passed, _spread(ys_in, ys), strict=True))]


def _typed(value: Any, var: Any) -> Any:
    """A carry as an array of exactly the type that the jaxpr says."""
    aval = var.aval
    if not hasattr(value, "dtype") or value.dtype != aval.dtype or getattr(value, "weak_type", False):
        return lax.convert_element_type(jnp.asarray(value), aval.dtype)
    return value


@register("while")
def _while(ctx: Context, eqn: Any, values: list[Any], wanted: list[bool]) -> Sequence[Any]:
    p = eqn.params
    cond, cond_consts = compat.open_jaxpr(p["cond_jaxpr"])
    body, body_consts = compat.open_jaxpr(p["body_jaxpr"])
    a, b = p["cond_nconsts"], p["body_nconsts"]
    forward = forwarded(body)
    init = values[a + b:]
    fixed = [isinstance(v, Leaf) and forward[i] == b + i for i, v in enumerate(init)]
    init = [ctx.whole(v, eqn, "a weight changed by the loop") if isinstance(v, Leaf) and not f else v
            for v, f in zip(init, fixed, strict=True)]
    inside = [not f for f in fixed]
    keyed = any(isinstance(v, Leaf) and v.keyed for v in (*values[a:a + b], *init))
    inner = ctx.enter(eqn)

    def state(carry: Any, consts: Sequence[Any]) -> list[Any]:
        return [v if f else c for v, f, c in zip(consts, fixed, _spread(inside, carry), strict=True)]

    def test(carry: Any) -> Any:
        outs = run(inner, cond, cond_consts, (*values[:a], *state(carry[1], init)))
        return _arrays(inner, eqn, outs, [True])[0]

    def step(carry: Any) -> Any:
        count, rest = carry
        consts = [v.fold(count) if keyed and isinstance(v, Leaf) else v for v in (*values[a:a + b], *init)]
        outs = run(inner, body, body_consts, (*consts[:b], *state(rest, consts[b:])), inside)
        outs = _arrays(inner, eqn, outs, inside)
        return count + 1, [_typed(v, var) for v, var, w in zip(outs, body.outvars, inside, strict=True) if w]

    start = [_typed(v, var) for v, var, w in zip(init, body.outvars, inside, strict=True) if w]
    _, final = lax.while_loop(test, step, (jnp.zeros((), jnp.uint32), start))
    return [v if f else c for v, f, c in zip(init, fixed, _spread(inside, final), strict=True)]


@register("cond")
def _cond(ctx: Context, eqn: Any, values: list[Any], wanted: list[bool]) -> Sequence[Any]:
    index, *operands = values
    branches = [compat.open_jaxpr(b) for b in eqn.params["branches"]]
    inner = ctx.enter(eqn)

    def make(branch: Any, dense: bool) -> Any:
        jaxpr, consts = branch

        def call() -> Any:
            outs = run(inner, jaxpr, consts, operands, wanted)
            if dense:
                outs = _arrays(inner, eqn, outs, wanted)
            outs = [flush(v) for v, w in zip(outs, wanted, strict=True) if w]
            return [v if isinstance(v, Leaf) else _typed(v, var) for v, var in
                    zip(outs, [v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w], strict=True)]

        return call

    uses = dict(ctx.uses)
    kinds = {jax.tree_util.tree_structure(jax.eval_shape(make(b, False))) for b in branches}
    ctx.uses.clear()
    ctx.uses.update(uses)
    dense = len(kinds) > 1
    return _spread(wanted, lax.switch(index, [make(b, dense) for b in branches]))


def _next(arrays: Iterator[Any], old: Any, dims: Any) -> Any:
    return next(arrays)


@register("shard_map")
def _shard_map(ctx: Context, eqn: Any, values: list[Any], wanted: list[bool]) -> Sequence[Any]:
    p = eqn.params
    jaxpr, consts = compat.open_jaxpr(p["jaxpr"])
    specs: list[Any] = []
    flat: list[list[Any]] = []
    for v, spec in zip(values, p["in_specs"], strict=True):
        if not isinstance(v, Leaf):
            specs.append(spec)
            flat.append(v)
            continue
        arrays: list[Any] = []
        own: list[Any] = []
        whole = (*spec, *(None,) * (v.ndim - len(spec)))

        def collect(a: Any, dims: Any, arrays: Any = arrays, own: Any = own, whole: Any = whole) -> Any:
            arrays.append(a)
            own.append(PartitionSpec(*(None if d is None else whole[d] for d in dims)))
            return a

        v.map(collect)
        specs.append(own)
        flat.append(arrays)
    inner = ctx.enter(eqn)
    if not p["check_vma"]:
        inner.manual = tuple(sorted({*ctx.manual, *p["newly_manual_axes"]}))

    def body(*args: Any) -> Any:
        local = []
        for v, arg, var in zip(values, args, jaxpr.invars, strict=True):
            if isinstance(v, Leaf):
                arg = v.map(functools.partial(_next, iter(arg)), tuple(var.aval.shape))
            local.append(arg)
        outs = _arrays(inner, eqn, run(inner, jaxpr, consts, local, wanted), wanted)
        return [v for v, w in zip(outs, wanted, strict=True) if w]

    out_specs = [s for s, w in zip(p["out_specs"], wanted, strict=True) if w]
    return _spread(wanted, compat.shard_map(body, eqn, tuple(specs), out_specs)(*flat))


@register("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
def _custom(ctx: Context, eqn: Any, values: list[Any], wanted: list[bool]) -> Sequence[Any]:
    raise Unsupported("a function with a custom derivative takes the weight; its rule cannot see the adapter")
