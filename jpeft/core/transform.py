"""The transform: `init`, `adapt`, `merge` and what belongs to them. All pure functions of (plan, trainable, frozen)."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import sharding
from jpeft.core.calibrate import Calibration, Statistics, statistics
from jpeft.core.frozen import Frozen
from jpeft.core.interpret import Context, flush, run
from jpeft.core.leaf import Leaf, Origin
from jpeft.core.maps import Hooked, told
from jpeft.core.method import Call, Theta
from jpeft.core.ops import Op
from jpeft.core.plan import Entry, Plan
from jpeft.core.site import widest
from jpeft.core.tokens import other_length, pad, shapes_of, strip, twins
from jpeft.core.trace import Apply, is_array, leaves_of, trace
from jpeft.errors import CallError, NotMergeable

Trainable = dict[str, Theta]


def path_number(path: str) -> int:
    """A number that stands for a path in PRNG keys: the same on every machine and in every process."""
    return zlib.crc32(path.encode())


def init(plan: Plan, params: Any, key: jax.Array, *, calibration: Any = None,
         shardings: Any = None) -> tuple[Trainable, Frozen]:
    """Create the trainable partition and wrap the parameters as the frozen one.

    Args:
        plan: made for these parameters.
        params: the base parameters. Their leaves become `frozen.base` as they are, without a copy.
        key: a PRNG key.
        calibration: a `jpeft.Calibration`, the model and batches of data, for methods whose start depends on them.
        shardings: what `jpeft.shardings` returned: every array is made where it belongs, and never whole. None: derived
            from the params where they lie on a mesh; on one device otherwise.

    Returns:
        `(trainable, frozen)`: `{path: {letter: array}}`, every leaf in a buffer of its own, and `Frozen(base, theta)`.

    Raises:
        PathError: the params are not those of the plan.
        CallError: calibration is given and no method of the plan reads it, or one needs it and it is not given.
        ShardingError: shardings is not what `jpeft.shardings` returned for this plan.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> params = {"w": jnp.ones((8, 4))}
        >>> plan = jpeft.plan(lambda p, x: x @ p["w"], params, (jnp.ones((2, 8)),), {"w": jpeft.LoRA(rank=2)})
        >>> trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
        >>> trainable["w"]["a"].shape, trainable["w"]["b"].shape, frozen.base["w"] is params["w"]
        ((8, 2), (2, 4), True)
    """
    readers = [e for e in plan.entries if e.method.calibration] if isinstance(plan, Plan) else []
    if calibration is not None and not readers:
        raise CallError("calibration is given, but no method of the plan reads it; drop it")
    if readers and not isinstance(calibration, Calibration):
        raise CallError(f"{readers[0].method} on {readers[0].path!r} starts from data, and calibration is a "
                        f"{type(calibration).__name__}; pass calibration=jpeft.Calibration(apply, batches)")
    _check_plan(plan, "jpeft.init(plan, params, key)")
    _check_key(key, "key")
    names, leaves, _ = leaves_of(params)
    plan.check_params(names, leaves)
    by_path = dict(zip(names, leaves, strict=True))

    def create(key: jax.Array, bases: Mapping[str, Any]) -> tuple[Trainable, Trainable]:
        made = {e.path: e.method.init(jax.random.fold_in(key, path_number(e.path)), e.site, bases[e.path])
                for e in plan.entries}
        return {p: t for p, (t, _) in made.items()}, {p: f for p, (_, f) in made.items() if f}

    bases = {e.path: by_path[e.path] for e in plan.entries}
    places = sharding.of_arrays(plan, names, leaves) if shardings is None else sharding.parts(plan, shardings)
    where: dict[str, Any] = {} if places is None else {"out_shardings": (places[0], places[1].theta)}
    trainable, theta = jax.jit(create, **where)(key, bases)
    if calibration is not None:
        data = statistics(adapt, plan, params, calibration)
        trainable, theta = jax.jit(functools.partial(_calibrate, plan), **where)(key, bases, trainable, theta, data)
    return trainable, Frozen(params, theta)


def _calibrate(plan: Plan, key: jax.Array, bases: Mapping[str, Any], trainable: Trainable, theta: Trainable,
               data: Statistics) -> tuple[Trainable, Trainable]:
    """Replace what `init` made by what the methods make of the data."""
    trainable, theta = dict(trainable), dict(theta)
    for e in plan.entries:
        if e.method.calibration:
            own = jax.random.fold_in(key, path_number(e.path))
            start = trainable[e.path], theta.get(e.path, {})
            trainable[e.path], frozen = e.method.calibrate(own, e.site, bases[e.path], start, data[e.path])
            theta |= {e.path: frozen} if frozen else {}
    return trainable, theta


def _theta(plan: Plan, entry: Entry, trainable: Trainable, frozen: Frozen) -> Theta:
    return entry.effective({**frozen.theta.get(entry.path, {}), **trainable[entry.path]})


def _check_plan(plan: Any, order: str) -> None:
    if not isinstance(plan, Plan):
        raise CallError(f"the plan is a {type(plan).__name__}, not a jpeft.Plan; call {order}")


def _check_key(key: Any, what: str) -> None:
    if not hasattr(key, "dtype") or not hasattr(key, "shape"):
        raise CallError(f"{what} is a {type(key).__name__}, not a PRNG key; pass jax.random.key(0)")


def check_theta(plan: Any, trainable: Any, frozen: Any, order: str) -> None:
    """Raise `CallError` unless the two partitions are those of the plan: paths, letters and shapes."""
    _check_plan(plan, order)
    if not isinstance(frozen, Frozen):
        raise CallError(f"frozen is a {type(frozen).__name__}, not jpeft.Frozen; call {order}")
    for what, have, want in zip(("trainable", "frozen.theta"), (trainable, frozen.theta), plan.theta_shapes(),
                                strict=True):
        remedy = "pass what jpeft.init or jpeft.load returned for this plan"
        paths = {p for p, v in have.items() if p in want or not isinstance(v, Mapping) or v} \
            if isinstance(have, Mapping) else {type(have).__name__}
        if paths != set(want):
            raise CallError(f"{what} lacks {sorted(set(want) - paths)[:3]} and has "
                            f"{sorted(map(str, paths - set(want)))[:3]} beyond the plan; {remedy}")
        for path, entries in want.items():
            shapes = {k: tuple(np.shape(v)) for k, v in have[path].items()} if isinstance(have[path], Mapping) else {}
            if shapes != {k: v.shape for k, v in entries.items()}:
                raise CallError(f"{what} has {shapes or type(have[path]).__name__} for {path!r}, the plan says "
                                f"{ {k: v.shape for k, v in entries.items()} }; {remedy}")


def _check_call(plan: Plan, trainable: Any, frozen: Any, call: Any) -> None:
    check_theta(plan, trainable, frozen, "adapted(trainable, frozen, *inputs)")
    if not isinstance(call, Call):
        raise CallError(f"peft is a {type(call).__name__}; pass peft=jpeft.Call(key=...)")
    if call.key is not None:
        _check_key(call.key, "peft=Call(key=...)")
    if not isinstance(call.continued, bool | None):
        raise CallError("peft=Call(continued=...) is no bool but an array; make the Call inside the jitted function")
    for field in ("task", "adapter", "lengths"):
        if getattr(call, field) is not None and not any(field in e.method.call for e in plan.entries):
            raise CallError(f"peft=Call({field}=...) is given, but no method of the plan reads it; drop it")


def _inputs(plan: Plan, names: Sequence[str], leaves: Sequence[Any], trainable: Trainable, frozen: Frozen,
            call: Call) -> list[Any]:
    """The interpreter's inputs: plain arrays, adapted leaves, and tracked biases of hooked leaves."""
    entries = {e.path: e for e in plan.entries}
    watched = {e.site.bias for e in plan.entries if e.method.hooks} | _tapped(plan)
    said = {name: value for name, value in (("task", call.task), ("lengths", call.lengths)) if value is not None}
    result = []
    for name, leaf in zip(names, leaves, strict=True):
        entry = entries.get(name)
        value = leaf
        if entry is not None:
            own = None if call.key is None else jax.random.fold_in(call.key, path_number(name))
            value = entry.method.build(entry.site, jnp.asarray(leaf), _theta(plan, entry, trainable, frozen), own)
            if isinstance(value, Hooked):
                value = told(value, entry.start, plan.virtual_tokens, said, bool(call.continued))
        if isinstance(value, Op) or name in watched:
            dims = tuple(frozenset({d}) for d in range(np.ndim(leaf)))
            value = Leaf(value, (Origin(name, dims),), jax.dtypes.canonicalize_dtype(leaf.dtype))
        result.append(value)
    return result


