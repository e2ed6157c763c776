"""Keys and values of past tokens: a fixed number of slots per layer, so that decoding compiles once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """What a decoder remembers; a pytree. Token number n of every row is in slot `n % slots`.

    Attributes:
        key: after rotary positions, `[L, B, slots, K, d]`.
        value: `[L, B, slots, K, d]`.
        mask: bool `[B, slots]`: which of the tokens are visible; padding is not.
        length: tokens so far, padding included, int32 scalar.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array
    length: jax.Array

    @property
    def slots(self) -> int:
        return int(self.key.shape[2])

    def numbers(self) -> jax.Array:
        """Return the number of the token in each slot, int32 `[slots]`; negative where there is none."""
        slot = jnp.arange(self.slots)
        return self.length - 1 - (self.length - 1 - slot) % self.slots

    def extend(self, key: jax.Array, value: jax.Array, mask: jax.Array) -> Cache:
        """Append T tokens.

        Args:
            key: `[L, B, T, K, d]`.
            value: `[L, B, T, K, d]`.
            mask: bool `[B, T]`.
        """
        slots, n = self.slots, key.shape[2]
        start = self.length + max(n - slots, 0)
        if n > slots:
            key, value, mask = key[:, :, n - slots:], value[:, :, n - slots:], mask[:, n - slots:]
        at = (start + jnp.arange(key.shape[2])) % slots

        def put(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            new = new.astype(old.dtype)
            if new.shape[axis] == 1:
                return jax.lax.dynamic_update_slice_in_dim(old, new, at[0], axis)
            where: tuple[Any, ...] = (slice(None),) * axis + (at,)
            return old.at[where].set(new, unique_indices=True)

        return Cache(put(self.key, key, 2), put(self.value, value, 2), put(self.mask, mask, 1), self.length + n)


def empty(layers: int, batch: int, capacity: int, heads: int, head_size: int, dtype: Any,
          window: int | None = None) -> Cache:
    """Make a cache without tokens.

    Args:
        layers: L.
        batch: B.
        capacity: tokens that fit.
        heads: K, heads of keys and values.
        head_size: d.
        dtype: of keys and values.
        window: tokens that every layer sees at most: older ones are overwritten (a ring); None: all are kept.

    Example:
        >>> cache = empty(2, 1, 100, 1, 4, jnp.float32, window=8)
        >>> cache.key.shape, cache.numbers().tolist()
        ((2, 1, 8, 1, 4), [-8, -7, -6, -5, -4, -3, -2, -1])
    """
    slots = capacity if window is None else min(capacity, window)
    key, value = (jnp.zeros((layers, batch, slots, heads, head_size), dtype) for _ in range(2))
    return Cache(key, value, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))
