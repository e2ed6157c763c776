"""T5, Flan-T5 and mT5: an encoder and a decoder with relative position biases (Raffel et al., arXiv:1910.10683)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from jpeft.core import compat
from jpeft.core.sharding import divide_rows, whole_inputs
from jpeft.errors import ModelInputError
from jpeft.models import cache as caches
from jpeft.models.cache import Cache
from jpeft.models.layers import ACTIVATIONS, REMAT, RmsNorm, behind, check_pair, choose, stacked, visible
from jpeft.models.loss import chunked_cross_entropy
from jpeft.models.model import Model
from jpeft.models.output import Output
from jpeft.models.t5_config import T5Config

Pair = tuple[jax.Array, jax.Array]
Prefix = Mapping[str, Pair]


class T5Cache(NamedTuple):
    """What the decoder remembers; a pytree. Row r of the encoded text is visible where `mask` says so.

    Attributes:
        own: keys and values of the decoder's own tokens.
        key: of the encoded text, `[L, B, S, H, d]`.
        value: `[L, B, S, H, d]`.
        mask: bool `[B, S]`.
    """

    own: Cache
    key: jax.Array
    value: jax.Array
    mask: jax.Array


def buckets_of(distance: jax.Array, both: bool, buckets: int, furthest: int) -> jax.Array:
    """Return the bucket of each distance `key position - query position`: half of them exact, half logarithmic.

    Args:
        distance: int32.
        both: whether keys behind the query have buckets of their own; otherwise they count as distance 0.
        buckets: their number.
        furthest: from which on all distances are one bucket.

    Example:
        >>> buckets_of(jnp.asarray([-200, -9, -1, 0, 1, 9]), True, 32, 128).tolist()
        [15, 8, 1, 0, 17, 24]
    """
    start = jnp.zeros_like(distance)
    if both:
        buckets //= 2
        start = jnp.where(distance > 0, buckets, 0)
    far = jnp.abs(distance) if both else jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(far, 1).astype(jnp.float32) / exact) / math.log(furthest / exact)
    wide = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return start + jnp.where(far < exact, far, wide)


def _length(prefix: Pair | None) -> int:
    return 0 if prefix is None else int(prefix[0].shape[2])


class _Block(nn.Module):
    """A module that knows the configuration, the dtype of compute, and whether it drops."""

    config: T5Config
    dtype: Any = None
    train: bool = False

    def dense(self, features: int | tuple[int, ...], name: str, std: float,
              axis: int | tuple[int, ...] = -1) -> nn.DenseGeneral:
        start = nn.initializers.normal(std)
        return nn.DenseGeneral(features, axis, use_bias=False, dtype=self.dtype, kernel_init=start, name=name)

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        return RmsNorm(self.config.norm_eps, dtype=self.dtype, name=name)(x)

    def drop(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.config.dropout, deterministic=not self.train)(x)


class Attention(_Block):
    """Attention without the residual and without a scale: `[B, T, D]` to `[B, T, D]`, and the keys and values."""

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array | None, before: Pair | None, bias: jax.Array | None,
                 mask: jax.Array | None, prefix: Pair | None = None) -> tuple[jax.Array, Pair]:
        """`source` is where new keys come from (None: there are none), `before` are those that exist already.

        The keys and values that are returned are those without the prefix.
        """
        c, width = self.config, self.config.hidden_size
        query = self.dense((c.heads, c.head_size), "query", (width * c.head_size) ** -0.5)(x)
        pair = before
        if source is not None:
            key, value = (self.dense((c.heads, c.head_size), name, width**-0.5)(source) for name in ("key", "value"))
            pair = (key, value)
        assert pair is not None
        keys, values = pair
        if source is not None and before is not None:
            keys, values = (jnp.concatenate([old.astype(new.dtype), new], axis=1)
                            for old, new in zip(before, pair, strict=True))
        keys, values = behind(prefix, keys, values)
        mixed = self._mix(checkpoint_name(query, "query"), checkpoint_name(keys, "key"),
                          checkpoint_name(values, "value"), bias, mask)
        out = self.dense(width, "out", (c.heads * c.head_size) ** -0.5, axis=(-2, -1))
        return out(checkpoint_name(mixed, "attention_mix")), pair

    def _mix(self, query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None,
             mask: jax.Array | None) -> jax.Array:
        bias = None if bias is None else bias.astype(query.dtype)
        key, value = key.astype(query.dtype), value.astype(query.dtype)
        if (not self.train or self.config.dropout == 0.0) and compat.attends_in(query.dtype):
            return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=1.0)
        scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
        scores = scores if bias is None else scores + bias
        scores = scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        return jnp.einsum("bhts,bshd->bthd", self.drop(jax.nn.softmax(scores, axis=-1)).astype(value.dtype), value)


class Mlp(_Block):
    """The feed-forward half without the residual, `[B, T, D] -> [B, T, D]`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, act, std = self.config, ACTIVATIONS[self.config.activation], self.config.hidden_size**-0.5
        inner = self.dense(c.mlp_size, "up", std)(x)
        inner = act(self.dense(c.mlp_size, "gate", std)(x)) * inner if c.gated else act(inner)
        return self.dense(c.hidden_size, "down", c.mlp_size**-0.5)(self.drop(checkpoint_name(inner, "mlp_inner")))


