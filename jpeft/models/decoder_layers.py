"""The layers of a decoder, and what the scan over them hands to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jpeft.core.sharding import divide_rows
from jpeft.models.cache import Cache
from jpeft.models.decoder_config import DecoderConfig
from jpeft.models.layers import ACTIVATIONS, Part, RmsNorm, attend
from jpeft.models.moe import Experts
from jpeft.models.rope import rotate

Masks = tuple[jax.Array, ...]
Past = tuple[jax.Array, jax.Array]


class Here(NamedTuple):
    """What is different in each layer, stacked `[L, ...]`; None: nothing is.

    Attributes:
        local: whether the layer has the window.
        rotated: whether it has rotary positions.
        scale: of its attention scores.
        before: keys and values `[B, S, K, d]` of earlier tokens, as `(key, value)` of the past and of the cache.
        prefix: keys and values `[B or 1, P, K, d]` that stand before the first token, as the projections make them.
    """

    local: jax.Array | None
    rotated: jax.Array | None
    scale: jax.Array | None
    before: tuple[Past, ...]
    prefix: Past | None = None


class Shared(NamedTuple):
    """What is the same in all layers.

    Attributes:
        masks: for each part of the keys, without the window; None: plain causal attention among the tokens.
        local_masks: with it.
        tables: cosine and sine of the rotary positions `[B, T, n]`.
        local_tables: those of the layers with the window.
        prefix_tables: as `tables` and `local_tables`, of the prefix `[1, P, n]`.
    """

    masks: Masks | None
    local_masks: Masks | None
    tables: Past | None
    local_tables: Past | None
    prefix_tables: tuple[Past | None, Past | None] = (None, None)


class Block(nn.Module):
    """A module that knows the configuration, the dtype of compute, and whether it drops."""

    config: DecoderConfig
    dtype: Any = None
    train: bool = False

    @property
    def start(self) -> Any:
        return nn.initializers.normal(self.config.initializer_range)

    def dense(self, features: int | tuple[int, ...], name: str, bias: bool,
              axis: int | tuple[int, ...] = -1) -> nn.DenseGeneral:
        return nn.DenseGeneral(features, axis, use_bias=bias, dtype=self.dtype, kernel_init=self.start, name=name)

    def table(self, rows: int, name: str) -> nn.Embed:
        return nn.Embed(rows, self.config.hidden_size, dtype=self.dtype, embedding_init=self.start, name=name)

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        c = self.config
        if c.norm == "rms":
            return RmsNorm(c.norm_eps, c.norm_centred, self.dtype, name=name)(x)
        return nn.LayerNorm(epsilon=c.norm_eps, dtype=self.dtype, use_fast_variance=False, name=name)(x)

    def drop(self, x: jax.Array, rate: float) -> jax.Array:
        return nn.Dropout(rate, deterministic=not self.train)(x)


class Attention(Block):
    """Causal self-attention without the residual, `[B, T, D] -> [B, T, D]`, and the new keys and values."""

    @nn.compact
    def __call__(self, x: jax.Array, here: Here, shared: Shared) -> tuple[jax.Array, Past]:
        c = self.config
        (query, key, value), *learned = self._projections(x, *self._prompt())
        first: Sequence[jax.Array] = () if here.prefix is None else (here.prefix[0],)
        if c.qk_norm != "none":
            query, = self._normed("query_norm", query)
            key, *first = self._normed("key_norm", key, *first)
        tables = self._tables(here, shared.tables, shared.local_tables)
        if tables is not None:
            query, key = rotate(query, *tables), rotate(key, *tables)
        if here.prefix is not None:
            tables = self._tables(here, *shared.prefix_tables)
            pair = (first[0] if tables is None else rotate(first[0], *tables), here.prefix[1])
            wide = tuple(jnp.broadcast_to(p, (len(x), *p.shape[1:])) for p in pair)
            here = here._replace(before=(cast(Past, wide), *here.before))
        query, key, value = (checkpoint_name(one, name) for one, name in
                             ((query, "query"), (key, "key"), (value, "value")))
        mixed = self._mix(query, key, value, here, shared)
        for _, *said in learned:
            mixed = mixed + self._gated(query, said, here)
        mixed = checkpoint_name(mixed, "attention_mix")
        return self.dense(c.hidden_size, "out", c.out_bias, axis=(-2, -1))(mixed), (key, value)

    def _projections(self, *xs: jax.Array) -> list[Sequence[jax.Array]]:
        """Return the query, key and value of each input."""
        c = self.config
        h, k, d = c.heads, c.kv_heads, c.head_size
        if c.fused_qkv == "none":
            own = [self.dense((n, d), name, c.qkv_bias) for n, name in ((h, "query"), (k, "key"), (k, "value"))]
            return [[one(x) for one in own] for x in xs]
        if c.fused_qkv == "blocks":
            whole = self.dense((h + 2 * k, d), "qkv", c.qkv_bias)
            return [jnp.split(whole(x), (h, h + k), axis=-2) for x in xs]
        shape, axis = ((h, 3, d), -2) if c.fused_qkv == "heads" else ((3, h, d), -3)
        whole = self.dense(shape, "qkv", c.qkv_bias)
        return [[jnp.squeeze(one, axis) for one in jnp.split(whole(x), 3, axis)] for x in xs]

    def _prompt(self) -> list[jax.Array]:
        """Return the learned tokens `[1, P, D]`, if there are any."""
        c = self.config
        if not c.adapter_length:
            return []
        prompt = self.param("adapter_prompt", nn.initializers.ones, (c.adapter_length, c.hidden_size), jnp.float32)
        return [jnp.asarray(prompt, self.dtype)[None]]

    def _gated(self, query: jax.Array, pair: Sequence[jax.Array], here: Here) -> jax.Array:
        """`tanh(g) softmax(q K_P^T) V_P`, one g per head: what the learned tokens say, `[B, T, H, d]`."""
        c = self.config
        gate = jnp.tanh(self.param("adapter_gate", nn.initializers.zeros, (c.heads,), jnp.float32))
        key, value = (jnp.broadcast_to(p.astype(query.dtype), (len(query), *p.shape[1:])) for p in pair)
        said = attend(query, [Part(key, value)], scale=c.scale if here.scale is None else here.scale,
                      cap=c.attention_cap)
        return gate.astype(said.dtype)[:, None] * said

    def _normed(self, name: str, *xs: jax.Array) -> list[jax.Array]:
        norm = RmsNorm(self.config.norm_eps, self.config.norm_centred, self.dtype, name=name)
        if self.config.qk_norm == "head":
            return [norm(x) for x in xs]
        return [norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape) for x in xs]

    def _tables(self, here: Here, wide: Past | None, local: Past | None) -> Past | None:
        if wide is None:
            return None
        cos, sin = wide
        if local is not None and here.local is not None:
            cos, sin = (jnp.where(here.local, a, b) for a, b in zip(local, (cos, sin), strict=True))
        if here.rotated is not None:
            cos, sin = jnp.where(here.rotated, cos, 1.0), jnp.where(here.rotated, sin, 0.0)
        return cos, sin

    def _mix(self, query: jax.Array, key: jax.Array, value: jax.Array, here: Here, shared: Shared) -> jax.Array:
        c = self.config
        masks = shared.masks
        if masks is not None and shared.local_masks is not None and here.local is not None:
            masks = tuple(jnp.where(here.local, b, a) for a, b in zip(masks, shared.local_masks, strict=True))
        pairs = (*here.before, (key, value))
        parts = [Part(k.astype(key.dtype), v.astype(value.dtype), None if masks is None else masks[i])
                 for i, (k, v) in enumerate(pairs)]
        rng = self.make_rng("dropout") if self.train and c.attention_dropout else None
        return attend(query, parts, scale=c.scale if here.scale is None else here.scale, cap=c.attention_cap,
                      causal=masks is None, window=c.ring, dropout=c.attention_dropout, rng=rng)


class Mlp(Block):
    """The feed-forward half without the residual, `[B, T, D] -> [B, T, D]`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, act = self.config, ACTIVATIONS[self.config.activation]
        if c.fused_mlp:
            both = self.dense((2, c.mlp_size), "gate_up", c.mlp_bias)(x)
            inner = act(both[..., 0, :]) * both[..., 1, :]
        elif c.gated:
            inner = act(self.dense(c.mlp_size, "gate", c.mlp_bias)(x)) * self.dense(c.mlp_size, "up", c.mlp_bias)(x)
        else:
            inner = act(self.dense(c.mlp_size, "up", c.mlp_bias)(x))
        return self.dense(c.hidden_size, "down", c.mlp_bias)(checkpoint_name(inner, "mlp_inner"))


