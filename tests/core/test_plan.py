"""Rules, words, layers and the plan as a value; and the one-line error of each mistake."""

from __future__ import annotations

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer as T
from support import randomise

import jpeft
from jpeft import errors

LAYERS, D, F = 3, 8, 16


def apply(params, ids):
    x = jnp.take(params["embed"], ids, axis=0)
    return T.apply(params, x, heads=2) @ params["lm_head"]["kernel"]


def params_of(scanned: bool):
    p = T.init(jax.random.key(0), LAYERS, D, F, scanned)
    return p | {"embed": jnp.ones((11, D)), "lm_head": {"kernel": jnp.ones((D, 11))}, "spare": jnp.ones(3)}


IDS = jnp.asarray(np.random.RandomState(0).randint(0, 11, (2, 5)))


def make(rules, scanned=True, **kwargs):
    return jpeft.plan(apply, params_of(scanned), (IDS,), rules, **kwargs)


def paths(plan):
    return [e.path for e in plan.entries]


def test_inspect_names_every_use():
    sites = jpeft.inspect(apply, params_of(True), (IDS,))
    assert {p: s.use for p, s in sites.items()} == {
        "embed": "embedding", "lm_head/kernel": "linear", "spare": "unused",
        "layers/norm1": "scale", "layers/norm2": "scale", **{f"layers/{n}": "linear" for n in T.SHAPES}}
    q = sites["layers/q"]
    assert (q.in_dims, q.out_dims, q.stack_dims, q.rows) == ((1,), (2,), (0,), 2 * 5 * LAYERS)
    assert (sites["embed"].in_dims, sites["embed"].rows) == ((0,), 10)


def test_inspect_takes_structs():
    structs = jax.eval_shape(lambda: params_of(True))
    assert jpeft.inspect(apply, structs, (jax.ShapeDtypeStruct((2, 5), jnp.int32),))["layers/up"].out_dims == (2,)


def test_words():
    plan = make({"attention": jpeft.LoRA(rank=2), "mlp": jpeft.LoRA(rank=3), "embedding": jpeft.LoRA(rank=1)})
    ranks = {e.path: e.method.rank for e in plan.entries}
    assert ranks == {**{f"layers/{n}": 2 for n in "qkvo"}, "layers/up": 3, "layers/down": 3, "embed": 1}
    assert paths(make({"all-linear": jpeft.LoRA(rank=2)})) == sorted(f"layers/{n}" for n in T.SHAPES)
    assert set(paths(make({"norm": jpeft.LayerNormTuning()}))) == {"layers/norm1", "layers/norm2"}


def test_first_match_wins_and_exclude_comes_first():
    plan = make({r".*/q": jpeft.LoRA(rank=1), "attention": jpeft.LoRA(rank=2)}, exclude=[r".*/o"])
    assert {e.path: e.method.rank for e in plan.entries} == {"layers/q": 1, "layers/k": 2, "layers/v": 2}


def test_predicates_see_the_site():
    assert set(paths(make({lambda path, site: site.out_size == F: jpeft.LoRA(rank=2)}))) == {"layers/up"}


def test_uses_unite_roles():
    params = {"e": jnp.ones((7, 4))}

    def encode(p, ids):
        return jnp.take(p["e"], ids, axis=0)

    def decode(p, x):
        return x @ p["e"].T

    plan = jpeft.plan(encode, params, (jnp.zeros((2,), jnp.int32),), {"e": jpeft.LoRA(rank=2)},
                      uses=[(decode, (jnp.ones((2, 4)),))])
    assert plan.entries[0].site.use == "tied"
    t, f = jpeft.init(plan, params, jax.random.key(0))
    t = randomise(t, 0, 0.5)
    merged = jpeft.merge(plan, t, f)
    x = jnp.ones((2, 4))
    np.testing.assert_allclose(jpeft.adapt(decode, plan)(t, f, x), decode(merged, x), rtol=1e-5)


