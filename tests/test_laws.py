"""The laws: one test each, over every row of `cases.py`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dense
import flops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, LORA, SPECS, Case, T, encoder, make_inputs, make_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import assert_close, formula_value, randomise, x64

import jpeft

TOL = {"float64": 1e-10, "float32": 1e-5}
ROWS = [pytest.param(c, id=c.name) for c in CASES]
Apply = Callable[..., Any]


def rows(law: str, only: Sequence[str] = ()) -> Any:
    """Every row that does not pass a substitute for this law; `only`: those in the default tier."""
    def slow(case: Case) -> bool:
        return case.name not in only if only else case.tier == "slow"

    return pytest.mark.parametrize("case", [
        pytest.param(c, id=c.name, marks=pytest.mark.slow if slow(c) else ()) for c in CASES if law not in c.exempt])


class Ready(NamedTuple):
    """A row, planned and initialised; `start` is what init gives, `spread` has every entry random."""

    plan: jpeft.Plan
    params: Any
    start: Any
    spread: Any
    frozen: Any


def plan_for(case: Case, params: Any, rules: Any = None, apply: Apply = encoder) -> jpeft.Plan:
    ids, mask = make_inputs()
    kwargs = {"attention_mask": mask}
    return jpeft.plan(apply, params, (ids,), rules or case.rules, example_kwargs=kwargs, tokens=case.tokens)


def make(case: Case, dtype: str, rules: Any = None) -> Ready:
    params = make_params(jnp.dtype(dtype))
    plan = plan_for(case, params, rules)
    start, frozen = jpeft.init(plan, params, jax.random.key(0))
    return Ready(plan, params, start, randomise(start, 7), frozen)


ready = functools.cache(make)


def call(plan: jpeft.Plan, trainable: Any, frozen: Any, ids: jax.Array, mask: jax.Array,
         apply: Apply = encoder) -> jax.Array:
    """The adapted model, under strict dtype promotion."""
    with jax.numpy_dtype_promotion("strict"):
        return jpeft.adapt(apply, plan)(trainable, frozen, ids, attention_mask=mask)


def written_out(case: Case, plan: jpeft.Plan, trainable: Any, frozen: Any, ids: jax.Array,
                mask: jax.Array) -> jax.Array:
    """The unmodified model with merged parameters; what cannot merge is written into it by hand."""
    params, rest = jpeft.merge(plan, trainable, frozen, partial=True)
    assert bool(rest) == (case.extra is not None)
    return encoder(params, ids, mask, extra=case.extra(rest) if case.extra else None)


def weigh(out: jax.Array) -> jax.Array:
    return jnp.sum(jnp.asarray(np.cos(np.arange(out.size)).reshape(out.shape), out.dtype) * out)


def with_slopes(f: Callable[[Any], jax.Array], trainable: Any) -> tuple[jax.Array, Any]:
    """Return an output and the gradient of a weighted sum of it."""

    def loss(t: Any) -> tuple[jax.Array, jax.Array]:
        out = f(t)
        return weigh(out), out

    return jax.grad(loss, has_aux=True)(trainable)[::-1]


@functools.cache
def program(case: Case) -> Callable[..., Any]:
    """One compiled function of `(trainable, frozen)` for all float64 laws: adapted, written out, base."""
    plan, (ids, mask) = ready(case, "float64").plan, make_inputs()

    @jax.jit
    def run(trainable: Any, frozen: Any) -> Any:
        ours = with_slopes(lambda t: call(plan, t, frozen, ids, mask), trainable)
        oracle = with_slopes(lambda t: written_out(case, plan, t, frozen, ids, mask), trainable)
        return ours, oracle, encoder(jpeft.base(plan, frozen), ids, mask)

    return run


@pytest.fixture
def double() -> Iterator[None]:
    with x64():
        yield


@pytest.mark.parametrize("case", ROWS)
def test_closed_form_count(case: Case) -> None:
    r = ready(case, "float32")
    assert r.plan.count() == case.count
    assert [formula_value(e.method, e.site) for e in r.plan.entries] == [e.count() for e in r.plan.entries]
    assert sum(leaf.size for leaf in jax.tree.leaves(r.start)) == case.count
    assert {leaf.dtype for leaf in jax.tree.leaves(r.start)} == {jnp.dtype("float32")}
    for entry in r.plan.entries:
        theta = {**r.start[entry.path], **r.frozen.theta.get(entry.path, {})}
        axes = entry.method.axes(entry.site)
        assert set(theta) <= set(axes)
        for letter, value in theta.items():
            assert len(axes[letter]) == value.ndim, letter
            for dim, size in zip(axes[letter], value.shape, strict=True):
                assert dim is None or size == entry.site.shape[dim], letter
    # Base leaves divided on every dim that divides: what follows has the right rank, and divides too.
    mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"))
    base = jax.tree.map(lambda leaf: NamedSharding(mesh, divided(leaf.shape)), r.params)
    trainable, frozen = jpeft.shardings(r.plan, base, replicate_below=0)
    for shapes, placed in zip(r.plan.theta_shapes(), (trainable, frozen.theta), strict=True):
        jax.tree.map(lambda struct, one: one.shard_shape(struct.shape), shapes, placed)
    assert jpeft.explain(r.plan, shardings=(trainable, frozen)).rows[0].placement.startswith("base [")


def divided(shape: tuple[int, ...]) -> PartitionSpec:
    free, spec = {"fsdp": 2, "tensor": 4}, [None] * len(shape)
    for d in reversed(range(len(shape))):
        axis = next((a for a, n in free.items() if shape[d] % n == 0), None)
        if axis is not None:
            spec[d] = free.pop(axis) and axis
    return PartitionSpec(*spec)


@rows("L1")
@pytest.mark.usefixtures("double")
def test_l1_identity_at_init(case: Case) -> None:
    r = ready(case, "float64")
    (out, _), _, base = program(case)(r.start, r.frozen)
    assert_close(out, base, 1e-12)


@rows("L2")
@pytest.mark.usefixtures("double")
def test_l2_applying_equals_merging(case: Case) -> None:
    r = ready(case, "float64")
    (out, slopes), (want, oracle), base = program(case)(r.spread, r.frozen)
    assert_close(out, want, TOL["float64"], "output")
    assert_close(slopes, oracle, TOL["float64"], "gradient")
    with pytest.raises(AssertionError, match="max"):
        assert_close(out, base, 1e-3)
    for path, entries in slopes.items():
        for letter, slope in entries.items():
            assert jnp.any(slope != 0), f"{path}: {letter} does not learn"
    if case.extra is not None:
        with pytest.raises(jpeft.NotMergeable, match="keep the adapted function"):
            jpeft.merge(r.plan, r.spread, r.frozen)


def louder(method: jpeft.Method) -> jpeft.Method:
    """The same method with another scale, if it has one."""
    if isinstance(method, jpeft.Chain):
        return jpeft.Chain(tuple(map(louder, method.methods)))
    names = {f.name for f in dataclasses.fields(method)} & {"alpha", "scaling"}
    return dataclasses.replace(method, **{n: 2 * getattr(method, n) for n in names})


@rows("L3")
def test_l3_l4_one_trace_and_an_untouched_base(case: Case) -> None:
    traces = 0

    def counted(*args: Any, **kwargs: Any) -> jax.Array:
        nonlocal traces
        traces += 1
        return encoder(*args, **kwargs)

    r, (ids, mask), optimiser = ready(case, "float32"), make_inputs(), optax.adam(1e-2)

    @functools.partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
    def step(trainable: Any, state: Any, frozen: Any, ids: jax.Array, mask: jax.Array) -> Any:
        def loss(t: Any) -> jax.Array:
            logits = call(r.plan, t, frozen, ids, mask, counted)
            return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

        value, slope = jax.value_and_grad(loss)(trainable)
        updates, state = optimiser.update(slope, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    before = jax.tree.map(np.array, r.params)
    trainable, losses = jax.tree.map(jnp.copy, r.start), []
    state = optimiser.init(trainable)
    bytes_of = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert bytes_of(state) == 2 * bytes_of(r.start) + 4
    compiled = step.lower(trainable, state, r.frozen, ids, mask).compile()
    for _ in range(5):
        trainable, state, value = compiled(trainable, state, r.frozen, ids, mask)
        losses.append(float(value))
    once = 2 if case.tokens else 1  # with virtual tokens, the call without them is traced too, to see what grew
    assert traces == once
    assert losses == sorted(losses, reverse=True)
    assert_close(*(jax.tree.map(jnp.zeros_like, t) for t in (trainable, r.start)), 0.0, "dtypes and shapes")
    others = {pattern: louder(method) for pattern, method in case.rules.items()}
    other = jpeft.init(plan_for(case, r.params, others), r.params, jax.random.key(0))[1]
    step.lower(trainable, state, other, ids, mask)
    assert traces == once
    # Held by a step: theta and two moments of it, in place; the base and what is frozen; the batch. No other byte.
    memory, moved = compiled.memory_analysis(), 3 * 4 * case.count + 4
    assert memory.alias_size_in_bytes == moved
    assert memory.argument_size_in_bytes == moved + bytes_of((r.frozen, ids, mask))
    assert memory.output_size_in_bytes - moved <= 8 + 8 * len(jax.tree.leaves((trainable, state, value)))
    for mine, theirs, old in zip(*map(jax.tree.leaves, (r.frozen.base, r.params, before)), strict=True):
        assert mine is theirs
        assert mine.tobytes() == old.tobytes()


@rows("L5")
@pytest.mark.usefixtures("double")
def test_l5_stacked_adapters(case: Case) -> None:
    r, (ids, mask) = ready(case, "float64"), make_inputs()
    adapters = [(randomise(r.start, seed), r.frozen.theta) for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    one = lambda t, theta: call(r.plan, t, r.frozen._replace(theta=theta), ids, mask)  # noqa: E731
    served = jax.jit(jax.vmap(one))(*stacked)
    for out, (trainable, _) in zip(served, adapters, strict=True):
        assert_close(out, program(case)(trainable, r.frozen)[0][0], TOL["float64"])


@rows("L6")
@pytest.mark.usefixtures("double")
def test_l6_round_trips(case: Case, tmp_path: Path) -> None:
    from safetensors import safe_open

    r = ready(case, "float64")
    assert jpeft.Plan.from_json(json.loads(json.dumps(r.plan.to_json()))) == r.plan
    jpeft.save(tmp_path, r.plan, r.spread, r.frozen)
    plan, trainable, frozen = jpeft.load(tmp_path, r.params)
    assert plan == r.plan
    assert hash(plan) == hash(r.plan)
    assert_close((trainable, frozen.theta), (r.spread, r.frozen.theta), 0.0)
    with safe_open(tmp_path / "adapter.safetensors", "np") as file:
        stored = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    assert stored == sum(leaf.size for leaf in jax.tree.leaves((r.start, r.frozen.theta)))
    assert_close(program(case)(trainable, frozen)[0], program(case)(r.spread, r.frozen)[0], 0.0)


def placed(r: Ready, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Theta and base on a mesh: the base by `SPECS`, each axis of theta as the leaf dim that it follows."""
    specs = {s.path: (*SPECS.get(s.path, ()), *(None,) * len(s.shape))[: len(s.shape)] for s in r.plan.sites}

    def put(x: jax.Array, path: str, dims: Any) -> jax.Array:
        spec = PartitionSpec(*(None if d is None else specs[path][d] for d in dims))
        return jax.device_put(x, NamedSharding(mesh, spec))

    def follow(theta: Any) -> Any:
        axes = {e.path: e.method.axes(e.site) for e in r.plan.entries}
        return {p: {k: put(v, p, axes[p][k]) for k, v in letters.items()} for p, letters in theta.items()}

    leaves, treedef = jax.tree.flatten(r.frozen.base)
    base = [put(leaf, s.path, range(leaf.ndim)) for leaf, s in zip(leaves, r.plan.sites, strict=True)]
    return follow(r.spread), jpeft.Frozen(jax.tree.unflatten(treedef, base), follow(r.frozen.theta))


