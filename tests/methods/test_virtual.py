"""Prompts and prefixes against attention written out with more tokens, or with more keys and values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import B, D, H, K, L, T, V, encoder, make_inputs, make_params
from support import assert_close, randomise, x64

import jpeft
from jpeft.errors import CallError, MethodConfigError, PlanError

N = 3
TOKENS = jpeft.Tokens(ids=0)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """`[B, T, D]` queries on `[B, S, D]` keys and values, `S >= T`, two heads; the last query sees every key."""
    split = lambda t: jnp.reshape(t, (*t.shape[:2], 2, -1))  # noqa: E731
    q, k, v = split(q), split(k), split(v)
    scores = jnp.einsum("bthk,bshk->bhts", q, k)
    t, s = scores.shape[-2:]
    if causal:
        scores = jnp.where(jnp.arange(s) <= jnp.arange(t)[:, None] + s - t, scores, -jnp.inf)
    return jnp.reshape(jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v), (*v.shape[:1], t, -1))


def model(params: Any, ids: jax.Array, causal: bool, prefix: Any = None) -> jax.Array:
    """Two layers, the kernels fused or not; `prefix` `[L, N, 2 D]`: what a prefix means, `[P_K; K]` and `[P_V; V]`."""
    h = params["embed"][ids]
    for i, p in enumerate(params["layers"]):
        if "qkv" in p:
            q, k, v = jnp.split(h @ p["qkv"] + p["qkv_bias"], 3, -1)
        else:
            q, k, v = (h @ p[n] + p[n + "_bias"] for n in ("query", "key", "value"))
        if prefix is not None:
            own = [jnp.broadcast_to(t, (len(h), *t.shape)) for t in jnp.split(prefix[i], 2, -1)]
            k, v = jnp.concatenate([own[0], k], 1), jnp.concatenate([own[1], v], 1)
        h = h + jnp.tanh(attention(q, k, v, causal) @ p["out"])
    return h @ params["head"]


def model_params(fused: bool) -> Any:
    layer = {"qkv": (D, 3 * D), "qkv_bias": (3 * D,)} if fused else \
        {n + e: (D, D)[: 2 - bool(e)] for n in ("query", "key", "value") for e in ("", "_bias")}
    shapes = {"embed": (V, D), "layers": [{**layer, "out": (D, D)}] * 2, "head": (D, 5)}
    return randomise(jax.tree.map(jnp.zeros, shapes, is_leaf=lambda s: isinstance(s, tuple)), 4)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "split"])
def test_a_prefix_is_more_keys_and_values(causal: bool, fused: bool) -> None:
    with x64():
        params, ids = model_params(fused), make_inputs()[0]
        method = jpeft.PrefixTuning(length=N, channels=(D, 3 * D) if fused else None)
        rules = {r"layers/\d/qkv" if fused else r"layers/\d/(key|value)": method}
        plan = jpeft.plan(model, params, (ids, causal), rules, tokens=TOKENS)
        assert plan.count() == 2 * N * 2 * D
        start, frozen = jpeft.init(plan, params, jax.random.key(0))
        spread = randomise(start, 5, 1.0)

        def prefix(t: Any) -> jax.Array:
            if fused:
                return jnp.stack([t[f"layers/{i}/qkv"]["p"] for i in range(2)])
            pairs = [[t[f"layers/{i}/{n}"]["p"] for n in ("key", "value")] for i in range(2)]
            return jnp.stack([jnp.concatenate(pair, -1) for pair in pairs])

        def measure(f: Any) -> Any:
            return f(spread), jax.grad(lambda t: jnp.sum(jnp.sin(f(t))))(spread)

        ours, oracle = jax.jit(lambda: (measure(lambda t: jpeft.adapt(model, plan)(t, frozen, ids, causal)),
                                        measure(lambda t: model(params, ids, causal, prefix(t)))))()
        assert ours[0].shape == (B, T, 5)
        assert_close(ours, oracle, 1e-10)


def pad_aware(params: Any, ids: jax.Array) -> jax.Array:
    """The encoder, hiding tokens of id 0."""
    return encoder(params, ids, ids != 0)


@pytest.mark.parametrize("fill", [0, 1])
def test_an_invisible_prompt_is_the_base(fill: int) -> None:
    """Where the model hides the virtual tokens, they change nothing, whatever they hold."""
    with x64():
        params, ids = make_params(jnp.float64), 1 + make_inputs()[0] % (V - 1)
        plan = jpeft.plan(pad_aware, params, (ids,), {"embedding": jpeft.PromptTuning(length=N)},
                          tokens=jpeft.Tokens(ids=0, fill=fill))
        start, frozen = jpeft.init(plan, params, jax.random.key(0))
        both = jax.jit(lambda t: (jpeft.adapt(pad_aware, plan)(t, frozen, ids), pad_aware(params, ids)))
        out, base = both(randomise(start, 1))
        if fill == 0:
            assert_close(out, base, 1e-12)
        else:
            assert float(jnp.max(jnp.abs(out - base))) > 1e-3


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_a_prompt_behind_a_prefix(causal: bool) -> None:
    """The prefix takes the first rows, the prompt those behind them."""
    with x64():
        params, (ids, mask) = make_params(jnp.float64), make_inputs()
        rules = {"layers/(key|value)/kernel": jpeft.PrefixTuning(length=N), "embed": jpeft.PromptTuning(length=2)}
        plan = jpeft.plan(encoder, params, (ids, mask), rules, example_kwargs={"causal": causal},
                          tokens=jpeft.Tokens(ids=0, mask=1))
        start, frozen = jpeft.init(plan, params, jax.random.key(0))
        spread = randomise(start, 1)
        extra = {"prompt": spread["embed"]["p"], **{n: spread[f"layers/{n}/kernel"]["p"] for n in ("key", "value")}}
        assert extra["key"].shape == (L, N, H, K)
        ours, oracle = jax.jit(lambda: (jpeft.adapt(encoder, plan)(spread, frozen, ids, mask, causal=causal),
                                        encoder(params, ids, mask, causal=causal, extra=extra)))()
        assert_close(ours, oracle, 1e-10)


def tied(params: Any, ids: jax.Array) -> jax.Array:
    h = params["embed"][ids]
    return jnp.cumsum(jnp.tanh(h), 1) @ params["embed"].T


@pytest.mark.parametrize("vocabulary", [11, 4], ids=["wide", "square"])
def test_a_tied_head_is_left_alone(vocabulary: int) -> None:
    with x64():
        params, ids = {"embed": randomise(jnp.zeros((vocabulary, 4)), 1)}, jnp.asarray([[1, 3, 0], [2, 2, 1]])
        plan = jpeft.plan(tied, params, (ids,), {"embed": jpeft.PromptTuning(length=2)}, tokens=TOKENS)
        start, frozen = jpeft.init(plan, params, jax.random.key(0))
        spread = randomise(start, 2)
        h = jnp.concatenate([jnp.broadcast_to(spread["embed"]["p"], (2, 2, 4)), params["embed"][ids]], 1)
        want = (jnp.cumsum(jnp.tanh(h), 1) @ params["embed"].T)[:, 2:]
        assert_close(jpeft.adapt(tied, plan)(spread, frozen, ids), want, 1e-10)


def test_rows_of_the_vocabulary() -> None:
    params, ids = {"embed": jnp.arange(12.0).reshape(6, 2)}, jnp.zeros((1, 3), jnp.int32)

    def make(length: int) -> jpeft.Plan:
        rules = {"embed": jpeft.PromptTuning(length, "vocabulary")}
        return jpeft.plan(lambda p, i: p["embed"][i], params, (ids,), rules, tokens=TOKENS)

    drawn = np.asarray(jpeft.init(make(6), params, jax.random.key(0))[0]["embed"]["p"])
    assert sorted(map(tuple, drawn.tolist())) == [(2.0 * i, 2.0 * i + 1) for i in range(6)]
    with pytest.raises(MethodConfigError, match="use init_weights='random'"):
        make(7)


@pytest.mark.parametrize(("init", "ids", "want"), [
    ("text", (4, 2), [4, 2, 4, 2]), ("text", (1, 2, 3, 4, 5), [1, 2, 3, 4]),
    ("labels", ((4,), (2, 5, 5), (0, 1), (3,)), [4, 4, 0.5, 3])])  # fmt: skip
def test_rows_of_given_tokens(init: str, ids: Any, want: list[float]) -> None:
    """A text, repeated or cut; the mean of each class's rows. Row i of the table is (i, 10 i)."""
    params = {"embed": jnp.arange(6.0)[:, None] * jnp.asarray([[1.0, 10.0]])}
    plan = jpeft.plan(lambda p, i: p["embed"][i], params, (jnp.zeros((1, 3), jnp.int32),),
                      {"embed": jpeft.PromptTuning(4, init, ids)}, tokens=TOKENS)
    p = jpeft.init(plan, params, jax.random.key(0))[0]["embed"]["p"]
    assert_close(p, jnp.asarray(want)[:, None] * jnp.asarray([[1.0, 10.0]]), 1e-6)
    assert jpeft.Plan.from_json(plan.to_json()) == plan


