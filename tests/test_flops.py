"""The FLOP counter against closed forms: what every speed claim of the test-suite rests on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flops import Flops, UncountedError, compile_for, count, count_text, temp_bytes
from jax import lax

B, D, L = 8, 32, 5
LAYER = 2 * B * D * D


def spec(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def layers(x: jax.Array, w: jax.Array) -> jax.Array:
    """Scan `tanh(x @ w[i])` over the leading axis of `w`."""
    return lax.scan(lambda c, wi: (jnp.tanh(c @ wi), None), x, w)[0]


def layers_remat(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.scan(jax.checkpoint(lambda c, wi: (jnp.tanh(c @ wi), None)), x, w)[0]


def unrolled(x: jax.Array, w: jax.Array) -> jax.Array:
    for i in range(w.shape[0]):
        x = jnp.tanh(x @ w[i])
    return x


def grid(x: jax.Array, w: jax.Array) -> jax.Array:
    """A scan of scans: `w` is [outer, inner, D, D]."""
    return lax.scan(lambda c, wi: (layers(c, wi), None), x, w)[0]


def grad(f: Callable[..., jax.Array], argnums: int | tuple[int, ...] = (0, 1)) -> Callable[..., Any]:
    return jax.grad(lambda *args: jnp.sum(f(*args) ** 2), argnums)


X, W, WS, WSS = spec(B, D), spec(D, D), spec(L, D, D), spec(3, L, D, D)

DOTS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]] = {
    "matmul": (lambda a, b: a @ b, (spec(8, 32), spec(32, 16)), 2 * 8 * 32 * 16),
    "matmul in bfloat16": (lambda a, b: a @ b, (spec(8, 32, dtype=jnp.bfloat16), spec(32, 16, dtype=jnp.bfloat16)),
                           2 * 8 * 32 * 16),
    "matrix by vector": (lambda a, b: a @ b, (spec(8, 32), spec(32)), 2 * 8 * 32),
    "batched": (lambda a, b: a @ b, (spec(4, 8, 32), spec(4, 32, 16)), 2 * 4 * 8 * 32 * 16),
    "stored (out, in)": (lambda a, b: a @ b.T, (spec(8, 32), spec(16, 32)), 2 * 8 * 32 * 16),
    "two contracted dims": (lambda a, b: jnp.einsum("bthd,hde->bte", a, b), (spec(2, 3, 4, 8), spec(4, 8, 16)),
                            2 * 2 * 3 * 32 * 16),
    "attention": (lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), (spec(2, 6, 4, 8), spec(2, 7, 4, 8)),
                  2 * 2 * 4 * 6 * 7 * 8),
    "three factors": (lambda x, a, b: (x @ a) @ b, (spec(8, 32), spec(32, 4), spec(4, 16)), 2 * 8 * 4 * (32 + 16)),
    "matmul, both gradients": (grad(lambda a, b: a @ b), (spec(8, 32), spec(32, 16)), 3 * 2 * 8 * 32 * 16),
    "matmul, one gradient": (grad(lambda a, b: a @ b, 1), (spec(8, 32), spec(32, 16)), 2 * 2 * 8 * 32 * 16),
    "scan": (layers, (X, WS), L * LAYER),
    "scan, gradients": (grad(layers), (X, WS), 3 * L * LAYER),
    "scan, input gradient": (grad(layers, 0), (X, WS), 2 * L * LAYER),
    "scan, remat, gradients": (grad(layers_remat), (X, WS), 4 * L * LAYER),
    "scan of scans": (grid, (X, WSS), 3 * L * LAYER),
    "scan of scans, gradients": (grad(grid), (X, WSS), 3 * 3 * L * LAYER),
    "scan, partly unrolled": (lambda x, w: lax.scan(lambda c, wi: (jnp.tanh(c @ wi), None), x, w, unroll=2)[0],
                              (X, spec(6, D, D)), 6 * LAYER),
    "scan, reversed": (lambda x, w: lax.scan(lambda c, wi: (jnp.tanh(c @ wi), None), x, w, reverse=True)[0],
                       (X, WS), L * LAYER),
    "vmap of scan": (jax.vmap(layers, (0, None)), (spec(3, B, D), WS), 3 * L * LAYER),
    "unrolled, gradients": (grad(unrolled), (X, WS), 3 * L * LAYER),
    "fori_loop": (lambda x, w: lax.fori_loop(0, 7, lambda i, c: jnp.tanh(c @ w), x), (X, W), 7 * LAYER),
    "fori_loop from 2": (lambda x, w: lax.fori_loop(2, 7, lambda i, c: jnp.tanh(c @ w), x), (X, W), 5 * LAYER),
    "while_loop by threes": (
        lambda x, w: lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + 3, jnp.tanh(c[1] @ w)), (0, x))[1],
        (X, W), 4 * LAYER),
    "cond, the dearest branch": (lambda p, x, w: lax.cond(p, lambda: jnp.tanh(x @ w) @ w, lambda: x @ w),
                                 (spec(dtype=bool), X, W), 2 * LAYER),
    "switch": (lambda i, x, w: lax.switch(i, [lambda: x, lambda: x @ w, lambda: x + 1]),
               (spec(dtype=jnp.int32), X, W), LAYER),
    "cond in a scan": (lambda x, w: lax.scan(
        lambda c, wi: (lax.cond(jnp.sum(c) > 0, lambda: c @ wi, lambda: c), None), x, w)[0], (X, WS), L * LAYER),
    "top_k and sort": (lambda x, w: (lax.top_k(x @ w, 3), jnp.sort(x)), (X, W), LAYER),
    "random bits (a loop without products)": (
        lambda k, x, w: (x @ w) * jax.random.bernoulli(k, shape=(B, D)), (spec(2, dtype=jnp.uint32), X, W), LAYER),
}


@pytest.mark.parametrize("name", DOTS)
def test_dots_match_the_closed_form(name: str) -> None:
    f, args, expected = DOTS[name]
    assert count(f, *args) == Flops(dot=expected)


def conv(x: jax.Array, w: jax.Array, **settings: Any) -> jax.Array:
    layout = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}[x.ndim]
    settings = {"window_strides": (1,) * (x.ndim - 2), "padding": "VALID", **settings}
    return lax.conv_general_dilated(x, w, dimension_numbers=layout, **settings)


def reads(size: int, window: int, stride: int = 1, pad: int = 0, step: int = 1) -> int:
    """Return the pairs (output, window position) that read data, not padding, along one dim."""
    outputs = (size + 2 * pad - (window - 1) * step - 1) // stride + 1
    return sum(0 <= o * stride + k * step - pad < size for o in range(outputs) for k in range(window))


CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], int]] = {
    "1-D": ((2, 10, 4), (3, 4, 6), {}, 2 * 2 * 8 * 3 * 4 * 6),
    "2-D": ((2, 9, 8, 4), (3, 2, 4, 6), {}, 2 * 2 * (7 * 7) * (3 * 2) * 4 * 6),
    "strided": ((2, 9, 9, 4), (3, 3, 4, 6), {"window_strides": (2, 2)}, 2 * 2 * (4 * 4) * 9 * 4 * 6),
    "grouped": ((2, 9, 9, 4), (3, 3, 2, 6), {"feature_group_count": 2}, 2 * 2 * (7 * 7) * 9 * 2 * 6),
    "depthwise": ((2, 9, 9, 4), (3, 3, 1, 4), {"feature_group_count": 4}, 2 * 2 * (7 * 7) * 9 * 4),
    "grouped and strided": ((2, 9, 9, 4), (3, 3, 2, 6), {"feature_group_count": 2, "window_strides": (2, 2)},
                            2 * 2 * (4 * 4) * 9 * 2 * 6),
    "padded and strided": ((2, 9, 9, 4), (3, 3, 4, 6), {"padding": [(1, 1), (1, 1)], "window_strides": (2, 2)},
                           2 * 2 * reads(9, 3, 2, 1) ** 2 * 4 * 6),
    "dilated": ((2, 9, 9, 4), (3, 3, 4, 6), {"padding": [(2, 2), (2, 2)], "rhs_dilation": (2, 2)},
                2 * 2 * reads(9, 3, 1, 2, 2) ** 2 * 4 * 6),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions_match_the_closed_form(name: str) -> None:
    x, w, settings, expected = CONVS[name]
    assert count(lambda x, w: conv(x, w, **settings), spec(*x), spec(*w)) == Flops(conv=expected)


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_costs_the_same_forward_and_in_both_gradients(name: str) -> None:
    x, w, settings, expected = CONVS[name]
    gradients = grad(lambda x, w: conv(x, w, **settings))
    # XLA computes the kernel gradient of a depthwise convolution for all pairs of the 4 channels, then drops 3 of 4.
    times = 2 + 4 if name == "depthwise" else 3
    assert count(gradients, spec(*x), spec(*w)).total == times * expected


def test_a_window_of_one_is_a_dot() -> None:
    flops = count(conv, spec(2, 9, 9, 4), spec(1, 1, 4, 6))
    assert flops.total == 2 * 2 * 81 * 4 * 6


def test_ragged_dot_counts_what_is_executed() -> None:
    """On CPU a ragged product is one dense product over all groups."""
    flops = count(lax.ragged_dot, spec(12, 8), spec(3, 8, 6), spec(3, dtype=jnp.int32))
    assert flops.total in (2 * 12 * 8 * 6, 3 * 2 * 12 * 8 * 6)


def test_raw_cost_analysis_counts_a_scan_body_once() -> None:
    compiled = compile_for(layers, X, WS)
    assert compiled.cost_analysis()["flops"] < 1.1 * LAYER
    assert count(compiled).total == L * LAYER


def test_functions_lowered_and_compiled_programs_count_alike() -> None:
    lowered = jax.jit(layers).lower(X, WS)
    assert count(layers, X, WS) == count(jax.jit(layers), X, WS) == count(lowered) == count(lowered.compile())


@pytest.mark.parametrize("level", [0, 3])
def test_the_count_does_not_depend_on_the_backend_optimisation_level(level: int) -> None:
    """The suite compiles at level 0, which changes how loops become machine code and not the HLO."""
    lowered = jax.jit(grad(layers_remat)).lower(X, WS)
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": level})
    assert count(compiled).total == 4 * L * LAYER


def test_a_sharded_program_counts_per_device() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (jax.NamedSharding(mesh, jax.P(*names)) for names in (("data",), ()))
    x = jax.ShapeDtypeStruct((64, D), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((L, D, D), jnp.float32, sharding=everywhere)
    assert count(layers, x, w).total == L * 2 * (64 // 8) * D * D
    assert count(jax.pmap(layers, in_axes=(0, None)), spec(8, B, D), WS).total == L * LAYER


def test_data_dependent_trips_raise_unless_given() -> None:
    def f(n: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.fori_loop(0, n, lambda i, c: jnp.tanh(c @ w), x)

    args = spec(dtype=jnp.int32), X, W
    with pytest.raises(UncountedError, match="trips=N"):
        count(f, *args)
    assert count(f, *args, trips=11).total == 11 * LAYER


def test_a_condition_runs_once_more_than_its_body() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.while_loop(lambda c: (c[0] < 4) & (jnp.sum(c[1] @ w) < 9), lambda c: (c[0] + 1, c[1] + 1), (0, x))[1]

    with pytest.raises(UncountedError, match="trips=N"):
        count(f, X, W)
    assert count(f, X, W, trips=4).total == 5 * LAYER


@pytest.mark.parametrize("name", [name for name in DOTS if re.search(r"^(scan|fori|while)", name)])
def test_trips_are_derived_where_the_compiler_does_not_say_them(name: str) -> None:
    f, args, expected = DOTS[name]
    text, known = re.subn(r'"known_trip_count":\{"n":"\d+"\}', '"nothing":{}', compile_for(f, *args).as_text())
    assert known
    assert count_text(text).total == expected


def test_custom_calls_raise_unless_ignored() -> None:
    def f(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.linalg.solve(a, b) @ b

    args = spec(8, 8), spec(8, 8)
    with pytest.raises(UncountedError, match="lapack_"):
        count(f, *args)
    assert count(f, *args, ignore=("lapack_",)).total == 2 * 8**3


HEADER = "HloModule m\n\n"
OPERANDS = "  %a = f32[8,32]{1,0} parameter(0)\n  %b = f32[32,16]{1,0} parameter(1)\n"


def module(*lines: str) -> str:
    body = "".join(f"  {line}\n" for line in lines)
    return f"{HEADER}ENTRY %main (a: f32[8,32], b: f32[32,16]) -> f32[8,16] {{\n{OPERANDS}{body}}}\n"


def test_other_ways_to_print_an_operand() -> None:
    tail = 'lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="calls=%none, lhs_batch_dims={0}"}'
    for operands in ("%a, %b", "f32[8,32]{1,0} %a, f32[32,16]{1,0} %b", "a, b"):
        assert count_text(module(f"ROOT %dot = f32[8,16]{{1,0}} dot({operands}), {tail}")).dot == 2 * 8 * 32 * 16
    tuple_of = "(f32[8,16]{1,0:T(8,128)}, /*index=1*/(s8[4]{0}, u32[]))"
    assert count_text(module(f"ROOT %t = {tuple_of} tuple(%a, %b)")) == Flops()


@pytest.mark.parametrize("line", [
    'ROOT %c = f32[8,16]{1,0} custom-call(%a, %b), custom_call_target="__onednn$matmul", backend_config={"x":"y"}',
    'ROOT %c = (f32[8,16]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"',
    "ROOT %c = f32[8,16]{1,0} ragged-dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    "ROOT %c = f32[8,16]{1,0} cholesky(%a), lower=true",
    "ROOT %c f32[8,16]{1,0} nonsense",
])
def test_nothing_is_skipped_in_silence(line: str) -> None:
    with pytest.raises(UncountedError):
        count_text(module(line))


def test_text_that_is_no_module_raises() -> None:
    with pytest.raises(UncountedError, match="ENTRY"):
        count_text("module @jit_f { func.func public @main() }")


def test_temp_bytes_see_what_a_scan_keeps_for_its_gradient() -> None:
    args = spec(256, D), WS
    kept, again = (temp_bytes(grad(f), *args) for f in (layers, layers_remat))
    assert kept >= L * 256 * D * 4
    assert again >= L * 256 * D * 4
    assert temp_bytes(layers, *args) < kept


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_convolutions_agree_with_the_compiler(seed: int) -> None:
    """Without a loop XLA's own figure is right, once the other operations are out of the way."""
    rng = np.random.default_rng(seed)
    for _ in range(60):
        groups, size, window = (int(n) for n in rng.integers((1, 5, 2), (4, 10, 5)))
        settings = {
            "window_strides": tuple(int(n) for n in rng.integers(1, 3, 2)),
            "padding": [tuple(int(n) for n in rng.integers(0, 3, 2)) for _ in range(2)],
            "lhs_dilation": tuple(int(n) for n in rng.integers(1, 3, 2)),
            "feature_group_count": groups,
        }
        x, w = spec(2, size, size + 1, 2 * groups), spec(window, window, 2, 2 * groups)
        compiled = compile_for(lambda x, w, s=settings: conv(x, w, **s), x, w)
        assert count(compiled).total == compiled.cost_analysis()["flops"]
