"""Where what training needs lies on a mesh: batches, and the optimiser's state beside its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jpeft.core.sharding import ROWS, put
from jpeft.errors import ShardingError


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """Return where a batch goes: rows over the axes "data" and "fsdp" of the mesh, tokens over "sequence".

    Args:
        batch: a pytree of arrays or `jax.ShapeDtypeStruct` `[B, ...]` or `[B, T, ...]`.
        mesh: it may lack any of these axes; what no axis divides is on every device.

    Returns:
        A `NamedSharding` for each array, for `jax.device_put` and `in_shardings`.

    Raises:
        ShardingError: the axes do not divide the rows, or the tokens.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
        >>> tuple(batch_shardings({"tokens": jnp.ones((4, 8))}, mesh)["tokens"].spec)
        ('fsdp',)
    """
    rows = tuple(axis for axis in ROWS if axis in mesh.shape)
    over = (rows[0] if len(rows) == 1 else rows or None, "sequence" if "sequence" in mesh.shape else None)

    def one(x: Any) -> NamedSharding:
        spec: list[Any] = []
        for what, size, axes in zip(("rows", "tokens"), x.shape, over, strict=False):
            names = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh.shape[axis] for axis in names)
            if size % parts:
                raise ShardingError(f"a batch has {size} {what}, which {', '.join(names)} of {parts} devices do not "
                                    f"divide; make it {-(-size // parts) * parts} {what}")
            spec.append(axes)
        while spec and spec[-1] is None:
            spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, batch)


def made_mesh(axes: Mapping[str, int]) -> Mesh:
    """Return a mesh over the first devices, with axes of type Auto.

    Args:
        axes: the size of each axis, by name.

    Raises:
        ShardingError: there are fewer devices, or another process would have none of them.

    Example:
        >>> dict(made_mesh({"fsdp": 1}).shape)
        {'fsdp': 1}
    """
    count, devices = math.prod(axes.values()), jax.devices()
    if count > len(devices):
        raise ShardingError(f"the mesh {dict(axes)} has {count} devices, JAX has {len(devices)}; make it smaller, or "
                            f"simulate them: set XLA_FLAGS=--xla_force_host_platform_device_count={count} before JAX "
                            "starts")
    if count < len(devices) and jax.process_count() > 1:
        raise ShardingError(f"the mesh {dict(axes)} has {count} devices, the {jax.process_count()} processes have "
                            f"{len(devices)}; divide over all of them")
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=devices[:count])


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Put a batch that lies on the host where `batch_shardings` says; arrays that lie on a device are left there.

    Where several processes train, each has the same batch and puts only the rows and tokens of its own devices.

    Raises:
        ShardingError: the axes do not divide the rows, or the tokens.
    """
    where = batch_shardings(batch, mesh)
    return jax.tree.map(lambda x, at: x if isinstance(x, jax.Array) else put(np.asarray(x), at), batch, where)


def device_bytes(tree: Any) -> int:
    """Return the bytes of the part of each leaf that the fullest device holds; leaves may be shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def like_parameters(tx: optax.GradientTransformation, shapes: Any, shardings: Any) -> Any:
    """Return where the optimiser's state goes: each slot with its parameter, what is no slot on every device.

    A slot is a leaf of the state whose path ends in the path of a parameter and whose shape is that of the parameter.

    Args:
        tx: the optimiser.
        shapes: the parameters, arrays or `jax.ShapeDtypeStruct`.
        shardings: their shardings, in the same structure.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jax.sharding import NamedSharding, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("fsdp",))
        >>> where = like_parameters(optax.adam(0.1), {"w": jnp.ones(4)}, {"w": NamedSharding(mesh, P("fsdp"))})
        >>> tuple(where[0].mu["w"].spec), tuple(where[0].count.spec)
        (('fsdp',), ())
    """
    keyed, _ = jax.tree_util.tree_flatten_with_path(shapes)
    places = jax.tree.leaves(shardings)
    of = {tuple(map(str, keys)): (tuple(leaf.shape), place)
          for (keys, leaf), place in zip(keyed, places, strict=True)}
    rest = replicated(places)
    depths = sorted({len(keys) for keys in of}, reverse=True)

    def one(keys: Any, leaf: Any) -> Sharding:
        names = tuple(map(str, keys))
        ends = (names[len(names) - depth:] for depth in depths)
        found = next((of[end] for end in ends if end in of), None)
        return found[1] if found is not None and found[0] == tuple(leaf.shape) else rest

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(tx.init, shapes))


def replicated(places: Any) -> Sharding:
    """Return the sharding of what is whole on all devices of some shardings."""
    leaves = jax.tree.leaves(places)
    mesh = next((one.mesh for one in leaves if isinstance(one, NamedSharding)), None)
    return leaves[0] if mesh is None else NamedSharding(mesh, PartitionSpec())
