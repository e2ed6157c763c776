"""The interpreter: evaluates a jaxpr in which some inputs are adapted leaves.

An equation that no adapted leaf enters is re-bound unchanged. The others go to a rule, found by the name of their
primitive: `views` (the leaf stays a leaf), `consume` (it is contracted or looked up), `structure` (scan, cond, ...).
A consumer without a rule is an error. The same walk, with a `Recorder`, infers how a model uses its leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jpeft.core import compat, ops
from jpeft.core.factor import Unsupported
from jpeft.core.leaf import Leaf, Pending
from jpeft.errors import CallError, UnsupportedUse

Rule = Callable[..., Sequence[Any]]
RULES: dict[str, Rule] = {}
USER_RULES: dict[str, Callable[..., Any]] = {}
TRANSPARENT = frozenset({"convert_element_type", "reshape", "transpose", "squeeze", "expand_dims", "copy", "name",
                         "psum", "psum_invariant", "reduce_scatter", "sharding_constraint", "optimization_barrier",
                         "pvary", "pcast", "broadcast_in_dim", "reduce_precision", "reshard"})
SCALING = frozenset({"mul", "div", "neg", "select_n"})
ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "max", "min", "neg", "convert_element_type", "and", "or", "clamp",
                         "shift_left", "shift_right_logical", "shift_right_arithmetic", "select_n", "round", "exp2"})


class Recorder(Protocol):
    """What an analysis listens to; every method gets the leaf as it is at that point."""

    def contraction(self, leaf: Leaf, kind: str, ins: Sequence[int], outs: Sequence[int], rows: int, key: Any,
                    where: str, groups: int) -> None: ...

    def other(self, leaf: Leaf, kind: str, where: str, problem: bool) -> None: ...

    def bias(self, paths: Sequence[str], leaf: Leaf) -> bool: ...

    def rows(self, leaf: Leaf) -> None: ...


@dataclasses.dataclass
class Context:
    """What one evaluation knows.

    Attributes:
        recorder: set in an analysis, where leaves are plain arrays that are only watched.
        allowed: paths whose adapted weight may be formed whole.
        embeddings: paths whose rows are looked up.
        sited: paths whose adapter enters at the contraction only: elementwise operations on the way act on the base.
        biases: for each hooked leaf, the path of its bias.
        tokens: for an equation, by id, the shapes that its outputs have without the virtual tokens.
        growth: by how many tokens those outputs differ.
        moved: for an equation, by id, the one to evaluate in its place: behind the virtual tokens.
        tapped: paths of leaves whose inputs some hook wants to see.
        taps: the last input of each of them, `[*rows, in]`, as far as it is in scope.
        uses: how often each leaf has been contracted, so that each use gets its own dropout mask.
        trips: product of the lengths of the scans around the present equation.
        stack: the equations around the present one.
        line: the user's line of the nearest of them that has one.
        manual: manual mesh axes, where the types do not say what varies.
        thin: within one jaxpr, what was broadcast to a variable, and its shape with size 1 along the new dims.
    """

    recorder: Recorder | None = None
    allowed: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    sited: frozenset[str] = frozenset()
    biases: dict[str, str | None] = dataclasses.field(default_factory=dict)
    tokens: dict[int, tuple[tuple[int, ...], ...]] = dataclasses.field(default_factory=dict)
    growth: int = 0
    moved: dict[int, Any] = dataclasses.field(default_factory=dict)
    tapped: frozenset[str] = frozenset()
    taps: dict[str, Any] = dataclasses.field(default_factory=dict)
    uses: dict[tuple[str, ...], int] = dataclasses.field(default_factory=dict)
    trips: int = 1
    stack: tuple[int, ...] = ()
    line: str | None = None
    manual: tuple[str, ...] = ()
    thin: dict[Any, tuple[Any, tuple[int, ...]]] = dataclasses.field(default_factory=dict)

    def where(self, eqn: Any) -> str:
        return f"{eqn.primitive.name} @ {compat.source_line(eqn) or self.line or 'unknown line'}"

    def holds_moved(self, eqn: Any) -> bool:
        """Whether an equation inside this one has to be evaluated in another place."""
        return id(eqn) in self.moved and bool(compat.sub_jaxprs(eqn))

    def whole(self, leaf: Leaf, eqn: Any, why: str = "") -> Any:
        """Form a leaf whole for a consumer that has no rule, if that is allowed."""
        if self.recorder is not None:
            self.record(leaf, eqn.primitive.name, self.where(eqn))
            return leaf.op
        if not leaf.adapted:
            return leaf.op
        if leaf.lookup is not None or all(p in self.allowed for p in leaf.paths):
            return leaf.dense()
        names = ", ".join(repr(p) for p in leaf.paths)
        raise UnsupportedUse(
            f"{self.where(eqn)} needs the whole adapted weight of {names}"
            + (f" ({why})" if why else "")
            + "; exclude the leaf, register a rule (jpeft.register_rule), or pass materialise=[...] to jpeft.plan"
        )

    def record(self, leaf: Leaf, kind: str, where: str) -> None:
        """Note a use without a rule, or a look-up of rows that has come to its end."""
        assert self.recorder is not None
        if leaf.lookup is not None:
            self.recorder.rows(leaf)
        else:
            self.recorder.other(leaf, kind, where, problem=True)

    def enter(self, eqn: Any, trips: int = 1) -> Context:
        return dataclasses.replace(self, trips=self.trips * trips, stack=(*self.stack, id(eqn)),
                                   line=compat.source_line(eqn) or self.line, taps=dict(self.taps))

    def use(self, leaf: Leaf, x: Any) -> Leaf:
        """Give this use of the leaf, on this shard, its own dropout key."""
        if not leaf.adapted or not leaf.keyed:
            return leaf
        count = self.uses.get(leaf.paths, 0)
        self.uses[leaf.paths] = count + 1
        leaf = leaf.fold(count)
        for axis in compat.varying_axes(x) or self.manual:
            leaf = leaf.fold(jax.lax.axis_index(axis))
        return leaf


def register(*names: str) -> Callable[[Rule], Rule]:
    """Register an engine rule `rule(ctx, eqn, values, wanted) -> outputs`."""
    def add(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule
    return add


def register_rule(primitive: Any, rule: Callable[..., Any]) -> None:
    """Teach the engine an operation that takes a weight: a Pallas kernel, an FFI call, a `custom_vjp`.

    Args:
        primitive: a JAX primitive or its name, as `jpeft.inspect` shows it. For `custom_vjp_call` and
            `custom_jvp_call`, the rule must return `NotImplemented` for functions that it does not know.
        rule: `rule(*operands, **params) -> output or tuple`. An adapted leaf arrives as a `Leaf`: `leaf.shape`,
            `leaf.dtype`, `leaf.dense()` (forms the weight) and `jpeft.core.consume.multiply(x, leaf, x_dims, w_dims)`
            (contracts without forming it). Return `NotImplemented` to decline.

    Raises:
        TypeError: if `rule` is not callable.

    Example:
        >>> import jpeft
        >>> jpeft.register_rule("my_matmul", lambda x, w, **params: jpeft.multiply(x, w, (1,), (0,)))
    """
    if not callable(rule):
        raise TypeError(f"register_rule needs a callable, found {type(rule).__name__}; pass rule(*operands, **params)")
    USER_RULES[getattr(primitive, "name", primitive)] = rule


def alive(jaxpr: Any, wanted: Sequence[bool]) -> list[bool]:
    """For each equation, whether a wanted output or an effect needs it."""
    need = {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and not isinstance(v, compat.Literal)}
    keep = [False] * len(jaxpr.eqns)
    for i in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[i]
        if eqn.effects or any(v in need for v in eqn.outvars):
            keep[i] = True
            need.update(v for v in eqn.invars if not isinstance(v, compat.Literal))
    return keep


def forwarded(jaxpr: Any) -> list[int | None]:
    """For each output of a jaxpr, the input that it is, unchanged, or None."""
    source = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        remat = compat.remat_parts(eqn)
        inner = remat[0] if remat is not None else eqn.params.get("jaxpr") if eqn.primitive.name == "jit" else None
        if inner is None:
            continue
        for out, i in zip(eqn.outvars, forwarded(compat.open_jaxpr(inner)[0]), strict=True):
            if i is not None and not isinstance(eqn.invars[i], compat.Literal) and eqn.invars[i] in source:
                source[out] = source[eqn.invars[i]]
    return [None if isinstance(v, compat.Literal) else source.get(v) for v in jaxpr.outvars]


def run(ctx: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any],
        wanted: Sequence[bool] | None = None) -> list[Any]:
    """Evaluate a jaxpr; inputs and outputs may be arrays, `Leaf` or `Pending`. Unwanted outputs may be None."""
    wanted = [True] * len(jaxpr.outvars) if wanted is None else list(wanted)
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    keep = alive(jaxpr, wanted)
    ctx = dataclasses.replace(ctx, thin={})
    last: dict[Any, bool] = dict.fromkeys((v for v, w in zip(jaxpr.outvars, wanted, strict=True)
                                          if w and not isinstance(v, compat.Literal)), True)
    for eqn, k in zip(jaxpr.eqns, keep, strict=True):
        if k:
            last.update(dict.fromkeys((v for v in eqn.invars if not isinstance(v, compat.Literal)), True))

    def read(atom: Any) -> Any:
        return compat.literal_value(atom) if isinstance(atom, compat.Literal) else env[atom]

    for eqn, k in zip(jaxpr.eqns, keep, strict=True):
        if not k:
            continue
        eqn = ctx.moved.get(id(eqn), eqn)
        values = [read(v) for v in eqn.invars]
        if any(isinstance(v, (Leaf, Pending)) for v in values) or ctx.holds_moved(eqn):
            needed = [v in last for v in eqn.outvars]
            outs = _dispatch(ctx, eqn, values, needed)
        else:
            outs = compat.rebind(eqn, values)
            if eqn.primitive.name == "broadcast_in_dim":
                ctx.thin[eqn.outvars[0]] = values[0], _before(eqn)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) if w else None for v, w in zip(jaxpr.outvars, wanted, strict=True)]


def _before(eqn: Any) -> tuple[int, ...]:
    """The shape of a broadcast's operand, laid along the dims of the result."""
    shape = [1] * len(eqn.params["shape"])
    for n, d in zip(eqn.invars[0].aval.shape, eqn.params["broadcast_dimensions"], strict=True):
        shape[d] = n
    return tuple(shape)