class EncoderLayer(_Block):
    """One layer of the encoder; the body of a scan."""

    @nn.compact
    def __call__(self, x: jax.Array, prefix: Pair | None, bias: jax.Array,
                 mask: jax.Array | None) -> tuple[jax.Array, None]:
        args = (self.config, self.dtype, self.train)
        x = divide_rows(x)
        inner = self.norm(x, "attention_norm")
        mixed, _ = Attention(*args, name="attention")(inner, inner, None, bias, mask, prefix)
        x = x + self.drop(checkpoint_name(mixed, "attention_out"))
        inner = Mlp(*args, name="mlp")(self.norm(x, "mlp_norm"))
        return x + self.drop(checkpoint_name(inner, "mlp_out")), None


class DecoderLayer(_Block):
    """One layer of the decoder; the body of a scan. Its second output are its keys and values: own, and encoded."""

    @nn.compact
    def __call__(self, x: jax.Array, before: Pair | None, encoded: Pair | None, prefix: Prefix,
                 memory: jax.Array | None, bias: jax.Array, mask: jax.Array,
                 seen: jax.Array | None) -> tuple[jax.Array, tuple[Pair, Pair]]:
        args = (self.config, self.dtype, self.train)
        x = divide_rows(x)
        inner = self.norm(x, "attention_norm")
        mixed, own = Attention(*args, name="attention")(inner, inner, before, bias, mask, prefix.get("decoder"))
        x = x + self.drop(checkpoint_name(mixed, "attention_out"))
        inner = self.norm(x, "cross_norm")
        mixed, pair = Attention(*args, name="cross")(inner, memory, encoded, None, seen, prefix.get("cross"))
        x = x + self.drop(mixed)
        inner = Mlp(*args, name="mlp")(self.norm(x, "mlp_norm"))
        return x + self.drop(checkpoint_name(inner, "mlp_out")), (own, pair)


class _Stack(_Block):
    """What the encoder and the decoder share: a table of biases, layers, a norm."""

    remat: str = "none"

    def biases(self, distance: jax.Array, both: bool) -> jax.Array:
        """Return the biases `[1, H, T, S]` of distances `[T, S]`."""
        c = self.config
        table = nn.Embed(c.buckets, c.heads, embedding_init=nn.initializers.normal(c.hidden_size**-0.5), name="bias")
        return jnp.transpose(table(buckets_of(distance, both, c.buckets, c.max_distance)), (2, 0, 1))[None]


