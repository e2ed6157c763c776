"""Prefixes that come out of an encoder, and prefixes that start from a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import B, D, H, K, L, encoder, make_inputs, make_params
from support import assert_close, randomise, x64

import jpeft
from jpeft.errors import CallError

N = 3
TOKENS = jpeft.Tokens(ids=0)
KV = "layers/(key|value)/kernel"


def planned(method: jpeft.Method, params: Any, **kwargs: Any) -> jpeft.Plan:
    return jpeft.plan(encoder, params, make_inputs()[:1], {KV: method}, tokens=TOKENS, example_kwargs=kwargs)


def projected(t: Any) -> jax.Array:
    """`tanh(e W_1 + b_1) W_2l + b_2l`, layer by layer."""
    hidden = jnp.tanh(t["e"] @ t["w1"] + t["b1"])
    return jnp.stack([jnp.einsum("vh,hnk->vnk", hidden, t["w2"][i]) + t["b2"][i] for i in range(L)])


@pytest.mark.slow
def test_an_encoder_makes_the_prefix(tmp_path: Path) -> None:
    """Against the prefix that it makes, in outputs and gradients; what is saved goes on training."""
    with x64():
        params, ids = make_params(jnp.float64), make_inputs()[0]
        plan = planned(jpeft.PrefixTuning(length=N, prefix_projection=True, encoder_hidden_size=5), params)
        n = H * K
        assert plan.count() == 2 * (N * n + n * 5 + 5 + L * (5 * n + n))
        start, frozen = jpeft.init(plan, params, jax.random.key(0))
        jpeft.save(tmp_path, plan, randomise(start, 1), frozen)
        _, spread, frozen = jpeft.load(tmp_path, params)

        def measure(f: Any) -> Any:
            return f(spread), jax.grad(lambda t: jnp.sum(jnp.sin(f(t))))(spread)

        def oracle(t: Any) -> jax.Array:
            extra = {name: projected(t[f"layers/{name}/kernel"]) for name in ("key", "value")}
            return encoder(params, ids, extra=extra)

        ours, want = jax.jit(lambda: (measure(lambda t: jpeft.adapt(encoder, plan)(t, frozen, ids)), measure(oracle)))()
        assert_close(ours, want, 1e-10)
        assert all(bool(jnp.any(slope != 0)) for slope in jax.tree.leaves(ours[1]))
    assert jpeft.PrefixTuning(prefix_projection=True).recommended_lr < jpeft.PrefixTuning().recommended_lr


def test_a_prefix_starts_from_a_text() -> None:
    """A causal model with the prefix of a text is the model that has read it, longer texts are cut."""
    with x64():
        params, ids = make_params(jnp.float64), make_inputs()[0]
        text = jnp.asarray([[4, 1, 5, 9, 2]])
        rules = {KV: jpeft.Chain((jpeft.LoRA(rank=2, init_weights="eva"), jpeft.PrefixTuning(N, "text")))}
        plan = jpeft.plan(encoder, params, (ids,), rules, tokens=TOKENS, example_kwargs={"causal": True})
        model = lambda p, i: encoder(p, i, causal=True)  # noqa: E731
        data = jpeft.Calibration(model, [(text,)])
        start, frozen = jpeft.init(plan, params, jax.random.key(0), calibration=data)
        whole = jnp.concatenate([jnp.broadcast_to(text[:, :N], (B, N)), ids], axis=1)
        ours, want = jax.jit(lambda t: (jpeft.adapt(encoder, plan)(t, frozen, ids, causal=True),
                                        encoder(params, whole, causal=True)[:, N:]))(start)
        assert_close(ours, want, 1e-10)


@pytest.mark.parametrize(("batches", "words"), [
    ([(jnp.ones((2, 5), int),)], "one row of 4 tokens or more, and .* is applied to 2 of 5"),
    ([(jnp.ones((1, 3), int),)], "is applied to 1 of 3"),
    ([(jnp.ones((1, 4), int),)] * 2, "starts from one text, and calibration has 2 batches"),
])  # fmt: skip
def test_what_is_no_text(batches: Any, words: str) -> None:
    params = make_params()
    plan = planned(jpeft.PrefixTuning(4, "text"), params)
    with pytest.raises(CallError, match=words):
        jpeft.init(plan, params, jax.random.key(0), calibration=jpeft.Calibration(encoder, batches))


def test_a_fused_kernel_starts_from_a_text() -> None:
    """Keys and values are some of its channels."""
    apply = lambda p, ids: jnp.cumsum(p["embed"][ids] @ p["qkv"] + p["b"], 1)  # noqa: E731
    params = randomise({"embed": jnp.zeros((9, D)), "qkv": jnp.zeros((D, 12)), "b": jnp.zeros(12)})
    text = jnp.asarray([[4, 1, 5]])
    plan = jpeft.plan(apply, params, (text,), {"qkv": jpeft.PrefixTuning(2, "text", channels=(4, 12))}, tokens=TOKENS)
    start, _ = jpeft.init(plan, params, jax.random.key(0), calibration=jpeft.Calibration(apply, [(text,)]))
    want = (params["embed"][text[0, :2]] @ params["qkv"] + params["b"])[:, 4:]
    assert_close(start["qkv"]["p"], want, 1e-5)
