"""The encoder as a model to fine-tune: what jpeft's words find in it, dropout, dtypes, remat, and what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from gallery.audit import dense_weights
from support import assert_close, quick_compile, randomise

import jpeft
from jpeft.errors import ModelConfigError, ModelInputError
from jpeft.models.encoder import Encoder, EncoderConfig, embed
from jpeft.models.layers import attention

BASE = EncoderConfig(vocab_size=40, hidden_size=16, layers=3, heads=2, mlp_size=24, positions=12, token_types=2)
CLASSES = dataclasses.replace(BASE, task="classification", labels=3, pooler=True)
TOKENS = jax.random.randint(jax.random.key(0), (4, 7), 1, 40)
MASK = jnp.asarray(np.arange(7) < np.array([[7], [5], [3], [1]]), jnp.int32)
TYPES = jnp.asarray(np.arange(7) > 3, jnp.int32) * jnp.ones((4, 1), jnp.int32)

ATTENTION = {f"layers/attention/{part}/kernel" for part in ("query", "key", "value", "out")}
MLP = {"layers/mlp/up/kernel", "layers/mlp/down/kernel"}
NORMS = {f"{at}/{leaf}" for at in ("embeddings/norm", "layers/attention_norm", "layers/mlp_norm")
         for leaf in ("scale", "bias")}
FOUND = {
    "attention": ATTENTION,
    "mlp": MLP,
    "all-linear": ATTENTION | MLP | {"pooler/kernel", "classifier/kernel"},
    "embedding": {f"embeddings/{kind}/embedding" for kind in ("word", "position", "token_type")},
    "norm": NORMS,
    "bias": {path.replace("kernel", "bias") for path in ATTENTION | MLP | {"pooler/kernel", "classifier/kernel"}}
            | {path for path in NORMS if path.endswith("bias")},
}


def made(config: EncoderConfig = CLASSES, **fields: Any) -> tuple[Encoder, Any]:
    model = Encoder(config, **fields)
    return model, randomise(model.shapes(), scale=0.2)


def run(model: Encoder, params: Any, *args: Any, **kwargs: Any) -> Any:
    return jax.jit(model.apply, compiler_options=quick_compile())(params, *args, **kwargs)


@pytest.mark.parametrize("word", FOUND)
def test_words_find_their_leaves(word: str) -> None:
    model = Encoder(CLASSES)
    method = jpeft.Full() if word in ("norm", "bias", "embedding") else jpeft.LoRA(rank=2)
    plan = jpeft.plan(model.apply, model.shapes(), (TOKENS, MASK, TYPES), {word: method})
    assert {entry.path for entry in plan.entries} == FOUND[word]


def test_layers_are_stacked_and_their_roles_are_found() -> None:
    model = Encoder(BASE)
    sites = jpeft.inspect(model.apply, model.shapes(), (TOKENS, MASK))
    query, out = sites["layers/attention/query/kernel"], sites["layers/attention/out/kernel"]
    assert (query.shape, query.stack_dims, query.in_dims, query.out_dims) == ((3, 16, 2, 8), (0,), (1,), (2, 3))
    assert (out.shape, out.stack_dims, out.in_dims, out.out_dims) == ((3, 2, 8, 16), (0,), (1, 2), (3,))


def test_an_embedding_does_not_use_its_pooler() -> None:
    model = Encoder(dataclasses.replace(CLASSES, task="embedding"))
    assert jpeft.inspect(model.apply, model.shapes(), (TOKENS, MASK))["pooler/kernel"].use == "unused"


@pytest.mark.parametrize(("task", "remat"), [
    ("classification", "full"), *(pytest.param(*more, marks=pytest.mark.slow) for more in (
        ("hidden", "none"), ("token-classification", "none"), ("embedding", "dots")))])
def test_lora_materialises_no_weight_and_merges(task: str, remat: str) -> None:
    model, params = made(dataclasses.replace(CLASSES, task=task), remat=remat)
    plan = jpeft.plan(model.apply, params, (TOKENS, MASK, TYPES), {"all-linear": jpeft.LoRA(rank=2)})
    assert all(row.rule.startswith("fused") for row in jpeft.explain(plan).rows)
    trainable, frozen = jpeft.init(plan, params, jax.random.key(2))
    trainable = randomise(trainable)
    adapted = jpeft.adapt(model.apply, plan)
    assert dense_weights(adapted, trainable, frozen, TOKENS, MASK, TYPES) == []
    ours = jax.jit(adapted)(trainable, frozen, TOKENS, MASK, TYPES)
    assert_close(ours, jax.jit(model.apply)(jpeft.merge(plan, trainable, frozen), TOKENS, MASK, TYPES), 2e-5)


@pytest.mark.parametrize(("method", "rule"), [(jpeft.PromptTuning(3), "embeddings/word/embedding"),
                                          (jpeft.PrefixTuning(3), "layers/attention/(key|value)/kernel")])
def test_virtual_tokens_ride_with_masks_and_token_types(method: jpeft.Method, rule: str) -> None:
    model, params = made()
    given = {"attention_mask": MASK, "token_types": TYPES}
    plan = jpeft.plan(model.apply, params, (TOKENS,), {rule: method}, example_kwargs=given,
                      tokens=jpeft.Tokens(mask="attention_mask", segments="token_types"))
    trainable, frozen = jpeft.init(plan, params, jax.random.key(2))
    out = jax.jit(jpeft.adapt(model.apply, plan))(trainable, frozen, TOKENS, **given)
    assert (out.logits.shape, out.hidden.shape) == ((4, 3), (4, 7, 16))


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_changes_neither_values_nor_gradients(remat: str) -> None:
    plain, params = made()
    other = Encoder(CLASSES, remat=remat)

    def loss(model: Encoder) -> Any:
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(model.apply(p, TOKENS, MASK).logits).sum()))(params)

    ours, oracle = loss(other), loss(plain)
    # A bias of the keys moves all scores of a query alike: its gradient is zero but for rounding.
    for _, grads in (ours, oracle):
        attention = grads["layers"]["attention"]
        assert jnp.abs(attention["key"].pop("bias")).max() <= 1e-5 * jnp.abs(attention["query"]["bias"]).max()
    assert_close(ours, oracle, 1e-5)


def test_the_program_does_not_grow_with_depth() -> None:
    def size(layers: int) -> int:
        model = Encoder(dataclasses.replace(CLASSES, layers=layers))
        return len(jax.jit(model.apply).lower(model.shapes(), TOKENS, MASK).as_text().splitlines())

    assert size(32) == size(4)


def test_dropout_needs_a_key_and_follows_it() -> None:
    model, params = made(dataclasses.replace(CLASSES, dropout=0.2, attention_dropout=0.2, head_dropout=0.2))
    calm, first, same, second = (run(model, params, TOKENS, MASK, key=key).logits for key in
                                 (None, *map(jax.random.key, (1, 1, 2))))
    assert_close(calm, run(Encoder(CLASSES), params, TOKENS, MASK).logits, 1e-6)
    assert_close(first, same, 0.0)
    assert jnp.abs(first - second).max() > 1e-3
    assert jnp.abs(first - calm).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "head_dropout"])
def test_each_rate_acts_alone_and_differs_between_layers(rate: str) -> None:
    model, params = made(dataclasses.replace(CLASSES, **{rate: 0.5}))
    calm, wild = (model.apply(params, TOKENS, MASK, key=key) for key in (None, jax.random.key(0)))
    assert jnp.abs(calm.logits - wild.logits).max() > 1e-3
    assert bool(jnp.all(calm.hidden == wild.hidden)) == (rate == "head_dropout")


def test_attention_dropout_keeps_the_mean_and_hides_masked_tokens() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 2, 4)) for i in range(3))
    mask = jnp.ones((2, 1, 1, 5), bool).at[:, :, :, 3:].set(False)
    still = attention(q, k, v, mask)
    keys = jax.random.split(jax.random.key(9), 4000)
    mean = jax.jit(lambda: jax.vmap(lambda key: attention(q, k, v, mask, 0.3, key))(keys).mean(0))()
    np.testing.assert_allclose(mean, still, atol=0.08)
    spoiled = v.at[:, 3:].set(1e6)
    assert_close(attention(q, k, spoiled, mask, 0.3, keys[0]), attention(q, k, v, mask, 0.3, keys[0]), 1e-6)


def test_padding_and_its_side_do_not_matter() -> None:
    model, params = made(dataclasses.replace(BASE, task="embedding"))
    row = TOKENS[:1, :5]
    whole = run(model, params, row)
    padded = run(model, params, jnp.pad(row, ((0, 0), (0, 3))), jnp.asarray([[1] * 5 + [0] * 3]))
    assert_close(padded.hidden[:, :5], whole.hidden, 1e-5)
    assert_close(padded.embedding, whole.embedding, 1e-5)
    left = run(model, params, jnp.pad(row, ((0, 0), (3, 0))), jnp.asarray([[0] * 3 + [1] * 5]),
                       positions=jnp.asarray([[0, 0, 0, 0, 1, 2, 3, 4]]))
    assert_close(left.embedding, whole.embedding, 1e-5)


def test_a_mask_of_its_own_for_every_token() -> None:
    model, params = made()
    square = jnp.broadcast_to(MASK[:, None, :], (4, 7, 7))
    assert_close(run(model, params, TOKENS, square), run(model, params, TOKENS, MASK), 1e-6)
    causal = jnp.tril(jnp.ones((7, 7), bool))[None] & jnp.ones((4, 1, 1), bool)
    later = TOKENS.at[:, 5:].set(3)
    first, other = (run(model, params, tokens, causal).hidden[:, :5] for tokens in (TOKENS, later))
    assert_close(other, first, 1e-6)


def test_a_row_without_a_visible_token_is_finite() -> None:
    model, params = made(dataclasses.replace(BASE, task="embedding"))
    out = run(model, params, TOKENS, MASK.at[0].set(0))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out))


def test_dtypes_of_params_and_of_compute() -> None:
    model, params = made()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for one, p, dtype in ((model, params, "float32"), (model, half, "bfloat16"),
                          (dataclasses.replace(model, dtype=jnp.dtype("bfloat16")), params, "bfloat16")):
        out = run(one, p, TOKENS, MASK)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(out)} == {dtype}
        np.testing.assert_allclose(out.logits.astype(jnp.float32), run(model, params, TOKENS, MASK).logits, atol=0.05)


def test_embeddings_pool_the_mean_or_the_first_token() -> None:
    hidden = jax.random.normal(jax.random.key(0), (4, 7, 16))
    mean = np.stack([np.asarray(h[:n]).mean(0) for h, n in zip(hidden, (7, 5, 3, 1), strict=True)])
    np.testing.assert_allclose(embed(hidden, MASK, "mean", normalise=False), mean, atol=1e-6)
    np.testing.assert_allclose(embed(hidden, MASK, "cls", normalise=False), hidden[:, 0], atol=0)
    np.testing.assert_allclose(np.linalg.norm(embed(hidden, MASK), axis=-1), 1, atol=1e-6)


def test_init_is_seeded_and_has_the_announced_shapes() -> None:
    model = Encoder(CLASSES)
    params = model.init(jax.random.key(3), jnp.bfloat16)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, model.shapes())
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    assert_close(params, model.init(jax.random.key(3), jnp.bfloat16), 0.0)
    kernel = np.asarray(model.init(jax.random.key(3))["layers"]["mlp"]["up"]["kernel"])
    assert abs(kernel.std() - 0.02) < 0.004
    assert len({hashlib.sha256(layer.tobytes()).hexdigest() for layer in kernel}) == 3


@pytest.mark.parametrize(("fields", "says"), [
    ({"heads": 3}, "heads = 3 must divide hidden_size = 16"),
    ({"layers": 0, "dropout": 1.0}, "layers = 0, must be a positive integer; dropout = 1.0, must be in"),
    ({"activation": "gelo"}, r"activation 'gelo' is not implemented.*nearest: 'gelu'"),
    ({"task": "regression"}, "task = 'regression', must be one of"),
    ({"task": "classification", "labels": 0}, "labels = 0, must be positive for classification"),
    ({"pooling": "max"}, "pooling = 'max', must be 'mean' or 'cls'"),
])
def test_a_wrong_configuration_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelConfigError, match=says):
        dataclasses.replace(BASE, **fields)


def test_an_unknown_remat_is_refused() -> None:
    with pytest.raises(ModelConfigError, match=r"remat 'dot' is not implemented.*nearest: 'dots'"):
        Encoder(BASE, remat="dot")


@pytest.mark.parametrize(("config", "given", "says"), [
    (BASE, {"tokens": TOKENS[0]}, r"tokens must be integer ids \[B, T\], found int32 \(7,\)"),
    (BASE, {"tokens": TOKENS.astype(jnp.float32)}, "tokens must be integer ids"),
    (BASE, {"tokens": jnp.ones((1, 13), jnp.int32)}, "13 tokens is longer than the 12 positions"),
    (dataclasses.replace(BASE, positions_after_pad=True, pad_id=1), {"tokens": jnp.ones((1, 11), jnp.int32)},
     "11 tokens is longer than the 10 positions"),
    (BASE, {"attention_mask": MASK[:, :3]}, r"attention_mask has shape \(4, 3\), must be \(4, 7\) or \(4, 7, 7\)"),
    (dataclasses.replace(BASE, task="embedding"), {"attention_mask": jnp.ones((4, 7, 7))}, r"must be \(4, 7\)(?! or)"),
    (BASE, {"token_types": TYPES[:1]}, r"token_types has shape \(1, 7\)"),
    (dataclasses.replace(BASE, token_types=0), {"token_types": TYPES}, "this model has no token types"),
])
def test_wrong_inputs_are_refused(config: EncoderConfig, given: dict[str, Any], says: str) -> None:
    model = Encoder(config)
    with pytest.raises(ModelInputError, match=says):
        jax.eval_shape(lambda p: model.apply(p, **{"tokens": TOKENS, **given}), model.shapes())
