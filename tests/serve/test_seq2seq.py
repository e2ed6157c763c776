"""Generation by an encoder-decoder: cached equals uncached, transformers writes the same, virtual tokens, errors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from models.t5_cases import CASES, torch_model, write
from support import randomise

import jpeft
from jpeft.errors import CallError, ModelInputError
from jpeft.models.encoder import Encoder, EncoderConfig
from jpeft.models.t5 import T5
from jpeft.models.t5_config import T5Config
from jpeft.serve.generate import Generator
from jpeft.serve.sampling import Sampling

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 8, 7, 6, 5, 4, 3, 9, 8, 7, 6, 5, 4, 3, 9, 8, 7, 6]]
NEW = 10


def model(**changes: Any) -> tuple[T5, Any]:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "layers": 2, "decoder_layers": 3, "heads": 4,
                             "head_size": 4, "mlp_size": 32, "start_id": 2}
    made = T5(T5Config(**{**sizes, **changes}))
    return made, randomise(made.init(jax.random.key(0)), 3, 0.4)


def uncached(apply: Any, weights: Any, prompts: list[list[int]], count: int = NEW) -> list[list[int]]:
    """The whole answers again for each token, padded on the right."""
    forward = jax.jit(lambda w, tokens, mask, written: apply(*w, tokens, attention_mask=mask,
                                                             decoder_tokens=written).logits)
    longest = max(map(len, prompts))
    tokens = jnp.asarray([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    mask = jnp.asarray([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    written = np.zeros((len(prompts), count + 1), int)
    written[:, 0] = 2
    for n in range(count):
        written[:, n + 1] = forward(weights, tokens, mask, jnp.asarray(written[:, :count]))[:, n].argmax(-1)
    return written[:, 1:].tolist()


def adapted(made: T5, params: Any, rules: dict[str, Any]) -> tuple[Any, tuple[Any, Any]]:
    ids = jnp.ones((1, 4), int)
    plan = jpeft.plan(made.apply, params, (ids,), rules, example_kwargs={"decoder_tokens": ids},
                      tokens=jpeft.Tokens(ids=0))
    trainable, frozen = jpeft.init(plan, params, jax.random.key(1))
    return jpeft.adapt(made.apply, plan), (randomise(trainable, 2, 1.0), frozen)


@pytest.mark.slow
def test_cached_greedy_is_uncached_greedy() -> None:
    made, params = model()
    generator = Generator(made)
    wrote = generator(params, PROMPTS, max_new_tokens=NEW)
    assert [answer.tokens for answer in wrote] == uncached(made.apply, (params,), PROMPTS)
    for prompt, answer in zip(PROMPTS, wrote, strict=True):
        assert (answer.reason, answer.prompt_tokens, answer.text) == ("length", len(prompt), "")
    assert len({tuple(answer.tokens) for answer in wrote}) > 1
    for length, new in ((17, 5), (20, 9), (24, 16)):
        generator(params, [list(range(3, 3 + length))] * 3, max_new_tokens=new)
    assert generator.traces == {"prefill": 1, "decode": 1}


def test_sampling_and_ends() -> None:
    made, params = model()
    generator = Generator(made)
    hot = Sampling(temperature=1.0)

    def draw(seed: int) -> list[list[int]]:
        return [one.tokens for one in generator(params, PROMPTS, max_new_tokens=NEW, sampling=hot, seed=seed)]

    assert draw(0) == draw(0) != draw(1)
    fresh = generator(params, PROMPTS, max_new_tokens=NEW, sampling=Sampling(repetition_penalty=1e6))
    assert all(len({2, *one.tokens}) == NEW + 1 for one in fresh)
    end = draw(0)[0][4]
    cut = generator(params, PROMPTS, max_new_tokens=NEW, sampling=hot, seed=0, eos=[end])[0]
    assert (cut.tokens, cut.reason) == (draw(0)[0][:draw(0)[0].index(end) + 1], "eos")


@pytest.mark.parametrize("rules", [
    pytest.param({"embed/embedding": jpeft.PromptTuning(length=3), ".*/(query|value)/kernel": jpeft.LoRA(rank=2)},
                 marks=pytest.mark.slow),
    pytest.param({"encoder/layers/attention/(key|value)/kernel": jpeft.PrefixTuning(length=3)},
                 marks=pytest.mark.slow),
    pytest.param({"(encoder/layers/attention|decoder/layers/cross)/(key|value)/kernel": jpeft.PrefixTuning(length=3)},
                 marks=pytest.mark.slow),
], ids=["prompt", "prefix", "prefix of both"])  # fmt: skip
def test_virtual_tokens_before_the_text(rules: dict[str, Any]) -> None:
    made, params = model()
    apply, weights = adapted(made, params, rules)
    generator = Generator(made, apply=apply)
    wrote = generator(weights, PROMPTS, max_new_tokens=NEW)
    assert [one.tokens for one in wrote] == uncached(apply, weights, PROMPTS)
    assert [one.tokens for one in wrote] != [one.tokens for one in Generator(made)(params, PROMPTS, max_new_tokens=NEW)]
    assert generator.traces == {"prefill": 1, "decode": 1}


@pytest.mark.slow
def test_a_prompt_is_more_embedded_text() -> None:
    """The table is shared: the prompt stands before the encoded text, and the decoder's words are left alone."""
    made, params = model()
    apply, (trainable, frozen) = adapted(made, params, {"embed/embedding": jpeft.PromptTuning(length=3)})
    spare = [37, 38, 39]
    words = params["embed"]["embedding"].at[jnp.asarray(spare)].set(trainable["embed/embedding"]["p"])
    text, written = jnp.asarray([PROMPTS[0]]), jnp.asarray([[2, 5, 6, 7]])
    one, other = jax.jit(lambda: (
        apply(trainable, frozen, text, decoder_tokens=written).hidden,
        made.apply({**params, "embed": {"embedding": words}}, jnp.asarray([spare + PROMPTS[0]]),
                   decoder_tokens=written).hidden))()
    assert one.shape == (1, 4, 16)
    assert jnp.abs(one - other).max() < 1e-5


