"""The output of a contraction whose leaf has hooks: what each hook has to know, and what it waits for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jpeft.core.interpret import Context
from jpeft.core.leaf import Leaf, Pending, hook_theta
from jpeft.errors import CallError, UnsupportedUse


def _token_axis(ctx: Context, eqn: Any) -> int | None:
    """The output axis that grew with the virtual tokens."""
    if not ctx.tokens:
        return None
    shape = tuple(eqn.outvars[0].aval.shape)
    old = ctx.tokens.get(id(eqn), (shape,))[0]
    grown = [d for d, (a, b) in enumerate(zip(shape, old, strict=True)) if a - b == ctx.growth]
    return grown[0] if len(grown) == 1 else None


def finish(ctx: Context, eqn: Any, leaf: Leaf, y: Any, hooks: Sequence[Any], features: Sequence[int]) -> list[Any]:
    """Wrap an output that awaits a hook, or a bias in an analysis."""
    if ctx.recorder is not None:
        return [Pending(y, leaf.paths, (), tuple(features), None, None)]
    if not hooks:
        return [y]
    bias, token = ctx.biases.get(leaf.paths[0]), _token_axis(ctx, eqn)
    if ctx.tokens and token is None:
        hooks = [h for h in hooks if not _without_rows(ctx, eqn, h.fn)]
        if not hooks:
            return [y]
    pairs = tuple((h.fn, hook_theta(h)) for h in hooks)
    if token is None and any(h.fn.positions for h in hooks):
        raise CallError(f"{ctx.where(eqn)} applies {leaf.paths[0]!r} to rows without a token axis, and its method acts "
                        "by position; keep [B, T, ..] there, or let it act on all positions")
    rows = tuple(n for d, n in enumerate(y.shape) if d not in features)
    inputs = tuple(_input_of(ctx, eqn, h.fn, rows) for h in hooks)
    pending = Pending(y, leaf.paths, pairs, tuple(features), token, bias, inputs, ctx.where(eqn))
    return [pending.settle() if bias is None and pending.late else pending]


def _without_rows(ctx: Context, eqn: Any, hook: Any) -> bool:
    """Whether a method has virtual tokens and this use of its leaf does not: a table that a second text reads too."""
    if not hook.method.virtual_tokens:
        return False
    if hook.site.use == "linear":
        raise CallError(f"{ctx.where(eqn)} applies {hook.site.path!r} to tokens that have no virtual ones before them; "
                        f"limit the rule of {type(hook.method).__name__} to the leaves of the text that "
                        "jpeft.Tokens(ids=...) names")
    return True


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
