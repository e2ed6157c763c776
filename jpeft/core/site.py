"""A site: all that a method may know of the leaf it rides on. Static, hashable, JSON both ways."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

Use = Literal["linear", "conv", "embedding", "tied", "bias", "scale", "other", "unused"]


def widest(*dtypes: Any) -> Any:
    """The dtype that holds values of all `dtypes`; 8-bit floats, which JAX does not promote, count as float32.

    Where JAX is limited to 32 bits, numpy's float64 is float32.
    """
    with jax.numpy_dtype_promotion("standard"):  # the promotion is asked for
        wide = functools.reduce(jnp.promote_types, (
            jnp.float32 if jnp.issubdtype(d, jnp.floating) and jnp.dtype(d).itemsize == 1 else d for d in dtypes))
    return jax.dtypes.canonicalize_dtype(wide)


@dataclasses.dataclass(frozen=True)
class Site:
    """One leaf of the base parameters and what the model does with it.

    Attributes:
        path: the leaf's path, keys joined by `/`.
        shape: the leaf's shape.
        dtype: the leaf's dtype, by name.
        use: `linear` (contraction weight), `conv`, `embedding` (row look-up), `tied` (look-up and contraction),
            `bias` (added), `scale` (multiplied, as in a norm), `other`, `unused`.
        in_dims: the dims that a contraction sums over (of an embedding: the vocabulary).
        out_dims: the dims that appear in the output.
        stack_dims: dims that hold independent copies: scanned layers, experts, batch dims of a contraction.
        rows: input rows contracted (or looked up) per call with the example arguments, loop trips counted.
        bias: path of the leaf that is added to the output of this leaf's contraction, if there is one.
        groups: feature groups of a convolution.
        consumers: the operations that read the leaf, as `primitive @ file:line`.
        problems: those of them that would need the whole adapted weight.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    use: Use
    in_dims: tuple[int, ...] = ()
    out_dims: tuple[int, ...] = ()
    stack_dims: tuple[int, ...] = ()
    rows: int = 0
    bias: str | None = None
    groups: int = 1
    consumers: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def in_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[d] for d in self.in_dims)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[d] for d in self.out_dims)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[d] for d in self.stack_dims)

    @property
    def in_size(self) -> int:
        """Inputs per unit: the contracted sizes multiplied."""
        return math.prod(self.in_shape)

    @property
    def out_size(self) -> int:
        """Outputs: the free sizes multiplied."""
        return math.prod(self.out_shape)

    @property
    def stack_size(self) -> int:
        return math.prod(self.stack_shape)

    @property
    def theta_dtype(self) -> Any:
        """float32, or float64 where the base is float64 or complex128."""
        if jnp.issubdtype(self.dtype, jnp.complexfloating):
            return widest(jnp.float32, jnp.finfo(self.dtype).dtype)
        return widest(jnp.float32, self.dtype) if jnp.issubdtype(self.dtype, jnp.floating) else jnp.float32

    def matrix(self, base: jax.Array) -> jax.Array:
        """View the leaf as `[*stack, in, out]`."""
        base = jnp.transpose(base, (*self.stack_dims, *self.in_dims, *self.out_dims))
        return jnp.reshape(base, (*self.stack_shape, self.in_size, self.out_size))

    def unmatrix(self, matrix: jax.Array) -> jax.Array:
        """Inverse of `matrix`: from `[*stack, in, out]` to the leaf's own layout."""
        order = (*self.stack_dims, *self.in_dims, *self.out_dims)
        full = jnp.reshape(matrix, tuple(self.shape[d] for d in order))
        return jnp.transpose(full, tuple(order.index(d) for d in range(len(order))))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Site:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**fields)
