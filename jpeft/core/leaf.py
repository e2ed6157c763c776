"""The values that flow through the interpreter beside plain arrays: tracked leaves and outputs that await a hook."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import compat, ops
from jpeft.core.factor import AlongFn, Factor, Unsupported, reshape_groups
from jpeft.core.maps import Hooked, follow
from jpeft.errors import UnsupportedUse

Dims = tuple[frozenset[int], ...]
NONE: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Origin:
    """A parameter leaf, and for each dim of the present view the dims of the leaf that it comes from."""

    path: str
    dims: Dims


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A gather of rows: the leaf's own dims that were indexed, per origin; how many rows; which equation."""

    dims: tuple[frozenset[int], ...]
    rows: int
    key: tuple[int, ...]
    where: str


def _regroup(dims: Dims, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    result = [NONE] * len(new)
    for a, b in reshape_groups(old, new):
        wide = [d for d in a if old[d] > 1] or list(a)
        target = [d for d in b if new[d] > 1] or list(b)
        if len(wide) == len(target) == 1:
            result[target[0]] = dims[wide[0]]
        else:
            for d in target:
                result[d] = frozenset().union(*(dims[w] for w in wide)) if wide else NONE
    return tuple(result)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["op"], meta_fields=["origins", "dtype", "lookup"])
@dataclasses.dataclass(frozen=True)
class Leaf:
    """A view of one parameter leaf (or of several, concatenated): an expression and where it comes from.

    `lookup` is set once rows have been gathered by an array of indices: what is then not contracted as a weight is an
    activation, and may be formed.
    """

    op: Any
    origins: tuple[Origin, ...]
    dtype: Any
    lookup: Lookup | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.op.shape)

    @property
    def ndim(self) -> int:
        return len(self.op.shape)

    @property
    def adapted(self) -> bool:
        return isinstance(self.op, ops.Op)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(o.path for o in self.origins)

    def _with(self, op: Any, dims: Callable[[Dims], Dims]) -> Leaf:
        return Leaf(op, tuple(Origin(o.path, dims(o.dims)) for o in self.origins), self.dtype, self.lookup)

    def permute(self, perm: Sequence[int]) -> Leaf:
        return self._with(ops.permute(self.op, perm), lambda d: tuple(d[p] for p in perm))

    def reshape(self, new: Sequence[int]) -> Leaf:
        old, new = self.shape, tuple(new)
        return self if old == new else self._with(ops.reshape(self.op, new), lambda d: _regroup(d, old, new))

    def along(self, axis: int, fn: AlongFn, new: Sequence[int], carry: bool = False) -> Leaf:
        new = tuple(new)
        return self._with(ops.along(self.op, axis, fn, new, carry),
                          lambda d: (*d[:axis], *(d[axis],) * len(new), *d[axis + 1:]))

    def map(self, fn: ops.MapFn, shape: tuple[int, ...] | None = None) -> Leaf:
        return dataclasses.replace(self, op=ops.map_arrays(self.op, fn, shape))

    def scale(self, by: Any) -> Leaf:
        return dataclasses.replace(self, op=ops.scale(self.op, by))

    def cast(self, dtype: Any) -> Leaf:
        return dataclasses.replace(self, op=ops.cast(self.op, dtype), dtype=jnp.dtype(dtype))

    def dense(self) -> jax.Array:
        return ops.materialise(self.op).astype(self.dtype) if self.adapted else self.op

    def fold(self, number: Any) -> Leaf:
        """Fold a number into every dropout key of the expression."""
        return dataclasses.replace(self, op=fold_keys(self.op, number)) if self.adapted else self

    @property
    def keyed(self) -> bool:
        """True if the expression holds a dropout key."""
        found = jax.tree_util.tree_leaves(self.op, is_leaf=_is_product)
        return any(_is_product(p) and p.key is not None for p in found)


def _is_product(x: Any) -> bool:
    return isinstance(x, ops.Product)


def fold_keys(e: Any, number: Any) -> Any:
    """Fold `number` into the key data of every product of an expression."""
    def one(p: Any) -> Any:
        if not _is_product(p) or p.key is None:
            return p
        data = p.key.array
        flat = jnp.reshape(data, (-1, data.shape[-1]))
        new = jax.vmap(lambda d: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(d), number)))(flat)
        return dataclasses.replace(p, key=dataclasses.replace(p.key, array=jnp.reshape(new, data.shape)))

    return jax.tree_util.tree_map(one, e, is_leaf=_is_product)


def unhook(e: Any) -> tuple[Any, tuple[Hooked, ...]]:
    """Split an expression into its value and its hooks, innermost first."""
    if not isinstance(e, Hooked):
        return e, ()
    of, hooks = unhook(e.of)
    return of, (*hooks, e)


