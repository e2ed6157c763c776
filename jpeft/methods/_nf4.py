"""NF4: 4-bit codes for values that are normally distributed, 64 to a scale (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64
# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero: appendix E of the paper.
VALUES = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the codes of `x` `[*stack, n]`, two to a byte, and the largest absolute value of each block.

    Returns:
        `[*stack, blocks, 32]` (uint8) and `[*stack, blocks]`, `blocks = ceil(n / 64)`.

    Example:
        >>> import jax.numpy as jnp
        >>> codes, largest = quantise(jnp.asarray([0.5, -0.5, 0.0]))
        >>> codes.shape, dequantise(codes, largest, 3).tolist()
        ((1, 32), [0.5, -0.5, 0.0])
    """
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)])
    x = jnp.reshape(x, (*x.shape[:-1], -1, BLOCK))
    largest = jnp.max(jnp.abs(x), -1)
    scaled = x / jnp.where(largest > 0, largest, 1)[..., None]
    between = jnp.asarray((VALUES[1:] + VALUES[:-1]) / 2, x.dtype)
    codes = jnp.sum(scaled[..., None] > between, -1, dtype=jnp.uint8)
    return codes[..., ::2] * jnp.uint8(16) + codes[..., 1::2], largest


def dequantise(codes: jax.Array, largest: jax.Array, n: int) -> jax.Array:
    """Inverse of `quantise`, up to rounding: `[*stack, n]`."""
    pairs = jnp.stack((codes // jnp.uint8(16), codes % jnp.uint8(16)), -1)
    x = jnp.asarray(VALUES, largest.dtype)[pairs.astype(jnp.int32)]
    x = jnp.reshape(x, (*codes.shape[:-1], BLOCK)) * largest[..., None]
    return jnp.reshape(x, (*x.shape[:-2], -1))[..., :n]
