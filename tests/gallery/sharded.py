"""Plain JAX on four of the simulated devices: shard_map at its default checks, Auto and Explicit meshes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gallery.case import BOTH, D, Dims, Made, T, data, table, weights

CASES, case = table("sharded")
WIDE = 16
IN_OUT = {"up": Dims((0,), (1,)), "down": Dims((0,), (1,))}


def mesh(kind: AxisType = AxisType.Auto, shape: tuple[int, ...] = (4,), names: tuple[str, ...] = ("m",)) -> Mesh:
    return Mesh(np.array(jax.devices()[:4]).reshape(shape), names, axis_types=(kind,) * len(names))


def placed(mesh: Mesh, tree: Any, specs: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)


def mlp_weights(dtype: Any) -> dict[str, jax.Array]:
    return weights(dtype, up=(D, WIDE), down=(WIDE, D))


COLUMN_ROW = {"up": P(None, "m"), "down": P("m", None)}


@case(2, expect=IN_OUT, dtypes=BOTH)
def tensor_parallel_psum(dtype: Any) -> Made:
    """Column-parallel, then row-parallel with psum."""

    def local(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.psum(jax.nn.gelu(x @ p["up"]) @ p["down"], "m")

    return (
        jax.shard_map(local, mesh=mesh(), in_specs=(COLUMN_ROW, P()), out_specs=P()),
        mlp_weights(dtype),
        (data(dtype),),
    )


@case(2, expect=IN_OUT)
def tensor_parallel_placed(dtype: Any) -> Made:
    """The same with parameters that already lie sharded."""
    apply, params, args = tensor_parallel_psum(dtype)
    return apply, placed(mesh(), params, COLUMN_ROW), placed(mesh(), args, (P(),))


@case(2, expect=IN_OUT)
def data_parallel(dtype: Any) -> Made:
    """Replicated weights meet sharded activations: pvary."""

    def local(p: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = jax.nn.gelu(x @ p["up"]) @ p["down"]
        return y, jax.lax.pmean(y.sum(), "m")

    apply = jax.shard_map(local, mesh=mesh(), in_specs=(P(), P("m")), out_specs=(P("m"), P()))
    return apply, mlp_weights(dtype), (data(dtype, 4, T, D),)


@case(2, expect=IN_OUT)
def fully_sharded_gather(dtype: Any) -> Made:
    """Weights sharded over the data axis, gathered before use (one along inputs, one along outputs)."""

    def local(p: Any, x: jax.Array) -> jax.Array:
        up = jax.lax.all_gather(p["up"], "m", axis=0, tiled=True)
        down = jax.lax.all_gather(p["down"], "m", axis=1, tiled=True)
        return jax.nn.gelu(x @ up) @ down

    specs = {"up": P("m", None), "down": P(None, "m")}
    return (
        jax.shard_map(local, mesh=mesh(), in_specs=(specs, P("m")), out_specs=P("m")),
        mlp_weights(dtype),
        (data(dtype, 4, T, D),),
    )


@case(1, expect={"w": Dims((1,), (2,), (0,))})
def scanned_tensor_parallel(dtype: Any) -> Made:
    def local(p: Any, x: jax.Array) -> jax.Array:
        def body(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            mine = jax.lax.dynamic_slice_in_dim(h, 2 * jax.lax.axis_index("m"), 2, axis=-1)
            return jnp.tanh(jax.lax.psum(mine @ w, "m")), None

        return jax.lax.scan(jax.checkpoint(body), x, p["w"])[0]

    apply = jax.shard_map(local, mesh=mesh(), in_specs=({"w": P(None, "m")}, P()), out_specs=P())
    return apply, weights(dtype, w=(3, D, D)), (data(dtype),)


@case(1, expect={"w": Dims((1,), (2,), (0,))})
def expert_parallel(dtype: Any) -> Made:
    def local(p: Any, x: jax.Array) -> jax.Array:
        spread = jnp.stack([x, jnp.sin(x)])
        return jax.lax.psum(jnp.einsum("ebtd,edf->ebtf", spread, p["w"]).sum(0) * (1 + jax.lax.axis_index("m")), "m")

    apply = jax.shard_map(local, mesh=mesh(), in_specs=({"w": P("m")}, P()), out_specs=P())
    return apply, weights(dtype, w=(8, D, WIDE)), (data(dtype),)


@case(2, expect=IN_OUT)
def constrained(dtype: Any) -> Made:
    """Sharding constraints on the weights themselves, under an Auto mesh, inside a jit with shardings."""
    auto = mesh()

    def body(p: Any, x: jax.Array) -> jax.Array:
        p = {k: jax.lax.with_sharding_constraint(w, NamedSharding(auto, COLUMN_ROW[k])) for k, w in p.items()}
        return jax.nn.gelu(x @ p["up"]) @ p["down"]

    inner = jax.jit(body, out_shardings=NamedSharding(auto, P()))
    return inner, mlp_weights(dtype), (data(dtype),)


def explicit_mesh() -> Any:
    return jax.set_mesh(mesh(AxisType.Explicit))


@case(2, expect=IN_OUT, context=explicit_mesh)
def explicit_column_row(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        h = jax.nn.gelu(x @ p["up"])
        return jnp.einsum("btf,fd->btd", h, p["down"], out_sharding=P(None, None, None))

    params = placed(mesh(AxisType.Explicit), mlp_weights(dtype), COLUMN_ROW)
    return apply, params, placed(mesh(AxisType.Explicit), (data(dtype),), (P(),))


@case(2, expect=IN_OUT, context=explicit_mesh)
def explicit_batch(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x @ p["up"]) @ p["down"]

    specs = {"up": P(), "down": P()}
    explicit = mesh(AxisType.Explicit)
    return apply, placed(explicit, mlp_weights(dtype), specs), placed(explicit, (data(dtype, 4, T, D),), (P("m"),))


@case(1, expect={"w": Dims((1,), (2,), (0,))}, context=explicit_mesh)
def explicit_scanned(dtype: Any) -> Made:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        def body(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            y = jnp.einsum("btd,df->btf", h, w)
            return jax.sharding.reshard(jnp.tanh(y), P(None, None, None)), None

        return jax.lax.scan(body, x, p["w"])[0]

    explicit = mesh(AxisType.Explicit)
    params = placed(explicit, weights(dtype, w=(3, D, D)), {"w": P(None, None, "m")})
    return apply, params, placed(explicit, (data(dtype),), (P(),))