def test_a_prefix_before_a_text_without_virtual_tokens() -> None:
    made, params = model()
    with pytest.raises(CallError, match=r"'decoder/layers/attention/key/kernel' to tokens that have no virtual ones "
                                        r"before them; limit the rule of PrefixTuning to the leaves of the text"):
        adapted(made, params, {".*/attention/(key|value)/kernel": jpeft.PrefixTuning(length=3)})


def test_virtual_tokens_before_the_answer_are_refused() -> None:
    made, params = model()
    ids = jnp.ones((1, 4), int)
    rules = {"decoder/layers/attention/(key|value)/kernel": jpeft.PrefixTuning(length=3)}
    plan = jpeft.plan(made.apply, params, (ids,), rules,
                      example_kwargs={"decoder_tokens": ids}, tokens=jpeft.Tokens(ids="decoder_tokens", mask=None))
    with pytest.raises(ModelInputError, match="before the argument 'decoder_tokens' of an encoder-decoder cannot be"):
        Generator(made, apply=jpeft.adapt(made.apply, plan))


def test_a_model_that_writes_nothing() -> None:
    made = Encoder(EncoderConfig(vocab_size=9, hidden_size=8, layers=1, heads=2, mlp_size=16, positions=4))
    with pytest.raises(ModelInputError, match="a model with the task 'hidden' writes no text; load it with task="):
        Generator(made)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
@pytest.mark.parametrize("case", [case for case in CASES if case.task == "seq2seq"], ids=lambda case: case.name)
def test_greedy_is_that_of_transformers(case: Any, tmp_path: Path) -> None:
    import torch

    folder = write(case, tmp_path)
    made, params, _ = jpeft.from_pretrained(folder)
    peer = torch_model(case, folder)
    start = json.loads((folder / "config.json").read_text()).get("decoder_start_token_id", 0)
    peer.generation_config.update(decoder_start_token_id=start)
    assert made.config.start_id == start
    penalty = Sampling(repetition_penalty=1.3)
    generator = Generator(made)
    found = generator(params, PROMPTS, max_new_tokens=20, eos=[1])
    moved = generator(params, PROMPTS, max_new_tokens=20, eos=[1], sampling=penalty)
    for prompt, plain, other in zip(PROMPTS, found, moved, strict=True):
        for answer, options in ((plain, {}), (other, {"repetition_penalty": 1.3})):
            theirs = peer.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                                   max_new_tokens=20, use_cache=False, pad_token_id=0, eos_token_id=1, **options)
            assert answer.tokens == theirs[0, 1:].tolist()
