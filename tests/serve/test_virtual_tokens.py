"""Prompts and prefixes in generation: they enter the cache once, and what is written is what the full text gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from support import assert_close, randomise

import jpeft
from jpeft.errors import CallError, ModelInputError
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.models.rope import Rope
from jpeft.serve.generate import Generator

V, NEW = 5, 12
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 9, 8, 7, 6, 5, 4, 3, 2, 1], [11, 11]]
KV = r"layers/attention/(key|value)/kernel"
RULES: dict[str, dict[str, Any]] = {
    "prompt": {"embed/embedding": jpeft.PromptTuning(length=V)},
    "prefix": {KV: jpeft.PrefixTuning(length=V)},
    "lora and prompt": {"all-linear": jpeft.LoRA(rank=2), "embed/embedding": jpeft.PromptTuning(length=V)},
    "lora under prefix": {KV: jpeft.Chain((jpeft.LoRA(rank=2), jpeft.PrefixTuning(length=3))),
                          "all-linear": jpeft.LoRA(rank=2), "embed/embedding": jpeft.PromptTuning(length=2)},
}  # fmt: skip
PLACES: dict[str, dict[str, Any]] = {"rope": {}, "table": {"position_table": True, "rope": None, "norm": "layer"}}
DEFAULT = (("lora and prompt", "rope"),)


def model(**changes: Any) -> Decoder:
    sizes: dict[str, Any] = {
        "vocab_size": 60, "hidden_size": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 4, "mlp_size": 32,
        "positions": 128, "rope": Rope(), "initializer_range": 0.4, "tied": True}
    return Decoder(DecoderConfig(**{**sizes, **changes}))


def adapted(made: Decoder, rules: dict[str, Any], scale: float = 1.0) -> tuple[Any, tuple[Any, Any]]:
    """An adapted function whose methods say something, and its weights."""
    params = made.init(jax.random.key(0))
    plan = jpeft.plan(made.apply, params, (jnp.ones((1, 4), int),), rules, tokens=jpeft.Tokens(ids=0))
    trainable, frozen = jpeft.init(plan, params, jax.random.key(1))
    return jpeft.adapt(made.apply, plan), (randomise(trainable, 2, scale), frozen)


def uncached(apply: Any, weights: Any, prompt: list[int], count: int = NEW, width: int = 32) -> list[int]:
    """The whole text again for each token, padded on the right to one width."""
    forward = jax.jit(lambda w, tokens: apply(*w, tokens).logits)
    ids = list(prompt)
    for _ in range(count):
        logits = forward(weights, jnp.asarray([ids + [0] * (width - len(ids))]))
        ids.append(int(jnp.argmax(logits[0, len(ids) - 1])))
    return ids[len(prompt):]


@pytest.mark.parametrize(("name", "place"), [
    pytest.param(name, place, marks=() if (name, place) in DEFAULT else pytest.mark.slow)
    for name in RULES for place in PLACES])  # fmt: skip
def test_cached_greedy_is_uncached_greedy(name: str, place: str) -> None:
    made = model(**PLACES[place])
    apply, weights = adapted(made, RULES[name])
    generator = Generator(made, apply=apply)
    wrote = generator(weights, PROMPTS, max_new_tokens=NEW)
    for prompt, answer in zip(PROMPTS, wrote, strict=True):
        assert answer.tokens == uncached(apply, weights, prompt)


@pytest.mark.slow
def test_a_row_writes_the_same_alone() -> None:
    made = model()
    apply, weights = adapted(made, RULES["prompt"])
    generator = Generator(made, apply=apply)
    wrote = [one.tokens for one in generator(weights, PROMPTS, max_new_tokens=NEW)]
    assert wrote == [generator(weights, [prompt], max_new_tokens=NEW)[0].tokens for prompt in PROMPTS]
    assert wrote != [one.tokens for one in Generator(made)(weights[1].base, PROMPTS, max_new_tokens=NEW)]


def test_nothing_is_traced_again() -> None:
    made = model()
    apply, weights = adapted(made, RULES["prompt"])
    generator = Generator(made, apply=apply)
    for length, new in ((3, 5), (9, 7), (16, 6), (1, 9)):
        generator(weights, [list(range(1, length + 1))], max_new_tokens=new)
    assert generator.traces == {"prefill": 1, "decode": 1}


@pytest.mark.parametrize("windows", [
    pytest.param({"window": 9, "local": (0,)}, id="some layers", marks=pytest.mark.slow),
    pytest.param({"window": 9, "local": (0, 1)}, id="all layers", marks=pytest.mark.slow)])
def test_windows_reach_as_far_as_without_padding(windows: dict[str, Any]) -> None:
    made = model(**windows)
    apply, weights = adapted(made, RULES["prompt"])
    generator = Generator(made, apply=apply)
    for prompt in (PROMPTS[0], PROMPTS[1]):
        assert generator(weights, [prompt], max_new_tokens=NEW)[0].tokens == uncached(apply, weights, prompt)
    if not made.config.uniform:
        return
    pair = [PROMPTS[0], PROMPTS[0][::-1]]
    assert [one.tokens for one in generator(weights, pair, max_new_tokens=NEW)] == [
        uncached(apply, weights, prompt) for prompt in pair]
    with pytest.raises(ModelInputError, match="prompts of 1 to 5 tokens: padding would push 5 virtual tokens out of"):
        generator(weights, PROMPTS[:2], max_new_tokens=NEW)


def test_a_prefix_is_the_past_of_a_cache() -> None:
    """Virtual tokens, which any model takes, against keys and values, which the zoo takes: 1e-5."""
    made = model(rope=None)
    apply, (trainable, frozen) = adapted(made, RULES["prefix"])
    past = tuple(trainable[f"layers/attention/{name}/kernel"]["p"][:, None] for name in ("key", "value"))
    assert past[0].shape == (2, 1, V, 2, 4)
    tokens = jnp.asarray([PROMPTS[0], PROMPTS[2][:5]])
    one, other, plain = jax.jit(lambda: (apply(trainable, frozen, tokens), made.apply(
        frozen.base, tokens, past=past), made.apply(frozen.base, tokens)))()
    assert_close(one.hidden, other.hidden, 1e-5)
    assert_close(one.logits, other.logits, 1e-5)
    assert not np.allclose(one.logits, plain.logits, atol=1e-2)
    gradients = jax.jit(jax.grad(lambda p: jnp.sin(apply(p, frozen, tokens).hidden).sum()))(trainable)
    direct = jax.jit(jax.grad(lambda p: jnp.sin(made.apply(frozen.base, tokens, past=p).hidden).sum()))(past)
    for name, want in zip(("key", "value"), direct, strict=True):
        assert_close(gradients[f"layers/attention/{name}/kernel"]["p"], want[:, 0], 1e-5)


def test_positions_behind_virtual_tokens_are_counted() -> None:
    made = model(positions=20)
    apply, weights = adapted(made, RULES["prompt"])
    generator = Generator(made, apply=apply)
    assert len(generator(weights, [[1, 2, 3]], max_new_tokens=13)[0].tokens) == 13
    with pytest.raises(ModelInputError, match="3 tokens behind 5 virtual tokens, with max_new_tokens=14 more than the "
                                              "20 positions"):
        generator(weights, [[1, 2, 3]], max_new_tokens=14)


def test_virtual_tokens_that_cannot_be_seen_are_refused() -> None:
    made = model()
    plan = jpeft.plan(made.apply, made.init(jax.random.key(0)), (jnp.ones((1, 4), int),), RULES["prompt"],
                      tokens=jpeft.Tokens(positions="positions"), example_kwargs={"positions": jnp.ones((1, 4), int)})
    weights = jpeft.init(plan, made.init(jax.random.key(0)), jax.random.key(1))
    hidden = jpeft.adapt(made.apply, plan)
    with pytest.raises(ModelInputError, match="apply put 21 tokens for 16 into the cache: it has virtual tokens"):
        Generator(made, apply=lambda *args, **named: hidden(*args, **named))(weights, [[1, 2, 3]], max_new_tokens=3)


def test_a_call_that_continues_adds_no_virtual_tokens() -> None:
    made = model()
    apply, weights = adapted(made, RULES["prompt"])
    tokens = jnp.asarray([[1, 2, 3]])
    one, other = jax.jit(lambda: (apply(*weights, tokens, peft=jpeft.Call(continued=True)).logits,
                                  made.apply(weights[1].base, tokens).logits))()
    assert_close(one, other, 1e-6)
    assert (apply.apply, apply.plan.virtual_tokens) == (made.apply, V)
    with pytest.raises(CallError, match=r"continued.* is no bool but an array; make the Call inside the jitted"):
        jax.jit(lambda call: apply(*weights, tokens, peft=call).logits)(jpeft.Call(continued=True))
