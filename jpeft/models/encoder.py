"""The BERT family: BERT, MiniLM, RoBERTa, XLM-RoBERTa, DistilBERT. What differs between them is `EncoderConfig`."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jpeft.core.sharding import divide_rows
from jpeft.errors import ModelConfigError, ModelInputError
from jpeft.models.layers import ACTIVATIONS, REMAT, attention, behind, check_pair, choose, stacked, visible
from jpeft.models.model import Model
from jpeft.models.output import Output

Pair = tuple[jax.Array, jax.Array]
TASKS = ("hidden", "classification", "token-classification", "embedding")
_RATES = ("dropout", "attention_dropout", "head_dropout")
_SIZES = ("vocab_size", "hidden_size", "layers", "heads", "mlp_size", "positions")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """One encoder.

    Attributes:
        vocab_size: rows of the word table.
        hidden_size: width D of the residual stream.
        layers: number of layers L.
        heads: attention heads H; they divide D.
        mlp_size: inner width of the MLP.
        positions: rows of the position table.
        token_types: rows of the token type table; 0: the model has none.
        activation: of the MLP, by its Hugging Face name.
        norm_eps: of every layer norm.
        dropout: rate after the embeddings and after each sublayer.
        attention_dropout: rate on the attention probabilities.
        head_dropout: rate before the classifier.
        initializer_range: standard deviation of new kernels and tables.
        pad_id: id of the padding token.
        positions_after_pad: position of a token = `pad_id` + its number among the tokens that are not `pad_id`
            (RoBERTa); otherwise its index.
        head_activation: between the pooler's dense layer and the classifier.
        head_dropout_first: whether dropout also comes before the pooler's dense layer.
        task: one of `TASKS`.
        labels: classes of the classifier.
        pooler: whether there are parameters for a pooler. Classification always has one.
        pooling: of the embedding task: "mean" over visible tokens or "cls", the first token.
        normalise: whether embeddings have length 1.

    Raises:
        ModelConfigError: a value is out of its range, or not implemented.

    Example:
        >>> EncoderConfig(vocab_size=9, hidden_size=8, layers=1, heads=2, mlp_size=16, positions=4).head_size
        4
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    mlp_size: int
    positions: int
    token_types: int = 0
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.0
    attention_dropout: float = 0.0
    head_dropout: float = 0.0
    initializer_range: float = 0.02
    pad_id: int = 0
    positions_after_pad: bool = False
    head_activation: str = "tanh"
    head_dropout_first: bool = False
    task: str = "hidden"
    labels: int = 0
    pooler: bool = False
    pooling: str = "mean"
    normalise: bool = True

    def __post_init__(self) -> None:
        wrong = [f"{n} = {getattr(self, n)}, must be a positive integer" for n in _SIZES if getattr(self, n) < 1]
        wrong += [f"{n} = {getattr(self, n)}, must be in [0, 1)" for n in _RATES if not 0 <= getattr(self, n) < 1]
        if not wrong and self.hidden_size % self.heads:
            wrong.append(f"heads = {self.heads} must divide hidden_size = {self.hidden_size}")
        if self.pooling not in ("mean", "cls"):
            wrong.append(f"pooling = {self.pooling!r}, must be 'mean' or 'cls'")
        if self.task not in TASKS:
            wrong.append(f"task = {self.task!r}, must be one of {TASKS}")
        elif self.task.endswith("classification") and self.labels < 1:
            wrong.append(f"labels = {self.labels}, must be positive for {self.task}")
        if wrong:
            raise ModelConfigError(f"this encoder cannot be built: {'; '.join(wrong)}")
        choose(ACTIVATIONS, self.activation, "activation")
        choose(ACTIVATIONS, self.head_activation, "head activation")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    @property
    def max_length(self) -> int:
        """The longest sequence that the position table serves."""
        return self.positions - (self.pad_id + 1 if self.positions_after_pad else 0)


class _Block(nn.Module):
    """A module that knows the configuration, the dtype of compute, and whether it drops."""

    config: EncoderConfig
    dtype: Any = None
    train: bool = False

    def dense(self, features: int | tuple[int, ...], name: str, axis: int | tuple[int, ...] = -1) -> nn.DenseGeneral:
        start = nn.initializers.normal(self.config.initializer_range)
        return nn.DenseGeneral(features, axis, dtype=self.dtype, kernel_init=start, name=name)

    def table(self, rows: int, name: str) -> nn.Embed:
        start = nn.initializers.normal(self.config.initializer_range)
        return nn.Embed(rows, self.config.hidden_size, dtype=self.dtype, embedding_init=start, name=name)

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        eps = self.config.norm_eps
        return nn.LayerNorm(epsilon=eps, dtype=self.dtype, use_fast_variance=False, name=name)(x)

    def drop(self, x: jax.Array, rate: float) -> jax.Array:
        return nn.Dropout(rate, deterministic=not self.train)(x)


