"""Small random decoders of every family: their checkpoint folders, written with numpy alone, and inputs for them.

`python tests/models/decoder_cases.py` (torch and transformers installed) records what transformers computes on them in
`golden/decoder.npz`. The stored names are written down here from the format itself, not from the tables of jpeft.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

GOLDEN = Path(__file__).parent / "golden" / "decoder.npz"
VOCAB, ROWS, LENGTH = 24, 2, 8
BASE = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 32, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}
NEOX = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 12, "bos_token_id": 1,
        "eos_token_id": 2}
STEMS = {"llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen3": "Qwen3",
         "qwen3_moe": "Qwen3Moe", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "phi3": "Phi3",
         "smollm3": "SmolLM3", "olmo2": "Olmo2", "gpt_neox": "GPTNeoX", "gpt2": "GPT2"}
TIED = ("gemma", "gemma2", "gemma3_text", "smollm3", "gpt2")


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint and one call.

    Attributes:
        name: of the row.
        config: `config.json`.
        padding: "right", "left" or None.
        atol: closeness to transformers, absolute, in float32.
    """

    name: str
    config: dict[str, Any]
    padding: str | None = "right"
    atol: float = 3e-5

    @property
    def kind(self) -> str:
        return str(self.config["model_type"])

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    @property
    def task(self) -> str:
        name = self.architecture
        return "classification" if name.endswith("Classification") else "hidden" if name.endswith("Model") and \
            not name.endswith("LMHeadModel") else "causal-lm"

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", self.kind in TIED))


def _case(name: str, kind: str, padding: str | None = "right", end: str = "", **config: Any) -> Case:
    base = GPT2 if kind == "gpt2" else NEOX if kind == "gpt_neox" else BASE
    end = end or ("LMHeadModel" if kind == "gpt2" else "ForCausalLM")
    return Case(name, {**base, "model_type": kind, "architectures": [STEMS[kind] + end], **config}, padding)


def _yarn(**more: Any) -> dict[str, Any]:
    return {"factor": 4.0, "original_max_position_embeddings": 16, **more}


_LONG = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
_TWO = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
_GEMMA2 = {"head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 1.5,
           "final_logit_softcapping": 2.0}
