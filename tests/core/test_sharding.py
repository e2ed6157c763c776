"""Where adapters lie on a mesh, derived from their leaves: what is divided how, what is not, and who says so."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import D, F, H, K, L
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.errors import ShardingError
from jpeft.models.sharding import base_shardings, role_axes

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
MESH = jax.make_mesh((2, 4), ("fsdp", "tensor"), (AxisType.Auto,) * 2) if jax.device_count() >= 8 else None
EXPERTS = 4


def experts(p: Any, x: jax.Array) -> jax.Array:
    def body(h: jax.Array, w: Any) -> tuple[jax.Array, None]:
        each = jnp.einsum("ebd,edf->ebf", jnp.stack([h] * EXPERTS), w["up"])
        return h + jnp.einsum("ebf,efd->ebd", each, w["down"]).sum(0), None

    return jax.lax.scan(body, x @ p["q"].reshape(D, -1), p["moe"])[0] @ p["o"]


SHAPES = {"q": (D, H, D // H), "moe": {"up": (L, EXPERTS, D, F), "down": (L, EXPERTS, F, D)}, "o": (D, 6)}
PARAMS = {k: jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), v, is_leaf=lambda v: isinstance(v, tuple))
          for k, v in SHAPES.items()}
X = jax.ShapeDtypeStruct((3, D), jnp.float32)


def planned(rules: Any = None) -> jpeft.Plan:
    return jpeft.plan(experts, PARAMS, (X,), rules or {"all-linear": jpeft.LoRA(rank=2)})


def specs(theta: Any) -> dict[str, tuple[Any, ...]]:
    return {f"{path}:{letter}": tuple(one.spec) for path, letters in theta.items() for letter, one in letters.items()}


def tree(**found: P) -> Any:
    full = {"q": P(), "up": P(), "down": P(), "o": P()} | found
    put = {k: NamedSharding(MESH, v) for k, v in full.items()}
    return {"q": put["q"], "moe": {"up": put["up"], "down": put["down"]}, "o": put["o"]}


def test_an_axis_of_theta_is_divided_as_the_dim_it_follows() -> None:
    base = tree(q=P("fsdp", None, "tensor"), up=P(None, "fsdp", None, "tensor"), down=P(None, "fsdp", "tensor"),
                o=P(("fsdp", "tensor")))
    trainable, frozen = jpeft.shardings(planned(), base, replicate_below=0)
    assert specs(trainable) == {
        "q:a": ("fsdp", None), "q:b": (None, None, "tensor"),
        "moe/up:a": (None, "fsdp", None, None), "moe/up:b": (None, "fsdp", None, "tensor"),
        "moe/down:a": (None, "fsdp", "tensor", None), "moe/down:b": (None, "fsdp", None, None),
        "o:a": (("fsdp", "tensor"), None), "o:b": (None, None)}
    assert {one.spec for letters in frozen.theta.values() for one in letters.values()} == {P()}
    assert frozen.base == base
    assert all(one.mesh == MESH for one in jax.tree.leaves(trainable))


def test_small_entries_are_whole_by_choice_and_said() -> None:
    plan, base = planned(), tree(up=P(None, None, "fsdp", "tensor"))
    for below, whole in ((0, False), (L * EXPERTS * F * 2 * 4, False), (L * EXPERTS * F * 2 * 4 + 1, True)):
        pair = jpeft.shardings(plan, base, replicate_below=below)
        assert (pair[0]["moe/up"]["b"].spec == P()) == whole
        row = next(r for r in jpeft.explain(plan, shardings=pair).rows if r.path == "moe/up")
        assert ("b whole by choice (2,048 bytes)" if whole else "b [-, -, -, tensor]") in row.placement
    assert "a whole by choice (1,024 bytes)" in str(jpeft.explain(plan, shardings=jpeft.shardings(plan, base)))
    assert jpeft.explain(plan).rows[0].placement == ""


def test_arrays_are_born_where_they_belong() -> None:
    plan = planned()
    base = base_shardings(PARAMS, MESH, plan=plan)
    params = jax.jit(lambda: jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), PARAMS), out_shardings=base)()
    pair = jpeft.shardings(plan, params, replicate_below=0)
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0), shardings=pair)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, one: x.sharding == one, trainable, pair[0])))
    assert frozen.base is params
    alone, _ = jpeft.init(plan, jax.device_get(params), jax.random.key(0))
    derived, _ = jpeft.init(plan, params, jax.random.key(0))
    assert {x.sharding.spec for x in jax.tree.leaves(derived)} == {P()}, "small ones are whole"
    for x, y, z in zip(*map(jax.tree.leaves, (trainable, derived, alone)), strict=True):
        assert jnp.array_equal(jax.device_get(x), jax.device_get(z))
        assert jnp.array_equal(jax.device_get(y), jax.device_get(z))


def test_roles_divide_the_model_that_the_tables_do_not_know() -> None:
    plan = planned()
    found = base_shardings(PARAMS, MESH, plan=plan)
    assert role_axes(plan.sites[0]) == ("layers", "experts", "mlp", "embed")
    assert {k: tuple(v.spec) for k, v in found["moe"].items()} == {
        "up": (None, None, "fsdp", "tensor"), "down": (None, None, "tensor", "fsdp")}
    assert tuple(found["q"].spec) == ("fsdp", None, "tensor"), "4 does not divide 2 heads, but what is in them"
    assert tuple(found["o"].spec) == ("tensor", "fsdp")
    ruled = base_shardings(PARAMS, MESH, {"moe/.*": P(None, "tensor")}, plan=plan)
    assert tuple(ruled["moe"]["up"].spec) == (None, "tensor")
    assert tuple(base_shardings(PARAMS, MESH)["o"].spec) == ()
    both = base_shardings(PARAMS, MESH, plan=plan, mesh_axes={"embed": ("fsdp", "tensor")})
    assert tuple(both["moe"]["up"].spec) == (None, None, ("fsdp", "tensor"))


@pytest.mark.parametrize(("change", "text"), [
    ({"o": P(None, "tensor")}, "divides dim 1 of 'o', of size 6, by 4 .tensor., which leaves a rest.*pad the dim to 8"),
    ({"o": P(None, None, "fsdp")}, "for 'o', which has 2 dims .16, 6.; give one entry for each dim"),
])
def test_shardings_that_do_not_fit_the_leaf(change: Any, text: str) -> None:
    with pytest.raises(ShardingError, match=text):
        jpeft.shardings(planned(), tree(**change))


def test_what_is_no_sharding() -> None:
    plan = planned()
    with pytest.raises(ShardingError, match="say on which mesh: NamedSharding"):
        jpeft.shardings(plan, {**tree(), "o": P()})
    with pytest.raises(ShardingError, match=r"lacks \['o'\].*in their structure"):
        jpeft.shardings(plan, {k: v for k, v in tree().items() if k != "o"})
    with pytest.raises(ShardingError, match="has a NoneType for"):
        jpeft.shardings(plan, PARAMS)
    with pytest.raises(ShardingError, match="replicate_below = -1"):
        jpeft.shardings(plan, tree(), replicate_below=-1)
    with pytest.raises(ShardingError, match="pass what jpeft"):
        jpeft.explain(plan, shardings=tree())
    other = planned({"o": jpeft.LoRA(rank=2)})
    with pytest.raises(ShardingError, match="other entries in trainable than the plan"):
        jpeft.explain(plan, shardings=jpeft.shardings(other, tree()))
    with pytest.raises(ShardingError, match="pass the params that the plan was made for"):
        base_shardings({"o": PARAMS["o"]}, MESH, plan=plan)


def test_axes_that_do_not_fit_theta_are_an_error() -> None:
    class Crooked(jpeft.LoRA):
        def axes(self, site: jpeft.Site) -> dict[str, tuple[int | None, ...]]:
            return {**super().axes(site), "a": (1, None)}

    class Short(jpeft.LoRA):
        def axes(self, site: jpeft.Site) -> dict[str, tuple[int | None, ...]]:
            return {**super().axes(site), "a": (0,)}

    try:
        for method, text in ((Crooked(rank=2), "of size 16 follows dim 1 of 'o', of size 6; write None"),
                             (Short(rank=2), r"Short.axes says \(0,\) for 'a' on 'o', whose shape is \(16, 2\)")):
            with pytest.raises(ShardingError, match=text):
                jpeft.shardings(planned({"o": method}), tree())
    finally:
        jpeft.Method.registry.pop("Crooked"), jpeft.Method.registry.pop("Short")


def test_a_leaf_on_one_device_has_its_adapter_there() -> None:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    trainable, _ = jpeft.shardings(planned(), jax.tree.map(lambda _: one, PARAMS))
    assert set(jax.tree.leaves(trainable)) == {one}
    assert K * H == D