@pytest.mark.parametrize("scanned", [
    pytest.param(True, id="scanned"), pytest.param(False, id="unrolled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [
    pytest.param(jpeft.LoRA(rank=2), id="LoRA"), pytest.param(jpeft.IA3(), id="IA3", marks=pytest.mark.slow),
    pytest.param(jpeft.DoRA(rank=2), id="DoRA", marks=pytest.mark.slow)])
def test_layer_ranges(scanned, method):
    plan = make({jpeft.layers("attention", [0, 2]): method}, scanned)
    whole = make({"attention": method}, scanned)
    assert plan.count() * 3 == whole.count() * 2
    t, f = jpeft.init(plan, params_of(scanned), jax.random.key(0))
    t = randomise(t, 1, 0.5)
    merged = jpeft.merge(plan, t, f)
    new, old = ((p["layers"]["q"][1] if scanned else p["layers"][1]["q"]) for p in (merged, params_of(scanned)))
    np.testing.assert_allclose(new, old, rtol=1e-6)
    np.testing.assert_allclose(jpeft.adapt(apply, plan)(t, f, IDS), apply(merged, IDS), rtol=1e-4, atol=1e-5)
    if scanned:
        grads = jax.grad(lambda t: jnp.sum(jpeft.adapt(apply, plan)(t, f, IDS) ** 2))(t)
        assert all(not np.any(np.asarray(g)[1]) for g in jax.tree.leaves(grads["layers/q"]))


def test_one_rank_for_each_layer(tmp_path):
    plan = make({"layers/q": jpeft.LoRA(rank=(2, 0, 4))})
    assert plan.count() == 6 * (D + D)
    t, f = jpeft.init(plan, params_of(True), jax.random.key(0))
    t = randomise(t, 1, 0.5)
    merged = jpeft.merge(plan, t, f)
    delta = np.asarray(merged["layers"]["q"] - params_of(True)["layers"]["q"])
    assert [np.linalg.matrix_rank(d, tol=1e-4) for d in delta] == [2, 0, 4]
    np.testing.assert_allclose(jpeft.adapt(apply, plan)(t, f, IDS), apply(merged, IDS), rtol=1e-4, atol=1e-5)
    jpeft.save(tmp_path / "a", plan, t, f)
    _, t2, f2 = jpeft.load(tmp_path / "a", params_of(True))
    np.testing.assert_array_equal(jpeft.merge(plan, t2, f2)["layers"]["q"], merged["layers"]["q"])
    size = sum(p.stat().st_size for p in (tmp_path / "a").glob("*.safetensors"))
    assert size < 4 * plan.count() + 1200


def test_a_plan_is_a_value():
    plan = make({"all-linear": jpeft.LoRA(rank=2), "embedding": jpeft.PromptTuning(length=3)}, tokens=jpeft.Tokens())
    again = jpeft.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert hash(again) == hash(plan)
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(plan.to_json()))
    with pytest.raises(AttributeError):
        plan.entries = ()


def test_explain_adds_up():
    plan = make({"all-linear": jpeft.LoRA(rank=2)})
    told = jpeft.explain(plan)
    assert told.trainable == plan.count() == sum(r.trainable for r in told.rows) == 3 * 2 * (4 * 2 * D + 2 * (D + F))
    assert told.parameters == sum(x.size for x in jax.tree.leaves(params_of(True)))
    assert "layers/down" in str(told)
    assert f"{told.percent:.3f} %" in str(told)
    assert not told.materialised
    json.dumps(told.to_json())


def _collide():
    class Box(dict):
        pass
    jax.tree_util.register_pytree_with_keys(
        Box, lambda b: ([(jax.tree_util.DictKey("a"), b["x"]), (jax.tree_util.GetAttrKey("a"), b["y"])], None),
        lambda _, c: Box(x=c[0], y=c[1]))
    b = Box(x=jnp.ones((2, 2)), y=jnp.ones((2, 2)))
    return jpeft.plan(lambda p, x: x @ p["x"] @ p["y"], b, (jnp.ones((1, 2)),), {"a": jpeft.LoRA(rank=1)})