def test_classes_before_random_rows() -> None:
    params = {"embed": jnp.arange(12.0).reshape(6, 2)}
    plan = jpeft.plan(lambda p, i: p["embed"][i], params, (jnp.zeros((1, 3), jnp.int32),),
                      {"embed": jpeft.PromptTuning(3, "labels", ((5,),))}, tokens=TOKENS)
    p = jpeft.init(plan, params, jax.random.key(0))[0]["embed"]["p"]
    assert p[0].tolist() == [10.0, 11.0]
    assert {tuple(row) for row in p[1:].tolist()} < {(2.0 * i, 2.0 * i + 1) for i in range(6)}


def plan_of(rules: Any) -> jpeft.Plan:
    return jpeft.plan(encoder, make_params(), make_inputs()[:1], rules, tokens=TOKENS)


MISTAKES = {
    "two prefix lengths": (lambda: plan_of({"layers/key/kernel": jpeft.PrefixTuning(length=2),
                                            "layers/value/kernel": jpeft.PrefixTuning(length=3)}),
                           PlanError, r"must agree, found lengths \[2, 3\]"),
    "some layers": (lambda: plan_of({jpeft.layers("layers/(key|value)/kernel", [0]): jpeft.PrefixTuning(length=2)}),
                    MethodConfigError, "cannot be limited to some layers"),
    "channels outside": (lambda: plan_of({"layers/key/kernel": jpeft.PrefixTuning(channels=(8, 17))}),
                         MethodConfigError, "0 <= start < stop <= 16"),
    "no tokens": (lambda: jpeft.PromptTuning(length=0), MethodConfigError, "use 1 or more virtual tokens"),
    "unknown prompt": (lambda: jpeft.PromptTuning(init_weights="zero"), MethodConfigError, "random, vocabulary"),
    "unknown prefix": (lambda: jpeft.PrefixTuning(init_weights="vocabulary"), MethodConfigError, "random, zero, text"),
    "no text": (lambda: jpeft.PromptTuning(init_weights="text"), MethodConfigError, r"as \(3, 4, 5\)"),
    "a text of classes": (lambda: jpeft.PromptTuning(init_weights="text", init_ids=((1,),)), MethodConfigError, "3, 4"),
    "an empty class": (lambda: jpeft.PromptTuning(init_weights="labels", init_ids=((),)), MethodConfigError, "class"),
    "more classes": (lambda: jpeft.PromptTuning(1, "labels", ((1,), (2,))), MethodConfigError, "at most 1"),
    "ids without use": (lambda: jpeft.PromptTuning(init_ids=(1,)), MethodConfigError, "no init_ids with it"),
    "ids outside": (lambda: plan_of({"embed": jpeft.PromptTuning(2, "text", (3, V))}), MethodConfigError,
                    rf"the ids \[{V}\], .* from 0 to {V - 1}"),
    "no encoder": (lambda: jpeft.PrefixTuning(encoder_hidden_size=4), MethodConfigError, "prefix_projection=True"),
    "encoded text": (lambda: jpeft.PrefixTuning(init_weights="text", prefix_projection=True), MethodConfigError,
                     "comes out of the encoder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    act, kind, words = MISTAKES[mistake]
    with pytest.raises(kind, match=words):
        act()


def test_zero_prefix() -> None:
    plan = plan_of({"layers/(key|value)/kernel": jpeft.PrefixTuning(length=2, init_weights="zero")})
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jpeft.init(plan, make_params(), jax.random.key(0))[0]))


