"""Expressions: what an adapted leaf is worth, without ever forming the dense weight.

A method builds one of these around its frozen base; views of the leaf act on the expression, a contraction
distributes over it. A plain array is an expression too.

    Product   sum over extras of factor * factor * ...          (low rank, Kronecker, Khatri-Rao)
    Sum       part + part + ...
    Scaled    of * s                                            (IA3, DoRA)
    Rotated, Linear, Hooked: see `jpeft.core.maps`              (OFT; Kronecker; bottleneck adapters, prefixes)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from jpeft.core import compat
from jpeft.core.einsum import Dot, Letters, arrange, chain
from jpeft.core.factor import AlongFn, Factor, Unsupported, factor
from jpeft.core.site import widest

MapFn = Callable[[Any, tuple[int | None, ...]], Any]
Shape = tuple[int, ...]
T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def node(*data: str, meta: Sequence[str] = ("shape",)) -> Callable[[type[T]], type[T]]:
    """Make a class an expression: a frozen dataclass and a pytree of its `data` fields."""
    def wrap(cls: type[T]) -> type[T]:
        made = dataclasses.dataclass(frozen=True)(cls)
        return jax.tree_util.register_dataclass(made, data_fields=list(data), meta_fields=list(meta))

    return wrap


@dataclasses.dataclass(frozen=True)
class Op:
    """Base class of the expressions; a subclass has a field `shape`, the shape of the leaf's present view."""

    if TYPE_CHECKING:
        @property
        def shape(self) -> Shape: ...

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def permute(self, perm: Sequence[int]) -> Expr:
        """Transpose."""
        raise Unsupported("transpose")

    def reshape(self, new: Shape) -> Expr:
        """Reshape, squeeze and expand_dims."""
        raise Unsupported("reshape")

    def along(self, axis: int, fn: AlongFn, new: Shape, carry: bool = False) -> Expr:
        """Slice, index, gather, reverse, pad or broadcast one axis; `carry`: a constant axis must be widened first."""
        raise Unsupported("indexing")

    def map(self, fn: MapFn, shape: Shape | None = None) -> Expr:
        """Apply `fn(array, dims)` to every array; `shape`: the new view shape where fn changes sizes."""
        raise Unsupported("elementwise operation")

    def scale(self, by: Any) -> Expr:
        """Multiply by a scalar."""
        raise Unsupported("multiplication")

    def contract(self, x: jax.Array, xl: Letters, wl: Letters, out: Letters, dot: Dot) -> jax.Array:
        """Contract with `x`; letters name the dims, letters that `out` lacks are summed."""
        raise Unsupported("contraction")

    def dense(self) -> jax.Array:
        """Form the whole array."""
        raise Unsupported("materialisation")


Expr = Any  # jax.Array | Op


def permute(e: Expr, perm: Sequence[int]) -> Expr:
    return e.permute(perm) if isinstance(e, Op) else jnp.transpose(e, tuple(perm))


def reshape(e: Expr, new: Shape) -> Expr:
    return e.reshape(tuple(new)) if isinstance(e, Op) else jnp.reshape(e, new)


def along(e: Expr, axis: int, fn: AlongFn, new: Shape, carry: bool = False) -> Expr:
    return e.along(axis, fn, tuple(new), carry) if isinstance(e, Op) else fn(e, axis)


def map_arrays(e: Expr, fn: MapFn, shape: Shape | None = None) -> Expr:
    return e.map(fn, shape) if isinstance(e, Op) else fn(e, tuple(range(e.ndim)))


def scale(e: Expr, by: Any) -> Expr:
    return e.scale(by) if isinstance(e, Op) else e * jnp.asarray(by, e.dtype)


def contract(e: Expr, x: jax.Array, xl: Letters, wl: Letters, out: Letters, dot: Dot) -> jax.Array:
    if isinstance(e, Op):
        return e.contract(x, xl, wl, out, dot)
    if (xl, wl, out) == dot.letters:
        return dot.run(x, e)
    dtype = jnp.promote_types(x.dtype, e.dtype)
    return chain(x.astype(dtype), xl, [(e.astype(dtype), wl)], out, sizes_of(x, xl, e.shape, wl), dot).astype(dot.dtype)


def cast(e: Expr, dtype: Any) -> Expr:
    """Convert the arrays of the base; factors keep their own dtype and follow the activations at the contraction."""
    if not isinstance(e, Op):
        return e.astype(dtype)
    if isinstance(e, Sum):
        rest = (p if isinstance(p, Op) else p.astype(dtype) for p in e.parts[1:])
        return Sum((cast(e.parts[0], dtype), *rest), e.shape)
    return _inside(e, lambda of: cast(of, dtype)) if hasattr(e, "of") else e


def map_base(e: Expr, fn: Callable[[Any], Any]) -> Expr:
    """Apply `fn` to the base array of an expression and leave what the methods added alone."""
    if not isinstance(e, Op):
        return fn(e)
    if isinstance(e, Sum):
        return Sum((map_base(e.parts[0], fn), *e.parts[1:]), e.shape)
    if not hasattr(e, "of"):
        raise Unsupported("an elementwise operation on an additive term alone")
    return _inside(e, lambda of: map_base(of, fn))