@rows("L7", only=("lora", "dora", "oft", "pfeiffer", "prefix"))
@pytest.mark.usefixtures("double")
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_l7_sharded_equals_single(case: Case) -> None:
    """Batch over four devices, heads, hidden units and vocabulary over two."""
    r, mesh = ready(case, "float64"), jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    ids, mask = (jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in make_inputs())
    run = jax.jit(lambda t, f, ids, mask: with_slopes(lambda t: call(r.plan, t, f, ids, mask), t))
    out, slopes = run(*placed(r, mesh), ids, mask)
    want, oracle = program(case)(r.spread, r.frozen)[0]
    assert_close(out, want, TOL["float64"], "output")
    assert_close(slopes, oracle, TOL["float64"], "gradient")


def part(theta: Any, path: str, number: int) -> Any:
    """Theta of one method of the chain on `path`."""
    return {k.removeprefix(f"{number}."): v for k, v in theta.get(path, {}).items() if k.startswith(f"{number}.")}


@rows("L8", only=("lora", "dora", "oft", "pfeiffer", "prefix"))
@pytest.mark.usefixtures("double")
def test_l8_composition(case: Case) -> None:
    """With another method on another leaf, and in a `Chain` on the same one: as merging the first, then adapting."""
    (pattern, method), *rest = case.rules.items()
    beside = {"layers/key/kernel": LORA} if "up" in "".join(case.rules) else {"layers/up/kernel": LORA}
    a, b = case.chain(method) if case.chain else (None, method)
    joint = make(case, "float64", {pattern: jpeft.Chain((a, b)) if a else b, **dict(rest), **beside})
    first = make(case, "float64", {**({pattern: a} if a else {}), **beside})
    second = make(case, "float64", {pattern: b, **dict(rest)})
    ids, mask = make_inputs()
    chained = {e.path for e in joint.plan.entries if isinstance(e.method, jpeft.Chain) and a}

    def pick(theta: Any, plan: jpeft.Plan, number: int) -> Any:
        paths = [e.path for e in plan.entries]
        return {p: part(theta, p, number) if p in chained else theta.get(p, {}) for p in paths}

    @jax.jit
    def run(t: Any, theta: Any, base: Any) -> Any:
        folded = jpeft.merge(first.plan, pick(t, first.plan, 0), jpeft.Frozen(base, pick(theta, first.plan, 0)))
        frozen = jpeft.Frozen(folded, pick(theta, second.plan, 1))
        return (call(joint.plan, t, jpeft.Frozen(base, theta), ids, mask),
                call(second.plan, pick(t, second.plan, 1), frozen, ids, mask))

    ours, stepwise = run(joint.spread, joint.frozen.theta, joint.params)
    assert_close(ours, stepwise, TOL["float64"])


