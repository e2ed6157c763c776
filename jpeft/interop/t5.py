"""T5, Flan-T5 and mT5 as Hugging Face stores them: what config keys mean, what tensors are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jpeft.errors import ModelConfigError
from jpeft.interop.checkpoint import Names, Row
from jpeft.interop.family import Family
from jpeft.interop.hfconfig import ConfigTable, Key
from jpeft.interop.tensors import Tensors, same
from jpeft.models.t5 import T5
from jpeft.models.t5_config import TASKS, T5Config

_HEAD, _WORDS = "lm_head.weight", "shared.weight"
_COPIES = (r"(encoder|decoder)\.embed_tokens\.weight",
           r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")


def _attention(leaf: str, stored: str) -> tuple[Row, ...]:
    into = tuple(Row(f"{leaf}/{name}/kernel", f"{stored}.{name[0]}.weight", "in") for name in ("query", "key", "value"))
    return (*into, Row(f"{leaf}/out/kernel", f"{stored}.o.weight", "out"))


def _stack(side: str, mlp: int, gated: bool) -> tuple[Row, ...]:
    at, leaf = f"{side}.block.{{}}.layer", f"{side}/layers"
    dense = f"{at}.{mlp}.DenseReluDense"
    up = (Row(f"{leaf}/mlp/gate/kernel", f"{dense}.wi_0.weight", "in"),
          Row(f"{leaf}/mlp/up/kernel", f"{dense}.wi_1.weight", "in")) if gated else \
        (Row(f"{leaf}/mlp/up/kernel", f"{dense}.wi.weight", "in"),)
    cross = (*_attention(f"{leaf}/cross", f"{at}.1.EncDecAttention"),
             Row(f"{leaf}/cross_norm/scale", f"{at}.1.layer_norm.weight")) if side == "decoder" else ()
    return (Row(f"{side}/bias/embedding", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
            *_attention(f"{leaf}/attention", f"{at}.0.SelfAttention"),
            Row(f"{leaf}/attention_norm/scale", f"{at}.0.layer_norm.weight"), *cross, *up,
            Row(f"{leaf}/mlp/down/kernel", f"{dense}.wo.weight", "out"),
            Row(f"{leaf}/mlp_norm/scale", f"{at}.{mlp}.layer_norm.weight"),
            Row(f"{side}/norm/scale", f"{side}.final_layer_norm.weight"))


def _keys(vocab: int, mlp: int, layers: int, heads: int, inner: str) -> dict[str, Key]:
    return {
        "vocab_size": Key("vocab_size", vocab), "d_model": Key("hidden_size", 512), "d_kv": Key("head_size", 64),
        "d_ff": Key("mlp_size", mlp), "num_layers": Key("layers", layers),
        "num_decoder_layers": Key("decoder_layers", None), "num_heads": Key("heads", heads),
        "relative_attention_num_buckets": Key("buckets", 32),
        "relative_attention_max_distance": Key("max_distance", 128), "dropout_rate": Key("dropout", 0.1),
        "layer_norm_epsilon": Key("norm_eps", 1e-6), "feed_forward_proj": Key("inner", inner),
        "pad_token_id": Key("pad_id", 0, True),
        "decoder_start_token_id": Key("start_id", 0, True),
    }


@dataclasses.dataclass(frozen=True)
class T5Family(Family):
    """One `model_type`.

    Attributes:
        stem: of the names of its architectures.
        config: what the keys of `config.json` mean.
        scales: whether the decoder's output may be scaled before the head.
    """

    stem: str
    config: ConfigTable
    scales: bool

    model: ClassVar[type[T5]] = T5
    tasks: ClassVar[tuple[str, ...]] = TASKS
    default: ClassVar[str] = "seq2seq"
    head_leaf: ClassVar[str] = "lm_head/kernel"
    fresh: ClassVar[tuple[str, ...]] = ()
    saved: ClassVar[tuple[str, ...]] = TASKS
    rates: ClassVar[tuple[str, ...]] = ("dropout",)

    @property
    def classes(self) -> Mapping[str, str]:  # type: ignore[override]
        return {"seq2seq": f"{self.stem}ForConditionalGeneration", "hidden": f"{self.stem}Model"}

    def names(self, config: T5Config) -> Names:
        gated = config.gated
        rows = (Row("embed/embedding", _WORDS), *_stack("encoder", 1, gated), *_stack("decoder", 2, gated))
        unread, others = list(_COPIES), [r"classification_head\..*", r"qa_outputs\..*"]
        if config.task == "hidden":
            others.append(r"lm_head\..*")
        elif config.tied:
            unread.append(r"lm_head\.weight")
        else:
            rows = (*rows, Row("lm_head/kernel", _HEAD, "in"))
        return Names(rows, ("",), (), tuple(unread), tuple(others))

    def read(self, raw: Mapping[str, Any], where: str, **fields: Any) -> T5Config:
        plain = self.config.read(raw, where)
        plain.update({name: 0 for name in ("pad_id", "start_id") if plain[name] is None})
        gate, _, name = plain.pop("inner").rpartition("-")
        plain["gated"] = gate == "gated"
        plain["activation"] = "gelu_new" if plain["gated"] and name == "gelu" else name
        says = {"is_gated_act": plain["gated"], "dense_act_fn": plain["activation"]}
        wrong = [f"{key} = {raw[key]!r}" for key, value in says.items() if raw.get(key, value) != value]
        if gate not in ("", "gated") or wrong:
            raise ModelConfigError(f"{where}: feed_forward_proj = {raw.get('feed_forward_proj')!r} does not go with "
                                   f"{' and '.join(wrong) or 'this library'}; it must be an activation or gated-...")
        # An untied head was stored with a config that says so, and its input is not scaled.
        return T5Config(**{**plain, "scaled": self.scales and _scaled(raw), **fields})

    def write(self, raw: Mapping[str, Any], config: T5Config) -> dict[str, Any]:
        inner = "gelu" if config.gated and config.activation == "gelu_new" else config.activation
        says = {**dataclasses.asdict(config), "inner": f"gated-{inner}" if config.gated else inner}
        new = self.config.write(raw, says)
        new["is_encoder_decoder"] = True
        if any(key in raw for key in ("is_gated_act", "dense_act_fn")):
            new.update(is_gated_act=config.gated, dense_act_fn=config.activation)
        if self.scales and _scaled(raw) != config.scaled:
            new["tie_word_embeddings"] = config.scaled
            new.pop("scale_decoder_outputs", None)
        again = self.read(new, "the config.json to write", task=config.task, tied=config.tied)
        if again != config:
            differs = [f.name for f in dataclasses.fields(config) if getattr(again, f.name) != getattr(config, f.name)]
            raise ModelConfigError(f"a {self.stem} cannot have this {', '.join(differs)}; write it as another "
                                   "model_type")
        return new

    def adjusted(self, config: T5Config, held: Mapping[str, Any], tensors: Tensors) -> T5Config:
        """Tie the head unless the checkpoint stores another one, as transformers does."""
        if config.task != "seq2seq" or _HEAD not in tensors.infos or _WORDS not in tensors.infos:
            return config
        return dataclasses.replace(config, tied=same(tensors, _HEAD, _WORDS))


def _scaled(raw: Mapping[str, Any]) -> bool:
    return bool(raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True) is not False))


_FIXED = {"is_encoder_decoder": (True,), "scale_decoder_outputs": (True, False)}
_UNREAD = frozenset({"tie_word_embeddings", "dense_act_fn", "is_gated_act", "classifier_dropout", "n_positions",
                     "initializer_factor", "tokenizer_class", "scale_decoder_outputs"})
T5S: Mapping[str, T5Family] = {
    "t5": T5Family("T5", ConfigTable(_keys(32128, 2048, 6, 8, "relu"), _FIXED, _UNREAD,
                                     fallbacks={"decoder_layers": "layers"}), True),
    "mt5": T5Family("MT5", ConfigTable(_keys(250112, 1024, 8, 6, "gated-gelu"), _FIXED, _UNREAD,
                                       fallbacks={"decoder_layers": "layers"}), False),
}
