"""Checkpoint folders in and out: bit-exact round trips, new heads, old spellings, and every fault in one message."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from models.encoder_cases import CASES, Case, inputs, shapes, tensors, write

import jpeft
from jpeft.errors import CheckpointError, ModelConfigError, ModelInputError
from jpeft.interop.checkpoint import Row
from jpeft.interop.encoders import ENCODERS
from jpeft.interop.pretrained import from_pretrained, save_pretrained
from jpeft.interop.tensors import Safetensors
from jpeft.interop.tokenizer import Tokenizer
from jpeft.models.encoder import Encoder, EncoderConfig

BY_NAME = {case.name: case for case in CASES}
BERT, CLASS, ROBERTA = BY_NAME["bert"], BY_NAME["bert-class"], BY_NAME["roberta-class"]


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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [
    pytest.param(np.float32, id="f32"), pytest.param(ml_dtypes.bfloat16, id="bf16", marks=pytest.mark.slow)])
def test_read_write_read_is_bit_exact(case: Case, dtype: Any, tmp_path: Path) -> None:
    folder = put(write(case, tmp_path / "old"), tensors(case, dtype))
    model, params, _ = from_pretrained(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    save_pretrained(tmp_path / "new", model, params, max_shard_bytes=3000 if dtype == np.float32 else 10**9)
    old, new = stored(folder), stored(tmp_path / "new")
    assert {n: (x.dtype, x.tobytes()) for n, x in old.items()} == {n: (x.dtype, x.tobytes()) for n, x in new.items()}
    again, reread, _ = from_pretrained(tmp_path / "new")
    assert again == model
    assert bits(reread) == bits(params)
    said = json.loads((tmp_path / "new" / "config.json").read_text())
    assert {**said, "dtype": 0} == {**case.config, **said, "dtype": 0}


def test_files_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    model, params, _ = from_pretrained(write(CLASS, tmp_path / "old"))
    save_pretrained(tmp_path / "new", model, params, max_shard_bytes=8000)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "new").glob("model-*.safetensors"))
    assert [s.name for s in shards] == sorted(set(index["weight_map"].values()))
    assert all(s.stat().st_size < 8000 + 4000 for s in shards)
    merged: dict[str, np.ndarray] = {}
    for shard in shards:
        merged |= safetensors.numpy.load_file(shard)
    for name, value in tensors(CLASS).items():
        np.testing.assert_array_equal(merged[name], value)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in merged.values())
    save_pretrained(tmp_path / "new", model, params)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, _ = from_pretrained(write(CLASS, tmp_path))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jpeft.interop.tensors.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(tmp_path, model, params)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_leaves_are_read_into_the_wanted_dtype_and_place(tmp_path: Path) -> None:
    seen = []

    def place(path: str, array: np.ndarray) -> jax.Array:
        seen.append((path, array.dtype.name))
        return jax.device_put(array, jax.devices()[1])

    model, params, _ = from_pretrained(write(CLASS, tmp_path), dtype="bfloat16", put=place)
    assert len(seen) == len(jax.tree.leaves(model.shapes()))
    assert {dtype for _, dtype in seen} == {"bfloat16"}
    assert {leaf.devices().pop().id for leaf in jax.tree.leaves(params)} == {1}
    mixed, params, _ = from_pretrained(tmp_path, compute_dtype="bfloat16", remat="dots")
    assert params["classifier"]["kernel"].dtype == jnp.float32
    assert jax.eval_shape(mixed.apply, params, jnp.ones((1, 4), int)).logits.dtype == jnp.bfloat16


def test_old_spellings_buffers_and_heads_of_other_tasks(tmp_path: Path) -> None:
    old = {f"bert.{n}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for n, v in tensors(BERT).items()}
    extra = {"bert.embeddings.position_ids": np.arange(12)[None], "cls.predictions.bias": np.zeros(40, np.float32),
             "cls.seq_relationship.weight": np.zeros((2, 16), np.float32)}
    folder = put(write(BERT, tmp_path / "old"), {**old, **extra}, architectures=["BertForPreTraining"])
    model, params, _ = from_pretrained(folder)
    plain, same, _ = from_pretrained(write(BERT, tmp_path / "plain"))
    assert bits(params) == bits(same)
    assert model.notes[0] == "not read, heads of other tasks: cls.predictions.bias, cls.seq_relationship.weight"
    assert plain.notes == (f"no tokenizer: {tmp_path / 'plain'} has no tokenizer.json",)


def test_a_new_head(tmp_path: Path) -> None:
    folder = write(BERT, tmp_path / "old")
    model, params, _ = from_pretrained(folder, "classification", 4)
    assert model.notes[0] == "new, with seed 0: classifier"
    assert params["classifier"]["kernel"].shape == (16, 4)
    np.testing.assert_array_equal(params["pooler"]["kernel"], tensors(BERT)["pooler.dense.weight"].T)
    assert 0.005 < float(params["classifier"]["kernel"].std()) < 0.04
    assert not params["classifier"]["bias"].any()
    same, other = (from_pretrained(folder, "classification", 4, seed=n)[1]["classifier"]["kernel"] for n in (0, 1))
    np.testing.assert_array_equal(same, params["classifier"]["kernel"])
    assert (np.asarray(other) != np.asarray(same)).all()
    save_pretrained(tmp_path / "new", model, params, labels=["a", "b", "c", "d"])
    again, reread, _ = from_pretrained(tmp_path / "new")
    assert (again.config.task, again.config.labels, bits(reread)) == ("classification", 4, bits(params))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["label2id"] == {"a": 0, "b": 1, "c": 2, "d": 3}


def test_a_head_for_another_task_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    folder = write(BY_NAME["bert-tokens"], tmp_path)
    model, _, _ = from_pretrained(folder, "classification", 5)
    assert model.notes[0] == "new, with seed 0: classifier, pooler"
    assert model.notes[1] == "not read, heads of other tasks: classifier.bias, classifier.weight"
    assert from_pretrained(folder)[0].config.task == "token-classification"
    assert from_pretrained(folder, "hidden")[0].config.pooler is False


def test_the_number_of_classes(tmp_path: Path) -> None:
    folder = write(CLASS, tmp_path / "a")
    with pytest.raises(ModelConfigError, match="has a head for 3 classes, num_labels=2; pass fresh_head=True"):
        from_pretrained(folder, num_labels=2)
    model, params, _ = from_pretrained(folder, num_labels=2, fresh_head=True)
    assert (params["classifier"]["bias"].shape, model.notes[0]) == ((2,), "new, with seed 0: classifier")
    with pytest.raises(ModelConfigError, match="no head for classification and names no classes; pass num_labels"):
        from_pretrained(write(BERT, tmp_path / "b"), "classification")
    with pytest.raises(ModelConfigError, match="num_labels=2 has no meaning for the task 'embedding'"):
        from_pretrained(folder, "embedding", 2)
    with pytest.raises(ModelConfigError, match=r"task 'classify' is none of .*nearest: 'classification'"):
        from_pretrained(folder, "classify")
    with pytest.raises(ModelConfigError, match="2 names in labels for 3 classes"):
        save_pretrained(tmp_path / "c", *from_pretrained(folder)[:2], labels=["a", "b"])


def test_all_name_problems_in_one_message(tmp_path: Path) -> None:
    values = tensors(CLASS)
    query = "bert.encoder.layer.1.attention.self.query.weight"
    values[query.replace("query", "qeury")] = values.pop(query)
    del values["bert.embeddings.LayerNorm.bias"]
    values["bert.encoder.layer.2.output.dense.weight"] = np.zeros((24, 16), np.float32)
    values["bert.encoder.layer.3.output.dense.bias"] = np.zeros(16, np.float32)
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(put(write(CLASS, tmp_path), values))
    layer = "bert.encoder.layer"
    for part in (f"{layer}.2.output.dense.weight has shape (24, 16), must be (16, 24)",
                 f"missing: bert.embeddings.LayerNorm.bias, {query}",
                 f"unexpected: {layer}.1.attention.self.qeury.weight, {layer}.3.output.dense.bias"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_head_is_missing_not_new(tmp_path: Path) -> None:
    values = {n: v for n, v in tensors(CLASS).items() if n != "classifier.bias"}
    with pytest.raises(CheckpointError, match=r"missing: classifier\.bias"):
        from_pretrained(put(write(CLASS, tmp_path), values))


@pytest.mark.parametrize(("case", "config", "says"), [
    (BERT, {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' is not .*, only"),
    (BERT, {"is_decoder": True, "moe_layers": 2}, "is_decoder = True is not .*; moe_layers = 2 is not implemented"),
    (BERT, {"hidden_size": "16"}, "hidden_size = '16' must be like 768"),
    (BERT, {"hidden_act": "xielu"}, "activation 'xielu' is not implemented"),
    (BERT, {"model_type": "mamba"}, "model_type 'mamba' is not implemented, only bert, distilbert, roberta"),
    (BERT, {"quantization_config": {"bits": 4}}, "quantization_config = .* is not implemented"),
    (BERT, {"pruned_heads": {"0": [1]}}, "pruned_heads = .* is not implemented"),
    (BY_NAME["distilbert"], {"hidden_size": 16}, "hidden_size = 16 is not implemented"),
])
def test_config_fields_are_never_ignored(case: Case, config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=says):
        from_pretrained(put(write(case, tmp_path), tensors(case), **config))


def test_config_fields_that_say_nothing_are_fine(tmp_path: Path) -> None:
    harmless = {"torch_dtype": "float16", "use_cache": True, "gradient_checkpointing": False, "is_decoder": False,
                "problem_type": "single_label_classification", "top_k": 50, "pruned_heads": {}, "_name_or_path": "x"}
    model, _, _ = from_pretrained(put(write(BERT, tmp_path), tensors(BERT), **harmless))
    assert model.config == from_pretrained(write(BERT, tmp_path))[0].config


def test_dropout_rates_come_from_the_config_or_the_argument(tmp_path: Path) -> None:
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    folder = put(write(CLASS, tmp_path / "old"), tensors(CLASS), **rates)
    model, params, _ = from_pretrained(folder)
    config = model.config
    assert (config.dropout, config.attention_dropout, config.head_dropout) == (0.3, 0.2, 0.3)
    config = from_pretrained(folder, dropout=0.0)[0].config
    assert (config.dropout, config.attention_dropout, config.head_dropout) == (0.0, 0.0, 0.0)
    save_pretrained(tmp_path / "new", model, params)
    said = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (said["hidden_dropout_prob"], said.get("classifier_dropout")) in ((0.3, None), (0.3, 0.3))


def damage(folder: Path, how: str) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    if how == "header":
        path.write_bytes(data[:20] + b"\xff" + data[21:])
    elif how == "offsets":
        path.write_bytes(data.replace(b'"F32"', b'"F16"', 1))
    else:
        path.write_bytes(data[: {"short": -5, "empty": 0, "stub": 30}[how]])


@pytest.mark.parametrize(("how", "says"), [
    ("short", "it is truncated or damaged"), ("empty", "is truncated or no safetensors"),
    ("stub", "is truncated or no safetensors"), ("header", "has a damaged header"),
    ("offsets", "which do not fit its shape"),
])
def test_damaged_files(how: str, says: str, tmp_path: Path) -> None:
    damage(write(BERT, tmp_path), how)
    with pytest.raises(CheckpointError, match=says):
        from_pretrained(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    folder = write(BERT, tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has neither .*; found pytorch_model\.bin, which jpeft does not read"):
        from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        from_pretrained(folder)
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        from_pretrained(folder / "pytorch_model.bin")


def test_missing_and_wrong_shards(tmp_path: Path) -> None:
    model, params, _ = from_pretrained(write(BERT, tmp_path / "old"))
    save_pretrained(tmp_path / "new", model, params, max_shard_bytes=8000)
    index = tmp_path / "new" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    first, second = sorted(set(table["weight_map"].values()))[:2]
    wrong = {**table, "weight_map": {**table["weight_map"], "pooler.dense.bias": first}}
    index.write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match=r"names tensors that their shards lack: pooler\.dense\.bias"):
        from_pretrained(tmp_path / "new")
    index.write_text(json.dumps({**table, "weight_map": {**table["weight_map"], "x": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'\.\./x\.safetensors' is no plain file name"):
        from_pretrained(tmp_path / "new")
    index.write_text(json.dumps(table))
    (tmp_path / "new" / second).unlink()
    with pytest.raises(CheckpointError, match=f"{second} is missing"):
        from_pretrained(tmp_path / "new")


def test_params_that_are_not_the_models_are_not_written(tmp_path: Path) -> None:
    model, params, _ = from_pretrained(write(BERT, tmp_path / "old"))
    bad = {**params, "pooler": {"kernel": params["pooler"]["kernel"][:3]}, "lora": {"a": jnp.ones(3)}}
    with pytest.raises(CheckpointError, match=r"missing: pooler/bias; unexpected: lora/a; pooler/kernel has shape"):
        save_pretrained(tmp_path / "new", model, bad)
    assert not (tmp_path / "new").exists()


def test_a_merged_adapter_is_a_plain_checkpoint(tmp_path: Path) -> None:
    model, params, _ = from_pretrained(write(ROBERTA, tmp_path / "old"))
    plan = jpeft.plan(model.apply, params, (inputs(ROBERTA)["tokens"],), {"all-linear": jpeft.LoRA(rank=2)})
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
    trainable = jax.tree.map(lambda x: x + 0.05, trainable)
    save_pretrained(tmp_path / "new", model, jpeft.merge(plan, trainable, frozen))
    again, merged, _ = from_pretrained(tmp_path / "new")
    ours = jax.jit(again.apply)(merged, **inputs(ROBERTA)).logits
    adapted = jax.jit(jpeft.adapt(model.apply, plan))
    np.testing.assert_allclose(ours, adapted(trainable, frozen, **inputs(ROBERTA)).logits, atol=1e-5)


def test_embeddings_pool_as_the_folder_says(tmp_path: Path) -> None:
    folder = write(BERT, tmp_path / "a")
    model, params, _ = from_pretrained(folder, "embedding")
    assert (model.config.pooling, model.config.normalise) == ("mean", True)
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, pooling="cls", normalise=False))
    save_pretrained(tmp_path / "b", other, params)
    assert from_pretrained(tmp_path / "b", "embedding")[0].config == other.config
    pooling = json.loads((tmp_path / "b" / "1_Pooling" / "config.json").read_text())
    (tmp_path / "b" / "1_Pooling" / "config.json").write_text(json.dumps({**pooling, "pooling_mode_max_tokens": True}))
    with pytest.raises(ModelConfigError, match=r"pooling \['cls_token', 'max_tokens'\] is not implemented"):
        from_pretrained(tmp_path / "b", "embedding")
    (tmp_path / "b" / "modules.json").write_text(json.dumps([{"type": "x.Transformer", "path": ""},
                                                             {"type": "x.Dense", "path": "2_Dense"}]))
    with pytest.raises(ModelConfigError, match="Dense is not implemented for embeddings"):
        from_pretrained(tmp_path / "b", "embedding")


def test_a_model_made_from_nothing_can_be_written(tmp_path: Path) -> None:
    config = EncoderConfig(vocab_size=9, hidden_size=8, layers=1, heads=2, mlp_size=4, positions=9, token_types=1,
                           pad_id=1, positions_after_pad=True, head_dropout_first=True, task="classification",
                           labels=2, pooler=True)
    model = Encoder(config)
    params = model.init(jax.random.key(0))
    save_pretrained(tmp_path, model, params)
    again, reread, _ = from_pretrained(tmp_path)
    assert (again.config, bits(reread)) == (config, bits(params))


def test_layouts_turn_back_into_themselves() -> None:
    leaf = np.arange(2 * 3 * 2 * 4).reshape(2, 3, 2, 4)
    for layout, shape in (("same", (3, 2, 4)), ("flat", (24,)), ("in", (8, 3)), ("out", (4, 6))):
        row = Row("w", "layer.{}.w", layout)
        assert row.stored_shape(leaf.shape) == shape == row.to_stored(leaf[1]).shape
        np.testing.assert_array_equal(row.to_leaf(row.to_stored(leaf[1]), leaf.shape), leaf[1])
    experts = Row("w", "l.{}.e.{}.w").names((2, 2, 5))
    assert [name for _, name in experts] == ["l.0.e.0.w", "l.0.e.1.w", "l.1.e.0.w", "l.1.e.1.w"]


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers, which reads the tokenizer.json")
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)])
    raw.enable_padding(length=128)
    raw.enable_truncation(128)
    folder = write(BERT, tmp_path / "tokens")
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": {"content": "[PAD]"}, "model_max_length": 10}')
    return folder


def test_the_tokenizer_pads_cuts_and_is_written_back(with_tokenizer: Path, tmp_path: Path) -> None:
    model, params, tokenizer = from_pretrained(with_tokenizer)
    assert isinstance(tokenizer, Tokenizer)
    assert model.notes == ()
    assert (tokenizer.pad_id, tokenizer.max_length, tokenizer.special) == (0, 10, {"pad_token": 0})
    batch = tokenizer(["a good film", "bad"], ["a", "bad"])
    assert batch["tokens"].tolist() == [[2, 4, 5, 7, 3, 4, 3], [2, 6, 3, 6, 3, 0, 0]]
    assert batch["token_types"].tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [7, 5]
    assert tokenizer(["bad"], pad_to=5, padding_side="left")["tokens"].tolist() == [[0, 0, 2, 6, 3]]
    assert tokenizer(["a good film"], max_length=4)["tokens"].tolist() == [[2, 4, 5, 3]]
    assert tokenizer(["a good film", "bad"])["tokens"].shape == (2, 5)
    assert [len(e.overflowing) for e in tokenizer.encode(["a good film", "bad"], max_length=4)] == [1, 0]
    assert tokenizer.decode([[5, 7]]) == ["good film"]
    assert model.apply(params, **batch).hidden.shape == (2, 7, 16)
    save_pretrained(tmp_path / "new", model, params, tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (with_tokenizer / name).read_bytes()


@pytest.mark.parametrize(("args", "kwargs", "says"), [
    (("one text",), {}, "takes a list of texts, found one string"),
    ((["a", "b"], ["c"]), {}, "2 texts and 1 pairs"),
    ((["a good film"],), {"pad_to": 3}, "a text has 5 tokens, more than pad_to=3; pass max_length=3 too"),
    ((["a"],), {"padding_side": "top"}, "padding_side is 'top'"),
])
def test_what_the_tokenizer_refuses(with_tokenizer: Path, args: Any, kwargs: Any, says: str) -> None:
    tokenizer = from_pretrained(with_tokenizer)[2]
    assert tokenizer is not None
    with pytest.raises(ModelInputError, match=says):
        tokenizer(*args, **kwargs)


def test_a_damaged_tokenizer(with_tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(with_tokenizer, tmp_path / "bad")
    (tmp_path / "bad" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        from_pretrained(tmp_path / "bad")


def test_the_table_of_cases_covers_the_name_tables() -> None:
    assert {case.kind for case in CASES} == set(ENCODERS)
    assert {(case.kind, case.task) for case in CASES} >= {(k, "classification") for k in ENCODERS}
    assert len(shapes(BERT)) == 5 + 3 * 16 + 2
