"""Causal language models: Llama, Mistral, Mixtral, Qwen, Gemma, Phi, SmolLM3, OLMo, GPT-NeoX, GPT-2.

What differs between the families is `DecoderConfig`; layers that differ within a model (windows, rotary positions)
differ in a value that the scan over layers hands to each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from jpeft.core.sharding import whole_inputs
from jpeft.errors import ModelConfigError, ModelInputError
from jpeft.models import cache as caches
from jpeft.models.cache import Cache
from jpeft.models.decoder_config import DecoderConfig
from jpeft.models.decoder_layers import Block, Layer, Past, Shared, here, masks, tables
from jpeft.models.layers import REMAT, check_pair, choose, stacked
from jpeft.models.loss import chunked_cross_entropy
from jpeft.models.model import Model, Params
from jpeft.models.output import Output


class Head(Block):
    """The kernel of a head `[D, out]`: a parameter that is read, not applied."""

    features: int = 0

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.config.hidden_size, self.features)
        return whole_inputs(cast(jax.Array, self.param("kernel", self.start, shape, jnp.float32)))


class DecoderModule(Block):
    """The whole decoder with the head of its task."""

    remat: str = "none"

    @nn.compact
    def __call__(self, tokens: jax.Array, attention_mask: jax.Array | None = None, positions: jax.Array | None = None,
                 segment_ids: jax.Array | None = None, cache: Cache | None = None, past: Past | None = None,
                 labels: jax.Array | None = None, label_weights: jax.Array | None = None,
                 prefix: Past | None = None) -> Output:
        c = self.config
        mask = None if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        first = prefix if past is None else past
        ahead = 0 if first is None else first[0].shape[2]
        number = jnp.arange(tokens.shape[1]) if segment_ids is None else _within(segment_ids)
        number = jnp.broadcast_to(number + ahead + (0 if cache is None else cache.length), tokens.shape)
        positions = number if positions is None else positions
        words = self.table(c.vocab_size, "embed")
        x = words(tokens)
        x = x if c.embed_scale == 1.0 else x * jnp.asarray(c.embed_scale, x.dtype)
        x = x + self.table(c.positions, "position")(positions) if c.position_table else x
        x = self.drop(x, c.embedding_dropout)
        shared = Shared(*masks(c, mask, number, segment_ids, cache, ahead), *tables(c, positions),
                        (None, None) if prefix is None else tables(c, jnp.arange(ahead)[None]))
        layers = stacked(Layer, c.layers, self.remat, (0, nn.broadcast))
        each = here(c, cache, past, prefix, tokens.shape[0])
        x, (key, value) = layers(c, self.dtype, self.train, name="layers")(x, each, shared)
        hidden = self.norm(x, "norm")
        if cache is not None:
            fits = cache.length + tokens.shape[1] <= cache.slots
            hidden = hidden if c.ring and c.ring <= cache.slots else jnp.where(fits, hidden, jnp.nan)
            cache = cache.extend(key, value, jnp.ones(tokens.shape, bool) if mask is None else mask)
        if c.task == "hidden":
            return Output(hidden=hidden, cache=cache)
        if c.task == "classification":
            last = _last(tokens, mask, c.pad_id)
            row = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
            return Output(self.dense(c.labels, "classifier", bias=False)(row), hidden, cache=cache)
        head = self._head(words)
        if labels is None:
            return Output(_capped(head(hidden), c.logit_cap), hidden, cache=cache)
        loss = chunked_cross_entropy(hidden, head, *_targets(labels, label_weights, segment_ids, tokens.shape[1]),
                                     soft_cap=c.logit_cap)
        return Output(hidden=hidden, cache=cache, loss=loss)

    def _head(self, words: nn.Embed) -> Callable[[jax.Array], jax.Array]:
        if self.config.tied:
            return words.attend
        kernel = Head(self.config, self.dtype, features=self.config.vocab_size, name="lm_head")()

        def head(hidden: jax.Array) -> jax.Array:
            return jnp.dot(*promote_dtype(hidden, kernel, dtype=self.dtype))

        return head


def _capped(logits: jax.Array, cap: float | None) -> jax.Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _within(segments: jax.Array) -> jax.Array:
    """Return the number of each token within its segment, `[B, T]`."""
    place = jnp.arange(segments.shape[1])
    fresh = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return place - jax.lax.cummax(jnp.where(fresh, place, 0), axis=1)


def _last(tokens: jax.Array, mask: jax.Array | None, pad_id: int | None) -> jax.Array:
    """Return the place of the last token of each row that is no padding, `[B]`."""
    if mask is None:
        mask = jnp.ones(tokens.shape, bool) if pad_id is None else tokens != pad_id
    return jnp.max(jnp.where(mask, jnp.arange(tokens.shape[1]), 0), axis=1)


def _targets(labels: jax.Array, weights: jax.Array | None, segments: jax.Array | None,
             length: int) -> tuple[jax.Array, jax.Array | None]:
    """Shift labels by one: what each token should predict, `[B, T]`, negative where nothing."""
    def moved(x: jax.Array, fill: int) -> jax.Array:
        none = jnp.asarray(fill, x.dtype)
        full = jax.lax.pad(x, none, ((0, 0, 0), (length - x.shape[1], 0, 0)))
        return jax.lax.pad(full[:, 1:], none, ((0, 0, 0), (0, 1, 0)))

    targets = moved(labels, -100)
    if segments is not None:
        targets = jnp.where(moved(segments, -1) == segments, targets, -100)
    return targets, None if weights is None else moved(weights, 0)


@dataclasses.dataclass(frozen=True)
class Decoder(Model):
    """A decoder as pure functions; see `Model` for its attributes.

    Example:
        >>> from jpeft.models.rope import Rope
        >>> config = DecoderConfig(vocab_size=9, hidden_size=8, layers=2, heads=2, kv_heads=1, head_size=4, mlp_size=16,
        ...                        positions=32, rope=Rope())
        >>> model = Decoder(config)
        >>> params = model.init(jax.random.key(0))
        >>> tokens = jnp.ones((5, 4), jnp.int32)
        >>> model.apply(params, tokens).logits.shape, model.apply(params, tokens, labels=tokens).loss.shape
        ((5, 4, 9), ())
        >>> params["layers"]["attention"]["query"]["kernel"].shape
        (2, 8, 2, 4)
    """

    config: DecoderConfig

    def __post_init__(self) -> None:
        choose(REMAT, self.remat, "remat")

    def module(self, train: bool = False) -> DecoderModule:
        return DecoderModule(self.config, self.dtype, train, self.remat)

    def with_adapter(self, params: Any, length: int) -> tuple[Decoder, Params]:
        """Return this model and its params with places for `jpeft.LLaMAAdapter`: it computes what it did before.

        Each attention gets `adapter_prompt` `[L, length, D]`, from one, and `adapter_gate` `[L, H]`, from zero.

        Args:
            params: of this model.
            length: learned tokens in each layer.

        Raises:
            ModelConfigError: the length is not positive.

        Example:
            >>> config = DecoderConfig(vocab_size=9, hidden_size=8, layers=2, heads=2, kv_heads=1, head_size=4,
            ...                        mlp_size=16, positions=32)
            >>> model, params = Decoder(config).with_adapter(Decoder(config).init(jax.random.key(0)), 10)
            >>> params["layers"]["attention"]["adapter_prompt"].shape
            (2, 10, 8)
        """
        if length < 1:
            raise ModelConfigError(f"an adapter of {length} tokens learns nothing; use 1 or more")
        model = dataclasses.replace(self, config=dataclasses.replace(self.config, adapter_length=length))
        places, old = model.shapes()["layers"]["attention"], params["layers"]["attention"]
        dtype = jax.tree.leaves(old)[0].dtype
        new = {name: fill(places[name].shape, dtype) for name, fill in (
            ("adapter_prompt", jnp.ones), ("adapter_gate", jnp.zeros))}
        return model, {**params, "layers": {**params["layers"], "attention": {**old, **new}}}

    def empty_cache(self, batch: int, capacity: int, dtype: Any = None, whole: bool = False) -> Cache:
        """Return a cache for `apply`: `capacity` tokens for each of `batch` rows.

        A model all of whose layers have a window keeps the window alone, and takes any number of tokens.

        Args:
            batch: B.
            capacity: tokens that fit.
            dtype: of keys and values; None: that of compute, or float32 where that follows the params.
            whole: keep all tokens, even those that no layer's window reaches any more.
        """
        c = self.config
        return caches.empty(c.layers, batch, capacity, c.kv_heads, c.head_size, dtype or self.dtype or jnp.float32,
                            None if whole else c.ring)

    def apply(self, params: Any, tokens: jax.Array, attention_mask: jax.Array | None = None,
              positions: jax.Array | None = None, segment_ids: jax.Array | None = None, cache: Cache | None = None,
              past: Past | None = None, labels: jax.Array | None = None, label_weights: jax.Array | None = None,
              prefix: Past | None = None, *, key: jax.Array | None = None) -> Output:
        """Run the decoder.

        Args:
            params: as `init` or `jpeft.from_pretrained` returned them.
            tokens: ids `[B, T]`.
            attention_mask: `[B, T]`, 1 = visible, 0 = padding on either side; without a cache also `[B, T, T]`, a
                pattern of its own per token. It is of the new tokens alone: the cache remembers that of the old ones.
            positions: `[B, T]`; None: the number of the token in its row (or segment), after the prefix and the tokens
                in the cache. Padding counts, as it does in transformers; that matters to a position table alone.
            segment_ids: `[B, T]`: of packed sequences; neighbours with one id are one sequence and see no other.
            cache: what `empty_cache` or the last call returned; the result has it with the new tokens. More tokens than
                it holds make `hidden` and what follows from it NaN (an error where the cache is not traced).
            past: `(key, value)`, each `[L, B or 1, P, K, d]`: P tokens before the first one, as a cache holds them
                (after rotary positions), visible in all segments.
            labels: ids `[B, T]`, aligned with the tokens and shifted here: token t predicts label t + 1, within its
                segment. Negative labels count for nothing. Fewer than T: those of the last tokens.
            label_weights: of the labels, `[B, T]`; None: 1.
            prefix: in the place of `past`, the keys and values as the projections make them: before the norm of the
                keys and rotary positions, which they get here. They do not enter the cache: give them to every call.
            key: the key for dropout; None: no dropout.

        Returns:
            `hidden` after the last norm, `logits` (None with labels), `loss` (with labels: the weighted mean), `cache`.

        Raises:
            ModelInputError: an argument does not fit the model or another argument.
        """
        self._check(tokens, attention_mask, positions, segment_ids, cache, past, labels, label_weights, prefix)
        rngs = None if key is None else {"dropout": key}
        out = self.module(train=key is not None).apply(
            {"params": params}, tokens, attention_mask, positions, segment_ids, cache, past, labels, label_weights,
            prefix, rngs=rngs)
        return cast(Output, out)

    def _check(self, tokens: Any, mask: Any, positions: Any, segments: Any, cache: Cache | None, past: Any,
               labels: Any, weights: Any, prefix: Any) -> None:
        c, shape = self.config, tuple(jnp.shape(tokens))
        if len(shape) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
            raise ModelInputError(f"tokens must be integer ids [B, T], found {jnp.result_type(tokens)} {shape}")
        self._check_before(shape, segments, cache, past, prefix)
        first = prefix if past is None else past
        ahead = 0 if first is None else int(jnp.shape(first[0])[2])
        if c.position_table and positions is None and ahead + shape[1] > c.positions:
            raise ModelInputError(f"a sequence of {ahead + shape[1]} tokens is longer than the {c.positions} positions "
                                  "of this model; truncate it")
        square = [(*shape, shape[1])] if cache is None and c.task != "classification" else []
        for name, value, allowed in (("attention_mask", mask, [shape, *square]), ("positions", positions, [shape]),
                                     ("segment_ids", segments, [shape])):
            if value is not None and tuple(jnp.shape(value)) not in allowed:
                right = " or ".join(map(str, allowed))
                raise ModelInputError(f"{name} has shape {tuple(jnp.shape(value))}, must be {right}")
        if labels is None and weights is not None:
            raise ModelInputError("label_weights without labels; pass labels too")
        if labels is not None and c.task != "causal-lm":
            raise ModelInputError(f"labels have no meaning for the task {c.task!r}; drop them")
        if labels is not None and not (jnp.ndim(labels) == 2 and jnp.shape(labels)[0] == shape[0]
                                       and jnp.shape(labels)[1] <= shape[1]):
            raise ModelInputError(f"labels have shape {jnp.shape(labels)}, must be {shape}, or of the last tokens")
        if weights is not None and jnp.shape(weights) != jnp.shape(labels):
            raise ModelInputError(f"label_weights has shape {jnp.shape(weights)}, must be {jnp.shape(labels)}")

    def _check_before(self, shape: tuple[int, ...], segments: Any, cache: Cache | None, past: Any,
                      prefix: Any) -> None:
        c = self.config
        if past is not None and prefix is not None:
            raise ModelInputError("past and prefix both stand before the first token; give one of them")
        check_pair("past", past, c.layers, shape[0], c.kv_heads, c.head_size)
        check_pair("prefix", prefix, c.layers, shape[0], c.kv_heads, c.head_size)
        if cache is None:
            return
        if segments is not None:
            raise ModelInputError("segment_ids cannot go with a cache; give each sequence a row of its own")
        want = (c.layers, shape[0], cache.slots, c.kv_heads, c.head_size)
        if tuple(cache.key.shape) != want:
            raise ModelInputError(f"the cache has keys {tuple(cache.key.shape)}, must be {want}; make it with "
                                  "empty_cache")
        if c.ring is not None and c.ring <= cache.slots:
            return
        full = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
        if full + shape[1] > cache.slots:
            raise ModelInputError(f"{full} + {shape[1]} tokens do not fit a cache of {cache.slots}; make a larger one")
