"""The token axis: which arguments and outputs carry it, how they are padded for virtual tokens and stripped again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.core import compat
from jpeft.errors import CallError

Where = int | str | None
DIFFERENT = ("the model computes different operations for different token lengths, so the token axis cannot be found; "
             "make its control flow independent of the length")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Which arguments and outputs of an apply function run over tokens.

    Methods with virtual tokens pad the batch on the left through it, `[B, T] -> [B, V + T]`, and strip the outputs.
    An argument is named by its position after `params` (int) or its keyword (str).

    Attributes:
        ids: token ids `[B, T]` (or embeddings `[B, T, D]`).
        mask: attention mask, 1 = visible: `[B, T]`, or with `T` as its last (two) dims; virtual tokens are visible.
        positions: position ids `[B, T]`: real tokens move by V, virtual ones get 0..V-1.
        segments: segment ids `[B, T]`: virtual tokens join the segment of the first token.
        token_axis: the token axis of ids, positions and segments.
        strip: indices of the (flattened) outputs to strip; None: every output that grew by V on one axis.
        fill: the id given to virtual tokens where the model looks it up; any id that is not a padding id.
    """

    ids: Where = 0
    mask: Where = "attention_mask"
    positions: Where = None
    segments: Where = None
    token_axis: int = 1
    strip: tuple[int, ...] | None = None
    fill: int = 0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tokens:
        strip = data.get("strip")
        return cls(**{**data, "strip": None if strip is None else tuple(strip)})


def _pad_left(x: Any, n: int, axis: int, value: Any) -> jax.Array:
    x = jnp.asarray(x)
    if n < 0:
        return lax.slice_in_dim(x, -n, x.shape[axis], axis=axis)
    shape = (*x.shape[:axis], n, *x.shape[axis + 1:])
    return jnp.concatenate([jnp.broadcast_to(jnp.asarray(value, x.dtype), shape), x], axis)