def _tapped(plan: Plan) -> set[str]:
    """Leaves whose inputs a hook asks for."""
    return {path for e in plan.entries for path in e.method.sources(e.site)}


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _evaluate(apply: Apply, plan: Plan, trainable: Trainable, frozen: Frozen, args: Sequence[Any],
              kwargs: Mapping[str, Any], call: Call) -> Any:
    """Trace `apply` once and walk the jaxpr with the adapted leaves in place."""
    n = 0 if call.continued else plan.virtual_tokens
    plain_args, plain_kwargs = args, kwargs
    if n:
        assert plan.tokens is not None
        args, kwargs = pad(plan.tokens, n, args, kwargs)
    traced = trace(apply, frozen.base, args, kwargs)
    leaves = jax.tree_util.tree_leaves(frozen.base)
    plan.check_params(traced.names, leaves)
    ctx = Context(allowed=frozenset(plan.materialise), sited=frozenset(plan.sited),
                  embeddings=frozenset(s.path for s in plan.sites if s.use in ("embedding", "tied")),
                  biases={e.path: e.site.bias for e in plan.entries if e.method.hooks},
                  tapped=frozenset(_tapped(plan)))
    shapes: list[tuple[int, ...]] = []
    if n:
        before = trace(apply, frozen.base, plain_args, plain_kwargs)
        ctx.tokens, ctx.moved = twins(traced.jaxpr, before.jaxpr, n)
        ctx.growth = n
        shapes = [tuple(v.aval.shape) for v in before.jaxpr.outvars]
    elif plan.tokens is not None and not call.continued and any(e.method.positions for e in plan.entries):
        by = other_length(plan.tokens, args, kwargs)
        other = trace(apply, frozen.base, *pad(plan.tokens, by, args, kwargs))
        ctx.tokens, ctx.growth = shapes_of(traced.jaxpr, other.jaxpr), -by
    inputs = _inputs(plan, traced.names, leaves, trainable, frozen, call)
    outs = [flush(v) for v in run(ctx, traced.jaxpr, traced.consts, (*inputs, *traced.arrays))]
    outs = [v.dense() if isinstance(v, Leaf) else v for v in outs]
    if n and plan.tokens is not None:
        outs = strip(plan.tokens, n, outs, shapes)
    return jax.tree_util.tree_unflatten(traced.out_tree, outs)


