"""Bytes between devices and through memory, against programs whose traffic is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jpeft.errors import EstimateError, UncountedError
from jpeft.train import hlo, traffic
from jpeft.train.chips import CHIPS, bound, chip
from jpeft.train.traffic import Moved

N = 8
D = 64


def mesh(**axes: int) -> Mesh:
    count = math.prod(axes.values())
    return Mesh(np.array(jax.devices()[:count]).reshape(*axes.values()), tuple(axes),
                axis_types=(AxisType.Auto,) * len(axes))


def module(fn: Callable[..., Any], on: Mesh, *specs: P, out: P | None = None) -> hlo.Module:
    args = [jax.ShapeDtypeStruct((D, D), jnp.float32, sharding=NamedSharding(on, spec)) for spec in specs]
    jitted = jax.jit(fn) if out is None else jax.jit(fn, out_shardings=NamedSharding(on, out))
    return hlo.parse(jitted.lower(*args).compile().as_text())


def test_a_gather_sends_all_but_the_own_part() -> None:
    found = traffic.collectives(module(lambda x: x, mesh(x=N), P("x"), out=P()), N)
    assert found == [Moved("all-gather", N, 1, 4 * D * D * (N - 1) // N)]


def test_a_reduction_sends_twice_that() -> None:
    found = traffic.collectives(module(lambda a, b: a @ b, mesh(x=N), P(None, "x"), P("x"), out=P()), N)
    assert found == [Moved("all-reduce", N, 1, 2 * 4 * D * D * (N - 1) // N)]


def test_a_reduction_of_which_each_takes_its_slice_is_a_scatter() -> None:
    found = traffic.collectives(module(lambda a, b: a @ b, mesh(x=N), P(None, "x"), P("x"), out=P("x")), N)
    assert [(one.kind, one.sent) for one in found] == [("reduce-scatter", 4 * D * D * (N - 1) // N)]


def test_loops_and_groups_count() -> None:
    on = mesh(x=4, y=2)
    whole = NamedSharding(on, P())

    def fn(x: jax.Array) -> jax.Array:
        def body(carry: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return jnp.tanh(lax.with_sharding_constraint(carry, whole) @ x), None
        return lax.scan(body, x, None, length=3)[0]

    found = traffic.collectives(module(fn, on, P("x"), out=P("x")), N)
    assert {(one.kind, one.group) for one in found} == {("all-gather", 4)}
    assert sum(one.calls for one in found) in (3, 4)  # the first may be shared with the gather of x


def test_a_sum_that_a_loop_adds_up_comes_once() -> None:
    on = mesh(x=N)
    whole, rows = NamedSharding(on, P()), NamedSharding(on, P(None, "x"))

    def fn(x: jax.Array) -> jax.Array:
        parts = jnp.stack([lax.with_sharding_constraint(x * i, rows) for i in range(1, 6)])

        def body(carry: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
            one = lax.with_sharding_constraint(part, rows)
            return carry + lax.with_sharding_constraint(one @ one.T, whole), None
        return lax.scan(body, jnp.zeros_like(x), parts)[0]

    found = traffic.collectives(module(fn, on, P(None, "x"), out=P()), N)
    assert ("all-reduce", 1, 2 * 4 * D * D * (N - 1) // N) in [(one.kind, one.calls, one.sent) for one in found]


@pytest.mark.parametrize(("groups", "size"), [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4), ("replica_groups=[2,4]<=[8]", 4), ("replica_groups={}", 8),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4), ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
    ("replica_groups=mesh['a'=8] {'a':(1)2}", 2)])
def test_groups_in_every_notation(groups: str, size: int) -> None:
    text = f"ENTRY %main (p: f32[8]) -> f32[64] {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT %g = f32[64]{{0}} " \
           f"all-gather(%p), channel_id=1, {groups}, dimensions={{0}}\n}}\n"
    assert [one.group for one in traffic.collectives(hlo.parse(text), 8)] == [size]


def test_what_cannot_be_counted_is_an_error() -> None:
    text = "ENTRY %main (p: f32[8]) -> f32[64] {\n  %p = f32[8]{0} parameter(0)\n  ROOT %g = f32[64]{0} " \
           "all-gather-start(%p), replica_groups={}, dimensions={0}\n}\n"
    with pytest.raises(UncountedError, match="asynchronous"):
        traffic.collectives(hlo.parse(text), 8)
    with pytest.raises(UncountedError, match="'q7'"):
        traffic.size("q7[2]")


def test_products_read_operands_and_write_results() -> None:
    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)[0]

    assert traffic.product_bytes(module(fn, mesh(x=1), P(), P())) == 5 * 3 * 4 * D * D


def test_the_slowest_part_bounds_a_step() -> None:
    h100 = chip("h100")
    assert h100 is CHIPS["H100"]
    assert bound(h100, h100.flops, 0, []).seconds == 1.0
    assert bound(h100, 0, h100.bandwidth, []) == (0.0, 1.0, 0.0)
    inside, outside = Moved("all-gather", 8, 1, 450 * 10**9), Moved("all-gather", 64, 1, 400 * 10**9)
    assert bound(h100, 0, 0, [inside]).links == 1.0
    assert bound(h100, 0, 0, [outside]).links == 1.0
    assert bound(h100, 0, 0, [inside]).limit == "links"
    assert bound(h100, 1e12, 0, [], full=2.0).compute == 2e12 / h100.flops


def test_an_unknown_chip_names_the_nearest() -> None:
    with pytest.raises(EstimateError, match=r"'H10O' is none of H100, .* \(nearest: 'H100'\)"):
        chip("H10O")