POOLS = {
    "first": lambda h: h[:, 0],
    "two": lambda h: h[:, :2].reshape(len(h), -1),
    "last": lambda h: h[:, -1],
    "strided": lambda h: h[:, 1:4:2].sum(1),
}


@pytest.mark.parametrize("pool", POOLS)
def test_a_fixed_token_stays_that_token(pool: str) -> None:
    """A class token is read where it stands: behind the virtual tokens, inside a jitted function too."""
    read = jax.jit(POOLS[pool])

    def pooled(params: Any, ids: jax.Array, prefix: Any = None) -> jax.Array:
        return read(model(params, ids, False, prefix))

    with x64():
        params, ids = model_params(False), make_inputs()[0]
        rules = {r"layers/\d/(key|value)": jpeft.PrefixTuning(length=N)}
        plan = jpeft.plan(pooled, params, (ids,), rules, tokens=TOKENS)
        start, frozen = jpeft.init(plan, params, jax.random.key(0))
        t = randomise(start, 5, 1.0)
        pairs = [[t[f"layers/{i}/{n}"]["p"] for n in ("key", "value")] for i in range(2)]
        prefix = jnp.stack([jnp.concatenate(pair, -1) for pair in pairs])
        assert_close(jpeft.adapt(pooled, plan)(t, frozen, ids), pooled(params, ids, prefix), 1e-10)


