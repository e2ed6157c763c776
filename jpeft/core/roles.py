"""What a model does with each parameter leaf, inferred from one abstract trace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import compat
from jpeft.core.interpret import Context, flush, run
from jpeft.core.leaf import Leaf, Origin
from jpeft.core.site import Site, Use
from jpeft.core.trace import Apply, Traced, example, trace


@dataclasses.dataclass
class _Notes:
    """What was seen of one leaf."""

    contracted: dict[Any, tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = dataclasses.field(
        default_factory=dict)
    rows: dict[Any, int] = dataclasses.field(default_factory=dict)
    others: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    consumers: dict[str, None] = dataclasses.field(default_factory=dict)
    problems: dict[str, None] = dataclasses.field(default_factory=dict)
    bias: str | None = None
    groups: int = 1
    vector: frozenset[int] | None = None
    seen: frozenset[int] = frozenset()

    def saw(self, dims: Sequence[frozenset[int]]) -> None:
        """Note the dims that an operation which is no contraction reads together: the first, and all of them."""
        whole = frozenset[int]().union(*dims)
        self.vector = whole if self.vector is None else self.vector
        self.seen |= whole


class _Watch:
    """The recorder of an analysis: collects notes by path."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes
        self.notes: dict[str, _Notes] = {p: _Notes() for p in shapes}

    def contraction(self, leaf: Leaf, kind: str, ins: Sequence[int], outs: Sequence[int], rows: int, key: Any,
                    where: str, groups: int) -> None:
        for i, origin in enumerate(leaf.origins):
            notes, shape = self.notes[origin.path], self.shapes[origin.path]
            chosen = frozenset() if leaf.lookup is None else leaf.lookup.dims[i]
            a = (frozenset().union(*(origin.dims[d] for d in ins)) if ins else frozenset()) - chosen
            b = (frozenset().union(*(origin.dims[d] for d in outs)) if outs else frozenset()) - chosen
            if leaf.lookup is not None and not (a and b):  # rows summed, or multiplied by vectors: no weight
                self.rows(leaf)
                continue
            if key in notes.contracted:  # two parts of one leaf, joined
                ins_before, outs_before = notes.contracted[key][1:3]
                if a & set(outs_before) or b & set(ins_before):  # a leaf and its transpose: the first decides
                    continue
                a, b = a.union(ins_before), b.union(outs_before)
            b -= a
            rest = tuple(d for d in range(len(shape)) if d not in a and d not in b)
            notes.contracted[key] = (kind, tuple(sorted(a)), tuple(sorted(b)), rest)
            notes.rows[key] = rows
            notes.consumers[where] = None
            notes.groups = max(notes.groups, groups)

    def other(self, leaf: Leaf, kind: str, where: str, problem: bool) -> None:
        for origin in leaf.origins:
            notes = self.notes[origin.path]
            notes.others.setdefault(kind, set()).add(where)
            notes.consumers[where] = None
            notes.saw(origin.dims)
            if problem:
                notes.problems[where] = None

    def rows(self, leaf: Leaf) -> None:
        look = leaf.lookup
        assert look is not None
        for origin, ins in zip(leaf.origins, look.dims, strict=True):
            notes, shape = self.notes[origin.path], self.shapes[origin.path]
            outs = (frozenset().union(*origin.dims) if origin.dims else frozenset()) - ins
            rest = tuple(d for d in range(len(shape)) if d not in ins and d not in outs)
            key = (look.key, "rows")
            notes.contracted.setdefault(key, ("embedding", tuple(sorted(ins)), tuple(sorted(outs)), rest))
            notes.rows[key] = look.rows
            notes.consumers[look.where] = None

    def bias(self, paths: Sequence[str], leaf: Leaf) -> bool:
        """Note a leaf that is added to an output; False for one of more than a number per unit (position tables)."""
        bias, dims = leaf.origins[0].path, leaf.origins[0].dims
        if math.prod(self.shapes[bias]) > sum(self._units(p) for p in paths):
            return False
        for path in paths:
            if self.notes[path].bias is None:
                self.notes[path].bias = bias
        notes = self.notes[bias]
        notes.others.setdefault("bias", set()).add("bias")
        notes.saw(dims)
        return True

    def _units(self, path: str) -> int:
        """Outputs of a contracted leaf, copies included."""
        ins = next(iter(self.notes[path].contracted.values()))[1]
        return math.prod(n for d, n in enumerate(self.shapes[path]) if d not in ins)


def _classify(notes: _Notes) -> Use:
    kinds = [c[0] for c in notes.contracted.values()]
    if "conv" in kinds:
        return "conv"
    if "embedding" in kinds:
        return "tied" if "linear" in kinds else "embedding"
    if "linear" in kinds:
        return "linear"
    others = set(notes.others) | ({"scale"} if "scale" in kinds else set())
    if not others:
        return "unused"
    if others == {"bias"}:
        return "bias"
    return "scale" if others == {"scale"} else "other"


