"""Decoders against transformers on torch: recorded outputs always, live ones where torch is installed."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from models.decoder_cases import (
    CASES,
    EACH,
    GOLDEN,
    HALF,
    STEMS,
    Case,
    inputs,
    labels,
    torch_model,
    torch_outputs,
    write,
)
from support import quick_compile

from jpeft.interop.decoders import DECODERS
from jpeft.interop.pretrained import from_pretrained, save_pretrained

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
live = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
rows = pytest.mark.parametrize("case", EACH)
BY_NAME = {case.name: case for case in CASES}


def whole(model: Any, params: Any, batch: dict[str, Any], target: Any) -> dict[str, Any]:
    """Run a model without a cache, and with labels, as transformers does both at once."""
    out = model.apply(params, **batch)
    found = {"hidden": out.hidden, "logits": out.logits}
    if target is not None:
        found["loss"] = model.apply(params, **batch, labels=target).loss
    return {name: value for name, value in found.items() if value is not None}


def in_steps(model: Any, params: Any, batch: dict[str, Any]) -> jax.Array:
    """Run a model with a cache: five tokens, then one, then the two that are left; return all hidden states."""
    mask = jnp.asarray(batch.get("attention_mask", jnp.ones_like(batch["tokens"])))
    cache, hidden = model.empty_cache(len(mask), mask.shape[1]), []
    for some in (slice(0, 5), slice(5, 6), slice(6, None)):
        out = model.apply(params, batch["tokens"][:, some], mask[:, some], cache=cache)
        cache = out.cache
        hidden.append(out.hidden)
    return jnp.concatenate(hidden, axis=1)


def compiled(function: Any, model: Any, *args: Any) -> Any:
    return jax.jit(functools.partial(function, model), compiler_options=quick_compile())(*args)


def assert_same(ours: dict[str, Any], theirs: dict[str, np.ndarray], case: Case) -> None:
    assert set(ours) == set(theirs)
    mask = inputs(case).get("attention_mask")
    for name, value in theirs.items():
        mine, seen = np.asarray(ours[name]), 1.0 if mask is None or value.ndim < 3 else mask[..., None]
        np.testing.assert_allclose(mine * seen, value * seen, rtol=0, atol=case.atol, err_msg=name)


@pytest.mark.parametrize("case", HALF)
def test_equals_the_recorded_outputs(case: Case, tmp_path: Path) -> None:
    recorded = np.load(GOLDEN)
    theirs = {name.split("/")[1]: recorded[name] for name in recorded.files if name.split("/")[0] == case.name}
    assert theirs["hidden"].std() > 0.5
    model, params, tokenizer = from_pretrained(write(case, tmp_path))
    assert (model.config.task, tokenizer) == (case.task, None)
    batch = inputs(case)
    ours = compiled(whole, model, params, batch, labels(case) if case.task == "causal-lm" else None)
    assert_same(ours, theirs, case)
    if case.task == "causal-lm" and case.name not in ("llama-dynamic", "llama-longrope", "phi3-longrope"):
        steps = compiled(in_steps, model, params, batch)
        assert_same({"hidden": steps}, {"hidden": theirs["hidden"]}, case)


@live
@rows
def test_equals_transformers(case: Case, tmp_path: Path) -> None:
    folder = write(case, tmp_path)
    model, params, _ = from_pretrained(folder)
    ours = compiled(whole, model, params, inputs(case), labels(case) if case.task == "causal-lm" else None)
    assert_same(ours, torch_outputs(case, folder), case)


@live
@rows
def test_transformers_reads_what_is_written(case: Case, tmp_path: Path) -> None:
    model, params, _ = from_pretrained(write(case, tmp_path / "old"))
    save_pretrained(tmp_path / "new", model, params, max_shard_bytes=8000)
    assert (tmp_path / "new" / "model.safetensors.index.json").exists()
    before, after = (torch_outputs(case, tmp_path / which) for which in ("old", "new"))
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@live
@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope", "phi3-longrope"])
def test_decoding_grows_past_the_trained_length_as_in_transformers(name: str, tmp_path: Path) -> None:
    """The frequencies depend on the length so far, and keys in the cache keep those they were turned with."""
    import torch

    case = BY_NAME[name]
    folder, tokens = write(case, tmp_path), inputs(case)["tokens"]
    model, params, _ = from_pretrained(folder)
    peer, cache, hidden = torch_model(case, folder), None, []
    with torch.no_grad():
        for some in (slice(0, 5), slice(5, 6), slice(6, None)):
            out = peer(torch.tensor(tokens[:, some]).long(), past_key_values=cache, use_cache=True,
                       output_hidden_states=True)
            cache = out.past_key_values
            hidden.append(out.hidden_states[-1].numpy())
    ours = compiled(in_steps, model, params, inputs(case))
    np.testing.assert_allclose(ours, np.concatenate(hidden, axis=1), rtol=0, atol=case.atol)


def _grad(leaf: Any, layout: str) -> np.ndarray:
    leaf = np.asarray(leaf)
    return leaf.reshape(leaf.shape[0], -1).T if layout == "in" else leaf.reshape(-1, leaf.shape[-1]).T


GRADIENTS = {
    "llama-odd": (("layers/attention/query/kernel", "model.layers.1.self_attn.q_proj.weight", "in"),
                  ("layers/attention/key/bias", "model.layers.1.self_attn.k_proj.bias", ""),
                  ("layers/attention/out/kernel", "model.layers.1.self_attn.o_proj.weight", "out"),
                  ("embed/embedding", "model.embed_tokens.weight", "")),
    "gemma2": (("layers/attention/value/kernel", "model.layers.1.self_attn.v_proj.weight", "in"),
               ("layers/attention_post_norm/scale", "model.layers.1.post_attention_layernorm.weight", "")),
    "phi3": (("layers/attention/qkv/kernel", "model.layers.1.self_attn.qkv_proj.weight", "in"),
             ("layers/mlp/gate_up/kernel", "model.layers.1.mlp.gate_up_proj.weight", "in"),
             ("lm_head/kernel", "lm_head.weight", "in")),
    "mixtral": (("layers/moe/router/kernel", "model.layers.1.mlp.gate.weight", "in"),
                ("layers/attention_norm/scale", "model.layers.1.input_layernorm.weight", "")),
    "pythia": (("layers/attention/qkv/kernel", "gpt_neox.layers.1.attention.query_key_value.weight", "in"),
               ("layers/mlp/down/bias", "gpt_neox.layers.1.mlp.dense_4h_to_h.bias", "")),
    "gpt2": (("position/embedding", "transformer.wpe.weight", ""),
             ("layers/mlp/up/kernel", "transformer.h.1.mlp.c_fc.weight", "")),
    "olmo2": (("layers/attention/query_norm/scale", "model.layers.1.self_attn.q_norm.weight", ""),),
}  # fmt: skip


@live
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_those_of_torch(name: str, tmp_path: Path) -> None:
    import torch

    case = BY_NAME[name]
    folder, batch, target = write(case, tmp_path), inputs(case), labels(case)
    if case.padding == "left":
        target[1, 3] = -100  # what padding predicts is noise, and the gradients of noise are a matter of taste
    model, params, _ = from_pretrained(folder)
    grads = jax.jit(jax.grad(lambda p: model.apply(p, **batch, labels=target).loss))(params)
    peer = torch_model(case, folder)
    peer(torch.tensor(batch["tokens"]).long(), attention_mask=torch.tensor(batch["attention_mask"]),
         labels=torch.tensor(target).long()).loss.backward()
    theirs = dict(peer.named_parameters())
    for path, stored, layout in GRADIENTS[name]:
        leaf = functools.reduce(lambda tree, key: tree[key], path.split("/"), grads)
        leaf = leaf[1] if path.startswith("layers/") else leaf
        want = theirs[stored].grad.numpy().copy()
        ours = _grad(leaf, layout) if layout else np.asarray(leaf).reshape(want.shape)
        if path == "embed/embedding":
            ours, want = ours[1:], want[1:]  # torch leaves the gradient of the padding token out
        np.testing.assert_allclose(ours, want, rtol=0, atol=3e-5 * max(1.0, float(np.abs(want).max())), err_msg=path)


def test_the_table_of_cases_covers_the_families() -> None:
    assert {case.kind for case in CASES} == set(DECODERS) == set(STEMS)
    for kind, family in DECODERS.items():
        assert family.stem == STEMS[kind]


def test_the_goldens_are_small() -> None:
    assert GOLDEN.stat().st_size < 300_000
    assert json.dumps(sorted({name.split("/")[0] for name in np.load(GOLDEN).files})) == \
        json.dumps(sorted(case.name for case in CASES))