def test_looked_up_rows_of_a_fixed_token() -> None:
    """The first token's row of an adapted embedding, before anything was made of it."""
    apply = lambda p, ids: p["embed"][ids][:, 0] @ p["w"]  # noqa: E731
    params, ids = {"embed": jnp.arange(12.0).reshape(6, 2), "w": jnp.ones((2, 3))}, jnp.asarray([[4, 1], [2, 0]])
    plan = jpeft.plan(apply, params, (ids,), {"embed": jpeft.PromptTuning(length=2)}, tokens=TOKENS)
    t, f = jpeft.init(plan, params, jax.random.key(0))
    assert_close(jpeft.adapt(apply, plan)(t, f, ids), apply(params, ids), 1e-6)


FIXED = {
    "gather": lambda h: h[:, jnp.asarray([0, 2])],
    "dynamic_slice": lambda h: jax.lax.dynamic_index_in_dim(h, 0, 1, False),
}


@pytest.mark.parametrize("primitive", FIXED)
def test_a_constant_index_array_cannot_be_moved(primitive: str) -> None:
    apply = lambda p, ids: FIXED[primitive](jnp.tanh(p["embed"][ids]))  # noqa: E731
    params, ids = {"embed": jnp.ones((6, 2))}, jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(CallError, match=rf"{primitive} @ .*test_virtual.py:\d+ reads a token by a constant index"):
        jpeft.plan(apply, params, (ids,), {"embed": jpeft.PromptTuning(length=2)}, tokens=TOKENS)


def test_a_fixed_token_inside_a_custom_derivative() -> None:
    @jax.custom_jvp
    def first(h: jax.Array) -> jax.Array:
        return h[:, 0]

    first.defjvp(lambda h, dh: (first(*h), first(*dh)))
    params, ids = {"embed": jnp.ones((6, 2))}, jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(CallError, match="read the token outside"):
        jpeft.plan(lambda p, ids: first(p["embed"][ids]), params, (ids,), {"embed": jpeft.PromptTuning(length=2)},
                   tokens=TOKENS)