@functools.cache
def base_flops(tokens: int) -> int:
    ids, mask = (jax.ShapeDtypeStruct((x.shape[0], x.shape[1] + tokens), x.dtype) for x in make_inputs())
    return flops.count(encoder, make_params(), ids, mask).total


@rows("L9")
def test_l9_flops(case: Case) -> None:
    r, (ids, mask) = ready(case, "float32"), make_inputs()
    found = flops.count(lambda t, f, ids, mask: call(r.plan, t, f, ids, mask), r.spread, r.frozen, ids, mask).total
    wider = (ids.shape[1] + r.plan.virtual_tokens) / ids.shape[1]
    own = 0
    for e in r.plan.entries:
        per_row, per_call = e.method.flops(e.site)
        own += per_row * round(e.site.rows * wider) + per_call
    base = base_flops(r.plan.virtual_tokens)
    assert abs(found - base - own) <= 0.02 * max(own, 0.02 * base), f"found {found - base:,}, stated {own:,}"


@rows("L10", only=("lora", "dora", "full", "hira"))
def test_l10_no_dense_gradient(case: Case) -> None:
    """No step makes an array of a weight's shape, forward or backward, unless the row says why it must."""
    params, ids = make_params(), jnp.zeros((1, 3), jnp.int32)
    mask = jnp.ones_like(ids)
    plan = jpeft.plan(encoder, params, (ids,), case.rules, example_kwargs={"attention_mask": mask}, tokens=case.tokens)
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
    shapes: set[tuple[int, ...]] = set()
    for site in (e.site for e in plan.entries if e.site.in_dims and e.site.out_dims):
        flat, whole = (site.in_size, site.out_size), (*site.in_shape, *site.out_shape)
        shapes |= {(*stack, *dims) for stack in ((), site.stack_shape) for dims in (flat, whole)}

    def slopes(frozen: Any, trainable: Any, ids: jax.Array) -> Any:
        return jax.grad(lambda t: jnp.sum(jnp.square(call(plan, t, frozen, ids, mask))))(trainable)

    found = dense.dense_steps(slopes, frozen, trainable, ids, shapes=shapes)
    assert bool(found) == bool(case.dense), f"{found}; the row says {case.dense!r}"


