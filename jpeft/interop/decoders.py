"""Causal language models as Hugging Face stores them: what config keys mean, what tensors are called. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jpeft.interop.checkpoint import Row
from jpeft.interop.decoder_family import DecoderFamily
from jpeft.interop.hfconfig import ConfigTable, Key


def _linear(leaf: str, stored: str, layout: str = "in") -> tuple[Row, ...]:
    return Row(f"{leaf}/kernel", f"{stored}.weight", layout), Row(f"{leaf}/bias", f"{stored}.bias", "flat")


def _norm(leaf: str, stored: str) -> tuple[Row, ...]:
    return Row(f"{leaf}/scale", f"{stored}.weight"), Row(f"{leaf}/bias", f"{stored}.bias")


_AT = "layers.{}"
_BODY = (
    Row("embed/embedding", "embed_tokens.weight"),
    Row("norm/scale", "norm.weight"),
    *_linear("layers/attention/query", f"{_AT}.self_attn.q_proj"),
    *_linear("layers/attention/key", f"{_AT}.self_attn.k_proj"),
    *_linear("layers/attention/value", f"{_AT}.self_attn.v_proj"),
    *_linear("layers/attention/qkv", f"{_AT}.self_attn.qkv_proj"),
    *_linear("layers/attention/out", f"{_AT}.self_attn.o_proj", "out"),
    Row("layers/attention/query_norm/scale", f"{_AT}.self_attn.q_norm.weight"),
    Row("layers/attention/key_norm/scale", f"{_AT}.self_attn.k_norm.weight"),
    *_linear("layers/mlp/gate", f"{_AT}.mlp.gate_proj"),
    *_linear("layers/mlp/up", f"{_AT}.mlp.up_proj"),
    *_linear("layers/mlp/gate_up", f"{_AT}.mlp.gate_up_proj"),
    *_linear("layers/mlp/down", f"{_AT}.mlp.down_proj"),
)
_BEFORE = (Row("layers/attention_norm/scale", f"{_AT}.input_layernorm.weight"),
           Row("layers/mlp_norm/scale", f"{_AT}.post_attention_layernorm.weight"))
_AFTER = (Row("layers/attention_post_norm/scale", f"{_AT}.post_attention_layernorm.weight"),
          Row("layers/mlp_post_norm/scale", f"{_AT}.post_feedforward_layernorm.weight"))
_BOTH = (_BEFORE[0], Row("layers/mlp_norm/scale", f"{_AT}.pre_feedforward_layernorm.weight"), *_AFTER)


def _experts(at: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    kernels = (("gate", gate), ("up", up), ("down", down))
    return (Row("layers/moe/router/kernel", f"{_AT}.{at}.gate.weight", "in"),
            *(Row(f"layers/moe/{leaf}/kernel", f"{_AT}.{at}.experts.{{}}.{name}.weight", "in")
              for leaf, name in kernels))


def _keys(vocab: int, width: int, mlp: int | None, layers: int, heads: int, kv: int | None, positions: int,
          pad: int | None = None, eps: float = 1e-6, tied: bool = False,
          more: Mapping[str, Key] | None = None) -> dict[str, Key]:
    return {
        "vocab_size": Key("vocab_size", vocab),
        "hidden_size": Key("hidden_size", width),
        "intermediate_size": Key("mlp_size", mlp),
        "num_hidden_layers": Key("layers", layers),
        "num_attention_heads": Key("heads", heads),
        "num_key_value_heads": Key("kv_heads", kv, True),
        "head_dim": Key("head_size", None),
        "hidden_act": Key("activation", "silu"),
        "max_position_embeddings": Key("positions", positions),
        "initializer_range": Key("initializer_range", 0.02),
        "rms_norm_eps": Key("norm_eps", eps),
        "attention_dropout": Key("attention_dropout", 0.0),
        "tie_word_embeddings": Key("tied", tied),
        "pad_token_id": Key("pad_id", pad, True),
        **(more or {}),
    }


def _table(keys: Mapping[str, Key], fixed: Mapping[str, tuple[Any, ...]] | None = None,
           harmless: frozenset[str] = frozenset(), constants: Mapping[str, Any] | None = None) -> ConfigTable:
    return ConfigTable(keys, fixed or {}, harmless, constants or {}, {"kv_heads": "heads"})


_BIAS = {"attention_bias": Key("bias", False)}
_MLP_BIAS = {"mlp_bias": Key("mlp_bias", False)}
_LLAMA = DecoderFamily(
    "Llama", _table(_keys(32000, 4096, 11008, 32, 32, None, 2048, more={**_BIAS, **_MLP_BIAS}),
                    harmless=frozenset({"pretraining_tp"})), (*_BODY, *_BEFORE))
_MISTRAL = DecoderFamily("Mistral", _table(_keys(32000, 4096, 14336, 32, 32, 8, 131072)), (*_BODY, *_BEFORE),
                         windows="all", window=4096)
_MIXTRAL = DecoderFamily(
    "Mixtral",
    _table(_keys(32000, 4096, 14336, 32, 32, 8, 131072, eps=1e-5, more={
        "num_local_experts": Key("experts", 8), "num_experts_per_tok": Key("experts_chosen", 2)}),
           {"output_router_logits": (False,), "router_jitter_noise": (0.0,)}, frozenset({"router_aux_loss_coef"})),
    (*_BODY, *_BEFORE, *_experts("block_sparse_moe", "w1", "w3", "w2")), windows="all", theta=1e6)
_QWEN2 = DecoderFamily("Qwen2", _table(_keys(151936, 4096, 22016, 32, 32, 32, 32768), constants={"qkv_bias": True}),
                       (*_BODY, *_BEFORE), windows="late", window=4096)
_QWEN3 = DecoderFamily(
    "Qwen3", _table({**_keys(151936, 4096, 22016, 32, 32, 32, 32768, more=_BIAS), "head_dim": Key("head_size", 128)},
                    constants={"qk_norm": "head"}), (*_BODY, *_BEFORE), windows="late", window=4096)
_QWEN3_MOE = DecoderFamily(
    "Qwen3Moe",
    _table({**{k: v for k, v in _keys(151936, 2048, None, 24, 32, 4, 32768, more=_BIAS).items()
               if k != "intermediate_size"},
            "moe_intermediate_size": Key("mlp_size", 768), "num_experts_per_tok": Key("experts_chosen", 8),
            "num_experts": Key("experts", 128), "norm_topk_prob": Key("experts_renormalise", False)},
           {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None), "output_router_logits": (False,)},
           frozenset({"router_aux_loss_coef", "intermediate_size", "max_window_layers"}), {"qk_norm": "head"}),
    (*_BODY, *_BEFORE, *_experts("mlp", "gate_proj", "up_proj", "down_proj")), windows="switch", window=4096)
_GEMMA_ALL = {"norm_centred": True, "embed_by_width": True}
_ONE_WAY = {"use_bidirectional_attention": (False, None)}
_GEMMA = DecoderFamily(
    "Gemma",
    _table({**_keys(256000, 3072, 24576, 28, 16, 16, 8192, 0, tied=True, more=_BIAS), "head_dim": Key("head_size", 256),
            "hidden_act": Key("activation", "gelu_pytorch_tanh")},
           {**_ONE_WAY, "hidden_activation": (None, "gelu_pytorch_tanh")}, constants=_GEMMA_ALL), (*_BODY, *_BEFORE))


def _later_gemma(vocab: int, positions: int, logit_cap: float | None) -> dict[str, Key]:
    keys = _keys(vocab, 2304, 9216, 26, 8, 4, positions, 0, tied=True, more=_BIAS)
    del keys["hidden_act"]
    return {**keys, "head_dim": Key("head_size", 256), "hidden_activation": Key("activation", "gelu_pytorch_tanh"),
            "query_pre_attn_scalar": Key("query_scalar", 256.0),
            "final_logit_softcapping": Key("logit_cap", logit_cap, True)}


_UNREAD = frozenset({"hidden_act", "cache_implementation"})
_GEMMA2 = DecoderFamily(
    "Gemma2", _table({**_later_gemma(256000, 8192, 30.0), "attn_logit_softcapping": Key("attention_cap", 50.0, True)},
                     _ONE_WAY, _UNREAD, {**_GEMMA_ALL, "norm_at": "both"}),
    (*_BODY, *_BOTH), windows="every", window=4096, every=2)
_GEMMA3 = DecoderFamily(
    "Gemma3", _table(_later_gemma(262208, 131072, None), {**_ONE_WAY, "attn_logit_softcapping": (None,)}, _UNREAD,
                     {**_GEMMA_ALL, "norm_at": "both", "qk_norm": "head"}),
    (*_BODY, *_BOTH), windows="every", window=4096, every=6, rope="two", theta=1e6,
    suffixes=("ForCausalLM", "TextModel", "TextForSequenceClassification"))
_PHI3 = DecoderFamily(
    "Phi3",
    _table(_keys(32064, 3072, 8192, 32, 32, None, 4096, 32000, 1e-5, more={
        "resid_pdrop": Key("dropout", 0.0), "embd_pdrop": Key("embedding_dropout", 0.0)}),
           {"attention_bias": (False,), "mlp_bias": (False,), "lm_head_bias": (False,), "full_attn_mod": (1,),
            "interpolate_factor": (1,)}, constants={"fused_qkv": "blocks", "fused_mlp": True}),
    (*_BODY, *_BEFORE), rope="partial", windows="all")
_SMOLLM3 = DecoderFamily(
    "SmolLM3", _table(_keys(128256, 2048, 11008, 36, 16, 4, 32768, 128004, tied=True, more={**_BIAS, **_MLP_BIAS}),
                      harmless=frozenset({"pretraining_tp", "max_window_layers"})),
    (*_BODY, *_BEFORE), theta=2e6, windows="nope")
_OLMO2 = DecoderFamily("Olmo2", _table(_keys(50304, 4096, 11008, 32, 32, None, 2048, 1, 1e-5, more=_BIAS),
                                       constants={"norm_at": "after", "qk_norm": "full"}), (*_BODY, *_AFTER))
_NEOX_BODY = (
    Row("embed/embedding", "embed_in.weight"),
    *_norm("norm", "final_layer_norm"),
    *_linear("layers/attention/qkv", f"{_AT}.attention.query_key_value"),
    *_linear("layers/attention/out", f"{_AT}.attention.dense", "out"),
    *_norm("layers/attention_norm", f"{_AT}.input_layernorm"),
    *_norm("layers/mlp_norm", f"{_AT}.post_attention_layernorm"),
    *_linear("layers/mlp/up", f"{_AT}.mlp.dense_h_to_4h"),
    *_linear("layers/mlp/down", f"{_AT}.mlp.dense_4h_to_h"),
)
_PLAIN_MLP = {"norm": "layer", "gated": False, "mlp_bias": True, "head_size": None, "kv_heads": None}
_NEOX = DecoderFamily(
    "GPTNeoX",
    _table({**{k: v for k, v in _keys(50432, 6144, 24576, 44, 64, None, 2048).items()
               if k not in ("num_key_value_heads", "head_dim", "rms_norm_eps")},
            "hidden_act": Key("activation", "gelu"), "layer_norm_eps": Key("norm_eps", 1e-5),
            "hidden_dropout": Key("dropout", 0.0), "use_parallel_residual": Key("parallel", True),
            "attention_bias": Key("bias", True)},
           harmless=frozenset({"classifier_dropout"}), constants={**_PLAIN_MLP, "fused_qkv": "heads"}),
    _NEOX_BODY, base="gpt_neox.", out="embed_out.weight", rope="neox")
_GPT2 = DecoderFamily(
    "GPT2",
    _table({"vocab_size": Key("vocab_size", 50257), "n_positions": Key("positions", 1024),
            "n_embd": Key("hidden_size", 768), "n_layer": Key("layers", 12), "n_head": Key("heads", 12),
            "n_inner": Key("mlp_size", None), "activation_function": Key("activation", "gelu_new"),
            "resid_pdrop": Key("dropout", 0.1), "embd_pdrop": Key("embedding_dropout", 0.1),
            "attn_pdrop": Key("attention_dropout", 0.1), "layer_norm_epsilon": Key("norm_eps", 1e-5),
            "initializer_range": Key("initializer_range", 0.02), "tie_word_embeddings": Key("tied", True),
            "scale_attn_weights": Key("scaled", True), "pad_token_id": Key("pad_id", None),
            "scale_attn_by_inverse_layer_idx": Key("scale_by_depth", False)},
           harmless=frozenset({"n_ctx", "reorder_and_upcast_attn", "summary_type", "summary_use_proj",
                               "summary_activation", "summary_proj_to_labels", "summary_first_dropout"}),
           constants={**_PLAIN_MLP, "fused_qkv": "thirds", "position_table": True, "qkv_bias": True, "out_bias": True}),
    (
        Row("embed/embedding", "wte.weight"),
        Row("position/embedding", "wpe.weight"),
        *_norm("norm", "ln_f"),
        *_linear("layers/attention/qkv", "h.{}.attn.c_attn", "rows"),
        *_linear("layers/attention/out", "h.{}.attn.c_proj", "columns"),
        *_norm("layers/attention_norm", "h.{}.ln_1"),
        *_norm("layers/mlp_norm", "h.{}.ln_2"),
        *_linear("layers/mlp/up", "h.{}.mlp.c_fc", "same"),
        *_linear("layers/mlp/down", "h.{}.mlp.c_proj", "same"),
    ),
    base="transformer.", rope="none", suffixes=("LMHeadModel", "Model", "ForSequenceClassification"))

DECODERS: Mapping[str, DecoderFamily] = {
    "llama": _LLAMA, "mistral": _MISTRAL, "mixtral": _MIXTRAL, "qwen2": _QWEN2, "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE, "gemma": _GEMMA, "gemma2": _GEMMA2, "gemma3_text": _GEMMA3, "phi3": _PHI3,
    "smollm3": _SMOLLM3, "olmo2": _OLMO2, "gpt_neox": _NEOX, "gpt2": _GPT2,
}  # fmt: skip
