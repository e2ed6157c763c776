"""Prefix tuning: virtual tokens at the keys and values of every layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.core import maps
from jpeft.core.method import Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods.virtual import Virtual, overwrite


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Virtual):
    """Train keys and values of virtual tokens that every layer attends to.

    `K' = [P_K; K]` and `V' = [P_V; V]`: put it on the kernels of the key and of the value projection in every layer.
    The batch is padded on the left through `jpeft.Tokens`, the first V rows of each projection's output (after its
    bias) are replaced by P (`p`) `[*stack, V, *out]`, and the outputs of the virtual tokens are stripped: for the real
    tokens, in causal and in bidirectional attention, this equals attention to a prefix. What the model does to keys
    after the projection (rotary embedding, norm) it does to the prefix as well. It cannot be limited to some layers:
    the others would attend to the padding.

    With `prefix_projection`, P comes out of an encoder that is trained and saved with it:
    `P_l = tanh(e W_1 + b_1) W_2l + b_2l`, e `[V, n]`, W_1 (`w1`) `[n, h]`, `b1` `[h]`, W_2 (`w2`) `[*stack, h, *out]`,
    `b2` `[*stack, *out]`, n being the number of outputs. The encoder is shared by the layers of a scanned stack; the
    paper shares it between all layers and between keys and values.

    Args:
        length: V, the number of virtual tokens.
        init_weights: `random` (normal, deviation 0.02), `zero`, or `text`: what the projection makes of the first V
            tokens of a text, so that training starts from the model that has read it (exactly, if the model is causal).
            The text is the only row of the only batch of a `jpeft.Calibration` that `jpeft.init` is given.
        channels: `(start, stop)`: the output channels that are keys or values, of a fused kernel; None: all of them.
            P is then `[*stack, V, stop - start]`.
        prefix_projection: train the encoder; it starts as torch's layers do, e normal.
        encoder_hidden_size: h; None: the number of outputs.

    Raises:
        MethodConfigError: length below 1, channels outside the output, an unknown init, or an encoder that should make
            the prefix of a text.

    Source: arXiv 2101.00190; the start from a text 2506.06266.

    Example:
        >>> import jpeft
        >>> rules = {".*/(key|value)/kernel": jpeft.PrefixTuning(length=10)}
        >>> fused = {".*/c_attn/kernel": jpeft.PrefixTuning(length=10, channels=(768, 3 * 768))}
    """

    length: int = 20
    init_weights: str = "random"
    channels: tuple[int, int] | None = None
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "length * out"
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.channels, list):
            object.__setattr__(self, "channels", tuple(self.channels))
        self._check_fields(self.init_weights, ("random", "zero", "text"))
        if self.encoder_hidden_size is not None and (not self.prefix_projection or self.encoder_hidden_size < 1):
            raise MethodConfigError(f"{name}(encoder_hidden_size={self.encoder_hidden_size}, prefix_projection="
                                    f"{self.prefix_projection}) has no such encoder; give a positive size, and "
                                    "prefix_projection=True")
        if self.prefix_projection:
            if self.init_weights == "text":
                raise MethodConfigError(f"{name}(init_weights='text', prefix_projection=True) has a prefix that comes "
                                        "out of the encoder; use init_weights='random' or 'zero'")
            object.__setattr__(self, "recommended_lr", 1e-3)
            object.__setattr__(self, "formula", "(h + 1) * out + [length * out + h * (out + 1)]")

    def check(self, site: Site) -> None:
        if self.channels is not None and not 0 <= self.channels[0] < self.channels[1] <= site.out_size:
            raise MethodConfigError(f"{type(self).__name__}(channels={self.channels}) lie outside the {site.out_size} "
                                    f"outputs of {site.path!r}; give (start, stop), 0 <= start < stop <= "
                                    f"{site.out_size}")

    def _shape(self, site: Site) -> tuple[int, ...]:
        return site.out_shape if self.channels is None else (self.channels[1] - self.channels[0],)

    def _encoder(self, site: Site) -> tuple[int, int]:
        """Outputs n and hidden units h of the encoder."""
        n = math.prod(self._shape(site))
        return n, n if self.encoder_hidden_size is None else self.encoder_hidden_size

    def numbers(self, site: Site) -> dict[str, int]:
        n, h = self._encoder(site)
        return {"out": n, "h": h}

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        stack, own, dtype = site.stack_shape, self._shape(site), site.theta_dtype
        shape = (*stack, self.length, *own)
        if not self.prefix_projection:
            start = 0.02 * jax.random.normal(key, shape, dtype) if self.init_weights == "random" else \
                jnp.zeros(shape, dtype)
            return {"p": start}, {}
        n, h = self._encoder(site)
        keys = jax.random.split(key, 5)
        shapes = {"w1": ((n, h), n), "b1": ((h,), n), "w2": ((*stack, h, *own), h), "b2": ((*stack, *own), h)}
        theta = {letter: jax.random.uniform(k, size, dtype, -fan**-0.5, fan**-0.5)
                 for k, (letter, (size, fan)) in zip(keys[1:], shapes.items(), strict=True)}
        if self.init_weights == "zero":
            theta |= {letter: jnp.zeros_like(theta[letter]) for letter in ("w2", "b2")}
        return {"e": jax.random.normal(keys[0], (self.length, n), dtype), **theta}, {}

    @property
    def calibration(self) -> frozenset[str]:
        return frozenset({"outputs"} if self.init_weights == "text" else ())

    def calibrate(self, key: jax.Array, site: Site, base: jax.Array, start: tuple[Theta, Theta],
                  data: dict[str, jax.Array]) -> tuple[Theta, Theta]:
        trainable, frozen = start
        seen = data["outputs"] if self.channels is None else data["outputs"][..., slice(*self.channels)]
        p = trainable["p"]
        return {**trainable, "p": jnp.reshape(seen, p.shape).astype(p.dtype)}, frozen

    def prefix(self, site: Site, theta: Theta) -> jax.Array:
        """Return P, `[*stack, V, *out]`: what the virtual tokens have in the place of the projection's output."""
        if not self.prefix_projection:
            return theta["p"]
        stack, own = theta["w2"].shape[:len(site.stack_shape)], self._shape(site)
        hidden = jnp.tanh(jnp.matmul(theta["e"], theta["w1"], precision=lax.Precision.HIGHEST) + theta["b1"])
        last = jnp.reshape(theta["w2"], (*stack, hidden.shape[-1], -1))
        rows = jnp.matmul(hidden, last, precision=lax.Precision.HIGHEST)
        return jnp.reshape(rows, (*stack, self.length, *own)) + jnp.expand_dims(theta["b2"], len(stack))

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        return maps.hooked(base, {"p": self.prefix(site, theta)}, maps.Hook(self, site), site.stack_dims)

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        p = jnp.reshape(theta["p"], (self.length, math.prod(self._shape(site))))
        return overwrite(y, p, start, 0 if self.channels is None else self.channels[0])

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        stack, out = site.stack_dims, site.out_dims if self.channels is None else (None,)
        p = (*stack, None, *out)
        return {"p": p, "e": (None, None), "w1": (None, None), "b1": (None,), "w2": p, "b2": (*stack, *out)}

    def flops(self, site: Site) -> tuple[int, int]:
        n, h = self._encoder(site)
        return 0, 2 * self.length * n * h * (1 + site.stack_size) if self.prefix_projection else 0
