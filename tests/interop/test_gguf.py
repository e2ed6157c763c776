"""GGUF files that the tests write: values, names, configuration, all kinds of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs gguf, which reads the files")
pytest.importorskip("tokenizers", reason="needs tokenizers, which the tokenizer is rebuilt with")

import gguf
import jax
from interop.ggufs import EXPERTS, HEAD, QUANTS, ROWS, Q, tensors, write

from jpeft.errors import CheckpointError, ModelConfigError
from jpeft.interop.checkpoint import Names, Row, load, match
from jpeft.interop.gguf import Gguf, find
from jpeft.interop.gguf_models import ARCHITECTURES, read_gguf


@pytest.mark.parametrize("encode", QUANTS)
def test_values_of_every_encoding(encode: str, tmp_path: Path) -> None:
    values = {"model.embed_tokens.weight": np.random.default_rng(1).standard_normal((ROWS, 64)).astype(np.float32)}
    file = Gguf(write(tmp_path / "m.gguf", values=values, encode=encode))
    want = gguf.quants.dequantize(gguf.quants.quantize(values["model.embed_tokens.weight"], Q[encode]), Q[encode])
    got = file.read("token_embd.weight")
    assert file.stored["token_embd.weight"].kind == encode
    assert file.infos["token_embd.weight"] == (got.dtype, got.shape)
    assert str(got.dtype) == {"F16": "float16", "BF16": "bfloat16"}.get(encode, "float32")
    np.testing.assert_array_equal(got.astype(np.float32), want)
    np.testing.assert_allclose(want, values["model.embed_tokens.weight"], atol=0.4)


def blocks(kind: str, count: int, rng: Any) -> tuple[np.ndarray, np.ndarray]:
    """Random blocks of a K-quant, and what they are worth: one weight at a time, by the format's definition."""
    raw, out = [], []
    for _ in range(count):
        scale, low = (np.float16(x) for x in rng.uniform(0.01, 0.1, 2))
        if kind == "Q4_K":
            pack, nibbles = rng.integers(0, 256, 12, np.uint8), rng.integers(0, 256, 128, np.uint8)
            raw.append(np.concatenate([np.array([scale, low]).view(np.uint8), pack, nibbles]))
            for i in range(256):
                j = i // 32
                if j < 4:
                    s, m = int(pack[j]) & 63, int(pack[j + 4]) & 63
                else:
                    s = (int(pack[j + 4]) & 15) | (int(pack[j - 4]) >> 6) << 4
                    m = int(pack[j + 4]) >> 4 | (int(pack[j]) >> 6) << 4
                byte = int(nibbles[i // 64 * 32 + i % 32])
                out.append(float(scale) * s * (byte >> 4 if i // 32 % 2 else byte & 15) - float(low) * m)
        else:
            lows, highs = rng.integers(0, 256, 128, np.uint8), rng.integers(0, 256, 64, np.uint8)
            scales = rng.integers(-128, 128, 16).astype(np.int8)
            raw.append(np.concatenate([lows, highs, scales.view(np.uint8), np.array([scale]).view(np.uint8)]))
            for i in range(256):
                half, part, at = i // 128, i // 32 % 4, i % 32
                byte = int(lows[half * 64 + part % 2 * 32 + at])
                high = int(highs[half * 32 + at]) >> 2 * part & 3
                code = (byte >> 4 if part > 1 else byte & 15) | high << 4
                out.append(float(scale) * int(scales[i // 16]) * (code - 32))
    return np.stack(raw), np.array(out, np.float64)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants(kind: str, tmp_path: Path) -> None:
    raw, want = blocks(kind, 6, np.random.default_rng(2))
    data = raw.reshape(3, -1)
    path = write(tmp_path / "m.gguf", values={}, finish=lambda w: w.add_tensor("x", data, raw_dtype=Q[kind]))
    file = Gguf(path)
    assert file.stored["x"].shape == (3, 512)
    np.testing.assert_allclose(file.read("x").reshape(-1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_every_architecture_in_hugging_face_terms(kind: str, tied: bool, tmp_path: Path) -> None:
    values = tensors(kind, bias=kind == "qwen2", tied=tied)
    model = read_gguf(write(tmp_path / "m.gguf", kind, values))
    assert {name: info.shape for name, info in model.tensors.infos.items()} == {n: v.shape for n, v in values.items()}
    for name, value in values.items():
        rounding = 5e-7 if kind.startswith("gemma") else 0.0  # of the 1 that gemma's norms are stored with
        np.testing.assert_allclose(model.tensors.read(name), value, rtol=0, atol=rounding, err_msg=name)
    config = model.config
    assert config["model_type"] == {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}.get(kind, kind)
    assert config["tie_word_embeddings"] is tied
    assert (config["vocab_size"], config["hidden_size"], config["num_key_value_heads"]) == (ROWS, 64, 2)
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 500_000.0
    assert config.get("head_dim", HEAD) == HEAD
    assert model.tokenizer is None
    json.dumps(config)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_the_decoders_implement_every_key(kind: str, tmp_path: Path) -> None:
    """The families' own tables take the configuration and the names as they are."""
    pytest.importorskip("flax", reason="needs flax, which the models are written in")
    from jpeft.interop.decoders import DECODERS
    from jpeft.models.decoder import Decoder

    keys = {"attention.sliding_window": 32} if kind in ("gemma2", "gemma3") else {}
    model = read_gguf(write(tmp_path / "m.gguf", kind, tensors(kind, bias=kind == "qwen2"), keys=keys))
    family = DECODERS[model.config["model_type"]]
    config = family.read(model.config, "the file")
    assert (config.rope and config.rope.theta, config.head_size, config.tied) == (500_000.0, HEAD, True)
    match(model.tensors, family.names(config), Decoder(config).shapes())


def test_load_serves_a_gguf_file(tmp_path: Path) -> None:
    values = tensors("llama")
    model = read_gguf(write(tmp_path / "m.gguf", "llama", values, encode="Q8_0"))
    names = Names((Row("layers/q", "model.layers.{}.self_attn.q_proj.weight", "in"),), unread=(r"(?!.*q_proj).*",))
    shapes = {"layers": {"q": jax.ShapeDtypeStruct((2, 64, 4, HEAD), np.float32)}}
    params = load(model.tensors, match(model.tensors, names, shapes), shapes, lambda *_: None)
    want = values["model.layers.1.self_attn.q_proj.weight"].T.reshape(64, 4, HEAD)
    np.testing.assert_allclose(params["layers"]["q"][1], want, atol=0.02)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3moe"])
def test_experts(kind: str, tmp_path: Path) -> None:
    """All experts of a layer lie in one tensor; each is read as one of its own, whole or in rows."""
    pytest.importorskip("flax", reason="needs flax, which the models are written in")
    from jpeft.interop.pretrained import from_pretrained

    values = tensors(kind, tied=False)
    path = write(tmp_path / "m.gguf", kind, values)
    model = read_gguf(path)
    assert {name: info.shape for name, info in model.tensors.infos.items()} == {n: v.shape for n, v in values.items()}
    for name, value in values.items():
        np.testing.assert_array_equal(model.tensors.read(name), value, err_msg=name)
    ours, params, _ = from_pretrained(path)
    config = ours.config
    assert (config.experts, config.experts_chosen, config.mlp_size) == (EXPERTS, 2, 96)
    assert config.experts_renormalise
    at = "block_sparse_moe.experts.2.w2" if kind == "mixtral" else "mlp.experts.2.down_proj"
    down = params["layers"]["moe"]["down"]["kernel"]
    np.testing.assert_array_equal(down[1, 2], values[f"model.layers.1.{at}.weight"].T)
    assert np.isfinite(np.asarray(ours.apply(params, np.ones((1, 3), np.int32)).logits)).all()


def test_experts_of_older_files_and_in_quants(tmp_path: Path) -> None:
    values = tensors("mixtral")
    inner = {"w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down"}
    single = {f"blk.{n.split('.')[2]}.{inner[n.split('.')[-2]]}.{n.split('.')[5]}.weight": v
              for n, v in values.items() if ".experts." in n}

    def finish(writer: Any) -> None:
        for name, value in single.items():
            writer.add_tensor(name, value)

    rest = {name: value for name, value in values.items() if ".experts." not in name}
    old = read_gguf(write(tmp_path / "old.gguf", "mixtral", rest, finish=finish)).tensors
    assert set(old.infos) == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(old.read(name), value, err_msg=name)
    held = read_gguf(write(tmp_path / "q.gguf", "mixtral", values, encode="Q8_0")).tensors
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    want = gguf.quants.dequantize(gguf.quants.quantize(values[name], Q.Q8_0), Q.Q8_0)
    np.testing.assert_array_equal(held.read(name), want)
    (first, rows), = held.blocks(name, 4, 10, 2)
    assert first == 4
    np.testing.assert_array_equal(rows, want[4:10])


def parts_of(folder: Path, kind: str = "qwen2") -> list[Path]:
    folder.mkdir()
    write(folder / "m.gguf", kind, split_max_tensors=8)
    return sorted(folder.iterdir())


def test_a_model_in_several_files(tmp_path: Path) -> None:
    paths = parts_of(tmp_path / "parts")
    assert [path.name for path in paths] == [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    whole = read_gguf(write(tmp_path / "whole.gguf", "qwen2"))
    assert find(tmp_path / "parts") == paths[0]
    for path in paths:
        model = read_gguf(path)
        assert model.config == whole.config
        assert model.tensors.infos == whole.tensors.infos
        for name in whole.tensors.infos:
            np.testing.assert_array_equal(model.tensors.read(name), whole.tensors.read(name))
    (tmp_path / "parts" / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds 4 GGUF files; name one of them"):
        find(tmp_path / "parts")


def test_parts_that_are_missing_or_wrong(tmp_path: Path) -> None:
    paths = parts_of(tmp_path / "a")
    data = [path.read_bytes() for path in paths]
    paths[1].unlink()
    for path in (tmp_path / "a", paths[0], paths[2]):
        with pytest.raises(CheckpointError, match=r"is one of 3 parts; m-00002-of-00003\.gguf missing beside it"):
            read_gguf(find(path) or path)
    paths[1].write_bytes(data[2])
    with pytest.raises(CheckpointError, match=r"says that it is part 2 of 3 .*, its name that it is part 1 of 3"):
        read_gguf(paths[0])
    paths[1].write_bytes(data[1][:-8])
    with pytest.raises(CheckpointError, match="it is truncated"):
        read_gguf(paths[0])
    other = parts_of(tmp_path / "b", "llama")
    fewer = tmp_path / "c"
    fewer.mkdir()
    for path, content in zip(paths, data, strict=True):
        (fewer / path.name).write_bytes(content if path is not paths[1] else other[0].read_bytes())
    with pytest.raises(CheckpointError, match="its name that it is part 1 of 3"):
        read_gguf(fewer / paths[0].name)


def test_configurations_that_no_key_says(tmp_path: Path) -> None:
    gemma = read_gguf(write(tmp_path / "a.gguf", "gemma2", keys={"attention.sliding_window": 32})).config
    assert gemma["layer_types"] == ["sliding_attention", "full_attention"]
    assert (gemma["sliding_window"], gemma["query_pre_attn_scalar"]) == (32, HEAD)
    assert (gemma["attn_logit_softcapping"], gemma["final_logit_softcapping"]) == (50.0, 30.0)
    mistral = read_gguf(write(tmp_path / "b.gguf", "llama", keys={"attention.sliding_window": 32})).config
    assert (mistral["model_type"], mistral["sliding_window"]) == ("mistral", 32)
    linear = read_gguf(write(tmp_path / "c.gguf", keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}))
    assert linear.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    assert read_gguf(write(tmp_path / "d.gguf", "qwen2", keys=keys)).config["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def llama3(factor: float, size: int = HEAD, theta: float = 5e5, old: int = 8192) -> np.ndarray:
    out = []
    for i in range(size // 2):
        wave = 2 * np.pi * theta ** (2 * i / size)
        smooth = (old / wave - 1) / 3
        out.append(1.0 if wave < old / 4 else factor if wave > old else 1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_llama3_scaling_is_found_again(tmp_path: Path) -> None:
    def finish(values: np.ndarray) -> Callable[[Any], None]:
        return lambda writer: writer.add_tensor("rope_freqs.weight", values)

    said = read_gguf(write(tmp_path / "a.gguf", finish=finish(llama3(32.0)))).config["rope_scaling"]
    assert said == {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192}
    with pytest.raises(ModelConfigError, match=r"rope_freqs.weight are those of no known scaling"):
        read_gguf(write(tmp_path / "b.gguf", finish=finish(llama3(32.0)[::-1].copy())))


@pytest.mark.parametrize(("kind", "keys", "text"), [
    ("gpt2", {}, "architecture 'gpt2' is not implemented, only llama, qwen2"),
    ("llama", {"expert_shared_count": 8}, r"llama.expert_shared_count = 8 is not implemented \(nearest"),
    ("llama", {"expert_count": 8}, "llama.expert_used_count is missing"),
    ("qwen3moe", {"expert_feed_forward_length": None}, "qwen3moe.expert_feed_forward_length is missing"),
    ("llama", {"block_count": None}, "llama.block_count is missing"),
    ("llama", {"feed_forward_length": [96, 96]}, r"feed_forward_length = \[96, 96\] must be one number"),
    ("llama", {"rope.dimension_count": 8}, "rope.dimension_count = 8 is not implemented beside heads of 16"),
    ("qwen2", {"attention.key_length": 8, "rope.dimension_count": 8}, "heads of 8 are not implemented for qwen2"),
    ("llama", {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "'longrope' is not implemented"),
])  # fmt: skip
def test_what_is_not_implemented_is_named(kind: str, keys: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=text) as caught:
        read_gguf(write(tmp_path / "m.gguf", kind, keys=keys))
    assert "\n" not in str(caught.value)


def test_every_cut_and_many_flips_are_errors_or_harmless(tmp_path: Path) -> None:
    """No byte of the header can be wrong in a way that crashes, hangs or returns a tensor of another size."""
    data = write(tmp_path / "m.gguf", values={"model.norm.weight": np.arange(64, dtype=np.float32)},
                 finish=lambda w: (w.add_token_list(["a", "b"]), w.add_token_scores([0.5, 1.0]))).read_bytes()
    bad = tmp_path / "bad.gguf"
    for cut in [0, 1, 3, *range(4, len(data) - 1, 37), len(data) - 1]:
        bad.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"download it again|versions") as caught:
            Gguf(bad)
        assert "\n" not in str(caught.value)
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(len(data) - 256):
        bad.write_bytes(data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1:])
        try:
            file = Gguf(bad)
        except CheckpointError:
            refused += 1
            continue
        assert all(file.read(name).shape == info.shape for name, info in file.infos.items())
    assert refused > 100


def test_damage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    data = path.read_bytes()
    for new, text in ((b"PK\3\4" + data[4:], "begins with"), (data[:4] + b"\0\0\0\3" + data[8:], "big-endian"),
                      (data[:4] + b"\1\0\0\0" + data[8:], "of version 1"), (data[:-8], "is truncated")):
        path.write_bytes(new)
        with pytest.raises(CheckpointError, match=text):
            Gguf(path)
    path.write_bytes(data.replace(b"token_embd", b"token_emba"))
    with pytest.raises(CheckpointError, match=r"has no token_embd.weight"):
        read_gguf(path)
    parts = write(tmp_path / "p.gguf", finish=lambda w: w.add_uint16("split.count", 3))
    with pytest.raises(CheckpointError, match=r"one of 3 parts; name it as gguf-split does, NAME-00001-of-00003\.gguf"):
        read_gguf(parts)


def test_find(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.gguf").write_bytes(b"")
    assert find(tmp_path) == find(tmp_path / "inside" / "a.gguf") == tmp_path / "inside" / "a.gguf"
    (tmp_path / "inside" / "b.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files; name one of them: inside/a.gguf, inside/b.gguf"):
        find(tmp_path)