def _site(path: str, leaf: Any, notes: _Notes) -> Site:
    use = _classify(notes)
    shape = tuple(leaf.shape)
    dtype = str(leaf.dtype)
    kind = {"tied": "embedding", "embedding": "embedding", "linear": "linear", "conv": "conv"}.get(use)
    ins: tuple[int, ...] = ()
    outs: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    if kind is not None:
        _, ins, outs, stack = next(c for c in notes.contracted.values() if c[0] == kind)
    elif use in ("bias", "scale"):
        seen = notes.vector if notes.vector is not None else frozenset(range(len(shape)))
        outs = tuple(d for d in range(len(shape)) if d in seen or shape[d] == 1)
        stack = tuple(d for d in range(len(shape)) if d not in outs)
    elif use == "other" and not notes.contracted:
        stack = tuple(d for d in range(len(shape)) if d not in notes.seen and shape[d] > 1)
    problems = tuple(notes.problems) if kind is not None or use == "other" else ()
    return Site(path, shape, dtype, use, ins, outs, stack, sum(notes.rows.values()), notes.bias, notes.groups,
                tuple(notes.consumers), problems)


def analyse(traced: Traced, leaves: Sequence[Any], sited: Collection[str] = ()) -> dict[str, Site]:
    """Walk one jaxpr and return a `Site` for each leaf, by path; `sited`: leaves with site semantics."""
    whole = frozenset({*sited, *integer_leaves(traced.names, leaves)})
    watch = _Watch({n: tuple(v.shape) for n, v in zip(traced.names, leaves, strict=True)})

    def walk(params: Sequence[Any], arrays: Sequence[Any]) -> Any:
        tracked = [_track(n, v) for n, v in zip(traced.names, params, strict=True)]
        outs = run(Context(recorder=watch, sited=whole), traced.jaxpr, traced.consts, (*tracked, *arrays))
        outs = [flush(v) for v in outs]
        for v in outs:
            if isinstance(v, Leaf) and v.lookup is not None:
                watch.rows(v)
        return [v.op if isinstance(v, Leaf) else v for v in outs]

    structs = [jax.ShapeDtypeStruct(np.shape(v), v.dtype, sharding=_explicit(v)) for v in leaves]
    jax.eval_shape(walk, structs, traced.arrays)
    return {n: _site(n, v, watch.notes[n]) for n, v in zip(traced.names, leaves, strict=True)}


def integer_leaves(names: Sequence[str], leaves: Sequence[Any]) -> list[str]:
    """Leaves of integer codes: their adapters can only enter at the contraction, behind the dequantisation."""
    return [n for n, v in zip(names, leaves, strict=True)
            if not compat.is_extended(v) and jnp.issubdtype(v.dtype, jnp.integer)]


def _explicit(x: Any) -> Any:
    sharding = getattr(jax.typeof(x), "sharding", None) if not isinstance(x, jax.ShapeDtypeStruct) else x.sharding
    mesh = getattr(sharding, "mesh", None)
    return sharding if mesh is not None and not mesh.empty and getattr(mesh, "are_all_axes_explicit", False) else None


def _track(name: str, value: Any) -> Any:
    if compat.is_extended(value):
        return value
    return Leaf(value, (Origin(name, tuple(frozenset({d}) for d in range(value.ndim))),), value.dtype)


def unite(a: Site, b: Site) -> Site:
    """The roles of a leaf that two functions use: look-up and contraction tie it; else the first that reads it."""
    if a.use == "unused":
        return b
    if b.use == "unused" or a == b:
        return a
    first = a
    use: Use = a.use
    if {a.use, b.use} in ({"linear", "embedding"}, {"linear", "tied"}, {"embedding", "tied"}):
        first, use = (a if a.use != "linear" else b), "tied"
    elif a.use != b.use and b.use in ("linear", "embedding", "conv", "tied") and a.use in ("bias", "scale", "other"):
        first, use = b, b.use
    return dataclasses.replace(
        first, use=use, rows=a.rows + b.rows, bias=a.bias or b.bias,
        consumers=tuple(dict.fromkeys(a.consumers + b.consumers)),
        problems=tuple(dict.fromkeys(a.problems + b.problems)))


def as_matrix(site: Site) -> Site:
    """Roles by convention `[..., in, out]` for a leaf that may be formed whole and whose uses say nothing."""
    n = len(site.shape)
    if site.use != "other" or n < 2:
        return site
    return dataclasses.replace(site, use="linear", in_dims=(n - 2,), out_dims=(n - 1,), stack_dims=tuple(range(n - 2)))


def inspect(apply: Apply, params: Any, example_args: Sequence[Any], *,
            example_kwargs: Mapping[str, Any] | None = None) -> dict[str, Site]:
    """Say what a model does with every parameter leaf, from one abstract trace.

    Args:
        apply: pure function `apply(params, *args, **kwargs)` that `jax.jit` accepts.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`.
        example_args: positional arguments; arrays (or structs) are traced, everything else is static.
        example_kwargs: keyword arguments, likewise.

    Returns:
        Path -> `Site`: shape, dtype, use, and which dims are in, out and stacked.

    Raises:
        PathError: two leaves with one path, or a leaf that is not an array.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
        >>> sites = jpeft.inspect(lambda p, x: x @ p["w"] + p["b"], params, (jnp.ones((2, 3)),))
        >>> sites["w"].use, sites["w"].in_dims, sites["w"].out_dims, sites["w"].bias
        ('linear', (0,), (1,), 'b')
    """
    traced = trace(apply, params, example(example_args), example_kwargs or {})
    return analyse(traced, jax.tree_util.tree_leaves(params))