class Layer(Block):
    """One layer; the body of the scan. Its second output are its keys and values."""

    @nn.compact
    def __call__(self, x: jax.Array, here: Here, shared: Shared) -> tuple[jax.Array, Past]:
        c, x = self.config, divide_rows(x)
        before, after = c.norm_at in ("before", "both"), c.norm_at in ("after", "both")
        mixed, pair = Attention(c, self.dtype, self.train, name="attention")(
            self.norm(x, "attention_norm") if before else x, here, shared)
        mixed = checkpoint_name(mixed, "attention_out")
        mixed = self.drop(self.norm(mixed, "attention_post_norm") if after else mixed, c.dropout)
        middle = x if c.parallel else x + mixed
        inner = checkpoint_name(self._mlp()(self.norm(middle, "mlp_norm") if before else middle), "mlp_out")
        inner = self.drop(self.norm(inner, "mlp_post_norm") if after else inner, c.dropout)
        return (x + mixed if c.parallel else middle) + inner, pair

    def _mlp(self) -> Callable[[jax.Array], jax.Array]:
        c = self.config
        if c.experts:
            return Experts(c.experts, c.experts_chosen, c.mlp_size, c.activation, c.experts_renormalise, self.start,
                           self.dtype, name="moe")
        return Mlp(c, self.dtype, self.train, name="mlp")