@dataclasses.dataclass
class Pending:
    """The output of a contraction: hooks wait until the bias is added; in analysis it waits to see the bias.

    Attributes:
        y: the output so far.
        paths: the leaves contracted.
        hooks: `(function, {letter: array})`, to be applied to `[..., out]`.
        features: the axes of `y` that are the leaf's out dims, in order.
        token: the axis of `y` that runs over tokens, or None where unknown.
        bias: path of the bias that is to be added first, or None.
        inputs: for each hook, the input that it asks for, `[*y's other axes, in]`, or None.
        where: the operation, for messages.
    """

    y: Any
    paths: tuple[str, ...]
    hooks: tuple[tuple[Any, dict[str, jax.Array]], ...]
    features: tuple[int, ...]
    token: int | None
    bias: str | None
    inputs: tuple[Any, ...] = ()
    where: str = ""
    done: Any = None

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes of `y` that are no features."""
        return tuple(d for d in range(self.y.ndim) if d not in self.features)

    @property
    def late(self) -> bool:
        """Whether a hook waits for the residual stream."""
        return any(fn.method.after_residual for fn, _ in self.hooks)

    def permute(self, perm: Sequence[int], y: Any) -> Pending:
        at = tuple(perm).index
        rows = [at(d) for d in self.rows]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        inputs = tuple(x if x is None else jnp.transpose(x, (*order, x.ndim - 1)) for x in self.inputs)
        return dataclasses.replace(self, y=y, features=tuple(map(at, self.features)), inputs=inputs,
                                   token=None if self.token is None else at(self.token), done=None)

    def reshape(self, y: Any) -> Pending:
        old, new = tuple(self.y.shape), tuple(y.shape)
        token = None
        if self.token is not None:
            kept = follow((self.token,), old, new)
            token = next((d for d in kept if new[d] == old[self.token]), None)
        result = dataclasses.replace(self, y=y, features=follow(self.features, old, new), token=token, done=None)
        rows = tuple(new[d] for d in result.rows)
        inputs = tuple(x if x is None else jnp.reshape(x, (*rows, x.shape[-1])) for x in self.inputs)
        return dataclasses.replace(result, inputs=inputs)

    def settle(self) -> Any:
        """The bias is in: run the hooks, but for those that wait for the residual stream."""
        if not self.late:
            return self.flush()
        n = next(i for i, (fn, _) in enumerate(self.hooks) if fn.method.after_residual)
        first = dataclasses.replace(self, hooks=self.hooks[:n], inputs=self.inputs[:n], bias=None, done=None)
        return dataclasses.replace(self, y=first.flush(), hooks=self.hooks[n:], inputs=self.inputs[n:], bias=None,
                                   done=None)

    def join(self, add: Callable[[Any], Any]) -> Any:
        """`add` the settled output to the residual stream, and run the hooks that waited for it."""
        last = self.settle()
        return dataclasses.replace(last, y=add(last.y)).run()

    def flush(self) -> Any:
        """Apply the hooks, once.

        Raises:
            UnsupportedUse: one of them waits for the residual stream.
        """
        if self.late:
            raise UnsupportedUse(f"{self.where}: the output of {self.paths[0]!r} is not added to a residual stream of "
                                 "its shape, but its method changes that; put it on the last projection of a "
                                 "sublayer, or use residual=False")
        return self.run()

    def run(self) -> Any:
        """Apply all hooks to `y` as it is, once."""
        if not self.hooks:
            return self.y
        if self.done is None:
            y = self.y
            tail = (self.token, *self.features) if self.token is not None else self.features
            order = (*(d for d in range(y.ndim) if d not in tail), *tail)
            moved = jnp.transpose(y, order)
            lead = moved.ndim - len(self.features)
            flat = jnp.reshape(moved, (*moved.shape[:lead], -1))
            rows = self.rows
            turn = [rows.index(d) for d in order if d in rows]
            for (fn, theta), x in zip(self.hooks, self.inputs or (None,) * len(self.hooks), strict=True):
                theta = theta if x is None else {**theta, "x": jnp.transpose(x, (*turn, x.ndim - 1))}
                flat = fn(theta, flat).astype(y.dtype)
            moved = jnp.reshape(flat, moved.shape)
            self.done = compat.match_sharding(jnp.transpose(moved, tuple(order.index(d) for d in range(y.ndim))), y)
        return self.done


def hook_theta(hook: Hooked) -> dict[str, jax.Array]:
    """Theta of one hook, once every stack dim of the leaf is indexed away."""
    def take(f: Factor) -> jax.Array:
        if any(f.live):
            raise Unsupported("an output hook where one operation contracts several copies of the leaf")
        return jnp.reshape(f.array, f.array.shape[f.ndim:])

    return {k: take(f) for k, f in hook.theta.items()}