def _dispatch(ctx: Context, eqn: Any, values: list[Any], wanted: list[bool]) -> Sequence[Any]:
    name = eqn.primitive.name
    if any(isinstance(v, Pending) for v in values):
        passed = _pass_pending(ctx, eqn, values)
        if passed is not None:
            return passed
        values = [flush(v) for v in values]
        if not any(isinstance(v, Leaf) for v in values) and not ctx.holds_moved(eqn):
            return compat.rebind(eqn, values)
    if name in ELEMENTWISE and ctx.sited:
        passed = _pass_sited(ctx, eqn, values)
        if passed is not None:
            return passed
    if name in USER_RULES and any(isinstance(v, Leaf) and v.adapted for v in values):
        result = USER_RULES[name](*values, **eqn.params)
        if result is not NotImplemented:
            return list(result) if isinstance(result, (tuple, list)) else [result]
    rule = RULES.get("checkpoint" if compat.remat_parts(eqn) is not None else name)
    if rule is not None:
        try:
            with compat.context(eqn):
                return rule(ctx, eqn, values, wanted)
        except Unsupported as error:
            why = str(error)
    else:
        why = ""
    if ctx.holds_moved(eqn):
        raise CallError(f"{ctx.where(eqn)} reads a fixed token out of sight of the virtual tokens before it; read the "
                        "token outside of it")
    return compat.rebind(eqn, [ctx.whole(v, eqn, why) if isinstance(v, Leaf) else v for v in values])


