"""The BERT family as Hugging Face stores it: what its config keys mean, what its tensors are called. Data only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jpeft.interop.checkpoint import Names, Row
from jpeft.interop.family import Family
from jpeft.interop.hfconfig import ConfigTable, Key
from jpeft.interop.tensors import Tensors
from jpeft.models.encoder import TASKS, Encoder, EncoderConfig


@dataclasses.dataclass(frozen=True)
class EncoderFamily(Family):
    """One `model_type`.

    Attributes:
        config: what the keys of `config.json` mean.
        base: prefix of the encoder's tensors in a model that has a head.
        classes: architecture that stands for each task.
        body: name table of the encoder.
        head: name table of the head of each task; `!` marks names outside the encoder.
        others: stored names of heads that this library does not have, or of another task.
    """

    config: ConfigTable
    base: str
    classes: Mapping[str, str]
    body: tuple[Row, ...]
    head: Mapping[str, tuple[Row, ...]]
    others: tuple[str, ...]

    model: ClassVar[type[Encoder]] = Encoder
    tasks: ClassVar[tuple[str, ...]] = TASKS
    default: ClassVar[str] = "hidden"
    head_leaf: ClassVar[str] = "classifier/bias"
    fresh: ClassVar[tuple[str, ...]] = ("pooler", "classifier")
    saved: ClassVar[tuple[str, ...]] = ("classification", "token-classification")
    rates: ClassVar[tuple[str, ...]] = ("dropout", "attention_dropout", "head_dropout")

    def read(self, raw: Mapping[str, Any], where: str, **fields: Any) -> EncoderConfig:
        return EncoderConfig(**{**self.config.read(raw, where), "pooler": True, **fields})

    def write(self, raw: Mapping[str, Any], config: EncoderConfig) -> dict[str, Any]:
        return self.config.write(raw, dataclasses.asdict(config))

    def adjusted(self, config: EncoderConfig, held: Mapping[str, Any], tensors: Tensors) -> EncoderConfig:
        pooler = config.task == "classification" or "pooler/kernel" in held
        return dataclasses.replace(config, pooler=pooler)

    def names(self, config: Any) -> Names:
        """Return the name table for the task and pooler of a configuration."""
        pooler = config.pooler or config.task == "classification"
        head = tuple(r for r in self.head.get(config.task, ()) if pooler or not r.leaf.startswith("pooler/"))
        body = tuple(r for r in self.body if config.token_types or "/token_type/" not in r.leaf)
        prefixes = (self.base, "") if config.task.endswith("classification") else ("", self.base)
        return Names((*body, *head), prefixes, _OLD, tuple(f"({self.base})?{name}" for name in _BUFFERS), self.others)


def _linear(leaf: str, stored: str, layout: str = "in") -> tuple[Row, ...]:
    return Row(f"{leaf}/kernel", f"{stored}.weight", layout), Row(f"{leaf}/bias", f"{stored}.bias", "flat")


def _norm(leaf: str, stored: str) -> tuple[Row, ...]:
    return Row(f"{leaf}/scale", f"{stored}.weight"), Row(f"{leaf}/bias", f"{stored}.bias")


def _tables(*kinds: str) -> tuple[Row, ...]:
    return tuple(Row(f"embeddings/{kind}/embedding", f"embeddings.{kind}_embeddings.weight") for kind in kinds)


_OLD = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
_BUFFERS = (r"embeddings\.position_ids", r"embeddings\.token_type_ids")

_BERT_KEYS = {
    "vocab_size": Key("vocab_size", 30522),
    "hidden_size": Key("hidden_size", 768),
    "num_hidden_layers": Key("layers", 12),
    "num_attention_heads": Key("heads", 12),
    "intermediate_size": Key("mlp_size", 3072),
    "max_position_embeddings": Key("positions", 512),
    "type_vocab_size": Key("token_types", 2),
    "hidden_act": Key("activation", "gelu"),
    "layer_norm_eps": Key("norm_eps", 1e-12),
    "hidden_dropout_prob": Key("dropout", 0.1),
    "attention_probs_dropout_prob": Key("attention_dropout", 0.1),
    "classifier_dropout": Key("head_dropout", None),
    "initializer_range": Key("initializer_range", 0.02),
    "pad_token_id": Key("pad_id", 0),
}
_BERT_FIXED = {"position_embedding_type": ("absolute",)}
_BERT_BODY = (
    *_tables("word", "position", "token_type"),
    *_norm("embeddings/norm", "embeddings.LayerNorm"),
    *_linear("layers/attention/query", "encoder.layer.{}.attention.self.query"),
    *_linear("layers/attention/key", "encoder.layer.{}.attention.self.key"),
    *_linear("layers/attention/value", "encoder.layer.{}.attention.self.value"),
    *_linear("layers/attention/out", "encoder.layer.{}.attention.output.dense", "out"),
    *_norm("layers/attention_norm", "encoder.layer.{}.attention.output.LayerNorm"),
    *_linear("layers/mlp/up", "encoder.layer.{}.intermediate.dense"),
    *_linear("layers/mlp/down", "encoder.layer.{}.output.dense"),
    *_norm("layers/mlp_norm", "encoder.layer.{}.output.LayerNorm"),
)
_POOLER, _CLASSIFIER = _linear("pooler", "pooler.dense"), _linear("classifier", "!classifier")
_BERT = EncoderFamily(
    # `tie_word_embeddings` ties a language model head, which none of the tasks has.
    config=ConfigTable(_BERT_KEYS, _BERT_FIXED, frozenset({"tie_word_embeddings"}),
                       fallbacks={"head_dropout": "dropout"}),
    base="bert.",
    classes={"hidden": "BertModel", "embedding": "BertModel", "classification": "BertForSequenceClassification",
             "token-classification": "BertForTokenClassification"},
    body=_BERT_BODY,
    head={"hidden": _POOLER, "embedding": _POOLER, "classification": (*_POOLER, *_CLASSIFIER),
          "token-classification": _CLASSIFIER},
    others=(r"cls\..*", r"qa_outputs\..*", r"classifier\.(weight|bias)", r"(bert\.)?pooler\..*"),
)


def _roberta(stem: str) -> EncoderFamily:
    head = (*_linear("pooler", "!classifier.dense"), *_linear("classifier", "!classifier.out_proj"))
    keys = {**_BERT_KEYS, "vocab_size": Key("vocab_size", 50265), "pad_token_id": Key("pad_id", 1)}
    return EncoderFamily(
        config=ConfigTable(keys, _BERT_FIXED, frozenset({"tie_word_embeddings"}),
                           {"positions_after_pad": True, "head_dropout_first": True}, {"head_dropout": "dropout"}),
        base="roberta.",
        classes={"hidden": f"{stem}Model", "embedding": f"{stem}Model",
                 "classification": f"{stem}ForSequenceClassification",
                 "token-classification": f"{stem}ForTokenClassification"},
        body=_BERT_BODY,
        head={"hidden": _POOLER, "embedding": _POOLER, "classification": head, "token-classification": _CLASSIFIER},
        others=(r"lm_head\..*", r"qa_outputs\..*", r"classifier\..*", r"(roberta\.)?pooler\..*"),
    )


_DISTILBERT = EncoderFamily(
    # `sinusoidal_pos_embds` is about how the stored table was made, `qa_dropout` about a head that is not here.
    config=ConfigTable(
        {
            "vocab_size": Key("vocab_size", 30522),
            "dim": Key("hidden_size", 768),
            "n_layers": Key("layers", 6),
            "n_heads": Key("heads", 12),
            "hidden_dim": Key("mlp_size", 3072),
            "max_position_embeddings": Key("positions", 512),
            "activation": Key("activation", "gelu"),
            "dropout": Key("dropout", 0.1),
            "attention_dropout": Key("attention_dropout", 0.1),
            "seq_classif_dropout": Key("head_dropout", 0.2),
            "initializer_range": Key("initializer_range", 0.02),
            "pad_token_id": Key("pad_id", 0),
        },
        harmless=frozenset({"sinusoidal_pos_embds", "qa_dropout", "tie_weights_", "tie_word_embeddings"}),
        constants={"token_types": 0, "norm_eps": 1e-12, "head_activation": "relu"},
    ),
    base="distilbert.",
    classes={"hidden": "DistilBertModel", "embedding": "DistilBertModel",
             "classification": "DistilBertForSequenceClassification",
             "token-classification": "DistilBertForTokenClassification"},
    body=(
        *_tables("word", "position"),
        *_norm("embeddings/norm", "embeddings.LayerNorm"),
        *_linear("layers/attention/query", "transformer.layer.{}.attention.q_lin"),
        *_linear("layers/attention/key", "transformer.layer.{}.attention.k_lin"),
        *_linear("layers/attention/value", "transformer.layer.{}.attention.v_lin"),
        *_linear("layers/attention/out", "transformer.layer.{}.attention.out_lin", "out"),
        *_norm("layers/attention_norm", "transformer.layer.{}.sa_layer_norm"),
        *_linear("layers/mlp/up", "transformer.layer.{}.ffn.lin1"),
        *_linear("layers/mlp/down", "transformer.layer.{}.ffn.lin2"),
        *_norm("layers/mlp_norm", "transformer.layer.{}.output_layer_norm"),
    ),
    head={"classification": (*_linear("pooler", "!pre_classifier"), *_CLASSIFIER), "token-classification": _CLASSIFIER},
    others=(r"vocab_(transform|layer_norm|projector)\..*", r"qa_outputs\..*", r"(pre_)?classifier\..*"),
)

ENCODERS: Mapping[str, EncoderFamily] = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
}
