"""What the keys and tensors of a GGUF file mean in Hugging Face's terms: llama, qwen, gemma and their kin."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft.errors import CheckpointError, ModelConfigError, nearest
from jpeft.interop.gguf import File, Renamed, Source, opened
from jpeft.interop.gguf_tokens import tokenizer_of
from jpeft.interop.tensors import Tensors
from jpeft.interop.tokenizer import Tokenizer

_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# The keys of a mixture of experts, in the files that are one.
_COUNT, _CHOSEN, _INNER = "expert_count", "expert_used_count", "expert_feed_forward_length"
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
}
# Read below, or said by the tensors' shapes, or nothing that a forward pass computes.
_SEEN = frozenset({
    "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "vocab_size",
    "attention.causal", "tensor_data_layout",
})  # fmt: skip
_BODY = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_SANDWICH = {
    **_BODY,
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}


# Where the experts are: the MLP, then gate, up and down of one of them.
_EXPERTS = {
    "mixtral": ("model.layers.{}.block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("model.layers.{}.mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
        model_type: Hugging Face's name.
        model_class: of the causal language model.
        names: tensor names, without `.weight` and `.bias` where a layer has several.
        keys: keys of its own, and what Hugging Face calls them.
        fixed: configuration that the file does not say because all models of the architecture have it.
        interleaved: whether rows of q and k are stored for interleaved rotary pairs.
        offset: what norm scales are stored with on top of Hugging Face's.
        head_size: whether the size of a head is a key of its own in `config.json`.
    """

    model_type: str
    model_class: str
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _BODY)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    interleaved: bool = False
    offset: float = 0.0
    head_size: bool = True


_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "rope_theta": 10000.0, "attention_bias": False}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True,
                          keys={**_WINDOW, _COUNT: "num_local_experts", _CHOSEN: "num_experts_per_tok"},
                          fixed={"hidden_act": "silu", "rope_theta": 10000.0}),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", head_size=False,
                          fixed={"hidden_act": "silu", "rope_theta": 10000.0, "use_sliding_window": False}),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM",
                          fixed={"hidden_act": "silu", "rope_theta": 10000.0, "use_sliding_window": False}),
    # llama.cpp always makes the probabilities of the chosen experts sum to 1 here.
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM",
                             keys={_COUNT: "num_experts", _CHOSEN: "num_experts_per_tok",
                                   _INNER: "moe_intermediate_size"},
                             fixed={"hidden_act": "silu", "rope_theta": 10000.0, "use_sliding_window": False,
                                    "norm_topk_prob": True}),
    "gemma": Architecture("gemma", "GemmaForCausalLM", fixed=_GEMMA, offset=1.0),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _SANDWICH, {**_WINDOW, **_CAPS}, offset=1.0,
                           fixed={**_GEMMA, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
                                  "final_logit_softcapping": 30.0}),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _SANDWICH, offset=1.0,
                           keys={**_WINDOW, **_CAPS, "rope.freq_base_swa": "rope_local_base_freq"},
                           fixed={**_GEMMA, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10000.0,
                                  "attn_logit_softcapping": None, "final_logit_softcapping": None}),
}
# The two sizes whose query scale is not that of a head: {architecture: layers}. No key says it.
_SCALE_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
_WINDOW_EVERY = {"gemma2": 2, "gemma3": 6}


class Model(NamedTuple):
    """What a GGUF file holds, in Hugging Face's terms.

    Attributes:
        config: as a `config.json` would say it.
        tensors: under Hugging Face's names.
        tokenizer: None if the file has none.
    """

    config: dict[str, Any]
    tensors: Tensors
    tokenizer: Tokenizer | None