def kept(f: Callable[..., Any], tokens: int, *args: Any) -> float:
    """Values of four bytes for a row of the batch that the backward pass of `f(*args, ids, mask)` takes over."""
    def total(rows: int) -> int:
        batch = (jax.ShapeDtypeStruct((rows, tokens), jnp.int32),) * 2
        back = jax.eval_shape(lambda args, *batch: jax.vjp(lambda *a: f(*a, *batch), *args)[1], args, *batch)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))

    return (total(5) - total(3)) / 2 / 4


@functools.cache
def base_kept(tokens: int) -> float:
    params = make_params()

    def base(embed: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return encoder({**params, "embed": params["embed"] + embed}, ids, mask, remat=False)

    return kept(base, tokens, params["embed"])


@rows("L11", only=("lora", "dora", "ia3", "prefix", "pfeiffer"))
def test_l11_held_for_the_backward_pass(case: Case) -> None:
    """Without rematerialisation, by what the backward pass closes over; the gradient flows on through the layers."""
    r = ready(case, "float32")

    def adapted(trainable: Any, embed: jax.Array, frozen: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        frozen = frozen._replace(base={**frozen.base, "embed": frozen.base["embed"] + embed})
        return call(r.plan, trainable, frozen, ids, mask, functools.partial(encoder, remat=False))

    found = kept(lambda t, e, ids, mask: adapted(t, e, r.frozen, ids, mask), T, r.start, r.params["embed"])
    assert found - base_kept(T + r.plan.virtual_tokens) == case.held


@rows("bfloat16", only=("lora", "prefix", "oft"))
def test_bfloat16(case: Case) -> None:
    """Compute in bfloat16 on float32 parameters, and bfloat16 parameters with float32 theta."""
    r, half, (ids, mask) = ready(case, "float32"), make(case, "bfloat16"), make_inputs()
    assert {leaf.dtype for leaf in jax.tree.leaves(half.start)} == {jnp.dtype("float32")}
    low = functools.partial(encoder, dtype=jnp.bfloat16)

    @jax.jit
    def run(trainable: Any, frozen: Any, half_frozen: Any) -> Any:
        return (*with_slopes(lambda t: call(r.plan, t, frozen, ids, mask, low), trainable),
                call(half.plan, trainable, half_frozen, ids, mask))

    trainable = jax.tree.map(lambda w: 0.1 * w, r.spread)
    out, slopes, other = run(trainable, r.frozen, half.frozen)
    with x64():
        wide = jax.tree.map(lambda w: w.astype(jnp.float64), trainable)
        exact = jax.tree.map(lambda w: w.astype(jnp.float32), program(case)(wide, ready(case, "float64").frozen)[0])
    for y in (out, other):
        assert y.dtype == jnp.bfloat16
        assert_close(y.astype(jnp.float32), exact[0], 0.05, "output")
    gap = optax.tree.norm(jax.tree.map(jnp.subtract, slopes, exact[1])) / optax.tree.norm(exact[1])
    assert gap < 0.1, "gradient"


def test_every_substitute_is_there() -> None:
    for case in CASES:
        for law, (reason, where) in case.exempt.items():
            file, _, name = where.partition("::")
            tree = ast.parse((Path(__file__).parent.parent / file).read_text())
            found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert reason, f"{case.name} is exempt from {law} without a reason"
            assert name in found, f"{case.name} passes {where} instead of {law}, which is not there"
