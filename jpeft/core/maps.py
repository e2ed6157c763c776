"""Expressions around a function of the method: an input map, an additive linear map, a change of the output.

    Rotated   of(fn(x)): `fn` maps the flattened inputs before `of` is contracted       (OFT, HRA, BOFT)
    Linear    additive term given by `fn` from flattened inputs to flattened outputs    (LoKr, circulant)
    Hooked    the leaf itself; the output of its contraction is changed                 (adapters, prefixes)

`theta` holds factors that carry stack dims only, so that layers and experts slice them with the leaf.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.einsum import Dot, Letters, arrange
from jpeft.core.factor import AlongFn, Factor, Unsupported, factor, reshape_groups
from jpeft.core.ops import (
    Expr,
    MapFn,
    Op,
    Shape,
    along,
    contract,
    map_arrays,
    materialise,
    node,
    permute,
    reshape,
    scale,
    sizes_of,
)
from jpeft.core.site import widest

Arrays = dict[str, jax.Array]
LinearFn = Callable[[Arrays, jax.Array], jax.Array]


def follow(axes: tuple[int, ...], old: Shape, new: Shape) -> tuple[int, ...]:
    """Where the dims `axes`, in their order, are after a reshape that keeps them together."""
    moved: list[tuple[int, int]] = []
    for a, b in reshape_groups(old, new):
        mine = [d for d in a if d in axes]
        if not mine:
            continue
        if any(d not in axes and old[d] > 1 for d in a):
            raise Unsupported("reshape that mixes inputs and outputs of a structured adapter")
        at = axes.index(mine[0])
        if tuple(mine) != axes[at:at + len(mine)]:
            raise Unsupported("reshape that permutes the inputs or outputs of a structured adapter")
        moved += [(at, d) for d in b]
    return tuple(d for _, d in sorted(moved, key=lambda m: m[0]))


def apply_map(fn: LinearFn, theta: dict[str, Factor], x: jax.Array, xl: Letters, wl: Letters, src: Letters,
              dst: Letters, n_dst: int, dst_shape: Sequence[int], transposed: bool) -> tuple[jax.Array, Letters]:
    """Apply `fn` (or its transpose) to the letters `src` of `x`: `dst` replaces them, stack letters come first."""
    if any(c not in xl for c in src):
        raise Unsupported("a structured adapter contracted over a part of its inputs")
    named = {k: f.named(wl, dict.fromkeys(f.extras, -1)) for k, f in theta.items()}
    stack = tuple(dict.fromkeys(c for _, letters in named.values() for c in letters if c != -1))
    rest = tuple(c for c in xl if c not in src and c not in stack)
    here = tuple(c for c in stack if c in xl)
    size = dict(zip(xl, x.shape, strict=True))
    x = jnp.transpose(x, tuple(xl.index(c) for c in (*here, *rest, *src)))
    x = jnp.reshape(x, (*x.shape[: len(here) + len(rest)], math.prod(size[c] for c in src)))

    def one(arrays: Arrays, v: jax.Array) -> jax.Array:
        arrays = {k: a.astype(v.dtype) for k, a in arrays.items()}
        if not transposed:
            return fn(arrays, v)
        like = jax.ShapeDtypeStruct((*v.shape[:-1], n_dst), v.dtype)
        return jax.linear_transpose(lambda u: fn(arrays, u), like)(v)[0]

    run = one
    for n, c in reversed(list(enumerate(stack))):
        inner = {k: [m for m in letters if m not in stack[:n]] for k, (_, letters) in named.items()}
        axes = {k: letters.index(c) if c in letters else None for k, letters in inner.items()}
        rows = [h for h in here if h not in stack[:n]]
        run = jax.vmap(run, in_axes=(axes, rows.index(c) if c in rows else None))
    y = run({k: a for k, (a, _) in named.items()}, x)
    return jnp.reshape(y, (*y.shape[:-1], *dst_shape)), (*stack, *rest, *dst)


def _theta_map(theta: dict[str, Factor], fn: Callable[[Factor], Factor]) -> dict[str, Factor]:
    return {k: fn(f) for k, f in theta.items()}


@node("of", "theta", meta=("shape", "fn", "axes"))
class Rotated(Op):
    """`of` behind an input map: `y = of(fn(theta, x))`, with x `[..., n]` over the view dims `axes`."""

    of: Expr
    theta: dict[str, Factor]
    shape: Shape
    fn: LinearFn
    axes: tuple[int, ...]

    def permute(self, perm: Sequence[int]) -> Expr:
        of = permute(self.of, perm)
        theta = _theta_map(self.theta, lambda f: f.permute(perm))
        return Rotated(of, theta, tuple(of.shape), self.fn, tuple(tuple(perm).index(a) for a in self.axes))

    def reshape(self, new: Shape) -> Expr:
        axes = follow(self.axes, self.shape, new)
        theta = _theta_map(self.theta, lambda f: f.reshape(self.shape, new))
        return Rotated(reshape(self.of, new), theta, new, self.fn, axes)

    def along(self, axis: int, fn: AlongFn, new: Shape, carry: bool = False) -> Expr:
        if axis in self.axes:
            raise Unsupported("indexing the inputs of a rotated leaf")
        of = along(self.of, axis, fn, new, carry)
        axes = tuple(a + (len(new) - 1 if axis < a else 0) for a in self.axes)
        return Rotated(of, _theta_map(self.theta, lambda f: f.along(axis, fn, new)), tuple(of.shape), self.fn, axes)

    def map(self, fn: MapFn, shape: Shape | None = None) -> Expr:
        theta = _theta_map(self.theta, lambda f: f.map(fn))
        return Rotated(map_arrays(self.of, fn, shape), theta, shape or self.shape, self.fn, self.axes)

    def scale(self, by: Any) -> Expr:
        return dataclasses.replace(self, of=scale(self.of, by))

    def contract(self, x: jax.Array, xl: Letters, wl: Letters, out: Letters, dot: Dot) -> jax.Array:
        mine = tuple(wl[a] for a in self.axes)
        shape = tuple(self.shape[a] for a in self.axes)
        sizes = sizes_of(x, xl, self.shape, wl)
        if all(c in xl and c not in out for c in mine):
            turned, tl = apply_map(self.fn, self.theta, x, xl, wl, mine, mine, math.prod(shape), shape, False)
            want = (*xl, *(c for c in tl if c not in xl))
            return contract(self.of, arrange(turned, tl, want, sizes), want, wl, out, dot)
        if any(c in xl for c in mine):
            raise Unsupported("a rotated dim used as a batch dim")
        y = contract(self.of, x, xl, wl, out, dot)
        y, yl = apply_map(self.fn, self.theta, y, out, wl, mine, mine, math.prod(shape), shape, True)
        return arrange(y, yl, out, sizes)

    def dense(self) -> jax.Array:
        of = materialise(self.of)
        of = of.astype(widest(of.dtype, jnp.float32))
        wl = tuple(range(self.ndim))
        shape = tuple(self.shape[a] for a in self.axes)
        y, yl = apply_map(self.fn, self.theta, of, wl, wl, self.axes, self.axes, math.prod(shape), shape, True)
        return arrange(y, yl, wl, dict(enumerate(self.shape)))


@node("theta", meta=("shape", "fn", "in_axes", "out_axes"))
class Linear(Op):
    """Additive term `x [..., in] -> fn(theta, x) [..., out]` over the view dims `in_axes` and `out_axes`."""

    theta: dict[str, Factor]
    shape: Shape
    fn: LinearFn
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    def permute(self, perm: Sequence[int]) -> Expr:
        at = tuple(perm).index
        return Linear(_theta_map(self.theta, lambda f: f.permute(perm)), tuple(self.shape[p] for p in perm), self.fn,
                      tuple(map(at, self.in_axes)), tuple(map(at, self.out_axes)))

    def reshape(self, new: Shape) -> Expr:
        return Linear(_theta_map(self.theta, lambda f: f.reshape(self.shape, new)), new, self.fn,
                      follow(self.in_axes, self.shape, new), follow(self.out_axes, self.shape, new))

    def along(self, axis: int, fn: AlongFn, new: Shape, carry: bool = False) -> Expr:
        if axis in self.in_axes or axis in self.out_axes:
            raise Unsupported("slicing the inputs or outputs of a structured adapter")
        shift = len(new) - 1
        in_axes = tuple(a + (shift if axis < a else 0) for a in self.in_axes)
        out_axes = tuple(a + (shift if axis < a else 0) for a in self.out_axes)
        shape = (*self.shape[:axis], *new, *self.shape[axis + 1:])
        return Linear(_theta_map(self.theta, lambda f: f.along(axis, fn, new)), shape, self.fn, in_axes, out_axes)

    def map(self, fn: MapFn, shape: Shape | None = None) -> Expr:
        return dataclasses.replace(self, theta=_theta_map(self.theta, lambda f: f.map(fn)), shape=shape or self.shape)

    def scale(self, by: Any) -> Expr:
        old = self.fn
        return dataclasses.replace(self, fn=_Times(old, by)) if isinstance(by, (int, float)) else super().scale(by)

    def contract(self, x: jax.Array, xl: Letters, wl: Letters, out: Letters, dot: Dot) -> jax.Array:
        ins, outs = (tuple(wl[a] for a in axes) for axes in (self.in_axes, self.out_axes))
        sizes = sizes_of(x, xl, self.shape, wl)
        transposed = all(c in xl and c not in out for c in outs)
        if not transposed and not all(c in xl and c not in out for c in ins):
            raise Unsupported("a structured adapter contracted over a part of its inputs")
        src, dst = (outs, ins) if transposed else (ins, outs)
        shape = tuple(sizes[c] for c in dst)
        y, yl = apply_map(self.fn, self.theta, x, xl, wl, src, dst, math.prod(shape), shape, transposed)
        return arrange(y, yl, out, sizes).astype(dot.dtype)

    def dense(self) -> jax.Array:
        wl = tuple(range(self.ndim))
        shape = tuple(self.shape[a] for a in self.in_axes)
        n = math.prod(shape)
        dtype = next(iter(self.theta.values())).array.dtype
        eye = jnp.reshape(jnp.eye(n, dtype=dtype), (n, *shape))
        row = self.ndim
        dst_shape = tuple(self.shape[a] for a in self.out_axes)
        y, yl = apply_map(self.fn, self.theta, eye, (row, *self.in_axes), wl, self.in_axes, self.out_axes,
                          math.prod(dst_shape), dst_shape, False)
        stack = tuple(c for c in yl if c != row and c not in self.out_axes)
        y = arrange(y, yl, (*stack, row, *self.out_axes), {**dict(enumerate(self.shape)), row: n})
        y = jnp.reshape(y, (*y.shape[: len(stack)], *shape, *dst_shape))
        return arrange(y, (*stack, *self.in_axes, *self.out_axes), wl, dict(enumerate(self.shape)))


@dataclasses.dataclass(frozen=True)
class _Times:
    fn: LinearFn
    by: float

    def __call__(self, theta: Arrays, x: jax.Array) -> jax.Array:
        return self.fn(theta, x) * jnp.asarray(self.by, x.dtype)


@node("of", "theta", meta=("shape", "fn"))
class Hooked(Op):
    """`of`, whose contraction's output y `[..., out]` becomes `fn(theta, y)`."""

    of: Expr
    theta: dict[str, Factor]
    shape: Shape
    fn: Any

    def permute(self, perm: Sequence[int]) -> Expr:
        of = permute(self.of, perm)
        return Hooked(of, _theta_map(self.theta, lambda f: f.permute(perm)), tuple(of.shape), self.fn)

    def reshape(self, new: Shape) -> Expr:
        return Hooked(reshape(self.of, new), _theta_map(self.theta, lambda f: f.reshape(self.shape, new)), new, self.fn)

    def along(self, axis: int, fn: AlongFn, new: Shape, carry: bool = False) -> Expr:
        of = along(self.of, axis, fn, new, carry)
        return Hooked(of, _theta_map(self.theta, lambda f: f.along(axis, fn, new)), tuple(of.shape), self.fn)

    def map(self, fn: MapFn, shape: Shape | None = None) -> Expr:
        theta = _theta_map(self.theta, lambda f: f.map(fn))
        return Hooked(map_arrays(self.of, fn, shape), theta, shape or self.shape, self.fn)

    def scale(self, by: Any) -> Expr:
        return dataclasses.replace(self, of=scale(self.of, by))