def _pass_sited(ctx: Context, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """Site semantics: an elementwise operation (dequantisation) acts on the base alone, the adapter waits."""
    where = [i for i, v in enumerate(values) if isinstance(v, Leaf) and all(p in ctx.sited for p in v.paths)]
    if len(where) != 1 or tuple(eqn.outvars[0].aval.shape) != values[where[0]].shape:
        return None
    leaf = values[where[0]]
    values = [v if i == where[0] or not isinstance(v, Leaf) else ctx.whole(v, eqn) for i, v in enumerate(values)]

    def act(base: Any) -> Any:
        return compat.rebind(eqn, [base if i == where[0] else v for i, v in enumerate(values)])[0]

    return [dataclasses.replace(leaf, op=ops.map_base(leaf.op, act), dtype=eqn.outvars[0].aval.dtype)]


def flush(value: Any) -> Any:
    return value.flush() if isinstance(value, Pending) else value


def _pass_pending(ctx: Context, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """Let a pending output through an operation that its hook may wait for; None: the hook has to run now."""
    name = eqn.primitive.name
    where = [i for i, v in enumerate(values) if isinstance(v, Pending)]
    late = [i for i in where if values[i].late]
    if len(late) == 1:  # the other is the residual stream, if they are added
        values = [v if i == late[0] else flush(v) for i, v in enumerate(values)]
        where = late
    if name in ("add", "add_any") and len(values) == 2 and len(where) == 1:
        pending, other = values[where[0]], values[1 - where[0]]
        if isinstance(other, Leaf) and not other.adapted and other.lookup is None and len(other.paths) == 1:
            pair = [pending.y, other.op] if where[0] == 0 else [other.op, pending.y]
            if ctx.recorder is not None:
                return compat.rebind(eqn, pair) if ctx.recorder.bias(pending.paths, other) else None
            if other.paths[0] == pending.bias:
                y = compat.rebind(eqn, pair)[0]
                return [dataclasses.replace(pending, y=y, bias=None, done=None).settle()]
        elif pending.late and not isinstance(other, Leaf) and np.shape(other) == np.shape(pending.y):
            return [pending.join(lambda y: compat.rebind(eqn, [y, other] if where[0] == 0 else [other, y])[0])]
        return None
    if name in SCALING and len(late) == 1 and tuple(eqn.outvars[0].aval.shape) == np.shape(values[late[0]].y):
        last = values[late[0]].settle()  # dropout or a gain, on the way to the residual stream
        rest = [ctx.whole(v, eqn) if isinstance(v, Leaf) else v for v in values]
        y = compat.rebind(eqn, [last.y if i == late[0] else v for i, v in enumerate(rest)])[0]
        return [dataclasses.replace(last, y=y, done=None)]
    if name in TRANSPARENT and len(values) == 1:
        pending = values[0]
        y = compat.rebind(eqn, [pending.y])[0]
        try:
            if name == "transpose":
                return [pending.permute(eqn.params["permutation"], y)]
            if np.size(y) == np.size(pending.y):
                return [pending.reshape(y)]
        except Unsupported:
            return None
    return None
