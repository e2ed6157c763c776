"""Prefixes as keys and values against prefixes as virtual tokens: one plan, two functions, equal numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from support import assert_close, quick_compile, randomise

import jpeft
from jpeft.errors import ModelInputError, PlanError
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.models.encoder import Encoder, EncoderConfig
from jpeft.models.rope import Rope
from jpeft.models.t5 import T5
from jpeft.models.t5_config import T5Config

V, D = 3, 16
IDS = jnp.asarray([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
MASK = jnp.asarray([[1] * 5, [1, 1, 1, 1, 0]])
PREFIX = jpeft.PrefixTuning(length=V)
KV = "layers/attention/(key|value)/kernel"
BOTH = "(encoder/layers/attention|decoder/layers/cross)/(key|value)/kernel"
OWN = "decoder/layers/attention/(key|value)/kernel"


def decoder(**changes: Any) -> Decoder:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": D, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 4,
                             "mlp_size": 24, "positions": 32, "rope": Rope(), "initializer_range": 0.4, "tied": True}
    return Decoder(DecoderConfig(**{**sizes, **changes}))


def encoder(**changes: Any) -> Encoder:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": D, "layers": 2, "heads": 2, "mlp_size": 24,
                             "positions": 12, "initializer_range": 0.4}
    return Encoder(EncoderConfig(**{**sizes, **changes}))


def t5() -> T5:
    return T5(T5Config(vocab_size=20, hidden_size=D, layers=2, decoder_layers=3, heads=2, head_size=4, mlp_size=24))


TEXT = jpeft.Tokens(ids=0)
WRITTEN = {"decoder_tokens": IDS[:, :4]}
FUSED = {"kv_heads": 4, "rope": None, "position_table": True, "norm": "layer"}
QKV = "layers/attention/qkv/kernel"
ROWS: dict[str, tuple[Any, dict[str, Any], jpeft.Tokens, dict[str, Any]]] = {
    "decoder": (decoder(qk_norm="head"), {
        KV: jpeft.Chain((jpeft.LoRA(rank=2), PREFIX)), "embed/embedding": jpeft.PromptTuning(length=2),
        "mlp": jpeft.LoRA(rank=2)}, TEXT, {}),
    "encoder": (encoder(task="classification", labels=3, dropout=0.1), {KV: PREFIX, "classifier/.*": jpeft.Full()},
                TEXT, {}),
    "t5": (t5(), {BOTH: jpeft.PrefixTuning(length=V, prefix_projection=True, encoder_hidden_size=4)}, TEXT, WRITTEN),
    "t5 decoder": (t5(), {OWN: PREFIX}, jpeft.Tokens(ids="decoder_tokens", mask=None), WRITTEN),
    "windows": (decoder(window=4, local=(1,), local_rope=Rope(theta=100.0), unrotated=(0,)), {KV: PREFIX}, TEXT, {}),
    "positions": (decoder(), {KV: PREFIX}, jpeft.Tokens(ids=0, positions="positions"), {"positions": 2 * IDS}),
    "roberta": (encoder(positions_after_pad=True, pad_id=6, positions=20), {KV: PREFIX}, TEXT, {}),
    "blocks": (decoder(fused_qkv="blocks"), {QKV: jpeft.PrefixTuning(length=V, channels=(16, 32))}, TEXT, {}),
    "gpt2": (decoder(fused_qkv="thirds", **FUSED), {QKV: jpeft.PrefixTuning(length=V, channels=(16, 48))}, TEXT, {}),
    "neox": (decoder(fused_qkv="heads", **FUSED), {QKV: PREFIX}, TEXT, {}),
}


@pytest.mark.parametrize("name", [
    pytest.param(n, marks=() if n == "encoder" else pytest.mark.slow) for n in ROWS])
def test_equal_to_virtual_tokens(name: str) -> None:
    model, rules, tokens, more = ROWS[name]
    params, inputs = model.init(jax.random.key(0)), {"attention_mask": MASK, **more}
    plan = jpeft.plan(model.apply, params, (IDS,), rules, example_kwargs=inputs, tokens=tokens)
    start, frozen = jpeft.init(plan, params, jax.random.key(1))

    def measure(apply: Any, t: Any) -> Any:
        def loss(t: Any) -> Any:
            hidden = apply(t, frozen, IDS, **inputs).hidden
            return jnp.sum(jnp.sin(hidden)), hidden
        return jax.grad(loss, has_aux=True)(t)

    run = jax.jit(lambda t: [measure(adapt, t) for adapt in (
        jpeft.adapt_prefix(model, plan), jpeft.adapt(model.apply, plan))], compiler_options=quick_compile())
    (slopes, hidden), (want_slopes, want) = run(randomise(start, 2, 1.0))
    assert_close(hidden, want, 1e-5, "hidden")
    for (path, letters), old in zip(slopes.items(), want_slopes.values(), strict=True):
        for letter, slope in letters.items():
            if "classifier" not in path:
                assert jnp.any(slope != 0), f"{path} {letter}"
                assert_close(slope, old[letter], 1e-5, f"{path} {letter}")
    assert not jnp.allclose(hidden, model.apply(params, IDS, **inputs).hidden, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "t5"])
def test_decoding(name: str) -> None:
    """The prefix is given to every step and is no part of the cache."""
    from jpeft.serve.generate import Generator

    model, rules, tokens, more = ROWS[name]
    params = model.init(jax.random.key(0))
    plan = jpeft.plan(model.apply, params, (IDS,), {k: v for k, v in rules.items() if "embed" not in k},
                      example_kwargs=more, tokens=tokens)
    trainable, frozen = jpeft.init(plan, params, jax.random.key(1))
    weights = (randomise(trainable, 2, 1.0), frozen)
    ours, want = ([one.tokens for one in Generator(model, apply=apply)(weights, [[1, 2, 3], [4]], max_new_tokens=8)]
                  for apply in (jpeft.adapt_prefix(model, plan), jpeft.adapt(model.apply, plan)))
    assert ours == want


def plan_of(model: Any, rules: Any, **more: Any) -> jpeft.Plan:
    return jpeft.plan(model.apply, model.shapes(), (IDS,), rules, tokens=TEXT, example_kwargs=more)


MISTAKES = {
    "no model": (lambda: jpeft.adapt_prefix(jnp.sin, plan_of(encoder(), {KV: PREFIX})), "takes a model of the zoo"),
    "no prefix": (lambda: jpeft.adapt_prefix(encoder(), plan_of(encoder(), {KV: jpeft.LoRA()})), "has no PrefixTuning"),
    "keys alone": (lambda: jpeft.adapt_prefix(encoder(), plan_of(encoder(), {KV.replace("|value", ""): PREFIX})),
                   r"on \['key'\] of 'attention' and none on \['value'\]"),
    "queries": (lambda: jpeft.adapt_prefix(encoder(), plan_of(encoder(), {".*/query/kernel": PREFIX})),
                "query/kernel' is no plain prefix"),
    "half of t5": (lambda: jpeft.adapt_prefix(m := t5(), plan_of(m, {BOTH.replace("|d", "|no"): PREFIX}, **WRITTEN)),
                   "on the encoder and on the cross attention alike"),
    "channels": (lambda: jpeft.adapt_prefix(m := decoder(fused_qkv="blocks"), plan_of(
        m, {QKV: jpeft.PrefixTuning(length=V, channels=(0, 16))})), r"use channels=\(16, 32\)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    act, words = MISTAKES[mistake]
    with pytest.raises(PlanError, match=words):
        act()


def test_what_models_refuse() -> None:
    pair = (jnp.zeros((2, 1, 3, 2, 8)),) * 2
    with pytest.raises(ModelInputError, match="a sequence of 13 tokens is longer than the 12 positions"):
        encoder().apply(encoder().shapes(), jnp.ones((1, 10), int), prefix=pair)
    with pytest.raises(ModelInputError, match=r"prefix has shapes .*, must be .* \[2, 2 or 1, P, 2, 8\]"):
        encoder().apply(encoder().shapes(), IDS, prefix=(pair[0][:1], pair[1]))
    with pytest.raises(ModelInputError, match="prefix has 'text', must have some of 'encoder', 'decoder' and 'cross'"):
        t5().apply(t5().shapes(), IDS, decoder_tokens=IDS, prefix={"text": pair})
    past = (jnp.zeros((2, 1, 3, 2, 4)),) * 2
    with pytest.raises(ModelInputError, match="past and prefix both stand before the first token"):
        decoder().apply(decoder().shapes(), IDS, past=past, prefix=past)