class Attention(_Block):
    """Self-attention without the residual, `[B, T, D] -> [B, T, D]`."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, prefix: Pair | None) -> jax.Array:
        c = self.config
        query, key, value = (checkpoint_name(self.dense((c.heads, c.head_size), name)(x), name)
                             for name in ("query", "key", "value"))
        key, value = behind(prefix, key, value)
        rng = self.make_rng("dropout") if self.train and c.attention_dropout else None
        mixed = checkpoint_name(attention(query, key, value, mask, c.attention_dropout, rng), "attention_mix")
        return checkpoint_name(self.dense(c.hidden_size, "out", axis=(-2, -1))(mixed), "attention_out")


class Mlp(_Block):
    """The feed-forward half without the residual, `[B, T, D] -> [B, T, D]`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = ACTIVATIONS[self.config.activation](self.dense(self.config.mlp_size, "up")(x))
        outer = self.dense(self.config.hidden_size, "down")(checkpoint_name(inner, "mlp_inner"))
        return checkpoint_name(outer, "mlp_out")


class Layer(_Block):
    """One layer, normalised after each residual sum; the body of the scan."""

    @nn.compact
    def __call__(self, x: jax.Array, prefix: Pair | None, mask: jax.Array | None) -> tuple[jax.Array, None]:
        c, x = self.config, divide_rows(x)
        mixed = Attention(c, self.dtype, self.train, name="attention")(x, mask, prefix)
        x = self.norm(x + self.drop(mixed, c.dropout), "attention_norm")
        inner = Mlp(c, self.dtype, self.train, name="mlp")(x)
        return self.norm(x + self.drop(inner, c.dropout), "mlp_norm"), None


class Embeddings(_Block):
    """Words, positions and token types, summed and normalised: ids `[B, T] -> [B, T, D]`."""

    @nn.compact
    def __call__(self, tokens: jax.Array, token_types: jax.Array | None, positions: jax.Array | None,
                 ahead: int = 0) -> jax.Array:
        c = self.config
        x = self.table(c.vocab_size, "word")(tokens)
        if positions is None and c.positions_after_pad:
            real = (tokens != c.pad_id).astype(jnp.int32)
            positions = (jnp.cumsum(real, axis=-1) + ahead) * real + c.pad_id
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]) + ahead, tokens.shape)
        if c.token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + self.table(c.token_types, "token_type")(types)
        x = x + self.table(c.positions, "position")(positions)
        return self.drop(self.norm(x, "norm"), c.dropout)


class EncoderModule(_Block):
    """The whole encoder with the head of its task."""

    remat: str = "none"

    @nn.compact
    def __call__(self, tokens: jax.Array, attention_mask: jax.Array | None = None, token_types: jax.Array | None = None,
                 positions: jax.Array | None = None, prefix: Pair | None = None) -> Output:
        c, ahead = self.config, 0 if prefix is None else prefix[0].shape[2]
        x = Embeddings(c, self.dtype, self.train, name="embeddings")(tokens, token_types, positions, ahead)
        layers = stacked(Layer, c.layers, self.remat, (0, nn.broadcast))
        hidden, _ = layers(c, self.dtype, self.train, name="layers")(x, prefix, visible(attention_mask, ahead))
        if c.task == "token-classification":
            return Output(self.dense(c.labels, "classifier")(self.drop(hidden, c.head_dropout)), hidden)
        if c.task == "classification":
            first = self.drop(hidden[:, 0], c.head_dropout if c.head_dropout_first else 0.0)
            inner = self.drop(self._pooled(first), c.head_dropout)
            return Output(self.dense(c.labels, "classifier")(inner), hidden)
        pooled = self._pooled(hidden[:, 0]) if c.pooler else None
        if c.task == "embedding":
            return Output(None, hidden, embed(hidden, attention_mask, c.pooling, c.normalise))
        return Output(None, hidden, None, pooled)

    def _pooled(self, first: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.config.head_activation](self.dense(self.config.hidden_size, "pooler")(first))


