"""Checkpoints of causal language models: bit-exact round trips, configurations in every spelling, tied heads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from models.decoder_cases import CASES, EACH, Case, tensors, write

from jpeft.errors import CheckpointError, ModelConfigError
from jpeft.interop import hfrope
from jpeft.interop.decoders import DECODERS
from jpeft.interop.pretrained import from_pretrained, save_pretrained
from jpeft.interop.tensors import Safetensors
from jpeft.models.decoder import Decoder
from jpeft.models.rope import Rope

BY_NAME = {case.name: case for case in CASES}
rows = pytest.mark.parametrize("case", EACH)


def stored(folder: Path) -> dict[str, np.ndarray]:
    found = Safetensors(folder)
    return {name: found.read(name) for name in found.infos}


def put(folder: Path, values: dict[str, np.ndarray], **config: Any) -> Path:
    """Replace the tensors of a folder, and keys of its config."""
    safetensors.numpy.save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    raw = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def config_of(name: str, **keys: Any) -> Any:
    case = BY_NAME[name]
    return DECODERS[case.kind].read({**case.config, **keys}, "config.json")


@rows
@pytest.mark.parametrize("dtype", [
    pytest.param(np.float32, id="f32"), pytest.param(ml_dtypes.bfloat16, id="bf16", marks=pytest.mark.slow)])
def test_read_write_read_is_bit_exact(case: Case, dtype: Any, tmp_path: Path) -> None:
    folder = put(write(case, tmp_path / "old"), tensors(case, dtype))
    model, params, _ = from_pretrained(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    save_pretrained(tmp_path / "new", model, params, max_shard_bytes=6000 if dtype == np.float32 else 10**9)
    old, new = stored(folder), stored(tmp_path / "new")
    assert {n: (x.dtype, x.tobytes()) for n, x in old.items()} == {n: (x.dtype, x.tobytes()) for n, x in new.items()}
    again, reread, _ = from_pretrained(tmp_path / "new")
    assert again == model
    assert bits(reread) == bits(params)


@pytest.mark.slow
@pytest.mark.parametrize("case", {case.kind: case for case in CASES}.values(), ids=lambda case: case.name)
def test_a_model_made_from_nothing_can_be_written(case: Case, tmp_path: Path) -> None:
    fields = {"labels": 3} if case.task == "classification" else {}
    config = DECODERS[case.kind].read(case.config, "config.json", task=case.task, **fields)
    model = Decoder(config)
    params = model.init(jax.random.key(0))
    save_pretrained(tmp_path, model, params)
    again, reread, _ = from_pretrained(tmp_path)
    assert (dataclasses.replace(again.config, pad_id=config.pad_id), bits(reread)) == (config, bits(params))


def test_a_model_that_no_family_is_like_is_not_written(tmp_path: Path) -> None:
    config = dataclasses.replace(config_of("llama"), qkv_bias=True, parallel=True)
    model = Decoder(config)
    with pytest.raises(ModelConfigError, match="no model_type is like this configuration: a Llama cannot"):
        save_pretrained(tmp_path / "new", model, model.init(jax.random.key(0)))
    read, params, _ = from_pretrained(write(BY_NAME["llama"], tmp_path / "old"))
    other = dataclasses.replace(read, config=dataclasses.replace(read.config, attention_cap=3.0))
    with pytest.raises(ModelConfigError, match=r"a Llama cannot have attention_cap = 3\.0; write it as another"):
        save_pretrained(tmp_path / "new", other, params)


def test_a_changed_configuration_is_written_as_changed(tmp_path: Path) -> None:
    model, params, _ = from_pretrained(write(BY_NAME["qwen3"], tmp_path / "old"))
    config = dataclasses.replace(model.config, window=4, local=(1,), dropout=0.0, positions=128,
                                 rope=Rope(theta=77.0, kind="yarn", factor=2.0, original=32, magnitude=1.5))
    save_pretrained(tmp_path / "new", dataclasses.replace(model, config=config), params)
    assert from_pretrained(tmp_path / "new")[0].config == config


def test_tied_heads(tmp_path: Path) -> None:
    case = BY_NAME["qwen2"]
    values = tensors(case)
    words = values["model.embed_tokens.weight"]
    folder = write(case, tmp_path / "a")
    plain, params, _ = from_pretrained(folder)
    assert plain.config.tied
    assert "lm_head" not in params
    same, again, _ = from_pretrained(put(folder, {**values, "lm_head.weight": words}))
    assert (same.config, bits(again)) == (plain.config, bits(params))
    other, untied, _ = from_pretrained(put(folder, {**values, "lm_head.weight": words + 1}))
    np.testing.assert_array_equal(untied["lm_head"]["kernel"], words.T + 1)
    save_pretrained(tmp_path / "b", other, untied)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False
    assert from_pretrained(tmp_path / "b")[0].config == other.config
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        from_pretrained(put(folder, values, tie_word_embeddings=False))


def test_old_names_buffers_and_bare_checkpoints(tmp_path: Path) -> None:
    case = BY_NAME["gpt2"]
    values = {name.removeprefix("transformer."): value for name, value in tensors(case).items()}
    buffers = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 12, 12), np.uint8)) for i in range(2)}
    _, params, _ = from_pretrained(put(write(case, tmp_path / "bare"), {**values, **buffers}))
    assert bits(params) == bits(from_pretrained(write(case, tmp_path / "plain"))[1])
    case = BY_NAME["pythia"]
    values = tensors(case)
    values["lm_head.weight"] = values.pop("embed_out.weight")
    values["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = np.ones(1, np.float32)
    _, params, _ = from_pretrained(put(write(case, tmp_path / "neox"), values))
    assert bits(params) == bits(from_pretrained(write(case, tmp_path / "same"))[1])


def test_tasks(tmp_path: Path) -> None:
    folder = write(BY_NAME["llama"], tmp_path)
    assert from_pretrained(folder)[0].config.task == "causal-lm"
    model, params, _ = from_pretrained(folder, "hidden")
    assert "lm_head" not in params
    assert model.notes[0] == "not read, heads of other tasks: lm_head.weight"
    model, params, _ = from_pretrained(folder, "classification", 5)
    assert (params["classifier"]["kernel"].shape, model.notes[0]) == ((16, 5), "new, with seed 0: classifier")
    with pytest.raises(ModelConfigError, match="task 'embedding' is none of"):
        from_pretrained(folder, "embedding")
    model, _, _ = from_pretrained(folder, dropout=0.25)
    assert {getattr(model.config, name) for name in ("dropout", "attention_dropout", "embedding_dropout")} == {0.25}


def test_both_spellings_of_rotary_positions_say_the_same() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}
    old = config_of("llama", rope_scaling=scaling, rope_theta=5e5)
    assert old == config_of("llama", rope_parameters={**scaling, "rope_theta": 5e5})
    assert old.rope == Rope(5e5, kind="llama3", factor=8.0, original=16)
    two = {"full_attention": {"rope_type": "default", "rope_theta": 9.0}, "sliding_attention": {"rope_theta": 5.0}}
    keys = {"rope_scaling": None, "layer_types": None}
    nested = config_of("gemma3", rope_parameters=two, rope_theta=1.0, rope_local_base_freq=1.0, **keys)
    assert nested == config_of("gemma3", rope_theta=9.0, rope_local_base_freq=5.0, **keys)
    neox = {"rope_theta": 100.0, "rope_type": "default", "partial_rotary_factor": 1.0}
    raw = {k: v for k, v in BY_NAME["neox-serial"].config.items() if not k.startswith("rotary")}
    assert DECODERS["gpt_neox"].read({**raw, "rope_parameters": neox}, "") == config_of("neox-serial")
    assert config_of("phi3-longrope", rope_scaling={"type": "su", "short_factor": [1.0, 1.5],
                                                    "long_factor": [2.0, 4.0]}) == config_of("phi3-longrope")


@pytest.mark.parametrize("rope", [
    Rope(), Rope(kind="linear", factor=3.0), Rope(kind="dynamic", factor=3.0),
    Rope(kind="yarn", factor=3.0, original=9, magnitude=1.2, fast=8.0, slow=2.0, truncate=False),
    Rope(kind="longrope", original=9, magnitude=1.2, short=(1.0, 2.0), long=(3.0, 4.0)),
    Rope(kind="llama3", factor=4.0, original=9, low=2.0, high=5.0),
], ids=lambda rope: rope.kind)  # fmt: skip
def test_rotary_positions_turn_back_into_themselves(rope: Rope) -> None:
    said = hfrope.write(rope)
    assert hfrope.read(json.loads(json.dumps(said)), "", theta=rope.theta, positions=64) == rope


def test_the_number_of_experts_has_two_names() -> None:
    raw = {k: v for k, v in BY_NAME["qwen3-moe"].config.items() if k != "num_experts"}
    assert DECODERS["qwen3_moe"].read({**raw, "num_local_experts": 4}, "") == config_of("qwen3-moe")


@pytest.mark.parametrize(("name", "keys", "says"), [
    ("llama", {"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope type 'mrope' is not implemented, only"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope type linear needs factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor = '2' must be a number"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, "mscale = 1.0 is not impl"),
    ("llama", {"rope_scaling": [2]}, r"rope_scaling = \[2\] and rope_theta = 10000.0 must be an object and a number"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not implemented, only 1.0"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "not implemented for Llama"),
    ("llama", {"quantization_config": {"bits": 4}, "sliding_window": 4}, "quantization_config .*; sliding_window"),
    ("llama", {"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5 must be like 32"),
    ("llama", {"hidden_act": "xielu"}, "activation 'xielu' is not implemented"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types = .* for each of the 2 layers"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "but no sliding_window is set"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "must name full_attention or"),
    ("mistral", {"sliding_window": 0}, "sliding_window = 0 must be a positive integer or null"),
    ("mistral", {"attention_bias": True}, "attention_bias = True is not implemented"),
    ("mixtral", {"output_router_logits": True, "router_jitter_noise": 0.1}, "output_router_logits .*; router_jit"),
    ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not implemented, only 1"),
    ("qwen3-moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not implemented"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not implemented"),
    ("gemma3", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping = 3.0 is not implemented, only None"),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, r"rope_parameters has the keys \['rope_type'\], must be"),
    ("phi3-longrope", {"partial_rotary_factor": 0.25}, "longrope has 2 factors for 1 rotary frequencies"),
    ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers = \[1\] must be 0 or 1 for each of the 3 layers"),
    ("smollm3", {"use_sliding_window": 1}, "use_sliding_window = 1 must be true or false"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True is not implemented"),
])
def test_config_fields_are_never_ignored(name: str, keys: dict[str, Any], says: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    with pytest.raises(ModelConfigError, match=says) as caught:
        from_pretrained(put(write(case, tmp_path), tensors(case), **keys))
    assert "\n" not in str(caught.value)


def test_all_name_problems_in_one_message(tmp_path: Path) -> None:
    case = BY_NAME["mixtral"]
    values = tensors(case)
    at = "model.layers.1.block_sparse_moe.experts.2"
    values[f"{at}.w4.weight"] = values.pop(f"{at}.w2.weight")
    values[f"{at}.w1.weight"] = np.zeros((3, 16), np.float32)
    values["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(put(write(case, tmp_path), values))
    for part in (f"{at}.w1.weight has shape (3, 16), must be (20, 16)", f"missing: {at}.w2.weight",
                 f"unexpected: model.layers.0.self_attn.q_proj.bias, {at}.w4.weight"):
        assert part in str(caught.value)