class Encoder(_Stack):
    """Embedded tokens `[B, S, D]` to the encoded text `[B, S, D]`."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, prefix: Pair | None) -> jax.Array:
        c, place, ahead = self.config, jnp.arange(x.shape[1]), _length(prefix)
        bias = self.biases(jnp.arange(-ahead, x.shape[1])[None] - place[:, None], True)
        layers = stacked(EncoderLayer, c.layers, self.remat, (0, nn.broadcast, nn.broadcast))
        x, _ = layers(c, self.dtype, self.train, name="layers")(self.drop(x), prefix, bias, visible(mask, ahead))
        return self.drop(self.norm(x, "norm"))


class Decoder(_Stack):
    """Embedded tokens `[B, T, D]` to hidden states `[B, T, D]`, and what a cache takes."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, memory: jax.Array | None, seen: jax.Array | None,
                 own: Cache | None, encoded: Pair | None, prefix: Prefix) -> tuple[jax.Array, tuple[Pair, Pair]]:
        c, new, ahead = self.config, jnp.arange(x.shape[1]), _length(prefix.get("decoder"))
        old = jnp.zeros((0,), jnp.int32) if own is None else own.numbers()
        place = new if own is None else new + own.length
        distance = jnp.concatenate([jnp.arange(-ahead, 0), old, place])[None] - place[:, None]
        bias = self.biases(distance, False)
        known = jnp.concatenate([jnp.ones(ahead, bool), old >= 0, jnp.ones_like(new, bool)])
        open_to = ((distance <= 0) & known)[None]
        if mask is not None or own is not None:
            mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
            keys = mask if own is None else jnp.concatenate([own.mask, mask], axis=1)
            open_to = open_to & jnp.pad(keys, ((0, 0), (ahead, 0)), constant_values=True)[:, None]
        layers = stacked(DecoderLayer, c.decoder_layers, self.remat, (0, 0, 0, *[nn.broadcast] * 4))
        before = None if own is None else (own.key, own.value)
        x, pairs = layers(c, self.dtype, self.train, name="layers")(
            self.drop(x), before, encoded, prefix, memory, bias, open_to[:, None],
            visible(seen, _length(prefix.get("cross"))))
        return self.drop(self.norm(x, "norm")), pairs


class T5Module(_Block):
    """The whole model with the head of its task."""

    remat: str = "none"

    @nn.compact
    def __call__(self, tokens: jax.Array | None, attention_mask: jax.Array | None = None,
                 decoder_tokens: jax.Array | None = None, decoder_mask: jax.Array | None = None,
                 cache: Cache | T5Cache | None = None, labels: jax.Array | None = None,
                 label_weights: jax.Array | None = None, prefix: Prefix | None = None) -> Output:
        prefix = {} if prefix is None else dict(prefix)
        first = prefix.pop("encoder", None)
        c, args = self.config, (self.config, self.dtype, self.train, self.remat)
        words = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, embedding_init=nn.initializers.normal(1.0),
                         name="embed")
        seen = None if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        memory, encoded = None, None
        own = cache.own if isinstance(cache, T5Cache) else cache
        if isinstance(cache, T5Cache):
            encoded, seen = (cache.key, cache.value), cache.mask
        else:
            assert tokens is not None
            memory = Encoder(*args, name="encoder")(words(tokens), seen, first)
        if decoder_tokens is None:
            decoder_tokens = tokens if labels is None else shifted(labels, c.start_id, c.pad_id)
        assert decoder_tokens is not None
        mask = None if decoder_mask is None else jnp.asarray(decoder_mask).astype(bool)
        hidden, (pair, cross) = Decoder(*args, name="decoder")(
            words(decoder_tokens), mask, memory, seen, own, encoded, prefix)
        if own is not None:
            mask = jnp.ones(decoder_tokens.shape, bool) if mask is None else mask
            seen = jnp.ones(cross[0].shape[1:3], bool) if seen is None else seen
            fits = own.length + decoder_tokens.shape[1] <= own.slots
            hidden = jnp.where(fits, hidden, jnp.nan)
            cache = T5Cache(own.extend(*pair, mask), *cross, seen)
        if c.task == "hidden":
            return Output(hidden=hidden, cache=cache)
        scaled = hidden * jnp.asarray(c.hidden_size**-0.5, hidden.dtype) if c.scaled else hidden
        kernel = None if c.tied else _Head(c, self.dtype, name="lm_head")()

        def head(x: jax.Array) -> jax.Array:
            return words.attend(x) if kernel is None else jnp.dot(*promote_dtype(x, kernel, dtype=self.dtype))

        if labels is None:
            return Output(head(scaled), hidden, cache=cache)
        return Output(hidden=hidden, cache=cache, loss=chunked_cross_entropy(scaled, head, labels, label_weights))


