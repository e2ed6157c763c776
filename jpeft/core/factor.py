"""A factor: an array that knows which dims of a leaf it carries, and follows the leaf through every view.

Its leading axes are the dims of the (viewed) leaf, size 1 where `live` is False; its trailing axes are its own
(`extras`: a rank, a key). Every view of the leaf is one of three: `permute`, `reshape`, or `along` one axis.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

AlongFn = Callable[[jax.Array, int], jax.Array]


class Unsupported(Exception):
    """Internal: this node cannot follow that operation; the interpreter turns it into `UnsupportedUse`."""


@functools.lru_cache(maxsize=4096)
def reshape_groups(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Split a reshape into its smallest independent parts: `((old dims), (new dims))` of equal size each."""
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b, size_a, size_b = [], [], 1, 1
        if i < len(old):
            a, size_a, i = [i], old[i], i + 1
        if j < len(new):
            b, size_b, j = [j], new[j], j + 1
        while size_a != size_b:
            if size_a < size_b and i < len(old):
                a, size_a, i = [*a, i], size_a * old[i], i + 1
            elif j < len(new):
                b, size_b, j = [*b, j], size_b * new[j], j + 1
            else:
                raise Unsupported(f"reshape {old} -> {new}")
        groups.append((tuple(a), tuple(b)))
    return tuple(groups)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["live", "extras"])
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array over some dims of a leaf.

    Attributes:
        array: `[d or 1 for each leaf dim, *extras]`.
        live: for each leaf dim, whether the array carries it.
        extras: a name for each trailing axis; factors of one product contract over equal names.
    """

    array: Any
    live: tuple[bool, ...]
    extras: tuple[str, ...] = ()

    @property
    def ndim(self) -> int:
        return len(self.live)

    def permute(self, perm: Sequence[int]) -> Factor:
        n = self.ndim
        array = jnp.transpose(self.array, (*perm, *range(n, n + len(self.extras))))
        return Factor(array, tuple(self.live[p] for p in perm), self.extras)

    def reshape(self, old: tuple[int, ...], new: tuple[int, ...], free: Collection[int] = ()) -> Factor:
        """Reshape the leaf's dims; `free`: those along which the whole term is constant, and which may be widened."""
        shape, live = [1] * len(new), [False] * len(new)
        for a, b in reshape_groups(old, new):
            wide = [d for d in a if old[d] > 1] or list(a)
            carried = [self.live[d] for d in wide]
            stuck = next((d for d in wide if d in free and not self.live[d] and any(carried)), None)
            if stuck is not None:
                return self.widen(stuck, old[stuck]).reshape(old, new, free)
            if any(carried) and not all(carried):
                raise Unsupported(f"reshape {old} -> {new} mixes dims that the adapter keeps apart")
            if any(carried):
                wide_b = [d for d in b if new[d] > 1] or list(b)
                for d in b:
                    shape[d], live[d] = new[d], d in wide_b
        array = jnp.reshape(self.array, (*shape, *self.array.shape[self.ndim:]))
        return Factor(array, tuple(live), self.extras)

    def along(self, axis: int, fn: AlongFn, new: tuple[int, ...]) -> Factor:
        """Replace `axis` by axes of sizes `new`: with `fn(array, axis)` where it is live, by ones where not.

        A function with an attribute `inner` has another form for factors (padding with zeros, say).
        """
        live = (*self.live[:axis], *(self.live[axis],) * len(new), *self.live[axis + 1:])
        if self.live[axis]:
            return Factor(getattr(fn, "inner", fn)(self.array, axis), live, self.extras)
        shape = (*self.array.shape[:axis], *(1,) * len(new), *self.array.shape[axis + 1:])
        return Factor(jnp.reshape(self.array, shape), live, self.extras)

    def widen(self, axis: int, size: int) -> Factor:
        """Make the factor carry `axis`."""
        if self.live[axis]:
            return self
        shape = (*self.array.shape[:axis], size, *self.array.shape[axis + 1:])
        live = (*self.live[:axis], True, *self.live[axis + 1:])
        return Factor(jnp.broadcast_to(self.array, shape), live, self.extras)

    def map(self, fn: Callable[[Any, tuple[int | None, ...]], Any]) -> Factor:
        """Apply `fn(array, dims)`; `dims` names the leaf dim of each axis, None for the others."""
        dims = (*(d if live else None for d, live in enumerate(self.live)), *(None,) * len(self.extras))
        return dataclasses.replace(self, array=fn(self.array, dims))

    def named(self, letters: Sequence[int], names: dict[str, int]) -> tuple[jax.Array, tuple[int, ...]]:
        """Return the array without its empty axes, and the letter of each axis."""
        array = jnp.reshape(self.array, tuple(
            s for s, live in zip(self.array.shape[: self.ndim], self.live, strict=True) if live
        ) + self.array.shape[self.ndim:])
        own = (c for c, live in zip(letters, self.live, strict=True) if live)
        return array, (*own, *(names[e] for e in self.extras))


def factor(array: jax.Array, layout: Sequence[int | str], ndim: int) -> Factor:
    """Make a factor of an `ndim`-dimensional leaf.

    Args:
        array: one axis for each entry of `layout`.
        layout: a leaf dim (int) or the name of an extra axis (str), for each axis of `array`.
        ndim: number of dims of the leaf.
    """
    dims = [x for x in layout if isinstance(x, int)]
    extras = [x for x in layout if isinstance(x, str)]
    order = [*(layout.index(d) for d in sorted(dims)), *(layout.index(e) for e in extras)]
    array = jnp.transpose(array, order)
    shape = [1] * ndim
    for i, d in enumerate(sorted(dims)):
        shape[d] = array.shape[i]
    live = tuple(d in dims for d in range(ndim))
    return Factor(jnp.reshape(array, (*shape, *array.shape[len(dims):])), live, tuple(extras))


def join(factors: Sequence[Factor], axis: int, sizes: Sequence[int]) -> Factor:
    """Concatenate factors along `axis`, widening those that are constant there and padding extras to the largest."""
    first = factors[0]
    if any(f.extras != first.extras or f.live[:axis] + f.live[axis + 1:] != first.live[:axis] + first.live[axis + 1:]
           for f in factors):
        raise Unsupported("concatenate of differently adapted leaves")
    wide = [f.widen(axis, n).array for f, n in zip(factors, sizes, strict=True)]
    n = first.ndim
    top = [max(w.shape[n + i] for w in wide) for i in range(len(first.extras))]
    padded = [jnp.pad(w, [(0, 0)] * n + [(0, t - w.shape[n + i]) for i, t in enumerate(top)])
              if math.prod(w.shape[n:]) != math.prod(top) else w for w in wide]
    live = (*first.live[:axis], True, *first.live[axis + 1:])
    return Factor(jnp.concatenate(padded, axis), live, first.extras)
