"""P-Tuning: virtual tokens that come out of a small trained encoder."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.core.method import Theta
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods.virtual import PromptTuning, overwrite

DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class PTuning(PromptTuning):
    """Train the embeddings of virtual tokens as the output of an encoder, which is trained and saved with them.

    `E([v_1 .. v_V, x]) = [f(e); E(x)]`, e `[V, out]`. With `encoder="MLP"`, f is three linear layers
    `out -> h -> h -> out` with relu between them (`w1`, `b1`, .., `b3`). With `encoder="LSTM"`, a bidirectional LSTM of
    `num_layers` layers runs over the tokens (for layer i: `forward_i_x` `[.., 4 h]`, `forward_i_h` `[h, 4 h]`,
    `forward_i_b` `[4 h]`, `backward_i_..`; gates in the order input, forget, cell, output) and two linear layers
    `2 h -> 2 h -> out` follow (`w1` .. `b2`). The batch is padded as in `PromptTuning`; encoders start as torch's
    layers do, e normal.

    Args:
        length: V, the number of virtual tokens.
        encoder: `MLP` or `LSTM`.
        hidden_size: h; None: the size of the embedding.
        num_layers: layers of the LSTM.

    Raises:
        MethodConfigError: a size below 1, or an unknown encoder.

    Source: arXiv 2103.10385.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply = lambda p, ids: p["embed"][ids]
        >>> params, ids = {"embed": jnp.ones((20, 4))}, jnp.zeros((2, 6), int)
        >>> rules = {"embed": jpeft.PTuning(length=3, hidden_size=2)}
        >>> jpeft.plan(apply, params, (ids,), rules, tokens=jpeft.Tokens(ids=0)).count()
        40
    """

    encoder: str = "MLP"
    hidden_size: int | None = None
    num_layers: int = 2

    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "length * out + h * (2 * out + h + 2) + out"
    peft_type: ClassVar[str | None] = "P_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ("MLP", "LSTM"):
            raise MethodConfigError(f"PTuning(encoder={self.encoder!r}) is unknown; use 'MLP' or 'LSTM'")
        if self.num_layers < 1 or (self.hidden_size is not None and self.hidden_size < 1):
            raise MethodConfigError(f"PTuning(hidden_size={self.hidden_size}, num_layers={self.num_layers}) has no "
                                    "units; both must be positive")
        if self.init_weights != "random":
            raise MethodConfigError(f"PTuning(init_weights={self.init_weights!r}) is unknown; its tokens come out of "
                                    "the encoder, use 'random'")

    def _hidden(self, site: Site) -> int:
        return site.out_size if self.hidden_size is None else self.hidden_size

    def _linear(self, site: Site) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers."""
        d, h = site.out_size, self._hidden(site)
        return [(d, h), (h, h), (h, d)] if self.encoder == "MLP" else [(2 * h, 2 * h), (2 * h, d)]

    def _recurrent(self, site: Site) -> list[tuple[str, int]]:
        """Name and input size of each direction of each layer of the LSTM."""
        h, layers = self._hidden(site), range(self.num_layers) if self.encoder == "LSTM" else ()
        return [(f"{way}_{i}", 2 * h if i else site.out_size) for i in layers for way in DIRECTIONS]

    def numbers(self, site: Site) -> dict[str, int]:
        return {"h": self._hidden(site)}

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        h, dtype = self._hidden(site), site.theta_dtype
        shapes: dict[str, tuple[tuple[int, ...], int]] = {}
        for i, (n, m) in enumerate(self._linear(site), 1):
            shapes |= {f"w{i}": ((n, m), n), f"b{i}": ((m,), n)}
        for name, n in self._recurrent(site):
            shapes |= {f"{name}_x": ((n, 4 * h), h), f"{name}_h": ((h, 4 * h), h), f"{name}_b": ((4 * h,), h)}
        theta = {"e": jax.random.normal(key, (self.length, site.out_size), dtype)}
        for i, (letter, (shape, n)) in enumerate(shapes.items()):
            bound = 1.0 / math.sqrt(n)
            theta[letter] = jax.random.uniform(jax.random.fold_in(key, i), shape, dtype, -bound, bound)
        return theta, {}

    def prompt(self, site: Site, theta: Theta) -> jax.Array:
        """The virtual tokens, `[V, out]`."""
        x = theta["e"]
        names = [name for name, _ in self._recurrent(site)]
        for forward, backward in zip(names[::2], names[1::2], strict=True):
            x = jnp.concatenate([_lstm(theta, forward, x), _lstm(theta, backward, x, reverse=True)], -1)
        last = len(self._linear(site))
        for i in range(1, last + 1):
            x = jnp.matmul(x, theta[f"w{i}"], precision=lax.Precision.HIGHEST) + theta[f"b{i}"]
            x = x if i == last else jax.nn.relu(x)
        return x

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        return y if y.shape[-1] != site.out_size else overwrite(y, self.prompt(site, theta), start)

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        found: dict[str, tuple[int | None, ...]] = {"e": (None, site.out_dims[0] if len(site.out_dims) == 1 else None)}
        for i in range(1, len(self._linear(site)) + 1):
            found |= {f"w{i}": (None, None), f"b{i}": (None,)}
        for name, _ in self._recurrent(site):
            found |= {f"{name}_x": (None, None), f"{name}_h": (None, None), f"{name}_b": (None,)}
        return found

    def flops(self, site: Site) -> tuple[int, int]:
        h = self._hidden(site)
        products = sum(n * m for n, m in self._linear(site)) + sum((n + h) * 4 * h for _, n in self._recurrent(site))
        return 0, 2 * self.length * products


def _lstm(theta: Theta, name: str, x: jax.Array, reverse: bool = False) -> jax.Array:
    """One direction of a layer: `[V, in]` to `[V, h]`."""
    w = theta[f"{name}_h"]
    fed = jnp.matmul(x, theta[f"{name}_x"], precision=lax.Precision.HIGHEST) + theta[f"{name}_b"]

    def step(state: tuple[jax.Array, jax.Array], row: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        h, cell = state
        i, f, g, o = jnp.split(row + jnp.matmul(h[None], w, precision=lax.Precision.HIGHEST)[0], 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (h, cell), h

    zero = jnp.zeros_like(fed[0, : len(w)])
    return lax.scan(step, (zero, zero), fed, reverse=reverse)[1]