def read_gguf(path: Path) -> Model:
    """Read what a GGUF file says of a causal language model; its tensors are read later, one by one.

    Args:
        path: the file, or one of the parts of a model; the others lie beside it.

    Raises:
        CheckpointError: the file or its tokenizer is damaged, or encoded in a way that is not implemented.
        ModelConfigError: the architecture, or a key of it, is not implemented.
    """
    file = opened(path)
    kind = str(file.metadata.get("general.architecture"))
    if kind not in ARCHITECTURES:
        raise ModelConfigError(f"{path}: architecture {kind!r} is not implemented, only {', '.join(ARCHITECTURES)}")
    config = _config(file, kind, ARCHITECTURES[kind])
    tokenizer = tokenizer_of(file, config["vocab_size"], config["max_position_embeddings"])
    for role, number in (tokenizer.special if tokenizer else {}).items():
        if role in ("bos_token", "eos_token", "pad_token"):
            config[f"{role}_id"] = number
    return Model(config, Renamed(file, _names(file, config, ARCHITECTURES[kind])), tokenizer)


def _config(file: File, kind: str, arch: Architecture) -> dict[str, Any]:
    said = {key.removeprefix(f"{kind}."): value for key, value in file.metadata.items() if key.startswith(f"{kind}.")}
    known = {**_KEYS, **_OPTIONAL, **arch.keys}
    needed = {*_KEYS, *((_COUNT, _CHOSEN) if said.get(_COUNT) else ())}
    if _INNER in arch.keys:
        needed = (needed | {_COUNT, _CHOSEN, _INNER}) - {"feed_forward_length"}
    lines = [f"{kind}.{key} is missing" for key in [*known] if key in needed and key not in said]
    lines += [f"{kind}.{key} = {str(value)[:60]} is not implemented ({nearest(key, [*known, *_SEEN], 1)})"
              for key, value in said.items() if key not in known and key not in _SEEN and value not in (0, False)]
    lines += [f"{kind}.{key} = {str(value)[:60]} must be one number" for key, value in said.items()
              if key in known and (isinstance(value, bool) or not isinstance(value, int | float))]
    if lines:
        raise ModelConfigError(f"{file.where}: {'; '.join(lines)}")
    table = file.infos.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{file.where} has no token_embd.weight [V, D]; it is no complete model")
    config = {"architectures": [arch.model_class], "model_type": arch.model_type, **arch.fixed,
              **{known[key]: value for key, value in said.items() if key in known}}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["vocab_size"] = table.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.infos
    _heads(file, said, config, arch)
    if kind in ("llama", "qwen3", "qwen3moe"):
        config["attention_bias"] = "blk.0.attn_q.bias" in file.infos
    if kind == "llama":
        _llama(file, config)
    if kind in _WINDOW_EVERY:
        _gemma(kind, config)
    scaling = _scaling(file, said, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _heads(file: File, said: Mapping[str, Any], config: dict[str, Any], arch: Architecture) -> None:
    default = config["hidden_size"] // config["num_attention_heads"]
    size = said.get("attention.key_length", said.get("rope.dimension_count", default))
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if said.get(key, size) != size:
            raise ModelConfigError(f"{file.where}: {key} = {said[key]} is not implemented beside heads of {size}")
    if arch.head_size:
        config["head_dim"] = size
    elif size != default:
        raise ModelConfigError(f"{file.where}: heads of {size} are not implemented for {arch.model_type}, "
                               f"only {default}")


def _llama(file: File, config: dict[str, Any]) -> None:
    """Mistral and Mixtral are stored as llama; only the window and the experts tell them."""
    if not config.get("num_local_experts"):
        for key in ("num_local_experts", "num_experts_per_tok"):
            config.pop(key, None)
    if "num_local_experts" in config:
        config.update(architectures=["MixtralForCausalLM"], model_type="mixtral")
        config.setdefault("sliding_window", None)
        del config["attention_bias"]
    elif config.get("sliding_window"):
        config.update(architectures=["MistralForCausalLM"], model_type="mistral")
        del config["attention_bias"]
    else:
        config.pop("sliding_window", None)
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.infos


def _gemma(kind: str, config: dict[str, Any]) -> None:
    layers, every = config["num_hidden_layers"], _WINDOW_EVERY[kind]
    config["layer_types"] = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    by_width = layers == _SCALE_BY_WIDTH[kind]
    config["query_pre_attn_scalar"] = \
        config["hidden_size"] // config["num_attention_heads"] if by_width else config["head_dim"]


def _scaling(file: File, said: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = said.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.infos:
        return _llama3(file, config)
    if kind == "none" or said.get("rope.scaling.factor", 1.0) in (0.0, 1.0):
        return None
    scaling = {"rope_type": kind, "factor": said["rope.scaling.factor"]}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = said.get(
            "rope.scaling.original_context_length", config["max_position_embeddings"])
    elif kind != "linear":
        raise ModelConfigError(f"{file.where}: rope.scaling.type {kind!r} is not implemented, only none, linear, yarn")
    return scaling


def _llama3(file: File, config: Mapping[str, Any]) -> dict[str, Any]:
    """Find the llama3 scaling that has the stored divisors of the rotary frequencies."""
    stored = file.read("rope_freqs.weight").astype(np.float64)
    size, theta = config["head_dim"], config["rope_theta"]
    wave = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    for old in (8192, 4096, 2048, 16384, 32768):
        for factor in sorted({round(float(stored.max()), 3), 8.0, 32.0}):
            mix = (old / wave - 1.0) / 3.0
            want = np.where(wave < old / 4, 1.0, np.where(wave > old, factor, 1 / ((1 - mix) / factor + mix)))
            if stored.shape == want.shape and np.allclose(stored, want, rtol=1e-3):
                return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": old}
    raise ModelConfigError(f"{file.where}: the divisors in rope_freqs.weight are those of no known scaling; use the "
                           "safetensors of this model")


def _names(file: File, config: Mapping[str, Any], arch: Architecture) -> dict[str, Source]:
    """Return the sources by Hugging Face name; a strange tensor keeps its name and is reported by `match`."""
    names = {}
    for old in file.infos:
        if old == "rope_freqs.weight":
            continue
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", old)
        stem = f"blk.{{}}.{found[2]}" if found else old
        new = arch.names.get(stem, old)
        experts = dict(_experts(file, old, config))
        if experts:
            names.update(experts)
            continue
        if found and stem in arch.names:
            new = f"{new.format(found[1])}.{found[3]}"
        change: Callable[[np.ndarray], np.ndarray] | None = None
        if arch.interleaved and found and found[2] in ("attn_q", "attn_k"):
            change = _Unpermute(config["num_attention_heads" if found[2] == "attn_q" else "num_key_value_heads"])
        elif arch.offset and new.endswith("norm.weight"):
            change = _Minus(arch.offset)
        names[new] = Source(old, change)
    return names


def _experts(file: File, old: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Source]]:
    """Yield what a tensor of a mixture of experts is: the router, all experts, or (in older files) one of them."""
    at, matrices = _EXPERTS.get(config["model_type"], ("", {}))
    found = re.fullmatch(r"blk\.(\d+)\.ffn_(\w+?)(_inp|_exps|\.\d+)\.weight", old)
    if not at or found is None:
        return
    layer, which, kind = found.groups()
    if (which, kind) == ("gate", "_inp"):
        yield f"{at.format(layer)}.gate.weight", Source(old)
    elif which in matrices and kind == "_exps" and len(file.infos[old].shape) == 3:
        for expert in range(file.infos[old].shape[0]):
            yield f"{at.format(layer)}.experts.{expert}.{matrices[which]}.weight", Source(old, None, expert)
    elif which in matrices and kind.startswith("."):
        yield f"{at.format(layer)}.experts{kind}.{matrices[which]}.weight", Source(old)


@dataclasses.dataclass(frozen=True)
class _Unpermute:
    """From rows for rotary pairs (0, 1), (2, 3), ... to rows for pairs of the two halves of a head."""

    heads: int

    def __call__(self, array: np.ndarray) -> np.ndarray:
        if array.shape[0] % (2 * self.heads):
            return array
        halves = array.reshape(self.heads, -1, 2, *array.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


@dataclasses.dataclass(frozen=True)
class _Minus:
    offset: float

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return (array.astype(np.float32) - np.float32(self.offset)).astype(array.dtype)