def pad(tokens: Tokens, n: int, args: Sequence[Any],
        kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pad the arguments of one call by `n` virtual tokens on the left, or (n < 0) cut tokens off there.

    Raises:
        CallError: the token argument is not there, or a mask does not carry the token axis.
    """
    new_args, new_kwargs = list(args), dict(kwargs)

    def get(where: Where) -> Any:
        if isinstance(where, int):
            return new_args[where] if where < len(new_args) else None
        return new_kwargs.get(where) if where is not None else None

    def put(where: Where, value: Any) -> None:
        if isinstance(where, int):
            new_args[where] = value
        elif where is not None:
            new_kwargs[where] = value

    ids, axis = get(tokens.ids), tokens.token_axis
    if ids is None or jnp.ndim(ids) <= axis:
        raise CallError(f"jpeft.Tokens says that argument {tokens.ids!r} holds the tokens with axis {axis}, found "
                        f"{'nothing' if ids is None else f'shape {jnp.shape(ids)}'}; name the right one in "
                        "Tokens(ids=...)")
    length = ids.shape[axis]
    put(tokens.ids, _pad_left(ids, n, axis, tokens.fill if jnp.issubdtype(ids.dtype, jnp.integer) else 0))
    positions = get(tokens.positions)
    if positions is not None:
        at = min(axis, positions.ndim - 1)
        line = jnp.reshape(jnp.arange(max(n, 0), dtype=positions.dtype),
                           [max(n, 0) if d == at else 1 for d in range(positions.ndim)])
        put(tokens.positions, _pad_left(positions + jnp.asarray(n, positions.dtype), n, at, line))
    segments = get(tokens.segments)
    if segments is not None:
        put(tokens.segments, _pad_left(segments, n, axis, lax.slice_in_dim(segments, 0, 1, axis=axis)))
    mask = get(tokens.mask)
    if mask is not None:
        put(tokens.mask, _pad_mask(jnp.asarray(mask), n, axis, length))
    return tuple(new_args), new_kwargs


def _pad_mask(mask: jax.Array, n: int, axis: int, length: int) -> jax.Array:
    axes = (axis,) if mask.ndim == 2 and mask.shape[axis] == length and axis == 1 and mask.shape[0] != mask.shape[1] \
        else tuple(d for d in range(max(mask.ndim - 2, 0), mask.ndim) if mask.shape[d] == length)
    if mask.ndim == 2 and axis < 2 and mask.shape[axis] == length:
        axes = (axis,)
    if not axes:
        raise CallError(f"the mask has shape {mask.shape}, no dim of which is the token length {length}; "
                        "pass a [B, T] mask or one whose last dims are T")
    additive = mask.ndim != 2 and jnp.issubdtype(mask.dtype, jnp.floating)
    visible = True if mask.dtype == jnp.bool_ else 0 if additive else 1
    for d in axes:
        mask = _pad_left(mask, n, d, visible)
    return mask


def strip(tokens: Tokens, n: int, outs: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Drop the first `n` rows of the outputs that grew; `shapes` are those of the call without virtual tokens."""
    result = list(outs)
    for i, (out, old) in enumerate(zip(outs, shapes, strict=True)):
        grown = [d for d, (a, b) in enumerate(zip(out.shape, old, strict=True)) if a == b + n]
        if tokens.strip is not None and i not in tokens.strip:
            continue
        if tokens.strip is not None and not grown:
            raise CallError(f"output {i} has shape {tuple(out.shape)}, which has no token axis; drop it from "
                            "Tokens(strip=...)")
        for d in grown:
            result[i] = lax.slice_in_dim(result[i], n, out.shape[d], axis=d)
    return result


def other_length(tokens: Tokens, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """By how much to change the number of tokens to see which axes follow it: by -1 (no table is too short), or 1."""
    ids: Any = args[tokens.ids] if isinstance(tokens.ids, int) and tokens.ids < len(args) \
        else kwargs.get(str(tokens.ids))
    return -1 if jnp.ndim(ids) > tokens.token_axis and jnp.shape(ids)[tokens.token_axis] > 1 else 1


def shapes_of(jaxpr: Any, other: Any) -> dict[int, tuple[tuple[int, ...], ...]]:
    """For each equation of `jaxpr`, by id, the output shapes of its twin in the trace for another number of tokens."""
    found: dict[int, tuple[tuple[int, ...], ...]] = {}
    if [e.primitive.name for e in jaxpr.eqns] != [e.primitive.name for e in other.eqns]:
        raise CallError(DIFFERENT)
    for a, b in zip(jaxpr.eqns, other.eqns, strict=True):
        found[id(a)] = tuple(tuple(getattr(v.aval, "shape", ())) for v in b.outvars)
        for sa, sb in zip(compat.sub_jaxprs(a), compat.sub_jaxprs(b), strict=True):
            found |= shapes_of(sa, sb)
    return found


class Twins(NamedTuple):
    """What the trace without virtual tokens tells of the one with them, by the id of an equation of the latter.

    Attributes:
        shapes: the output shapes without virtual tokens.
        moved: `slice` equations that take a fixed window at the start of the tokens (`x[:, 0]`, a class token), moved
            behind the virtual tokens; the equations around them, as they are.
    """

    shapes: dict[int, tuple[tuple[int, ...], ...]]
    moved: dict[int, Any]


def twins(padded: Any, plain: Any, n: int) -> Twins:
    """Walk the jaxprs with and without `n` virtual tokens side by side.

    Raises:
        CallError: the two traces differ in more than shapes, or the model reads a token by a constant index array,
            which cannot be moved.
    """
    found = Twins({}, {})

    def walk(a: Any, b: Any, fixed: set[Any], line: str | None = None) -> bool:
        before = len(found.moved)
        if [e.primitive.name for e in a.eqns] != [e.primitive.name for e in b.eqns]:
            raise CallError(DIFFERENT)
        for ea, eb in zip(a.eqns, b.eqns, strict=True):
            old = tuple(tuple(getattr(v.aval, "shape", ())) for v in eb.outvars)
            found.shapes[id(ea)] = old
            known = [isinstance(v, compat.Literal) or v in fixed for v in ea.invars]
            if all(known):
                fixed.update(ea.outvars)
            here = compat.source_line(ea) or line
            window = _window(ea, eb, n, known, here)
            if window:
                found.moved[id(ea)] = eqn = compat.moved(ea, window, n)
                found.shapes[id(eqn)] = old
            for sa, sb in zip(compat.sub_jaxprs(ea), compat.sub_jaxprs(eb), strict=True):
                same = len(sa.invars) == len(known)
                inner = {v for v, k in zip(sa.invars, known, strict=True) if k} if same else set()
                if walk(sa, sb, inner.union(sa.constvars), here):
                    found.moved[id(ea)] = ea
        return len(found.moved) > before

    walk(padded, plain, set(padded.constvars))
    return found


def _window(ea: Any, eb: Any, n: int, fixed: Sequence[bool], line: str | None) -> list[int]:
    """The axes along which a slice keeps a fixed window at the start of the tokens."""
    name = ea.primitive.name
    if name not in ("slice", "gather", "dynamic_slice"):
        return []
    wide, thin = (tuple(e.invars[0].aval.shape) for e in (ea, eb))
    new, old = (tuple(e.outvars[0].aval.shape) for e in (ea, eb))
    grown = [d for d, (p, q) in enumerate(zip(wide, thin, strict=True)) if p == q + n]
    if name == "slice":
        starts = [e.params["start_indices"] for e in (ea, eb)]
        return [d for d in grown if new[d] == old[d] and starts[0][d] == starts[1][d]]
    if name == "gather":
        chosen = any(d in ea.params["dimension_numbers"].start_index_map and ea.params["slice_sizes"][d] < wide[d]
                     for d in grown)
        constant = chosen and new == old and fixed[1]
    else:
        constant = any(new[d] == old[d] and fixed[1 + d] for d in grown)
    if constant:
        raise CallError(f"{name} @ {line or 'unknown line'} reads a token by a constant index array, "
                        "which virtual tokens would shift; write it as a static index or slice, such as x[:, 0]")
    return []
