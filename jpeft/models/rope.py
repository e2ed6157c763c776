"""Rotary positions (arXiv 2104.09864) and the ways of stretching them to longer contexts."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.errors import ModelConfigError, nearest

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """How queries and keys turn with their position.

    Attributes:
        theta: the longest wavelength is about `2 pi theta`.
        fraction: part of each head that turns, from its start.
        kind: one of `KINDS`.
        factor: how far the context is stretched (linear, dynamic, yarn, llama3).
        original: the context that the model was first trained on (yarn, longrope, llama3).
        magnitude: factor on sine and cosine (yarn, longrope).
        fast: rotations within `original` above which a frequency stays as it is (yarn).
        slow: rotations below which it is divided by `factor` (yarn).
        truncate: whether the borders between them are whole dims (yarn).
        low: `original / low` is the wavelength above which a frequency is divided by `factor` (llama3).
        high: `original / high` is the wavelength below which it stays as it is (llama3).
        short: divisors of the frequencies up to `original` tokens (longrope).
        long: divisors of the frequencies beyond (longrope).

    Raises:
        ModelConfigError: a value is out of its range, or not implemented.

    Example:
        >>> Rope(kind="linear", factor=4.0).frequencies(4).round(5).tolist()
        [0.25, 0.0024999999441206455]
    """

    theta: float = 10000.0
    fraction: float = 1.0
    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    magnitude: float = 1.0
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    low: float = 1.0
    high: float = 4.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ModelConfigError(f"rope type {self.kind!r} is not implemented, only {', '.join(KINDS)} "
                                   f"({nearest(self.kind, KINDS, 1)})")
        wrong = [f"{name} = {getattr(self, name)}, must be positive" for name in ("theta", "factor")
                 if not getattr(self, name) > 0]
        if not 0 < self.fraction <= 1:
            wrong.append(f"fraction = {self.fraction}, must be in (0, 1]")
        if self.kind in ("yarn", "longrope", "llama3") and self.original < 1:
            wrong.append(f"original = {self.original}, must be a positive number of tokens for {self.kind}")
        if self.kind == "longrope" and (not self.short or len(self.short) != len(self.long)):
            wrong.append(f"{len(self.short)} short and {len(self.long)} long factors, must be as many of each")
        if self.kind == "llama3" and self.low >= self.high:
            wrong.append(f"low = {self.low}, must be below high = {self.high}")
        if wrong:
            raise ModelConfigError(f"these rotary positions cannot be built: {'; '.join(wrong)}")

    def width(self, head_size: int) -> int:
        """Number of dims of a head that turn."""
        return 2 * ((int(head_size * self.fraction) + 1) // 2)

    def frequencies(self, head_size: int) -> np.ndarray:
        """Return the angle per position of each pair of dims, float32; those of short contexts where lengths differ."""
        dim = int(head_size * self.fraction)
        base = np.float32(1) / np.float32(self.theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
        if self.kind == "linear":
            return base / np.float32(self.factor)
        if self.kind == "yarn":
            return self._yarn(base, dim)
        if self.kind == "longrope":
            return base / self._divisors(self.short, base)
        return self._llama3(base) if self.kind == "llama3" else base

    def _divisors(self, given: tuple[float, ...], base: np.ndarray) -> np.ndarray:
        if len(given) != len(base):
            raise ModelConfigError(f"longrope has {len(given)} factors for {len(base)} rotary frequencies; give one "
                                   "for each")
        return np.asarray(given, np.float32)

    def _yarn(self, base: np.ndarray, dim: int) -> np.ndarray:
        """Keep high frequencies, divide low ones, a ramp over the dims between (arXiv 2309.00071)."""
        def place(rotations: float) -> float:
            return dim * math.log(self.original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        first, last = place(self.fast), place(self.slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        last = last + 0.001 if first == last else last
        ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - first) / (last - first), 0, 1).astype(np.float32)
        return base / np.float32(self.factor) * ramp + base * (1 - ramp)

    def _llama3(self, base: np.ndarray) -> np.ndarray:
        wave = 2 * math.pi / base
        mix = np.clip((self.original / wave - self.low) / (self.high - self.low), 0, 1).astype(np.float32)
        return (1 - mix) * base / np.float32(self.factor) + mix * base

    def tables(self, positions: jax.Array, head_size: int, trained: int) -> tuple[jax.Array, jax.Array]:
        """Return cosine and sine `[B, T, width / 2]` in float32.

        Args:
            positions: `[B, T]`.
            head_size: d.
            trained: tokens beyond which "dynamic" stretches.
        """
        rates: jax.Array | np.ndarray = self.frequencies(head_size)
        length = jnp.max(positions) + 1
        if self.kind == "dynamic":
            dim = int(head_size * self.fraction)
            grown = self.factor * jnp.maximum(length, trained).astype(jnp.float32) / trained - (self.factor - 1)
            theta = self.theta * grown ** (dim / (dim - 2))
            rates = 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
        elif self.kind == "longrope":
            base = dataclasses.replace(self, kind="default").frequencies(head_size)
            rates = jnp.where(length > self.original, base / self._divisors(self.long, base), rates)
        angles = positions[..., None].astype(jnp.float32) * rates
        return jnp.cos(angles) * self.magnitude, jnp.sin(angles) * self.magnitude


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the first `2 n` dims of each head of `x` `[B, T, H, d]`, dim i with dim i + n, by tables `[B, T, n]`.

    Example:
        >>> x = jnp.asarray([[[[1.0, 0.0, 5.0]]]])
        >>> rotate(x, jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))).tolist()
        [[[[0.0, 1.0, 5.0]]]]
    """
    n = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second, rest = x[..., :n], x[..., n:2 * n], x[..., 2 * n:]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], axis=-1)
