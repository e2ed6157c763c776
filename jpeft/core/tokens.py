"""The token axis: which arguments and outputs carry it, how they are padded for virtual tokens and stripped again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.core import compat
from jpeft.errors import CallError

Where = int | str | None


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
    shape = (*x.shape[:axis], n, *x.shape[axis + 1:])
    return jnp.concatenate([jnp.broadcast_to(jnp.asarray(value, x.dtype), shape), x], axis)


def pad(tokens: Tokens, n: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pad the arguments of one call by `n` virtual tokens on the left.

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
                        f"{'nothing' if ids is None else f'shape {jnp.shape(ids)}'}; name the right one in Tokens(ids=...)")
    length = ids.shape[axis]
    put(tokens.ids, _pad_left(ids, n, axis, tokens.fill if jnp.issubdtype(ids.dtype, jnp.integer) else 0))
    positions = get(tokens.positions)
    if positions is not None:
        at = min(axis, positions.ndim - 1)
        line = jnp.reshape(jnp.arange(n, dtype=positions.dtype), [n if d == at else 1 for d in range(positions.ndim)])
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
    visible = True if mask.dtype == jnp.bool_ else 1 if mask.ndim == 2 or not jnp.issubdtype(mask.dtype, jnp.floating) else 0
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
            raise CallError(f"output {i} has shape {tuple(out.shape)}, which has no token axis; drop it from Tokens(strip=...)")
        for d in grown:
            result[i] = lax.slice_in_dim(result[i], n, out.shape[d], axis=d)
    return result


def twins(padded: Any, plain: Any) -> dict[int, tuple[tuple[int, ...], ...]]:
    """For each equation of the padded jaxpr, by id, the output shapes of its twin in the plain one.

    Raises:
        CallError: the two traces differ in more than shapes.
    """
    found: dict[int, tuple[tuple[int, ...], ...]] = {}

    def walk(a: Any, b: Any) -> None:
        if [e.primitive.name for e in a.eqns] != [e.primitive.name for e in b.eqns]:
            raise CallError("the model computes different operations for different token lengths, so the place of virtual "
                            "tokens cannot be found; make its control flow independent of the length")
        for ea, eb in zip(a.eqns, b.eqns, strict=True):
            found[id(ea)] = tuple(tuple(getattr(v.aval, "shape", ())) for v in eb.outvars)
            for sa, sb in zip(compat.sub_jaxprs(ea), compat.sub_jaxprs(eb), strict=True):
                walk(sa, sb)

    walk(padded, plain)
    return found