def _opaque(materialise=()):
    @jax.custom_vjp
    def matmul(x, w):
        return x @ w

    matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    return jpeft.plan(lambda p, x: matmul(x, p["w"]), {"w": jnp.ones((4, 4))}, (jnp.ones((2, 4)),),
                      {"w": jpeft.LoRA(rank=2)}, materialise=materialise)


MISTAKES = {
    "nothing matches": (
        lambda: make({r".*/qq": jpeft.LoRA()}), errors.NoMatchError, "matches none of the 11 leaves; nearest: "),
    "shadowed": (
        lambda: make({"attention": jpeft.LoRA(rank=2), ".*/q": jpeft.LoRA(rank=2)}),
        errors.NoMatchError, "earlier rules"),
    "exclude nothing": (
        lambda: make({"mlp": jpeft.LoRA(rank=2)}, exclude=["nope"]), errors.NoMatchError, "exclude 'nope'"),
    "rules that are no mapping": (lambda: make([("mlp", jpeft.LoRA())]), errors.PlanError, "list, not a mapping"),
    "a method for rules": (lambda: make(jpeft.LoRA()), errors.PlanError, "LoRA, not a mapping"),
    "a misspelt word": (lambda: make({"all_linear": jpeft.LoRA()}), errors.NoMatchError, "nearest: 'all-linear'"),
    "bare arguments": (
        lambda: jpeft.inspect(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, jnp.ones((2, 4))),
        errors.PlanError, "not a tuple"),
    "a number among the params": (
        lambda: jpeft.inspect(lambda p, x: x * p["s"], {"s": 2.0}, (1.0,)), errors.PathError, "make it an array"),
    "no rules": (lambda: make({}), errors.NoMatchError, "rules is empty"),
    "no such layer": (
        lambda: make({jpeft.layers("mlp", [5]): jpeft.LoRA(rank=2)}), errors.NoMatchError, "matches none"),
    "some layers too many": (
        lambda: make({jpeft.layers("mlp", range(2, 5)): jpeft.LoRA(rank=2)}), errors.NoMatchError, r"\[3, 4\]"),
    "bad regex": (lambda: make({"a(": jpeft.LoRA()}), errors.PlanError, "no regular expression"),
    "a class, not a method": (lambda: make({"mlp": jpeft.LoRA}), errors.PlanError, "instance of a method"),
    "unused leaf": (lambda: make({"spare": jpeft.BitFit()}), errors.UnusedLeafError, "does not read"),
    "wrong use": (lambda: make({".*norm1": jpeft.LoRA()}), errors.WrongUseError, "uses as scale"),
    "rank 0": (lambda: make({"mlp": jpeft.LoRA(rank=0)}), errors.MethodConfigError, "use a rank from 1 to 8"),
    "rank too large": (lambda: make({"mlp": jpeft.LoRA(rank=9)}), errors.MethodConfigError, "use a rank from 1 to 8"),
    "ranks for too few layers": (
        lambda: make({"mlp": jpeft.LoRA(rank=(1, 2))}), errors.MethodConfigError, "has 3 stacked layers"),
    "unknown init": (lambda: jpeft.LoRA(init_weights="magic"), errors.MethodConfigError, "kaiming"),
    "no tokens": (lambda: make({"embedding": jpeft.PromptTuning(length=2)}), errors.PlanError, "tokens=jpeft.Tokens"),
    "path collision": (_collide, errors.PathError, "'a'"),
    "not an array": (lambda: jpeft.inspect(lambda p, x: x, {"f": print}, (1.0,)), errors.PathError, "not an array"),
    "unsupported consumer": (
        _opaque, errors.UnsupportedUse, r"custom_vjp_call @ core/test_plan.py:\d+ needs the whole"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_cause_and_remedy(mistake):
    act, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_materialising_is_an_explicit_choice():
    plan = _opaque(materialise=["w"])
    told = jpeft.explain(plan)
    assert len(told.materialised) == 1
    assert "custom_vjp_call" in told.rows[0].rule
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    t, f = jpeft.init(plan, {"w": jnp.ones((4, 4))}, jax.random.key(0))
    t, x = randomise(t, 0, 0.5), jnp.ones((2, 4))
    np.testing.assert_allclose(jpeft.adapt(apply, plan)(t, f, x), apply(jpeft.merge(plan, t, f), x), rtol=1e-5)


def test_calls_that_do_not_fit_the_plan():
    plan = make({"mlp": jpeft.LoRA(rank=2)})
    t, f = jpeft.init(plan, params_of(True), jax.random.key(0))
    adapted = jpeft.adapt(apply, plan)
    path = next(iter(t))
    for match, call in {
        "frozen is a dict, not jpeft.Frozen; call adapted": lambda: adapted(t, f.base, IDS),
        "frozen is a dict, not jpeft.Frozen; call jpeft.merge": lambda: jpeft.merge(plan, f, t),
        "trainable lacks": lambda: jpeft.merge(plan, {}, f),
        "trainable has": lambda: adapted({**t, path: {"a": t[path]["a"]}}, f, IDS),
        "the plan says": lambda: jpeft.penalty(plan, jax.tree.map(lambda a: a[..., :1], t), f),
        "frozen.theta lacks": lambda: adapted(t, jpeft.Frozen(f.base, {}), IDS),
        "pass peft=jpeft.Call": lambda: adapted(t, f, IDS, peft=jax.random.key(0)),
        "peft=Call.* is a int, not a PRNG key": lambda: adapted(t, f, IDS, peft=jpeft.Call(key=0)),
        "key is a int, not a PRNG key": lambda: jpeft.init(plan, params_of(True), 0),
        "the plan is a function": lambda: jpeft.adapt(plan, apply),
    }.items():
        with pytest.raises(errors.CallError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(errors.CallError, match="lacks"):
        adapted({}, f, IDS)
    with pytest.raises(errors.CallError, match="task"):
        adapted(t, f, IDS, peft=jpeft.Call(task=0))
    with pytest.raises(errors.PathError, match=r"make a new plan|the plan has"):
        jpeft.init(plan, params_of(False), jax.random.key(0))
    with pytest.raises(errors.CallError, match="calibration"):
        jpeft.init(plan, params_of(True), jax.random.key(0), calibration=iter(()))


def test_of_two_parameters_the_weight_is_found():
    """Learned queries through `x @ W`, and through Equinox's vmapped `W @ x`."""
    params = {"w": jnp.ones((6, 6)), "queries": jnp.ones((3, 6))}
    plain = lambda p, x: x + p["queries"] @ p["w"]  # noqa: E731
    mapped = lambda p, x: x + jax.vmap(lambda q: p["w"] @ q)(p["queries"])  # noqa: E731
    for apply in (plain, mapped):
        sites = jpeft.inspect(apply, params, (jnp.ones((3, 6)),))
        assert (sites["w"].use, sites["queries"].use) == ("linear", "other")


def test_numpy_float64_parameters_count_as_float32():
    params, x = {"w": np.ones((6, 4))}, np.ones((2, 6))
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    plan = jpeft.plan(apply, params, (x,), {"w": jpeft.LoRA(rank=2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t, f = jpeft.init(plan, params, jax.random.key(0))
        t = randomise(t, 0, 0.5)
        jpeft.merge_error(plan, t, f)
        merged = jpeft.merge(plan, t, f)
        np.testing.assert_allclose(jpeft.adapt(apply, plan)(t, f, x), apply(merged, x), rtol=1e-5)
    assert t["w"]["a"].dtype == merged["w"].dtype == jnp.float32
