"""Generation that is told of its prompts: which task they are of, and where an invocation begins."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from serve.test_virtual_tokens import adapted, model
from support import assert_close

import jpeft
from jpeft.errors import ModelInputError
from jpeft.methods.alora import invocation
from jpeft.serve.generate import Generator

NEW = 6
PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 8, 3, 4], [9, 3, 4, 8, 7, 6, 5, 4, 3, 3, 4]]
CALLED = (3, 4)
MULTITASK = {"embed/embedding": jpeft.MultitaskPromptTuning(length=4, num_tasks=3)}
ALORA = {"layers/(attention|mlp)/.*": jpeft.ALoRA(rank=2, alpha=4)}


def uncached(apply: Any, weights: Any, prompt: list[int], call: jpeft.Call, width: int = 32) -> list[int]:
    """The whole text again for each token, padded on the right to one width."""
    forward = jax.jit(lambda w, tokens: apply(*w, tokens, peft=call).logits)
    ids = list(prompt)
    for _ in range(NEW):
        logits = forward(weights, jnp.asarray([ids + [0] * (width - len(ids))]))
        ids.append(int(jnp.argmax(logits[0, len(ids) - 1])))
    return ids[len(prompt):]


@pytest.mark.slow
def test_every_prompt_has_its_task() -> None:
    apply, weights = adapted(model(), MULTITASK, 3.0)
    generator = Generator(model(), apply=apply)
    wrote = [one.tokens for one in generator(weights, PROMPTS, max_new_tokens=NEW, task=[2, 0, 1])]
    assert wrote == [uncached(apply, weights, prompt, jpeft.Call(task=jnp.asarray(task)))
                     for prompt, task in zip(PROMPTS, (2, 0, 1), strict=True)]
    assert generator(weights, PROMPTS[:1], max_new_tokens=NEW, task=2)[0].tokens == wrote[0]
    assert wrote[0] != generator(weights, PROMPTS[:1], max_new_tokens=NEW, task=1)[0].tokens
    assert generator.traces["prefill"] <= 3
    for task, words in ((None, "has learnt 3 tasks and is not told which"), (3, "a number from 0 to 2"),
                        ([0, 1], "or one for each of 3 prompts"), (1.0, "task is 1.0")):
        with pytest.raises(ModelInputError, match=words):
            generator(weights, PROMPTS, max_new_tokens=1, task=task)  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_invocation_is_where_the_adapter_begins() -> None:
    apply, weights = adapted(model(), ALORA)
    generator = Generator(model(), apply=apply)
    lengths = [int(invocation(jnp.asarray([prompt]), CALLED)[0]) for prompt in PROMPTS]
    assert lengths == [2, 2, 9]
    wrote = [one.tokens for one in generator(weights, PROMPTS, max_new_tokens=NEW, lengths=lengths)]
    assert wrote == [uncached(apply, weights, prompt, jpeft.Call(lengths=jnp.asarray([before])))
                     for prompt, before in zip(PROMPTS, lengths, strict=True)]
    everywhere = [one.tokens for one in generator(weights, PROMPTS, max_new_tokens=NEW)]
    assert everywhere == [uncached(apply, weights, prompt, jpeft.Call()) for prompt in PROMPTS]
    assert wrote != everywhere
    for given, words in (([2, 2, 11], "prompt 2 has 11 tokens and lengths says that 11 come before"),
                         ([2], "one whole number for each of 3 prompts")):
        with pytest.raises(ModelInputError, match=words):
            generator(weights, PROMPTS, max_new_tokens=1, lengths=given)


@pytest.mark.slow
def test_the_cache_before_an_invocation_is_the_base_model_s() -> None:
    """What the base has read serves the adapter: the call that goes on gives what the whole call does."""
    made = model()
    apply, (trainable, frozen) = adapted(made, ALORA)
    ids, before = jnp.asarray([PROMPTS[2]]), 9

    @jax.jit
    def run(t: Any) -> Any:
        cache = made.apply(frozen.base, ids[:, :before], cache=made.empty_cache(1, 16)).cache
        rest = apply(t, frozen, ids[:, before:], cache=cache, peft=jpeft.Call(continued=True)).logits
        whole = apply(t, frozen, ids, peft=jpeft.Call(lengths=jnp.asarray([before]))).logits
        return rest, whole, made.apply(frozen.base, ids).logits

    rest, whole, base = run(trainable)
    assert_close(rest, whole[:, before:], 1e-5)
    assert_close(whole[:, :before], base[:, :before], 1e-5)
    assert not np.allclose(whole[:, before:], base[:, before:], atol=1e-2)


def test_what_no_method_reads() -> None:
    params = model().init(jax.random.key(0))
    for options, word in (({"task": 0}, "task"), ({"lengths": [0]}, "lengths")):
        with pytest.raises(ModelInputError, match=f"{word} is given, and no method of the function reads it; drop it"):
            Generator(model())(params, [[1, 2]], max_new_tokens=1, **options)