def embed(hidden: jax.Array, attention_mask: jax.Array | None = None, pooling: str = "mean",
          normalise: bool = True) -> jax.Array:
    """One vector per sequence, `[B, T, D] -> [B, D]`, computed in float32.

    Args:
        hidden: the last layer's output.
        attention_mask: `[B, T]`, 1 = visible; None: all are.
        pooling: "mean" over the visible tokens, or "cls": the first one.
        normalise: divide by the length of the vector.

    Example:
        >>> embed(jnp.asarray([[[3.0, 4.0], [9.0, 9.0]]]), jnp.asarray([[1, 0]])).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    x = hidden.astype(jnp.float32)
    if pooling == "cls":
        vector = x[:, 0]
    else:
        weight = jnp.ones(x.shape[:2], x.dtype) if attention_mask is None else jnp.asarray(attention_mask, x.dtype)
        vector = jnp.sum(x * weight[..., None], 1) / jnp.maximum(jnp.sum(weight, 1), 1e-9)[:, None]
    if normalise:
        vector = vector * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(vector), -1, keepdims=True), 1e-24))
    return vector.astype(hidden.dtype)


@dataclasses.dataclass(frozen=True)
class Encoder(Model):
    """An encoder as pure functions; see `Model` for its attributes.

    Example:
        >>> config = EncoderConfig(vocab_size=9, hidden_size=8, layers=2, heads=2, mlp_size=16, positions=4,
        ...                        task="classification", labels=3)
        >>> model = Encoder(config)
        >>> params = model.init(jax.random.key(0))
        >>> model.apply(params, jnp.ones((5, 4), jnp.int32)).logits.shape
        (5, 3)
        >>> params["layers"]["attention"]["query"]["kernel"].shape
        (2, 8, 2, 4)
    """

    config: EncoderConfig

    def __post_init__(self) -> None:
        choose(REMAT, self.remat, "remat")

    def module(self, train: bool = False) -> EncoderModule:
        return EncoderModule(self.config, self.dtype, train, self.remat)

    def apply(self, params: Any, tokens: jax.Array, attention_mask: jax.Array | None = None,
              token_types: jax.Array | None = None, positions: jax.Array | None = None, prefix: Pair | None = None,
              *, key: jax.Array | None = None) -> Output:
        """Run the encoder.

        Args:
            params: as `init` or `jpeft.from_pretrained` returned them.
            tokens: ids `[B, T]`.
            attention_mask: 1 = visible: `[B, T]`, or `[B, T, T]` for a pattern of its own per token.
            token_types: `[B, T]`; None: zeros.
            positions: rows of the position table `[B, T]`; None: as the family counts them, after the prefix.
            prefix: `(key, value)`, each `[L, B or 1, P, H, d]`: what all tokens see in every layer, beside themselves.
            key: the key for dropout; None: no dropout.

        Raises:
            ModelInputError: the sequence is longer than the position table, or an argument does not fit.
        """
        self._check(tokens, attention_mask, token_types, positions, prefix)
        rngs = None if key is None else {"dropout": key}
        out = self.module(train=key is not None).apply(
            {"params": params}, tokens, attention_mask, token_types, positions, prefix, rngs=rngs)
        return cast(Output, out)

    def _check(self, tokens: Any, attention_mask: Any, token_types: Any, positions: Any, prefix: Any) -> None:
        c, shape = self.config, tuple(jnp.shape(tokens))
        if len(shape) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
            raise ModelInputError(f"tokens must be integer ids [B, T], found {jnp.result_type(tokens)} {shape}")
        check_pair("prefix", prefix, c.layers, shape[0], c.heads, c.head_size)
        length = shape[1] + (0 if prefix is None else int(jnp.shape(prefix[0])[2]))
        if length > c.max_length:
            raise ModelInputError(f"a sequence of {length} tokens is longer than the {c.max_length} positions of "
                                  "this model; truncate it")
        masks = [shape] if c.task == "embedding" and c.pooling == "mean" else [shape, (*shape, shape[1])]
        for name, value, allowed in (("attention_mask", attention_mask, masks), ("token_types", token_types, [shape]),
                                     ("positions", positions, [shape])):
            if value is not None and tuple(jnp.shape(value)) not in allowed:
                right = " or ".join(map(str, allowed))
                raise ModelInputError(f"{name} has shape {tuple(jnp.shape(value))}, must be {right}")
        if token_types is not None and not c.token_types:
            raise ModelInputError("this model has no token types; leave token_types out")