@dataclasses.dataclass(frozen=True)
class Hook:
    """A method's `hook`, bound to its site and to the first row of its virtual tokens; `everywhere`: on all rows."""

    method: Any
    site: Any
    start: int = 0
    everywhere: bool = False

    @property
    def positions(self) -> bool:
        """Whether it must know the token axis."""
        return self.method.positions and not self.everywhere

    def __call__(self, theta: Arrays, y: jax.Array) -> jax.Array:
        return self.method.hook(self.site, theta, y, self.start)


def told(e: Hooked, start: int, real: int, lengths: Any, continued: bool = False) -> Expr:
    """`e`, its hooks told what they act on.

    Args:
        e: the expression.
        start: first row of its virtual tokens.
        real: first row of the real tokens.
        lengths: of the texts, or None.
        continued: the tokens go on after others: hooks that act on virtual tokens or by position have done so there,
            and those that go on act on every row.
    """
    method, theta = e.fn.method, e.theta
    of = told(e.of, start, real, lengths, continued) if isinstance(e.of, Hooked) else e.of
    if continued and method.goes_on:
        return dataclasses.replace(e, of=of, fn=dataclasses.replace(e.fn, everywhere=True))
    if continued and (method.virtual_tokens or method.positions):
        return of
    if lengths is not None and "lengths" in method.call:
        layout = [f"lengths{i}" for i in range(jnp.ndim(lengths))]
        theta = {**theta, "lengths": factor(jnp.asarray(lengths), layout, len(e.shape))}
    fn = dataclasses.replace(e.fn, start=start if method.virtual_tokens else real)
    return dataclasses.replace(e, of=of, theta=theta, fn=fn)


