"""LLaMA-Adapter on a decoder of the zoo, against attention written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from support import assert_close, randomise

import jpeft
from jpeft.errors import CheckpointError, MethodConfigError, ModelConfigError, NoMatchError
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.models.decoder_layers import Attention, Here, Shared
from jpeft.models.rope import Rope

P, D, H, K, HEAD = 3, 8, 4, 2, 4
IDS = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
RULES = {".*/adapter_(prompt|gate)": jpeft.LLaMAAdapter()}


def model(**changes: Any) -> Decoder:
    sizes: dict[str, Any] = {"vocab_size": 9, "hidden_size": D, "layers": 2, "heads": H, "kv_heads": K,
                             "head_size": HEAD, "mlp_size": 8, "positions": 16, "rope": Rope(),
                             "initializer_range": 0.5}
    return Decoder(DecoderConfig(**{**sizes, **changes}))


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_the_equation() -> None:
    config = model(rope=None, adapter_length=P).config
    x = randomise(jnp.zeros((2, 4, D)), 1, 1.0)
    call = (Here(None, None, None, ()), Shared(None, None, None, None))
    module = Attention(config)
    params = randomise(module.init(jax.random.key(0), x, *call)["params"], 2, 0.6)
    shut = {**params, "adapter_gate": jnp.zeros(H)}
    ours = module.apply({"params": params}, x, *call)[0] - module.apply({"params": shut}, x, *call)[0]
    p = jax.tree.map(np.asarray, params)
    query, key, value = (np.einsum("...d,dhk->...hk", rows, p[n]["kernel"]) for n, rows in (
        ("query", np.asarray(x)), ("key", p["adapter_prompt"]), ("value", p["adapter_prompt"])))
    want = 0
    for head in range(H):
        k, v = key[:, head // (H // K)], value[:, head // (H // K)]
        said = softmax(query[:, :, head] @ k.T / HEAD**0.5) @ v
        want = want + np.tanh(p["adapter_gate"][head]) * said @ p["out"]["kernel"][head]
    assert_close(ours, jnp.asarray(want), 1e-5)


@pytest.mark.slow
def test_it_starts_from_the_base_and_learns() -> None:
    small = model()
    params = small.init(jax.random.key(0))
    made, wide = small.with_adapter(params, P)
    plan = jpeft.plan(made.apply, wide, (IDS,), {**RULES, "attention": jpeft.LoRA(rank=2)})
    assert sum(e.count() for e in plan.entries if "adapter" in e.path) == 2 * (P * D + H)
    start, frozen = jpeft.init(plan, wide, jax.random.key(1))
    adapted = jpeft.adapt(made.apply, plan)

    @jax.jit
    def run(t: Any) -> Any:
        merged = made.apply(jpeft.merge(plan, t, frozen), IDS).hidden
        return adapted(t, frozen, IDS).hidden, merged, small.apply(params, IDS).hidden, \
            jax.grad(lambda t: jnp.sum(jnp.sin(adapted(t, frozen, IDS).hidden)))(t)

    hidden, merged, base, slopes = run(start)
    assert_close(hidden, base, 1e-6)
    gate, prompt = (f"layers/attention/adapter_{name}" for name in ("gate", "prompt"))
    assert np.abs(slopes[gate]["p"]).min() > 0 == np.abs(slopes[prompt]["p"]).max()
    hidden, merged, base, slopes = run(randomise(start, 3))
    assert_close(hidden, merged, 1e-5)
    assert np.abs(slopes[prompt]["p"]).min() > 0
    assert not np.allclose(hidden, base, atol=1e-2)


@pytest.mark.slow
def test_the_last_layers_alone() -> None:
    made, wide = model().with_adapter(model().init(jax.random.key(0)), P)
    (pattern, method), = RULES.items()
    plan = jpeft.plan(made.apply, wide, (IDS,), {jpeft.layers(pattern, [1]): method})
    assert plan.count() == P * D + H
    start, frozen = jpeft.init(plan, wide, jax.random.key(1))
    slopes = jax.grad(lambda t: jnp.sum(jnp.sin(jpeft.adapt(made.apply, plan)(t, frozen, IDS).hidden)))(
        randomise(start, 3))
    for slope in jax.tree.leaves(slopes):
        assert np.abs(slope[0]).max() == 0 < np.abs(slope[1]).min()


def test_no_checkpoint_holds_the_places(tmp_path: Path) -> None:
    made, wide = model().with_adapter(model().init(jax.random.key(0)), P)
    with pytest.raises(CheckpointError, match="places for LLaMAAdapter, which no Hugging Face checkpoint holds"):
        jpeft.save_pretrained(tmp_path, made, wide)
    assert not list(tmp_path.iterdir())


def test_mistakes() -> None:
    made, wide = model().with_adapter(model().init(jax.random.key(0)), P)
    with pytest.raises(MethodConfigError, match=r"length=4.* has places for 3; leave length out"):
        jpeft.plan(made.apply, wide, (IDS,), {".*/adapter_(prompt|gate)": jpeft.LLaMAAdapter(length=4)})
    with pytest.raises(MethodConfigError, match="'layers/attention/key/kernel', a weight of dtype float32, which it"):
        jpeft.plan(made.apply, wide, (IDS,), {"attention": jpeft.LLaMAAdapter()})
    with pytest.raises(NoMatchError, match="adapter_"):
        jpeft.plan(model().apply, model().shapes(), (IDS,), RULES)
    with pytest.raises(ModelConfigError, match="learns nothing"):
        model().with_adapter({}, 0)