def adapt(apply: Apply, plan: Plan) -> Callable[..., Any]:
    """Return `adapted(trainable, frozen, *args, peft=Call(), **kwargs)`, a pure function.

    It equals `apply(merge(plan, trainable, frozen), *args, **kwargs)` where the methods can merge, without ever forming
    the merged weights. Any function of the same parameters can be adapted with one plan.

    Args:
        apply: pure function `apply(params, *args, **kwargs)`; what `jax.grad(jax.jit(apply))` accepts is supported.
        plan: made for its parameters.

    Returns:
        A function for jit, grad, jvp, vmap, pmap, scan, remat and shard_map. `peft` is its only reserved keyword; its
        attributes `apply` and `plan` are the two arguments.
        Called on concrete arrays outside any transformation, it is compiled once per shapes and static arguments.

    Raises:
        UnsupportedUse: (when called) `apply` uses a leaf in a way that would need the whole adapted weight.
        CallError: (when called) the arguments do not fit the plan.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> apply, params, x = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
        >>> plan = jpeft.plan(apply, params, (x,), {"w": jpeft.LoRA(rank=2)})
        >>> trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
        >>> adapted = jpeft.adapt(apply, plan)
        >>> bool(jnp.allclose(adapted(trainable, frozen, x), apply(params, x)))
        True
    """
    _check_plan(plan, "jpeft.adapt(apply, plan)")

    def evaluate(trainable: Trainable, frozen: Frozen, args: Sequence[Any], kwargs: Mapping[str, Any],
                 call: Call) -> Any:
        _check_call(plan, trainable, frozen, call)
        return _evaluate(apply, plan, trainable, frozen, args, kwargs, call)

    @functools.lru_cache(maxsize=64)
    def compiled(treedef: Any, static: tuple[Any, ...]) -> Callable[[Sequence[Any]], Any]:
        def whole(arrays: Sequence[Any]) -> Any:
            it = iter(arrays)
            leaves = [next(it) if s is None else s[1] for s in static]
            return evaluate(*jax.tree_util.tree_unflatten(treedef, leaves))

        return jax.jit(whole)

    def adapted(trainable: Trainable, frozen: Frozen, /, *args: Any, peft: Call = Call(), **kwargs: Any) -> Any:  # noqa: B008
        leaves, treedef = jax.tree_util.tree_flatten((trainable, frozen, args, kwargs, peft))
        static = tuple(None if is_array(x) else (type(x), x) for x in leaves)
        if any(isinstance(x, jax.core.Tracer) for x in leaves) or not _hashable(static):
            return evaluate(trainable, frozen, args, kwargs, peft)
        return compiled(treedef, static)([x for x, s in zip(leaves, static, strict=True) if s is None])

    vars(adapted).update(apply=apply, plan=plan)
    return adapted