def _inside(e: Any, fn: Callable[[Expr], Expr]) -> Expr:
    return dataclasses.replace(e, of=fn(e.of))


def materialise(e: Expr) -> jax.Array:
    """Form the whole array of an expression."""
    return e.dense() if isinstance(e, Op) else e


def sizes_of(x: Any, xl: Letters, shape: Shape, wl: Letters) -> dict[int, int]:
    return {**dict(zip(wl, shape, strict=True)), **dict(zip(xl, x.shape, strict=True))}


@node("factors", "key", meta=("shape", "rate"))
class Product(Op):
    """Additive term `sum_extras prod_i factor_i`; `rate`, `key`: dropout on its input."""

    factors: tuple[Factor, ...]
    key: Factor | None
    shape: Shape
    rate: float = 0.0

    def _with(self, factors: Sequence[Factor], key: Factor | None, shape: Shape) -> Product:
        return Product(tuple(factors), key, shape, self.rate)

    def _each(self, fn: Callable[[Factor], Factor], shape: Shape) -> Product:
        return self._with([fn(f) for f in self.factors], None if self.key is None else fn(self.key), shape)

    def permute(self, perm: Sequence[int]) -> Expr:
        return self._each(lambda f: f.permute(perm), tuple(self.shape[p] for p in perm))

    def reshape(self, new: Shape) -> Expr:
        free = tuple(d for d in range(self.ndim) if not any(f.live[d] for f in self.factors))
        return self._each(lambda f: f.reshape(self.shape, new, free), new)

    def along(self, axis: int, fn: AlongFn, new: Shape, carry: bool = False) -> Expr:
        me = self
        if carry and not any(f.live[axis] for f in self.factors):
            me = self._with((self.factors[0].widen(axis, self.shape[axis]), *self.factors[1:]), self.key, self.shape)
        return me._each(lambda f: f.along(axis, fn, new), (*self.shape[:axis], *new, *self.shape[axis + 1:]))

    def map(self, fn: MapFn, shape: Shape | None = None) -> Expr:
        return self._each(lambda f: f.map(fn), shape or self.shape)

    def scale(self, by: Any) -> Expr:
        first = self.factors[0]
        dtype = jnp.promote_types(first.array.dtype, by.dtype) if jnp.iscomplexobj(by) and hasattr(by, "dtype") \
            else widest(first.array.dtype, jnp.complex64) if isinstance(by, complex) else first.array.dtype
        scaled = dataclasses.replace(first, array=first.array * jnp.asarray(by, dtype))
        return self._with((scaled, *self.factors[1:]), self.key, self.shape)

    def _named(self, wl: Letters, fresh: int, dtype: Any) -> list[tuple[jax.Array, Letters]]:
        names: dict[str, int] = {}
        for f in self.factors:
            for e in f.extras:
                names.setdefault(e, fresh + len(names))
        named = [f.named(wl, names) for f in self.factors]
        return [(a.astype(dtype), letters) for a, letters in named]

    def contract(self, x: jax.Array, xl: Letters, wl: Letters, out: Letters, dot: Dot) -> jax.Array:
        x = self.drop(x, xl, wl)
        if any(jnp.iscomplexobj(f.array) for f in self.factors):
            x = x.astype(jnp.promote_types(x.dtype, jnp.complex64))
        sizes = sizes_of(x, xl, self.shape, wl)
        return chain(x, xl, self._named(wl, max((*xl, *wl, *out)) + 1, x.dtype), out, sizes, dot).astype(dot.dtype)

    def drop(self, x: jax.Array, xl: Letters, wl: Letters) -> jax.Array:
        """Inverted dropout of `x`, one mask per copy that the key still carries (experts)."""
        if self.key is None or self.rate == 0.0:
            return x
        data, kl = self.key.named(wl, dict.fromkeys(self.key.extras, -1))
        copies = tuple(c for c in kl if c != -1)
        if any(c not in xl for c in copies):
            raise Unsupported("dropout where one input feeds several copies of the leaf")
        rest = tuple(c for c in xl if c not in copies)
        size = dict(zip(xl, x.shape, strict=True))
        keys = jax.random.wrap_key_data(jnp.reshape(data, (-1, data.shape[-1])))
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1.0 - self.rate, tuple(size[c] for c in rest)))(keys)
        keep = jnp.reshape(keep, tuple(size[c] for c in (*copies, *rest)))
        keep = arrange(keep, (*copies, *rest), xl, size)
        return jnp.where(keep, x / jnp.asarray(1.0 - self.rate, x.dtype), jnp.zeros((), x.dtype))

    def dense(self) -> jax.Array:
        wl = tuple(range(self.ndim))
        (first, fl), *rest = self._named(wl, self.ndim, self.factors[0].array.dtype)
        dot = Dot(jax.lax.Precision.HIGHEST, first.dtype, None, None, ((), (), ()), lambda x, w: x)
        return chain(first, fl, rest, wl, dict(enumerate(self.shape)), dot)


