"""The decoder as a model to fine-tune: adapters, caches, prefixes, packing, windows, remat, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from gallery.audit import dense_weights
from models.decoder_cases import CASES, HALF, Case, inputs
from support import assert_close, quick_compile, randomise

import jpeft
from jpeft.errors import ModelConfigError, ModelInputError
from jpeft.interop.decoders import DECODERS
from jpeft.models.decoder import Decoder
from jpeft.models.decoder_config import DecoderConfig
from jpeft.models.layers import Part, attend
from jpeft.models.moe import Experts
from jpeft.models.rope import Rope

BASE = DecoderConfig(vocab_size=23, hidden_size=16, layers=3, heads=4, kv_heads=2, head_size=4, mlp_size=20,
                     positions=64, rope=Rope())
MIXED = dataclasses.replace(BASE, window=3, local=(0, 2), local_rope=Rope(theta=50.0), unrotated=(1,))
RING = dataclasses.replace(BASE, window=3, local=(0, 1, 2))
TABLE = dataclasses.replace(BASE, rope=None, position_table=True, norm="layer", tied=True)
TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 1, 23)
MASK = jnp.asarray([[1] * 9, [1] * 6 + [0] * 3])


def made(config: DecoderConfig = BASE, **fields: Any) -> tuple[Decoder, Any]:
    model = Decoder(config, **fields)
    return model, randomise(model.shapes(), scale=0.4)


def run(model: Decoder, params: Any, *args: Any, **kwargs: Any) -> Any:
    return jax.jit(model.apply, compiler_options=quick_compile())(params, *args, **kwargs)


def model_of(case: Case) -> Decoder:
    return Decoder(DECODERS[case.kind].read(case.config, case.name, task=case.task, labels=3))


@pytest.mark.parametrize("case", HALF)
def test_lora_materialises_no_weight_in_any_family(case: Case) -> None:
    model = model_of(case)
    batch, params = inputs(case), model.shapes()
    rows = jpeft.explain(jpeft.plan(model.apply, params, (batch["tokens"],), {"all-linear": jpeft.LoRA(rank=2)})).rows
    assert all(row.rule.startswith("fused") for row in rows)
    found = {row.path for row in rows if row.path.startswith("layers/")}
    assert found == {path for path in jpeft.inspect(model.apply, params, (batch["tokens"],))
                     if path.startswith("layers/") and path.endswith("/kernel")}


@pytest.mark.parametrize("name", [
    "qwen3-moe", *(pytest.param(more, marks=pytest.mark.slow) for more in ("gemma2", "gpt2"))])
def test_adapted_equals_merged(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    model = model_of(case)
    params, batch = randomise(model.shapes()), inputs(case)
    rules = {"all-linear": jpeft.LoRA(rank=2), "embedding": jpeft.LoRA(rank=2)}
    plan = jpeft.plan(model.apply, params, (batch["tokens"],), rules)
    trainable, frozen = jpeft.init(plan, params, jax.random.key(2))
    trainable = randomise(trainable, scale=0.1)
    adapted = jpeft.adapt(functools.partial(_loss_and_hidden, model), plan)
    assert dense_weights(adapted, trainable, frozen, batch["tokens"], batch["attention_mask"]) == []
    ours = jax.jit(adapted)(trainable, frozen, batch["tokens"], batch["attention_mask"])
    theirs = jax.jit(functools.partial(_loss_and_hidden, model))(
        jpeft.merge(plan, trainable, frozen), batch["tokens"], batch["attention_mask"])
    assert_close(ours, theirs, 1e-5)


def _loss_and_hidden(model: Decoder, params: Any, tokens: jax.Array, mask: jax.Array | None = None) -> Any:
    out = model.apply(params, tokens, mask, labels=tokens)
    return out.loss, out.hidden


def test_words_find_their_leaves() -> None:
    model = Decoder(TABLE)
    for word, count in (("attention", 4), ("mlp", 3), ("embedding", 2), ("norm", 6)):
        method = jpeft.Full() if word in ("norm", "embedding") else jpeft.LoRA(rank=2)
        assert len(jpeft.plan(model.apply, model.shapes(), (TOKENS,), {word: method}).entries) == count
    sites = jpeft.inspect(model.apply, model.shapes(), (TOKENS,))
    assert sites["embed/embedding"].use == "tied"
    moe = Decoder(dataclasses.replace(BASE, experts=4, experts_chosen=2))
    site = jpeft.inspect(moe.apply, moe.shapes(), (TOKENS,))["layers/moe/up/kernel"]
    assert (site.shape, site.stack_dims, site.in_dims, site.out_dims) == ((3, 4, 16, 20), (0, 1), (2,), (3,))
    centred = Decoder(dataclasses.replace(BASE, norm_centred=True))
    assert jpeft.inspect(centred.apply, centred.shapes(), (TOKENS,))["layers/mlp_norm/scale"].use == "scale"


def _equations(jaxpr: Any) -> int:
    inner = [getattr(v, "jaxpr", v) for e in jaxpr.eqns for v in e.params.values()]
    return len(jaxpr.eqns) + sum(_equations(j) for j in inner if hasattr(j, "eqns"))


@pytest.mark.parametrize("config", [MIXED, RING, TABLE],
                         ids=["mixed", "ring", "table"])
def test_the_program_does_not_grow_with_depth(config: DecoderConfig) -> None:
    def size(layers: int) -> int:
        local = tuple(range(0, layers, 2)) if config is MIXED else tuple(range(layers)) if config is RING else ()
        model = Decoder(dataclasses.replace(config, layers=layers, local=local))
        loss = functools.partial(_loss_and_hidden, model)
        return _equations(jax.make_jaxpr(jax.grad(lambda p: loss(p, TOKENS)[0]))(model.shapes()).jaxpr)

    assert size(32) == size(4)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots", "names"])
def test_remat_changes_neither_values_nor_gradients(remat: str) -> None:
    plain, params = made()

    def loss(model: Decoder) -> Any:
        return run(Traced(model), params)

    assert_close(loss(Decoder(BASE, remat=remat)), loss(plain), 1e-5)


@dataclasses.dataclass(frozen=True)
class Traced:
    model: Decoder

    def apply(self, params: Any) -> Any:
        return jax.value_and_grad(lambda p: self.model.apply(p, TOKENS, MASK, labels=TOKENS).loss)(params)


def test_the_names_are_kept_for_the_backward_pass() -> None:
    def residuals(remat: str) -> int:
        model, params = made(remat=remat)
        vjp = jax.eval_shape(lambda p: jax.vjp(lambda q: model.apply(q, TOKENS).hidden, p), params)[1]
        return sum(leaf.size for leaf in jax.tree.leaves(vjp))

    full, names, none = (residuals(remat) for remat in ("full", "names", "none"))
    assert full < names < none


@pytest.mark.parametrize("config", [
    pytest.param(BASE, id="plain"), pytest.param(MIXED, id="mixed", marks=pytest.mark.slow),
    pytest.param(RING, id="ring"), pytest.param(TABLE, id="table", marks=pytest.mark.slow)])
def test_a_cache_changes_nothing(config: DecoderConfig) -> None:
    model, params = made(config)
    whole, step = run(model, params, TOKENS), jax.jit(model.apply)
    cache = model.empty_cache(2, 9)
    assert cache.slots == (3 if config is RING else 9)
    out, hidden = step(params, TOKENS[:, :4], cache=cache), []
    hidden.append(out.hidden)
    for i in range(4, 9):
        out = step(params, TOKENS[:, i:i + 1], cache=out.cache)
        hidden.append(out.hidden)
    assert_close(jnp.concatenate(hidden, 1), whole.hidden, 2e-5)
    assert step._cache_size() == 2
    assert int(out.cache.length) == 9


def test_left_padded_rows_decode_as_alone() -> None:
    model, params = made(MIXED)
    step = jax.jit(model.apply)
    padded = jnp.concatenate([jnp.zeros((2, 2), jnp.int32), TOKENS], 1)
    mask = jnp.asarray([[0, 0] + [1] * 9, [1] * 11])
    out = step(params, padded[:, :8], mask[:, :8], cache=model.empty_cache(2, 16))
    last = step(params, padded[:, 8:], mask[:, 8:], cache=out.cache).hidden[:1]
    assert_close(last, run(model, params, TOKENS[:1]).hidden[:, 6:], 2e-5)


def test_too_many_tokens_for_a_cache_are_loud() -> None:
    model, params = made()
    cache = model.empty_cache(2, 5)
    with pytest.raises(ModelInputError, match="0 \\+ 9 tokens do not fit a cache of 5; make a larger one"):
        model.apply(params, TOKENS, cache=cache)
    step = jax.jit(model.apply)
    out = step(params, TOKENS[:, :4], cache=cache)
    good = step(params, TOKENS[:, 4:5], cache=out.cache)
    assert bool(jnp.isfinite(good.logits).all())
    assert bool(jnp.isnan(step(params, TOKENS[:, 5:6], cache=good.cache).logits).all())


def test_a_ring_takes_any_number_of_tokens() -> None:
    model, params = made(RING)
    cache, many = model.empty_cache(2, 4), jnp.tile(TOKENS, 3)
    step = jax.jit(model.apply)
    for i in range(0, 27, 9):
        out = step(params, many[:, i:i + 9], cache=cache)
        cache = out.cache
    assert_close(out.hidden, run(model, params, many).hidden[:, 18:], 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [BASE, MIXED, TABLE], ids=["plain", "mixed", "table"])
def test_past_is_what_a_cache_would_hold(config: DecoderConfig) -> None:
    model, params = made(config)
    first = run(model, params, TOKENS[:, :4], cache=model.empty_cache(2, 4)).cache
    out = run(model, params, TOKENS[:, 4:], past=(first.key, first.value))
    assert_close(out.hidden, run(model, params, TOKENS).hidden[:, 4:], 2e-5)
    shared = jax.tree.map(lambda x: x[:, :1], (first.key, first.value))
    each = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), shared)
    step = jax.jit(model.apply)
    whole = step(params, TOKENS[:, 4:], past=shared)
    assert_close(whole.hidden, step(params, TOKENS[:, 4:], past=each).hidden, 1e-6)
    cached = step(params, TOKENS[:, 4:8], past=shared, cache=model.empty_cache(2, 8))
    last = step(params, TOKENS[:, 8:], past=shared, cache=cached.cache)
    assert_close(last.hidden, whole.hidden[:, 4:], 2e-5)


def test_past_has_gradients_and_is_visible_in_every_segment() -> None:
    model, params = made()
    past = tuple(jax.random.normal(jax.random.key(i), (3, 1, 2, 2, 4)) for i in range(2))
    segments = jnp.asarray([[0] * 4 + [1] * 5] * 2)

    def hidden(past: Any, tokens: jax.Array, segments: Any = None) -> jax.Array:
        return model.apply(params, tokens, past=past, segment_ids=segments).hidden

    packed = jax.jit(hidden)(past, TOKENS, segments)
    assert_close(packed[:, 4:], jax.jit(hidden)(past, TOKENS[:, 4:]), 2e-5)
    grads = jax.jit(jax.grad(lambda p: jnp.square(hidden(p, TOKENS)).sum()))(past)
    assert all(float(jnp.abs(g).min(axis=(0, 1, 3, 4)).max()) >= 0 and float(jnp.abs(g).max()) > 1e-3 for g in grads)


@pytest.mark.slow
@pytest.mark.parametrize("config", [BASE, MIXED, RING, TABLE], ids=["plain", "mixed", "ring", "table"])
def test_packed_sequences_are_those_apart(config: DecoderConfig) -> None:
    model, params = made(config)
    segments = jnp.asarray([[5] * 4 + [2] * 5, [1] * 9])
    out = run(model, params, TOKENS, segment_ids=segments)
    assert_close(out.hidden[:1, :4], run(model, params, TOKENS[:1, :4]).hidden, 2e-5)
    assert_close(out.hidden[:1, 4:], run(model, params, TOKENS[:1, 4:]).hidden, 2e-5)
    assert_close(out.hidden[1:], run(model, params, TOKENS[1:]).hidden, 2e-5)


def test_the_loss_is_the_mean_over_labels_within_segments() -> None:
    model, params = made(dataclasses.replace(BASE, logit_cap=2.0))
    segments = jnp.asarray([[0] * 4 + [1] * 5] * 2)
    weights = jax.random.uniform(jax.random.key(3), TOKENS.shape)
    target = TOKENS.at[0, 2].set(-100)
    out = run(model, params, TOKENS, segment_ids=segments, labels=target, label_weights=weights)
    assert out.logits is None
    logs = jax.nn.log_softmax(run(model, params, TOKENS, segment_ids=segments).logits)
    keep = np.ones((2, 8)) * np.asarray(weights[:, 1:])
    keep[:, 3], keep[0, 1] = 0, 0
    plain = -np.take_along_axis(np.asarray(logs[:, :-1]), np.asarray(TOKENS[:, 1:, None]), -1)[..., 0]
    np.testing.assert_allclose(out.loss, (plain * keep).sum() / keep.sum(), rtol=1e-5)
    short = run(model, params, TOKENS, labels=TOKENS[:, 4:]).loss
    np.testing.assert_allclose(short, run(model, params, TOKENS, labels=TOKENS.at[:, :4].set(-1)).loss, rtol=1e-6)


def test_prompts_and_prefixes_ride_with_labels() -> None:
    model, params = made()
    for rule, method in (("embed/embedding", jpeft.PromptTuning(3)),
                         ("layers/attention/(key|value)/kernel", jpeft.PrefixTuning(3))):
        apply = functools.partial(_loss_and_hidden, model)
        plan = jpeft.plan(apply, params, (TOKENS, MASK), {rule: method}, tokens=jpeft.Tokens(mask=1))
        trainable, frozen = jpeft.init(plan, params, jax.random.key(1))
        loss, hidden = jax.jit(jpeft.adapt(apply, plan))(trainable, frozen, TOKENS, MASK)
        assert (hidden.shape, bool(jnp.isfinite(loss))) == ((2, 9, 16), True)


def test_a_mask_of_its_own_for_every_token() -> None:
    model, params = made(MIXED)
    square = jnp.broadcast_to(MASK[:, None], (2, 9, 9))
    assert_close(run(model, params, TOKENS, square), run(model, params, TOKENS, MASK), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "embedding_dropout"])
def test_each_dropout_rate_acts_and_only_with_a_key(rate: str) -> None:
    model, params = made(dataclasses.replace(BASE, **{rate: 0.4}))
    calm, wild, again, other = (run(model, params, TOKENS, MASK, key=key).hidden for key in
                                (None, *map(jax.random.key, (1, 1, 2))))
    assert_close(calm, run(Decoder(BASE), params, TOKENS, MASK).hidden, 1e-6)
    assert_close(wild, again, 0.0)
    assert jnp.abs(wild - calm).max() > 1e-3
    assert jnp.abs(wild - other).max() > 1e-3


def test_dtypes_of_params_and_of_compute() -> None:
    model, params = made(dataclasses.replace(MIXED, norm_centred=True, qk_norm="head"))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for one, p, dtype in ((model, params, "float32"), (model, half, "bfloat16"),
                          (dataclasses.replace(model, dtype=jnp.dtype("bfloat16")), params, "bfloat16")):
        out = run(one, p, TOKENS, MASK, cache=one.empty_cache(2, 9, dtype))
        assert {str(x.dtype) for x in (out.hidden, out.logits, out.cache.key)} == {dtype}
        assert str(run(one, p, TOKENS, labels=TOKENS).loss.dtype) == "float32"


@pytest.mark.slow
def test_attention_over_parts_is_attention_over_all_and_repeats_no_key() -> None:
    q = jax.random.normal(jax.random.key(0), (2, 5, 6, 4))
    k, v = (jax.random.normal(jax.random.key(i), (2, 7, 2, 4)) for i in (1, 2))
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, (2, 1, 5, 7)).at[..., 0].set(True)
    parts = [Part(k[:, :2], v[:, :2], mask[..., :2]), Part(k[:, 2:], v[:, 2:], mask[..., 2:])]
    whole = [Part(k, v, mask)]
    assert_close(attend(q, parts), attend(q, whole), 1e-5)
    assert_close(attend(q, parts, cap=1e6), attend(q, whole), 1e-4)
    assert_close(attend(q, parts, cap=0.7), attend(q, whole, cap=0.7), 1e-5)
    one = [p._replace(mask=p.mask[:, :, :1]) for p in parts]
    assert_close(attend(q[:, :1], one), attend(q, whole)[:, :1], 1e-5)
    head = attend(q[:, :, 3:4], [Part(k[:, :, 1:], v[:, :, 1:], mask)])
    assert_close(attend(q, whole)[:, :, 3:4], head, 1e-5)
    text = str(jax.make_jaxpr(lambda *a: attend(a[0], [Part(*a[1:])], cap=1.0))(q, k, v, mask))
    assert "2,7,6,4" not in text


def test_experts_are_those_that_a_loop_would_choose() -> None:
    module = Experts(4, 2, 6, "silu", True, jax.nn.initializers.normal(0.5))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = module.init(jax.random.key(1), x)["params"]
    flat, kernels = np.asarray(x).reshape(-1, 8), {k: np.asarray(v["kernel"], np.float64) for k, v in params.items()}
    wanted = np.zeros((10, 8))
    for n, row in enumerate(flat):
        logits = row @ kernels["router"]
        p = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-p)[:2]
        for e in best:
            gate = row @ kernels["gate"][e]
            inner = gate / (1 + np.exp(-gate)) * (row @ kernels["up"][e])
            wanted[n] += p[e] / p[best].sum() * (inner @ kernels["down"][e])
    ours = jax.jit(lambda p: module.apply({"params": p}, x))(params)
    np.testing.assert_allclose(ours.reshape(-1, 8), wanted, atol=1e-5)


@pytest.mark.parametrize(("fields", "says"), [
    ({"heads": 3}, "kv_heads = 2 must divide heads = 3"),
    ({"layers": 0, "dropout": 1.0}, "layers = 0, must be a positive integer; dropout = 1.0, must be in"),
    ({"activation": "gelo"}, r"activation 'gelo' is not implemented.*nearest: 'gelu'"),
    ({"norm": "batch", "norm_at": "never"}, "norm = 'batch', must be one of .*; norm_at = 'never'"),
    ({"local": (1,)}, r"layers \[1\] have a window of None"),
    ({"local": (5,), "window": 3}, r"local names the layers \[5\] of 3"),
    ({"experts": 2}, r"experts_chosen = 0, must be in 1\.\.2"),
    ({"experts": 2, "experts_chosen": 1, "gated": False}, "with a gate and without biases"),
    ({"fused_qkv": "heads"}, "needs as many kv_heads as heads"),
    ({"task": "classification"}, "labels = 0, must be positive for classification"),
])
def test_a_wrong_configuration_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelConfigError, match=says):
        dataclasses.replace(BASE, **fields)


@pytest.mark.parametrize(("fields", "says"), [
    ({"kind": "su"}, r"rope type 'su' is not implemented, only default"),
    ({"kind": "yarn"}, "original = 0, must be a positive number of tokens for yarn"),
    ({"kind": "longrope", "original": 4, "short": (1.0,)}, "1 short and 0 long factors"),
    ({"kind": "llama3", "original": 4, "low": 4.0}, "low = 4.0, must be below high = 4.0"),
    ({"theta": 0.0, "fraction": 1.5}, r"theta = 0.0, must be positive; fraction = 1.5, must be in \(0, 1\]"),
])
def test_wrong_rotary_positions_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelConfigError, match=says):
        Rope(**fields)


def _past(*shape: int) -> Any:
    return (jnp.ones(shape), jnp.ones(shape))


@pytest.mark.parametrize(("config", "given", "says"), [
    (BASE, {"tokens": TOKENS[0]}, r"tokens must be integer ids \[B, T\], found int32 \(9,\)"),
    (BASE, {"attention_mask": MASK[:, :3]}, r"attention_mask has shape \(2, 3\), must be \(2, 9\) or \(2, 9, 9\)"),
    (BASE, {"positions": TOKENS[:1]}, r"positions has shape \(1, 9\), must be \(2, 9\)"),
    (BASE, {"segment_ids": TOKENS[0]}, r"segment_ids has shape \(9,\)"),
    (dataclasses.replace(TABLE, positions=8), {}, "9 tokens is longer than the 8 positions"),
    (BASE, {"past": _past(3, 2, 1, 4, 4)}, r"past has shapes .*, must be a key and a value \[3, 2 or 1, P, 2, 4\]"),
    (BASE, {"label_weights": MASK}, "label_weights without labels"),
    (BASE, {"labels": TOKENS, "label_weights": MASK[:, 1:]}, r"label_weights has shape \(2, 8\), must be \(2, 9\)"),
    (BASE, {"labels": jnp.ones((2, 10), int)}, r"labels have shape \(2, 10\), must be \(2, 9\)"),
    (dataclasses.replace(BASE, task="hidden"), {"labels": TOKENS}, "labels have no meaning for the task 'hidden'"),
    (BASE, {"cache": Decoder(BASE).empty_cache(1, 9)}, "the cache has keys .* make it with empty_cache"),
    (BASE, {"cache": Decoder(BASE).empty_cache(2, 9), "segment_ids": TOKENS}, "segment_ids cannot go with a cache"),
])
def test_wrong_inputs_are_refused(config: DecoderConfig, given: dict[str, Any], says: str) -> None:
    model = Decoder(config)
    with pytest.raises(ModelInputError, match=says):
        jax.eval_shape(lambda p: model.apply(p, **{"tokens": TOKENS, **given}), model.shapes())


def test_attention_in_float16_compiles_on_a_cpu() -> None:
    """JAX's own asks there for a product that sums in float32, which the CPU does not have."""
    half = [jax.random.normal(jax.random.key(i), (2, 5, 2, 4)).astype(jnp.float16) for i in range(3)]
    found = jax.jit(lambda q, k, v: attend(q, [Part(k, v)], causal=True))(*half)
    assert found.dtype == jnp.float16
    q, k, v = (x.astype(jnp.float32) for x in half)
    assert_close(found.astype(jnp.float32), attend(q, [Part(k, v)], causal=True), 2**-10)
