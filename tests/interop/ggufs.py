"""GGUF files that the tests write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

SIZES = {"context_length": 64, "block_count": 2, "embedding_length": 64, "feed_forward_length": 96,
         "attention.head_count": 4, "attention.head_count_kv": 2}
ROWS, HEAD, EXPERTS = 40, 16, 3
MIXTURE = {"expert_count": EXPERTS, "expert_used_count": 2}
QUANTS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
Q = gguf.GGMLQuantizationType


def tensors(kind: str, bias: bool = False, tied: bool = True) -> dict[str, np.ndarray]:
    """A model as Hugging Face stores it; "mixtral" is a kind of its own."""
    rng = np.random.default_rng(0)
    width, inner, q, kv = SIZES["embedding_length"], SIZES["feed_forward_length"], 4 * HEAD, 2 * HEAD
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, width), "model.norm.weight": (width,)}
    if not tied:
        shapes["lm_head.weight"] = (ROWS, width)
    for i in range(SIZES["block_count"]):
        one: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (q, width), "self_attn.k_proj.weight": (kv, width),
            "self_attn.v_proj.weight": (kv, width), "self_attn.o_proj.weight": (width, q),
            "mlp.gate_proj.weight": (inner, width), "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner), "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,)}
        if bias:
            one |= {f"self_attn.{x}_proj.bias": (n,) for x, n in (("q", q), ("k", kv), ("v", kv))}
        if kind in ("mixtral", "qwen3moe"):
            at = "mlp" if kind == "qwen3moe" else "block_sparse_moe"
            names = "gate_proj up_proj down_proj" if kind == "qwen3moe" else "w1 w3 w2"
            one = {name: shape for name, shape in one.items() if not name.startswith("mlp.")}
            one[f"{at}.gate.weight"] = (EXPERTS, width)
            for name, shape in zip(names.split(), ((inner, width), (inner, width), (width, inner)), strict=True):
                one |= {f"{at}.experts.{e}.{name}.weight": shape for e in range(EXPERTS)}
        if kind in ("qwen3", "qwen3moe", "gemma3"):
            one |= {"self_attn.q_norm.weight": (HEAD,), "self_attn.k_norm.weight": (HEAD,)}
        if kind in ("gemma2", "gemma3"):
            one |= {"pre_feedforward_layernorm.weight": (width,), "post_feedforward_layernorm.weight": (width,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in one.items()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def stored(kind: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same as llama.cpp's converter stores it, written down a second time and the other way round."""
    sandwich = kind in ("gemma2", "gemma3")
    inner = {"input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
             "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate_proj": "ffn_gate",
             "up_proj": "ffn_up", "down_proj": "ffn_down", "gate": "ffn_gate_inp",
             "w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down", "pre_feedforward_layernorm": "ffn_norm",
             "post_attention_layernorm": "post_attention_norm" if sandwich else "ffn_norm",
             "post_feedforward_layernorm": "post_ffw_norm"}
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    out: dict[str, Any] = {}
    for name, array in values.items():
        parts = name.split(".")
        new = outer.get(name) or f"blk.{parts[2]}.{inner[parts[-2]]}.{parts[-1]}"
        if ".experts." in name:
            out.setdefault(f"blk.{parts[2]}.{inner[parts[-2]]}_exps.weight", []).append(array)
            continue
        if kind in ("llama", "mixtral") and parts[-2] in ("q_proj", "k_proj"):
            heads = 4 if parts[-2] == "q_proj" else 2
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = array.swapaxes(1, 2).reshape(values[name].shape)
        out[new] = array + 1 if kind.startswith("gemma") and name.endswith("norm.weight") else array
    return {name: np.stack(array) if isinstance(array, list) else array for name, array in out.items()}


def write(path: Path, kind: str = "llama", values: dict[str, np.ndarray] | None = None,
          keys: dict[str, Any] | None = None, encode: str = "F32", finish: Callable[[Any], None] | None = None,
          **split: int) -> Path:
    """Write a GGUF file; `keys` of the architecture replace those of `SIZES`, None takes one away."""
    values, arch = tensors(kind) if values is None else values, "llama" if kind == "mixtral" else kind
    writer = gguf.GGUFWriter(path, arch, **split)
    said: dict[str, Any] = {**SIZES, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 5e5,
                            "rope.dimension_count": HEAD, "attention.key_length": HEAD,
                            **(MIXTURE if kind in ("mixtral", "qwen3moe") else {}),
                            **({"expert_feed_forward_length": 96} if kind == "qwen3moe" else {}), **(keys or {})}
    for key, value in said.items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
    for name, array in stored(kind, values).items():
        code = Q[encode] if array.ndim > 1 else Q.F32
        data = gguf.quants.quantize(array, code)
        writer.add_tensor(name, data, raw_dtype=code)
    if finish:
        finish(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