CASES = (
    _case("llama", "llama", None, num_key_value_heads=None),
    _case("llama-odd", "llama", "left", hidden_size=24, num_attention_heads=6, head_dim=8, attention_bias=True,
          mlp_bias=True, tie_word_embeddings=True, rope_theta=500.0, hidden_act="gelu"),
    _case("llama-linear", "llama", rope_scaling={"type": "linear", "factor": 3.0}),
    _case("llama-dynamic", "llama", None, rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=6),
    _case("llama-yarn", "llama", "left", rope_scaling=_yarn(rope_type="yarn")),
    _case("llama-yarn-scaled", "llama", head_dim=16, rope_parameters=_yarn(
        rope_type="yarn", rope_theta=5000.0, mscale=1.2, mscale_all_dim=0.8, beta_fast=4, beta_slow=1, truncate=False)),
    _case("llama-longrope", "llama", None, rope_scaling={
        "rope_type": "longrope", **_LONG, "original_max_position_embeddings": 6, "factor": 4.0}),
    _case("llama-3.1", "llama", head_dim=16, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}),
    _case("llama-base", "llama", "left", "Model"),
    _case("llama-class", "llama", end="ForSequenceClassification", id2label={"0": "a", "1": "b", "2": "c"},
          label2id={"a": 0, "b": 1, "c": 2}),
    _case("mistral", "mistral", sliding_window=3, head_dim=8),
    _case("mistral-full", "mistral", "left", sliding_window=None, num_key_value_heads=1),
    _case("mixtral", "mixtral", "left", num_local_experts=4),
    _case("mixtral-window", "mixtral", num_local_experts=3, num_experts_per_tok=1, sliding_window=4),
    _case("qwen2", "qwen2", "left", tie_word_embeddings=True, rope_theta=1e6),
    _case("qwen2-late", "qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1),
    _case("qwen3", "qwen3", "left", head_dim=8),
    _case("qwen3-types", "qwen3", head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=2,
          layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=True),
    _case("qwen3-moe", "qwen3_moe", "left", **_EXPERTS),
    _case("qwen3-moe-norm", "qwen3_moe", **{**_EXPERTS, "num_experts_per_tok": 3}, norm_topk_prob=True,
          use_sliding_window=True, sliding_window=3),
    _case("gemma", "gemma", "left", head_dim=8, hidden_act="gelu", num_key_value_heads=1),
    _case("gemma2", "gemma2", num_hidden_layers=3, **_GEMMA2),
    _case("gemma2-types", "gemma2", "left", layer_types=["full_attention", "sliding_attention"],
          **{**_GEMMA2, "attn_logit_softcapping": None}),
    _case("gemma3", "gemma3_text", num_hidden_layers=3, head_dim=8, sliding_window=3, sliding_window_pattern=2,
          rope_theta=50000.0, rope_local_base_freq=100.0, rope_scaling={"rope_type": "linear", "factor": 2.0},
          query_pre_attn_scalar=8),
    _case("gemma3-nested", "gemma3_text", "left", head_dim=8, sliding_window=4, rope_parameters=_TWO,
          layer_types=["full_attention", "sliding_attention"], final_logit_softcapping=3.0),
    _case("phi3", "phi3", "left", sliding_window=4),
    _case("phi3-longrope", "phi3", None, hidden_size=32, partial_rotary_factor=0.5, original_max_position_embeddings=6,
          rope_scaling={"type": "longrope", **_LONG}),
    _case("phi4-mini", "phi3", hidden_size=32, partial_rotary_factor=0.75, tie_word_embeddings=True),
    _case("smollm3", "smollm3", "left", num_hidden_layers=3, no_rope_layer_interval=2, rope_theta=1000.0),
    _case("smollm3-window", "smollm3", num_hidden_layers=3, no_rope_layers=[0, 1, 1], use_sliding_window=True,
          sliding_window=3, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    _case("olmo2", "olmo2", "left"),
    _case("olmo2-mha", "olmo2", None, num_key_value_heads=None, attention_bias=True),
    _case("pythia", "gpt_neox", "left", rotary_pct=0.5, hidden_act="gelu_new"),
    _case("neox-serial", "gpt_neox", None, rotary_pct=1.0, use_parallel_residual=False, attention_bias=False,
          rotary_emb_base=100),
    _case("gpt2", "gpt2", "left"),
    _case("gpt2-options", "gpt2", "right", n_inner=20, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False,
          activation_function="relu", tie_word_embeddings=False),
)

_FIRST = {case.kind: case for case in reversed(CASES)}
EACH = [pytest.param(case, id=case.name, marks=() if _FIRST[case.kind] is case else pytest.mark.slow) for case in CASES]
"""One case of each family in the default tier, all of them in the slow one."""
HALF = [pytest.param(*row.values, id=row.id, marks=pytest.mark.slow) if i % 2 else row
        for i, row in enumerate(row for row in EACH if not row.marks)] + [row for row in EACH if row.marks]
"""The same for what is dear: every other family in the default tier."""


def _linear(name: str, out: int, into: int, bias: bool = False) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _neox(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, f, bias = c["hidden_size"], c["intermediate_size"], c.get("attention_bias", True)
    body = {"embed_in.weight": (VOCAB, d), **_norm("final_layer_norm", d)}
    for i in range(c["num_hidden_layers"]):
        at = f"layers.{i}"
        body |= {**_norm(f"{at}.input_layernorm", d), **_norm(f"{at}.post_attention_layernorm", d),
                 **_linear(f"{at}.attention.query_key_value", 3 * d, d, bias),
                 **_linear(f"{at}.attention.dense", d, d, bias), **_linear(f"{at}.mlp.dense_h_to_4h", f, d, True),
                 **_linear(f"{at}.mlp.dense_4h_to_h", d, f, True)}
    return body


def _gpt2(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, f = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
    body = {"wte.weight": (VOCAB, d), "wpe.weight": (c["n_positions"], d), **_norm("ln_f", d)}
    for i in range(c["n_layer"]):
        body |= {**_norm(f"h.{i}.ln_1", d), **_norm(f"h.{i}.ln_2", d)}
        for name, into, out in (("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d), ("mlp.c_fc", d, f),
                                ("mlp.c_proj", f, d)):
            body |= {f"h.{i}.{name}.weight": (into, out), f"h.{i}.{name}.bias": (out,)}
    return body


def _llama(kind: str, c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, f, h = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    k, size = c["num_key_value_heads"] or h, c.get("head_dim") or d // h
    bias, mlp_bias = c.get("attention_bias", False), c.get("mlp_bias", False)
    body = {"embed_tokens.weight": (VOCAB, d), "norm.weight": (d,)}
    norms = {"olmo2": "post_attention post_feedforward",
             "gemma2": "input post_attention pre_feedforward post_feedforward"}
    norms["gemma3_text"] = norms["gemma2"]
    for i in range(c["num_hidden_layers"]):
        at = f"layers.{i}.self_attn"
        body |= {f"layers.{i}.{n}_layernorm.weight": (d,) for n in norms.get(kind, "input post_attention").split()}
        if kind == "phi3":
            body |= _linear(f"{at}.qkv_proj", (h + 2 * k) * size, d)
        else:
            for name, n in (("q", h), ("k", k), ("v", k)):
                body |= _linear(f"{at}.{name}_proj", n * size, d, bias or kind == "qwen2")
        body |= _linear(f"{at}.o_proj", d, h * size, bias)
        if kind in ("qwen3", "qwen3_moe", "gemma3_text", "olmo2"):
            body |= {f"{at}.{name}_norm.weight": (n * size if kind == "olmo2" else size,)
                     for name, n in (("q", h), ("k", k))}
        at = f"layers.{i}.mlp"
        if kind in ("mixtral", "qwen3_moe"):
            old = kind == "mixtral"
            at, n = (f"layers.{i}.block_sparse_moe", c["num_local_experts"]) if old else (at, c["num_experts"])
            body |= _linear(f"{at}.gate", n, d)
            inner = f if old else c["moe_intermediate_size"]
            names = ("w1", "w3", "w2") if old else ("gate_proj", "up_proj", "down_proj")
            for e in range(n):
                for name, out, into in zip(names, (inner, inner, d), (d, d, inner), strict=True):
                    body |= _linear(f"{at}.experts.{e}.{name}", out, into)
        elif kind == "phi3":
            body |= {**_linear(f"{at}.gate_up_proj", 2 * f, d), **_linear(f"{at}.down_proj", d, f)}
        else:
            for name, out, into in (("gate", f, d), ("up", f, d), ("down", d, f)):
                body |= _linear(f"{at}.{name}_proj", out, into, mlp_bias)
    return body


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Return the stored names and shapes of a case."""
    c, kind = case.config, case.kind
    body = _neox(c) if kind == "gpt_neox" else _gpt2(c) if kind == "gpt2" else _llama(kind, c)
    if case.task == "hidden":
        return body
    prefix = {"gpt_neox": "gpt_neox.", "gpt2": "transformer."}.get(kind, "model.")
    width = c.get("hidden_size", c.get("n_embd"))
    head: dict[str, tuple[int, ...]] = {}
    if case.task == "classification":
        head = {"score.weight": (len(c["id2label"]), width)}
    elif not case.tied:
        head = {"embed_out.weight" if kind == "gpt_neox" else "lm_head.weight": (VOCAB, width)}
    return {**{prefix + name: shape for name, shape in body.items()}, **head}


def tensors(case: Case, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Make the stored tensors of a case, each from a seed of its own name."""
    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = np.random.RandomState(zlib.crc32(f"{case.name}:{name}".encode())).standard_normal(shape)
        norm = name.endswith("weight") and ("norm" in name or ".ln_" in name)
        centre = 0.0 if "gemma" in case.kind else 1.0
        return (centre + 0.2 * values if norm else 0.3 * values).astype(dtype)

    return {name: one(name, shape) for name, shape in shapes(case).items()}


def write(case: Case, folder: Path) -> Path:
    """Write the checkpoint folder of a case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config))
    safetensors.numpy.save_file(tensors(case), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Make a batch of two rows, the second of them padded, under the names of `model.apply`."""
    batch = {"tokens": np.random.RandomState(7).randint(3, VOCAB, (ROWS, LENGTH)).astype(np.int32)}
    if case.padding is not None:
        mask = np.ones((ROWS, LENGTH), np.int32)
        mask[1, slice(LENGTH - 3, LENGTH) if case.padding == "right" else slice(0, 3)] = 0
        batch = {"tokens": np.where(mask == 1, batch["tokens"], 0).astype(np.int32), "attention_mask": mask}
    return batch


def labels(case: Case) -> np.ndarray:
    """Return the tokens as labels, padding and two others left out."""
    batch = inputs(case)
    wanted = np.where(batch.get("attention_mask", 1) == 1, batch["tokens"], -100)
    wanted[0, 2:4] = -100
    return wanted.astype(np.int32)


def torch_model(case: Case, folder: Path) -> Any:
    """Load a folder in transformers; it has to hold every tensor that the architecture wants and no other."""
    import torch
    import transformers

    model, info = getattr(transformers, case.architecture).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32)
    assert not any(info[kind] for kind in info), info
    return model.eval()


def torch_outputs(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """Return what transformers computes from a folder: "hidden" and, if there are any, "logits" and "loss"."""
    import torch

    batch = {k: torch.tensor(v).long() for k, v in inputs(case).items()}
    given = {"input_ids": batch["tokens"], "attention_mask": batch.get("attention_mask")}
    if case.task == "causal-lm":
        given["labels"] = torch.tensor(labels(case)).long()
    with torch.no_grad():
        out = torch_model(case, folder)(**given, output_hidden_states=True)
    found = {"hidden": out.hidden_states[-1] if case.task != "hidden" else out.last_hidden_state,
             "logits": getattr(out, "logits", None), "loss": getattr(out, "loss", None)}
    return {name: value.numpy() for name, value in found.items() if value is not None}


def main() -> None:
    import tempfile

    recorded = {}
    with tempfile.TemporaryDirectory() as home:
        for case in CASES:
            out = torch_outputs(case, write(case, Path(home) / case.name))
            recorded |= {f"{case.name}/{name}": value for name, value in out.items()}
    np.savez_compressed(GOLDEN, **recorded)
    print(f"{len(recorded)} arrays, {GOLDEN.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
