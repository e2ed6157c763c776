"""The table's row: a tiny model of somebody, the rules put on it, and what must come out."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jpeft

B, T, D, F, V = 2, 6, 8, 12, 11
Made = tuple[Callable[..., Any], Any, tuple[Any, ...]]
Make = Callable[[Any], Made]
LORA = jpeft.LoRA(rank=2, alpha=4)
LINEAR: Mapping[str, Any] = {"all-linear": LORA}
BOTH = ("float64", "float32")  # float32 too, where a compile costs little


class Dims(NamedTuple):
    """What inspection must say of a leaf; None: not stated."""

    ins: tuple[int, ...] | None
    outs: tuple[int, ...] | None
    stack: tuple[int, ...] | None = ()
    use: str | None = "linear"


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One model.

    Attributes:
        name: `folder-function`.
        make: from a dtype to `(apply, params, args)`.
        rules: the plan's rules.
        n_adapted: number of leaves that the rules must adapt.
        expect: dims and use of telling leaves.
        error: name of the error that planning or calling must raise instead.
        words: what the error's message must contain.
        dtypes: dtypes to run in.
        tol: bound on outputs and gradients, where the computation is coarser than the dtype.
        reverse: reverse-mode differentiation exists; otherwise forward mode is compared.
        still: patterns of the leaves whose gradient must be zero.
        context: entered around everything (a mesh).
    """

    name: str
    make: Make
    rules: Mapping[Any, Any] = dataclasses.field(default_factory=lambda: LINEAR)
    n_adapted: int = 1
    expect: Mapping[str, Dims] = dataclasses.field(default_factory=dict)
    error: str | None = None
    words: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float64",)
    tol: float | None = None
    reverse: bool = True
    still: tuple[str, ...] = ()
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def table(prefix: str) -> tuple[list[Case], Callable[..., Callable[[Make], Make]]]:
    """Return an empty table and the decorator that adds a `make` function to it as a case."""
    cases: list[Case] = []

    def case(n_adapted: int = 1, **fields: Any) -> Callable[[Make], Make]:
        def add(make: Make) -> Make:
            cases.append(Case(f"{prefix}-{make.__name__}", make, n_adapted=n_adapted, **fields))
            return make

        return add

    return cases, case


def lora(*patterns: str) -> dict[str, Any]:
    return dict.fromkeys(patterns, LORA)


def numbers(name: str, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    """Return `scale * normal`, seeded by the name."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return jnp.asarray((scale * rng.standard_normal(shape)).astype(dtype))


def weights(dtype: Any, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    return {name: numbers(name, shape, dtype, 0.4) for name, shape in shapes.items()}


def data(dtype: Any, *shape: int) -> jax.Array:
    return numbers("x", shape or (B, T, D), dtype)


def tokens(*shape: int, below: int = V) -> jax.Array:
    rng = np.random.RandomState(1)
    return jnp.asarray(rng.randint(0, below, size=shape or (B, T)), jnp.int32)


def fill(shapes: Any) -> Any:
    """Turn a pytree of shapes into values, without compiling an initialiser. Variances stay positive."""

    def one(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.reshape(jax.random.split(jax.random.key(0), max(1, leaf.size)), leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        value = numbers(name, leaf.shape, np.float64, 0.4)
        shift = 1.0 if "scale" in name or "var" in name else 0.0
        return jnp.asarray(np.asarray(abs(value) + shift if shift else value), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return softmax(q k^T / sqrt(d)) v for `[..., T, d]`."""
    scores = jnp.einsum("...td,...sd->...ts", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("...ts,...sd->...td", jax.nn.softmax(scores), v)
