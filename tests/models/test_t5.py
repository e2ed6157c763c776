"""T5 against transformers on torch (recorded outputs always, live ones where torch is installed), and on its own."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from models.t5_cases import CASES, GOLDEN, Case, inputs, labels, tensors, torch_model, torch_outputs, write
from support import quick_compile

import jpeft
from jpeft.errors import ModelConfigError, ModelInputError
from jpeft.interop import tensors as files
from jpeft.interop.checkpoint import load, match, unload
from jpeft.interop.t5 import T5S
from jpeft.interop.tensors import Safetensors
from jpeft.models.t5 import T5, T5Cache, shifted
from jpeft.models.t5_config import T5Config

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
live = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
rows = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
BY_NAME = {case.name: case for case in CASES}


def read(folder: Path) -> tuple[T5, Any, dict[str, Any]]:
    """What `from_pretrained` does with these tables."""
    raw, stored = json.loads((folder / "config.json").read_text()), Safetensors(folder)
    family = T5S[raw["model_type"]]
    config = family.read(raw, "config.json", task=family.task_of(raw), labels=0)
    config = family.adjusted(config, {}, stored)
    model = T5(config)
    names, shapes = family.names(config), model.shapes()
    return model, load(stored, match(stored, names, shapes), shapes, lambda *_: None), raw


def save(folder: Path, model: T5, params: Any, raw: dict[str, Any]) -> None:
    family = T5S[raw["model_type"]]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family.write(raw, model.config)))
    files.write(folder, *unload(params, family.names(model.config), model.shapes()))


def whole(model: T5, params: Any, batch: dict[str, Any], target: Any) -> dict[str, Any]:
    out = model.apply(params, **batch)
    found = {"hidden": out.hidden, "logits": out.logits}
    if target is not None:
        text = {name: value for name, value in batch.items() if name != "decoder_tokens"}
        found["loss"] = model.apply(params, **text, labels=target).loss
    return {name: value for name, value in found.items() if value is not None}


def in_steps(model: T5, params: Any, batch: dict[str, Any]) -> jax.Array:
    """Decode five tokens with the text, then one, then the rest, from the cache."""
    written = batch["decoder_tokens"]
    text = {name: value for name, value in batch.items() if name != "decoder_tokens"}
    first = model.apply(params, **text, decoder_tokens=written[:, :5], cache=model.empty_cache(len(written), 12))
    hidden, cache = [first.hidden], first.cache
    for some in (slice(5, 6), slice(6, None)):
        out = model.apply(params, None, decoder_tokens=written[:, some], cache=cache)
        cache = out.cache
        hidden.append(out.hidden)
    return jnp.concatenate(hidden, axis=1)


def compiled(function: Any, model: Any, *args: Any) -> Any:
    return jax.jit(functools.partial(function, model), compiler_options=quick_compile())(*args)


def assert_same(ours: dict[str, Any], theirs: dict[str, np.ndarray]) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=3e-5, err_msg=name)


def target(case: Case) -> np.ndarray | None:
    return labels(case) if case.task == "seq2seq" else None


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=pytest.mark.slow if i % 2 else ()) for i, case in enumerate(CASES)])
def test_equals_the_recorded_outputs(case: Case, tmp_path: Path) -> None:
    recorded = np.load(GOLDEN)
    theirs = {name.split("/")[1]: recorded[name] for name in recorded.files if name.split("/")[0] == case.name}
    assert theirs["hidden"].std() > 0.3
    model, params, _ = read(write(case, tmp_path))
    assert (model.config.task, model.config.tied) == (case.task, not case.head)
    assert_same(compiled(whole, model, params, inputs(case), target(case)), theirs)
    assert_same({"hidden": compiled(in_steps, model, params, inputs(case))}, {"hidden": theirs["hidden"]})


@live
@rows
def test_equals_transformers(case: Case, tmp_path: Path) -> None:
    folder = write(case, tmp_path)
    model, params, _ = read(folder)
    assert_same(compiled(whole, model, params, inputs(case), target(case)), torch_outputs(case, folder))


@live
@rows
def test_transformers_reads_what_is_written(case: Case, tmp_path: Path) -> None:
    save(tmp_path / "new", *read(write(case, tmp_path / "old")))
    before, after = (torch_outputs(case, tmp_path / which) for which in ("old", "new"))
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@live
@pytest.mark.parametrize("name", ["t5", "flan"])
def test_gradients_equal_those_of_torch(name: str, tmp_path: Path) -> None:
    import torch

    case = BY_NAME[name]
    folder, batch = write(case, tmp_path), inputs(case)
    text = {key: value for key, value in batch.items() if key != "decoder_tokens"}
    model, params, _ = read(folder)
    grads = jax.jit(jax.grad(lambda p: model.apply(p, **text, labels=labels(case)).loss))(params)
    peer = torch_model(case, folder)
    peer(torch.tensor(text["tokens"]).long(), labels=torch.tensor(labels(case)).long(),
         attention_mask=torch.tensor(text["attention_mask"]) if "attention_mask" in text else None).loss.backward()
    theirs = dict(peer.named_parameters())
    family = T5S[case.config["model_type"]]
    _, make = unload(grads, family.names(model.config), model.shapes())
    for row in family.names(model.config).rows:
        stored = row.stored.format(*[1] * row.stacked)
        ours, want = make(stored), theirs[stored].grad.numpy()
        np.testing.assert_allclose(ours, want, rtol=0, atol=3e-5 * max(1.0, float(np.abs(want).max())), err_msg=stored)


@rows
def test_read_write_read(case: Case, tmp_path: Path) -> None:
    model, params, raw = read(write(case, tmp_path / "old"))
    save(tmp_path / "new", model, params, raw)
    again, reread, said = read(tmp_path / "new")
    assert again == model
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), params, reread))
    assert {**said, **case.config} == said
    assert set(Safetensors(tmp_path / "new").infos) == set(tensors(case))


# --- on its own ---

def tiny(**changes: Any) -> tuple[T5, Any]:
    sizes: dict[str, Any] = {"vocab_size": 12, "hidden_size": 8, "layers": 1, "decoder_layers": 2, "heads": 2,
                             "head_size": 4, "mlp_size": 16}
    model = T5(T5Config(**{**sizes, **changes}))
    return model, model.init(jax.random.key(0))


def test_padding_of_the_decoder_is_not_seen() -> None:
    model, params = tiny()
    tokens, written = jnp.ones((1, 3), int), jnp.asarray([[0, 5, 6]])
    mask = jnp.asarray([[1, 0, 1]])
    forward = jax.jit(lambda w: model.apply(params, tokens, decoder_tokens=w, decoder_mask=mask).logits)
    one, other = forward(written), forward(written.at[0, 1].set(9))
    np.testing.assert_allclose(one[:, 2], other[:, 2], rtol=1e-6)


def test_dropout_needs_a_key_and_acts_everywhere() -> None:
    model, params = tiny(dropout=0.5)
    ids = jnp.ones((1, 3), int)
    plain, dropped = compiled(lambda m: [m.apply(params, ids, decoder_tokens=ids, key=key).logits for key in (
        None, jax.random.key(0))], model)
    assert not np.allclose(plain, dropped)


def test_a_full_cache_is_nan_and_no_silence() -> None:
    model, params = tiny()
    cache = model.empty_cache(1, 2)
    ids = jnp.ones((1, 3), int)
    logits = compiled(lambda m: m.apply(params, ids, decoder_tokens=ids, cache=cache).logits, model)
    assert jnp.isnan(logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "names"])
def test_remat_changes_nothing(remat: str) -> None:
    model, params = tiny()
    again = T5(model.config, remat=remat)
    tokens, wanted = jnp.ones((2, 3), int), jnp.asarray([[5, 6], [7, 1]])
    one, other = (compiled(lambda m: jax.grad(lambda p: m.apply(p, tokens, labels=wanted).loss)(params), m)
                  for m in (model, again))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), one, other)


@pytest.mark.slow
def test_lora_on_all_linears_forms_no_weight() -> None:
    model, params = tiny(tied=False, gated=True)
    tokens, wanted = jnp.ones((2, 5), int), jnp.asarray([[5, 6], [7, 1]])

    def loss(params: Any, tokens: Any, labels: Any) -> jax.Array:
        return model.apply(params, tokens, labels=labels).loss

    plan = jpeft.plan(loss, params, (tokens, wanted), {"all-linear": jpeft.LoRA(rank=2)})
    assert len(plan.entries) == 7 + 11
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    got = jax.jit(jpeft.adapt(loss, plan))(trainable, frozen, tokens, wanted)
    want = jax.jit(loss)(jpeft.merge(plan, trainable, frozen), tokens, wanted)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
def test_it_learns_to_copy() -> None:
    """A few steps on one batch: the loss of a copied text falls far below that of guessing."""
    import optax

    model, params = tiny(hidden_size=16, mlp_size=32)
    tokens = jax.random.randint(jax.random.key(1), (8, 4), 2, 12)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: model.apply(p, tokens, labels=tokens).loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, first = tx.init(params), None
    for _ in range(60):
        params, state, loss = step(params, state)
        first = loss if first is None else first
    assert first > 1.5
    assert loss < 0.3


@pytest.mark.parametrize(("call", "text"), [
    ({"tokens": None, "decoder_tokens": "ids"}, "no tokens to encode and no cache"),
    ({"tokens": "ids"}, "the decoder has nothing to read"),
    ({"tokens": "ids", "decoder_tokens": "ids", "label_weights": "ids"}, "label_weights without labels"),
    ({"tokens": "ids", "decoder_tokens": "long"}, "the decoder reads 3 rows, there are 2"),
    ({"tokens": "ids", "labels": "ids", "attention_mask": "long"}, "attention_mask has shape"),
    ({"tokens": "floats", "labels": "ids"}, "tokens must be integer ids"),
])  # fmt: skip
def test_wrong_inputs(call: dict[str, Any], text: str) -> None:
    model, params = tiny()
    known = {"ids": jnp.ones((2, 3), int), "long": jnp.ones((3, 3), int), "floats": jnp.ones((2, 3)), None: None}
    with pytest.raises(ModelInputError, match=text):
        model.apply(params, **{name: known[value] for name, value in call.items()})


def test_a_cache_that_holds_the_text_takes_no_other() -> None:
    model, params = tiny()
    ids = jnp.ones((2, 3), int)
    own = model.empty_cache(2, 8)
    cache = T5Cache(own, own.key, own.value, own.mask)
    with pytest.raises(ModelInputError, match="this cache holds an encoded text"):
        model.apply(params, ids, decoder_tokens=ids, cache=cache)


def test_shifted_labels() -> None:
    assert shifted(jnp.asarray([[4, -100, 5]]), 2, 0).tolist() == [[2, 4, 0]]


@pytest.mark.parametrize(("change", "text"), [
    ({"feed_forward_proj": "gated-"}, "activation '' is not implemented"),
    ({"feed_forward_proj": "twice-gelu"}, "feed_forward_proj = 'twice-gelu' does not go with this library"),
    ({"feed_forward_proj": "relu", "is_gated_act": True}, "does not go with is_gated_act = True"),
    ({"is_encoder_decoder": False}, "is_encoder_decoder = False is not implemented"),
    ({"relative_attention_num_buckets": 6}, "buckets = 6, must divide by 4"),
    ({"relative_attention_max_distance": 4}, "max_distance = 4, must be more than half"),
    ({"num_experts": 4}, "num_experts = 4 is not implemented"),
])  # fmt: skip
def test_configurations_that_are_not_implemented(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelConfigError, match=text):
        T5S["t5"].read({**BY_NAME["t5"].config, **change}, "config.json")


def test_the_goldens_are_small() -> None:
    assert GOLDEN.stat().st_size < 100_000
    assert {name.split("/")[0] for name in np.load(GOLDEN).files} == {case.name for case in CASES}