class _Head(_Block):
    """The kernel of the head `[D, V]`: a parameter that is read, not applied."""

    @nn.compact
    def __call__(self) -> jax.Array:
        c = self.config
        start = nn.initializers.normal(c.hidden_size**-0.5)
        return whole_inputs(self.param("kernel", start, (c.hidden_size, c.vocab_size), jnp.float32))


def shifted(labels: jax.Array, start_id: int, pad_id: int) -> jax.Array:
    """Return what the decoder reads to predict `labels`: a start token and all but the last of them.

    Example:
        >>> shifted(jnp.asarray([[5, 6, -100]]), 0, 9).tolist(), shifted(jnp.asarray([[5, -100, 6]]), 0, 9).tolist()
        ([[0, 5, 6]], [[0, 5, 9]])
    """
    moved = jnp.roll(labels, 1, axis=1).at[:, 0].set(start_id)
    return jnp.where(moved < 0, pad_id, moved)


@dataclasses.dataclass(frozen=True)
class T5(Model):
    """An encoder and decoder as pure functions; see `Model` for its attributes.

    Example:
        >>> model = T5(T5Config(vocab_size=9, hidden_size=8, layers=1, decoder_layers=2, heads=2, head_size=3,
        ...                     mlp_size=16))
        >>> params = model.init(jax.random.key(0))
        >>> tokens, labels = jnp.ones((5, 4), jnp.int32), jnp.ones((5, 3), jnp.int32)
        >>> model.apply(params, tokens, labels=labels).loss.shape
        ()
        >>> model.apply(params, tokens, decoder_tokens=labels).logits.shape
        (5, 3, 9)
    """

    config: T5Config

    def __post_init__(self) -> None:
        choose(REMAT, self.remat, "remat")

    def module(self, train: bool = False) -> T5Module:
        return T5Module(self.config, self.dtype, train, self.remat)

    def empty_cache(self, batch: int, capacity: int, dtype: Any = None) -> Cache:
        """Return a cache for the decoder's own tokens, `capacity` for each of `batch` rows.

        `apply` with this cache and the text to encode returns one that holds the encoded text too; further calls take
        that and `tokens=None`.
        """
        c = self.config
        kind = dtype or self.dtype or jnp.float32
        return caches.empty(c.decoder_layers, batch, capacity, c.heads, c.head_size, kind)

    def apply(self, params: Any, tokens: jax.Array | None, attention_mask: jax.Array | None = None,
              decoder_tokens: jax.Array | None = None, decoder_mask: jax.Array | None = None,
              cache: Cache | T5Cache | None = None, labels: jax.Array | None = None,
              label_weights: jax.Array | None = None, prefix: Prefix | None = None,
              *, key: jax.Array | None = None) -> Output:
        """Run the model.

        Args:
            params: as `init` or `jpeft.from_pretrained` returned them.
            tokens: ids to encode `[B, S]`; None where the cache holds the encoded text.
            attention_mask: `[B, S]`, 1 = visible, 0 = padding on either side; None: all are.
            decoder_tokens: ids that the decoder reads `[B, T]`; None: the labels moved by one, behind the start token.
            decoder_mask: `[B, T]`; None: all are visible to later ones.
            cache: what `empty_cache` or the last call returned; the result has it with the new tokens.
            labels: ids `[B, T]` that the decoder should write, at their own places. Negative ones count for nothing.
            label_weights: of the labels, `[B, T]`; None: 1.
            prefix: `(key, value)`, each `[L, B or 1, P, H, d]`, of the attention in the "encoder", of that of the
                "decoder" among its own tokens, and of the "cross" attention: what all tokens see there, beside the
                others. They do not enter the cache: give them to every call.
            key: the key for dropout; None: no dropout.

        Returns:
            `hidden` of the decoder, `logits` (None with labels), `loss` (with labels: the weighted mean), `cache`.

        Raises:
            ModelInputError: an argument does not fit the model or another argument.
        """
        self._check(tokens, attention_mask, decoder_tokens, decoder_mask, cache, labels, label_weights)
        seen: Any = cache.mask if tokens is None and cache is not None else tokens
        self._check_prefix(prefix, jnp.shape(seen)[0])
        rngs = None if key is None else {"dropout": key}
        out = self.module(train=key is not None).apply({"params": params}, tokens, attention_mask, decoder_tokens,
                                                       decoder_mask, cache, labels, label_weights, prefix, rngs=rngs)
        return cast(Output, out)

    def _check_prefix(self, prefix: Any, batch: int) -> None:
        c = self.config
        for part, pair in (prefix or {}).items():
            if part not in ("encoder", "decoder", "cross"):
                raise ModelInputError(f"prefix has {part!r}, must have some of 'encoder', 'decoder' and 'cross'")
            layers = c.layers if part == "encoder" else c.decoder_layers
            check_pair(f"prefix[{part!r}]", pair, layers, batch, c.heads, c.head_size)

    def _check(self, tokens: Any, mask: Any, decoder_tokens: Any, decoder_mask: Any, cache: Any, labels: Any,
               weights: Any) -> None:
        held = isinstance(cache, T5Cache)
        if held and (tokens is not None or mask is not None):
            raise ModelInputError("this cache holds an encoded text; pass tokens=None and no attention_mask with it")
        if not held and tokens is None:
            raise ModelInputError("there are no tokens to encode and no cache that holds an encoded text")
        if decoder_tokens is None and labels is None:
            raise ModelInputError("the decoder has nothing to read; pass decoder_tokens or labels")
        if labels is not None and self.config.task != "seq2seq":
            raise ModelInputError(f"labels have no meaning for the task {self.config.task!r}; drop them")
        if labels is None and weights is not None:
            raise ModelInputError("label_weights without labels; pass labels too")
        for name, ids in (("tokens", tokens), ("decoder_tokens", decoder_tokens), ("labels", labels)):
            if ids is not None and (jnp.ndim(ids) != 2 or not jnp.issubdtype(jnp.result_type(ids), jnp.integer)):
                raise ModelInputError(f"{name} must be integer ids [B, T], found {jnp.result_type(ids)} "
                                      f"{jnp.shape(ids)}")
        read = labels if decoder_tokens is None else decoder_tokens
        for name, value, like in (("attention_mask", mask, tokens), ("decoder_mask", decoder_mask, read),
                                  ("labels", labels, read), ("label_weights", weights, labels)):
            if value is not None and jnp.shape(value) != jnp.shape(like):
                raise ModelInputError(f"{name} has shape {jnp.shape(value)}, must be {jnp.shape(like)}")
        rows = cache.mask.shape[0] if held else jnp.shape(tokens)[0]
        if jnp.shape(read)[0] != rows:
            raise ModelInputError(f"the decoder reads {jnp.shape(read)[0]} rows, there are {rows} encoded texts")