def hooked(of: Expr, theta: Arrays, hook: Hook, stack: Sequence[int]) -> Hooked:
    """`of`, with `hook` on the output of its contraction; theta entries are `[*stack, ...]`."""
    return Hooked(of, stacked(theta, stack, len(of.shape)), tuple(of.shape), hook)


def stacked(arrays: Arrays, stack: Sequence[int], ndim: int) -> dict[str, Factor]:
    """Lay the leading axes of every array along the stack dims; the others are extras."""
    return {k: factor(a, (*stack, *(f"{k}{i}" for i in range(a.ndim - len(stack)))), ndim) for k, a in arrays.items()}


def rotated(of: Expr, theta: Arrays, fn: LinearFn, stack: Sequence[int], axes: Sequence[int]) -> Rotated:
    """`y = of(fn(theta, x))`: theta entries are `[*stack, ...]`, x is `[..., n]` over the leaf dims `axes`."""
    return Rotated(of, stacked(theta, stack, len(of.shape)), tuple(of.shape), fn, tuple(axes))


def linear(shape: Shape, theta: Arrays, fn: LinearFn, stack: Sequence[int], ins: Sequence[int],
           outs: Sequence[int]) -> Linear:
    """Additive map `x [..., in] -> fn(theta, x) [..., out]`: theta entries are `[*stack, ...]`."""
    return Linear(stacked(theta, stack, len(shape)), tuple(shape), fn, tuple(ins), tuple(outs))