def verify(apply: Apply, plan: Plan, params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Evaluate the adapted function abstractly, with a dropout key, so that every unsupported use is an error now.

    Methods that learn several tasks are asked for the first.
    """
    shapes, theta = plan.theta_shapes()
    task = jnp.zeros((), jnp.int32) if any("task" in e.method.call for e in plan.entries) else None
    leaves, treedef = jax.tree_util.tree_flatten((tuple(args), dict(kwargs)))
    arrays = [isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)) for x in leaves]

    def call(trainable: Any, theta: Any, base: Any, given: Sequence[Any]) -> Any:
        it = iter(given)
        filled = [next(it) if t else x for x, t in zip(leaves, arrays, strict=True)]
        a, kw = jax.tree_util.tree_unflatten(treedef, filled)
        outs = adapt(apply, plan)(trainable, Frozen(base, theta), *a, peft=Call(jax.random.key(0), task), **kw)
        return [x for x in jax.tree_util.tree_leaves(outs) if isinstance(x, jax.Array)]

    jax.eval_shape(call, shapes, theta, params, [x for x, t in zip(leaves, arrays, strict=True) if t])


def base(plan: Plan, frozen: Frozen) -> Any:
    """Return the original parameters: the adapter switched off. They are the caller's own arrays."""
    return frozen.base


def merge(plan: Plan, trainable: Trainable, frozen: Frozen, *, partial: bool = False) -> Any:
    """Fold every method into plain parameters for the untouched `apply`: no inference cost.

    Each leaf is computed in float32 (or wider) and cast back to its own dtype. Pure; works under jit.

    Args:
        plan: the plan.
        trainable: the trainable partition.
        frozen: the frozen partition.
        partial: leave leaves whose method cannot merge as they are and return the rest beside.

    Returns:
        The merged parameters; with `partial=True` `(params, rest)`, rest being `{path: theta}` of what did not merge.

    Raises:
        NotMergeable: a method has no plain equivalent and `partial` is False.
        CallError: the partitions are not those of the plan.
    """
    check_theta(plan, trainable, frozen, "jpeft.merge(plan, trainable, frozen)")
    names, leaves, treedef = leaves_of(frozen.base)
    plan.check_params(names, leaves)
    entries = {e.path: e for e in plan.entries}
    rest: Trainable = {}
    result = []
    for name, leaf in zip(names, leaves, strict=True):
        if name in entries:
            try:
                new = _merged(plan, entries[name], leaf, trainable, frozen)
                leaf = new.astype(jax.dtypes.canonicalize_dtype(leaf.dtype))
            except NotMergeable:
                if not partial:
                    raise
                rest[name] = trainable[name]
        result.append(leaf)
    params = jax.tree_util.tree_unflatten(treedef, result)
    return (params, rest) if partial else params


def _merged(plan: Plan, entry: Entry, leaf: Any, trainable: Trainable, frozen: Frozen) -> jax.Array:
    if entry.path in plan.sited:
        raise NotMergeable(f"{entry.path!r} ({leaf.dtype}) has site semantics: its adapter is no part of the stored "
                           "value; dequantise the base first, then merge")
    wide = jnp.asarray(leaf).astype(widest(jnp.float32, leaf.dtype))
    return entry.method.merge(entry.site, wide, _theta(plan, entry, trainable, frozen))


def merge_error(plan: Plan, trainable: Trainable, frozen: Frozen) -> dict[str, jax.Array]:
    """Return, per merged leaf, `max|round(W') - W'| / max|W'|`: what casting back to the leaf's dtype loses."""
    check_theta(plan, trainable, frozen, "jpeft.merge_error(plan, trainable, frozen)")
    leaves = dict(zip(*leaves_of(frozen.base)[:2], strict=True))
    errors = {}
    for e in plan.entries:
        try:
            exact = _merged(plan, e, leaves[e.path], trainable, frozen)
        except NotMergeable:
            continue
        rounded = exact.astype(jax.dtypes.canonicalize_dtype(leaves[e.path].dtype)).astype(exact.dtype)
        largest = jnp.maximum(jnp.max(jnp.abs(exact)), jnp.finfo(exact.dtype).tiny)
        errors[e.path] = jnp.max(jnp.abs(rounded - exact)) / largest
    return errors


def penalty(plan: Plan, trainable: Trainable, frozen: Frozen) -> jax.Array:
    """Return the sum of the methods' regularisers, a float32 scalar (0 where no method has one)."""
    check_theta(plan, trainable, frozen, "jpeft.penalty(plan, trainable, frozen)")
    total = jnp.zeros((), jnp.float32)
    for e in plan.entries:
        value = e.method.penalty(e.site, _theta(plan, e, trainable, frozen))
        if value is not None:
            total = total + value.astype(jnp.float32)
    return total
