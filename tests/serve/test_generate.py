"""Generation on a small random decoder: cached equals uncached, batches equal rows, traces, texts, adapters, errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")
pytest.importorskip("tokenizers", reason="needs tokenizers, for answers in text")

import tokenizers

import jpeft
from jpeft.errors import ModelInputError
from jpeft.interop.tokenizer import Tokenizer
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.models.rope import Rope
from jpeft.serve.generate import Generation, Generator
from jpeft.serve.sampling import Sampling

VOCAB = 60
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 9, 8, 7, 6, 5, 4, 3, 2, 1], [11, 11]]


def model(**changes: Any) -> Decoder:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 4, "mlp_size": 32,
        "positions": 128, "rope": Rope(), "initializer_range": 0.4, "tied": True}
    return Decoder(DecoderConfig(**{**sizes, **changes}))


@pytest.fixture(scope="module")
def plain() -> tuple[Decoder, Any]:
    made = model()
    return made, made.init(jax.random.key(0))


@pytest.fixture(scope="module")
def generator(plain: tuple[Decoder, Any]) -> Generator:
    return Generator(plain[0])


def uncached(made: Decoder, params: Any, prompt: list[int], count: int, width: int = 48) -> list[int]:
    """The whole text again for each token, padded on the right to one width."""
    forward = jax.jit(made.apply)
    ids = list(prompt)
    for _ in range(count):
        tokens = jnp.asarray([ids + [0] * (width - len(ids))])
        ids.append(int(jnp.argmax(forward(params, tokens).logits[0, len(ids) - 1])))
    return ids[len(prompt):]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {},
    {"window": 6, "local": (0, 1)},
    {"window": 6, "local": (0,), "logit_cap": 3.0, "tied": False},
    {"position_table": True, "rope": None, "norm": "layer"},
], ids=["rope", "ring", "windows", "table"])  # fmt: skip
def test_cached_greedy_is_uncached_greedy(changes: dict[str, Any]) -> None:
    made = model(**changes)
    params = made.init(jax.random.key(1))
    answers = Generator(made)(params, PROMPTS, max_new_tokens=24)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.tokens == uncached(made, params, prompt, 24)
        assert (answer.reason, answer.prompt_tokens, answer.text) == ("length", len(prompt), "")


def test_one_trace_per_bucket(plain: tuple[Decoder, Any]) -> None:
    made, params = plain
    generator = Generator(made)
    for length, new in ((3, 5), (17, 8), (8, 12), (9, 16)):
        generator(params, [list(range(1, length + 1))], max_new_tokens=new)
    assert generator.traces == {"prefill": 2, "decode": 2}
    for length, new in ((4, 7), (16, 10), (5, 6)):
        generator(params, [list(range(1, length + 1))], max_new_tokens=new)
    assert generator.traces == {"prefill": 2, "decode": 2}
    generator(params, [list(range(1, 40))], max_new_tokens=5)
    assert generator.traces == {"prefill": 3, "decode": 3}


def test_sampling_values_share_a_step(plain: tuple[Decoder, Any]) -> None:
    made, params = plain
    generator = Generator(made)
    for temperature, k in ((0.5, 3), (1.5, 9)):
        generator(params, [[1, 2]], max_new_tokens=4, sampling=Sampling(temperature=temperature, top_k=k))
    assert generator.traces == {"prefill": 1, "decode": 1}


def test_seeds(plain: tuple[Decoder, Any], generator: Generator) -> None:
    def draw(seed: int) -> list[Generation]:
        return generator(plain[1], PROMPTS, max_new_tokens=12, sampling=Sampling(temperature=1.0), seed=seed)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_top_k_of_one_is_greedy(plain: tuple[Decoder, Any], generator: Generator) -> None:
    how = Sampling(temperature=1.0, top_k=1)
    drawn = generator(plain[1], PROMPTS, max_new_tokens=8, sampling=how)
    assert drawn == generator(plain[1], PROMPTS, max_new_tokens=8)


def test_repetition_penalty_covers_prompt_and_answer(plain: tuple[Decoder, Any], generator: Generator) -> None:
    """A huge penalty leaves no token twice, in the prompt or the answer, as long as there are others."""
    for prompt, answer in zip(PROMPTS, generator(plain[1], PROMPTS, max_new_tokens=20,
                                                 sampling=Sampling(repetition_penalty=1e6)), strict=True):
        made = answer.tokens
        positive = [t for t in made if made.count(t) > 1 or t in prompt]
        assert positive == []


def test_eos_ends_a_row_and_no_other(plain: tuple[Decoder, Any], generator: Generator) -> None:
    free = generator(plain[1], PROMPTS, max_new_tokens=20)
    end = free[0].tokens[5]
    cut = generator(plain[1], PROMPTS, max_new_tokens=20, eos=[end])
    for whole, one in zip(free, cut, strict=True):
        stop = whole.tokens.index(end) + 1 if end in whole.tokens else 20
        assert one.tokens == whole.tokens[:stop]
        assert one.reason == ("eos" if end in whole.tokens else "length")


# --- texts ---

def words() -> Tokenizer:
    vocabulary = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.add_special_tokens(["<pad>", "</s>"])
    template = "{% for m in messages %}{{ m.content }} w2 {% endfor %}"
    return Tokenizer(raw, 0, 128, False, {"eos_token": 1, "pad_token": 0}, template=template)


def test_texts_stream_and_stop(plain: tuple[Decoder, Any]) -> None:
    made, params = plain
    generator = Generator(made, words())
    prompts = ["w5 w6 w7", "w9"]
    free = generator(params, prompts, max_new_tokens=20, eos=[])
    ids = generator(params, [[5, 6, 7], [9]], max_new_tokens=20, eos=[])
    assert [one.tokens for one in free] == [one.tokens for one in ids]
    stop = f"w{free[0].tokens[6]} w{free[0].tokens[7]}"
    parts: dict[int, str] = {0: "", 1: ""}

    def on_text(row: int, part: str) -> None:
        parts[row] += part

    cut = generator(params, prompts, max_new_tokens=20, eos=[], stop=[stop], on_text=on_text)
    assert cut[0].reason == "stop"
    assert cut[0].text == free[0].text[:free[0].text.index(stop)]
    assert len(cut[0].tokens) < 20
    assert [parts[0], parts[1]] == [one.text for one in cut]


def test_a_chat_is_its_template(plain: tuple[Decoder, Any]) -> None:
    made, params = plain
    generator = Generator(made, words())
    answer = generator.chat(params, [{"role": "user", "content": "w5"}], max_new_tokens=4)
    assert answer.tokens == generator(params, [[5, 2]], max_new_tokens=4)[0].tokens
    assert generator(params, ["w5"], max_new_tokens=60)[0].reason in ("eos", "length")


# --- adapted ---

def test_adapted_equals_merged(plain: tuple[Decoder, Any], generator: Generator) -> None:
    made, params = plain
    plan = jpeft.plan(made.apply, params, (jnp.ones((1, 4), int),), {r".*/(query|value|up|down)/kernel": jpeft.LoRA(2)})
    trainable, frozen = jpeft.init(plan, params, jax.random.key(1))
    trainable = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), trainable)
    adapted = Generator(made, apply=jpeft.adapt(made.apply, plan))
    answers = adapted((trainable, frozen), PROMPTS, max_new_tokens=16)
    assert answers == generator(jpeft.merge(plan, trainable, frozen), PROMPTS, max_new_tokens=16)
    assert answers != generator(params, PROMPTS, max_new_tokens=16)
    assert adapted.traces == {"prefill": 1, "decode": 1}


# --- errors ---

@pytest.mark.parametrize(("prompts", "options", "text"), [
    ("w5", {}, "must be a list of at least one text"),
    ([], {}, "must be a list of at least one text"),
    (["w5"], {}, "prompts in text need a tokenizer"),
    ([[1], []], {}, "prompt 1 has no tokens"),
    ([[1, 99]], {}, "prompt 0 has the id 99, the model knows 0 to 59"),
    ([[-1, 3]], {}, "prompt 0 has the id -1"),
    ([[1] * 100], {"max_new_tokens": 30}, "prompt 0 has 100 tokens, with max_new_tokens=30 more than the 128"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ([[1]], {"stop": "x"}, "must be a list of strings"),
    ([[1]], {"stop": [""]}, "must be a list of strings that are not empty"),
    ([[1]], {"stop": ["x"]}, "stop strings and on_text need a tokenizer"),
])  # fmt: skip
def test_wrong_inputs(plain: tuple[Decoder, Any], generator: Generator, prompts: Any, options: dict[str, Any],
                      text: str) -> None:
    with pytest.raises(ModelInputError, match=text) as caught:
        generator(plain[1], prompts, **options)
    assert "\n" not in str(caught.value)


def test_nan_is_said(plain: tuple[Decoder, Any], generator: Generator) -> None:
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.nan), plain[1])
    with pytest.raises(ModelInputError, match="the logits after token 5 of row 0 are NaN"):
        generator(broken, PROMPTS, max_new_tokens=3)