@node("parts")
class Sum(Op):
    """`part + part + ...`."""

    parts: tuple[Expr, ...]
    shape: Shape

    def _each(self, fn: Callable[[Expr], Expr]) -> Expr:
        parts = tuple(fn(p) for p in self.parts)
        return Sum(parts, tuple(parts[0].shape))

    def permute(self, perm: Sequence[int]) -> Expr:
        return self._each(lambda p: permute(p, perm))

    def reshape(self, new: Shape) -> Expr:
        return self._each(lambda p: reshape(p, new))

    def along(self, axis: int, fn: AlongFn, new: Shape, carry: bool = False) -> Expr:
        return self._each(lambda p: along(p, axis, fn, new, carry))

    def map(self, fn: MapFn, shape: Shape | None = None) -> Expr:
        return self._each(lambda p: map_arrays(p, fn, shape))

    def scale(self, by: Any) -> Expr:
        return self._each(lambda p: scale(p, by))

    def contract(self, x: jax.Array, xl: Letters, wl: Letters, out: Letters, dot: Dot) -> jax.Array:
        first, *rest = (contract(p, x, xl, wl, out, dot) for p in self.parts)
        return functools.reduce(lambda y, z: y + compat.match_sharding(z, y), rest, first)

    def dense(self) -> jax.Array:
        parts = [materialise(p) for p in self.parts]
        dtype = widest(*(p.dtype for p in parts))
        return functools.reduce(jnp.add, (p.astype(dtype) for p in parts))


@node("of", "s")
class Scaled(Op):
    """`of * s`, s a factor without extras."""

    of: Expr
    s: Factor
    shape: Shape

    def _with(self, of: Expr, s: Factor) -> Scaled:
        return Scaled(of, s, tuple(of.shape))

    def permute(self, perm: Sequence[int]) -> Expr:
        return self._with(permute(self.of, perm), self.s.permute(perm))

    def reshape(self, new: Shape) -> Expr:
        free = tuple(d for d, live in enumerate(self.s.live) if not live)
        return self._with(reshape(self.of, new), self.s.reshape(self.shape, new, free))

    def along(self, axis: int, fn: AlongFn, new: Shape, carry: bool = False) -> Expr:
        return self._with(along(self.of, axis, fn, new, carry), self.s.along(axis, fn, new))

    def map(self, fn: MapFn, shape: Shape | None = None) -> Expr:
        return self._with(map_arrays(self.of, fn, shape), self.s.map(fn))

    def scale(self, by: Any) -> Expr:
        return self._with(scale(self.of, by), self.s)

    def contract(self, x: jax.Array, xl: Letters, wl: Letters, out: Letters, dot: Dot) -> jax.Array:
        s, sl = self.s.named(wl, {})
        sizes = sizes_of(x, xl, self.shape, wl)
        if all(c in out for c in sl):
            y = contract(self.of, x, xl, wl, out, dot)
            return y * spread(s.astype(y.dtype), sl, out)
        wide = (*xl, *(c for c in sl if c not in xl))
        if any(c not in xl for c in sl if c not in out):
            raise Unsupported("a scale over dims that the input lacks")
        x = arrange(x, xl, wide, sizes) * spread(s.astype(x.dtype), sl, wide)
        return contract(self.of, x, wide, wl, out, dot)

    def dense(self) -> jax.Array:
        of = materialise(self.of)
        dtype = widest(of.dtype, self.s.array.dtype)
        return of.astype(dtype) * self.s.array.astype(dtype)


def spread(s: jax.Array, sl: Letters, out: Letters) -> jax.Array:
    s = jnp.transpose(s, tuple(sl.index(c) for c in out if c in sl))
    return jnp.expand_dims(s, tuple(i for i, c in enumerate(out) if c not in sl))


def product(shape: Shape, *factors: tuple[jax.Array, Sequence[int | str]], rate: float = 0.0,
            key: tuple[jax.Array, Sequence[int | str]] | None = None) -> Product:
    """Make an additive term from `(array, layout)` pairs; see `factor` for layouts."""
    made = tuple(factor(a, tuple(layout), len(shape)) for a, layout in factors)
    return Product(made, None if key is None else factor(key[0], tuple(key[1]), len(shape)), tuple(shape), rate)


def add(*parts: Expr) -> Expr:
    """Sum of expressions of one shape; plain arrays first."""
    flat = [q for p in parts for q in (p.parts if isinstance(p, Sum) else (p,))]
    return Sum(tuple(flat), tuple(flat[0].shape))


def scaled(of: Expr, s: jax.Array, layout: Sequence[int]) -> Scaled:
    """`of * s`, with the axes of `s` laid along the leaf dims `layout`."""
    return Scaled(of, factor(s, tuple(layout), len(of.shape)), tuple(of.shape))