def here(c: DecoderConfig, cache: Cache | None, past: Past | None, prefix: Past | None, batch: int) -> Here:
    """Return what is different in each layer."""
    def flags(chosen: Sequence[int]) -> jax.Array:
        return jnp.asarray([i in chosen for i in range(c.layers)])

    before: list[Past] = []
    if past is not None:
        before.append(cast(Past, tuple(jnp.broadcast_to(p, (p.shape[0], batch, *p.shape[2:])) for p in past)))
    if cache is not None:
        before.append((cache.key, cache.value))
    scale = None
    if c.scale_by_depth:
        base = c.head_size**-0.5 if c.scale is None else c.scale
        scale = base / jnp.arange(1, c.layers + 1, dtype=jnp.float32)
    return Here(None if c.uniform else flags(c.local), ~flags(c.unrotated) if c.unrotated else None, scale,
                tuple(before), prefix)


def tables(c: DecoderConfig, positions: jax.Array) -> tuple[Past | None, Past | None]:
    """Return the rotary tables of layers without and with the window; None: they have none, or the same."""
    def one(rope: Any) -> Past | None:
        return None if rope is None else rope.tables(positions, c.head_size, c.positions)

    wide, local = one(c.rope), one(c.local_rope)
    if local is not None and c.ring is not None:
        return local, None
    return wide, None if c.uniform else local


def masks(c: DecoderConfig, mask: jax.Array | None, number: jax.Array, segments: jax.Array | None,
           cache: Cache | None, prefix: int) -> tuple[Masks | None, Masks | None]:
    """Return what is visible in each part of the keys, without and with the window, bool `[B or 1, 1, T, S]`."""
    if mask is None and segments is None and cache is None and not prefix and c.uniform:
        return None, None
    t = number.shape[1]

    def near(back: jax.Array, window: int | None) -> jax.Array:
        return back >= 0 if window is None else (back >= 0) & (back < window)

    def all_parts(window: int | None) -> Masks:
        parts = []
        if prefix:
            parts.append(near(number[:, :, None] - jnp.arange(prefix), window))
        if cache is not None:
            old = cache.numbers()
            seen = near(jnp.arange(t)[:, None] + cache.length - old, window)
            parts.append((seen & (old >= 0))[None] & cache.mask[:, None])
        new = near(jnp.arange(t)[:, None] - jnp.arange(t), window)[None]
        if segments is not None:
            new = new & (segments[:, :, None] == segments[:, None])
        if mask is not None:
            new = new & (mask if mask.ndim == 3 else mask[:, None])
        return tuple(one[:, None] for one in (*parts, new))

    if c.uniform:
        return all_parts(c.ring), None
    return all_parts(None), all_parts(c.window)
