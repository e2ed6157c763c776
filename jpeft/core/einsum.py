"""Two-operand contractions over named dims: the one place where the engine's own products become `dot_general`.

A dim's name is an int ("letter"). `Dot` carries what the model asked of its own contraction (precision, output type,
output sharding), so that an adapter's products follow it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.core import compat

Letters = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Dot:
    """How one contraction of the model is to be done.

    Attributes:
        precision: `lax.dot_general`'s.
        dtype: dtype of the result.
        preferred: `lax.dot_general`'s preferred_element_type.
        out_sharding: sharding of the model's own result (explicit mode), or None.
        letters: letters of the model's own (x, weight, result).
        run: the model's own contraction as a function of (x, weight).
    """

    precision: Any
    dtype: Any
    preferred: Any
    out_sharding: Any
    letters: tuple[Letters, Letters, Letters]
    run: Callable[[Any, Any], Any]


def _reorder(x: jax.Array, have: Letters, want: Letters) -> jax.Array:
    return x if have == want else jnp.transpose(x, tuple(have.index(c) for c in want))


def arrange(x: jax.Array, have: Letters, want: Letters, sizes: dict[int, int]) -> jax.Array:
    """Sum out the letters of `x` that `want` lacks, transpose, and broadcast over those that `x` lacks."""
    lost = tuple(i for i, c in enumerate(have) if c not in want)
    if lost:
        x, have = jnp.sum(x, axis=lost), tuple(c for c in have if c in want)
    x = _reorder(x, have, tuple(c for c in want if c in have))
    missing = [c for c in want if c not in have]
    if missing:
        x = jnp.expand_dims(x, tuple(want.index(c) for c in missing))
        x = jnp.broadcast_to(x, tuple(sizes[c] for c in want))
    return x


def pair(a: jax.Array, al: Letters, b: jax.Array, bl: Letters, keep: Sequence[int],
         dot: Dot) -> tuple[jax.Array, Letters]:
    """Contract two arrays over the letters that both have and `keep` lacks.

    Args:
        a: left operand, dims named `al`.
        b: right operand, dims named `bl`, already of the dtype to compute in.
        keep: letters that the result must still have.

    Returns:
        The product and its letters: shared kept letters, then those of `a`, then those of `b`.
    """
    if any(c not in bl and c not in keep for c in al):
        live = tuple(c for c in al if c in bl or c in keep)
        a, al = jnp.sum(a, axis=tuple(i for i, c in enumerate(al) if c not in live)), live
    if any(c not in al and c not in keep for c in bl):
        live = tuple(c for c in bl if c in al or c in keep)
        b, bl = jnp.sum(b, axis=tuple(i for i, c in enumerate(bl) if c not in live)), live
    batch = tuple(c for c in al if c in bl and c in keep)
    con = tuple(c for c in al if c in bl and c not in keep)
    a_free = tuple(c for c in al if c not in bl)
    b_free = tuple(c for c in bl if c not in al)
    result = (*batch, *a_free, *b_free)
    if not con:
        wide = [jnp.expand_dims(_reorder(t, tl, tuple(c for c in result if c in tl)),
                                tuple(i for i, c in enumerate(result) if c not in tl)) for t, tl in ((a, al), (b, bl))]
        return wide[0] * wide[1], result
    if not batch and len(a_free) > 1 and compat.single_cpu_device():
        sizes = [a.shape[al.index(c)] for c in a_free]
        n_con = math.prod(a.shape[al.index(c)] for c in con)
        a2 = jnp.reshape(_reorder(a, al, (*a_free, *con)), (math.prod(sizes), n_con))
        b2 = jnp.reshape(_reorder(b, bl, (*con, *b_free)), (n_con, math.prod(b.shape) // max(n_con, 1)))
        y = lax.dot_general(a2, b2, (((1,), (0,)), ((), ())), precision=dot.precision)
        return jnp.reshape(y, (*sizes, *(b.shape[bl.index(c)] for c in b_free))), result
    numbers = ((tuple(al.index(c) for c in con), tuple(bl.index(c) for c in con)),
               (tuple(al.index(c) for c in batch), tuple(bl.index(c) for c in batch)))
    sharding = compat.contraction_sharding(a, b, numbers)
    return lax.dot_general(a, b, numbers, precision=dot.precision, out_sharding=sharding), result


def chain(x: jax.Array, xl: Letters, factors: Sequence[tuple[jax.Array, Letters]], out: Letters,
          sizes: dict[int, int], dot: Dot) -> jax.Array:
    """Multiply `x` with every factor, cheapest product first, and lay the result out as `out`."""
    todo = list(factors)
    size = dict(sizes)
    for f, fl in todo:
        size.update(zip(fl, f.shape, strict=True))
    while todo:
        cheapest = min(range(len(todo)), key=lambda i: (math.prod(size[c] for c in {*xl, *todo[i][1]}), i))
        f, fl = todo.pop(cheapest)
        keep = {*out, *(c for _, other in todo for c in other)}
        x, xl = pair(x, xl, f, fl, tuple(keep), dot)
    return arrange(x, xl, out, size)
