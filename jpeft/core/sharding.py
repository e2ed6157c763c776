"""Where adapters lie on a mesh: as the leaves that they ride on, dim by dim, through `Method.axes`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jpeft.core.frozen import Frozen
from jpeft.core.paths import flatten
from jpeft.core.plan import Entry, Plan
from jpeft.core.site import Site
from jpeft.errors import ShardingError

SMALL = 2**20
"""Entries of theta of fewer bytes than these are whole on every device, unless `shardings` is told otherwise."""

ROWS = ("data", "fsdp")
"""Mesh axes that divide the rows of a batch."""

ThetaShardings = dict[str, dict[str, Sharding]]


def shardings(plan: Plan, base_shardings: Any, *, replicate_below: int = SMALL) -> tuple[ThetaShardings, Frozen]:
    """Derive where an adapter lies from where its base lies.

    An axis of theta that follows a dim of its leaf (`Method.axes`) is divided as that dim is; ranks, bottlenecks and
    virtual tokens are not. Of a LoRA on `W [in, out]` with `P("fsdp", "tensor")`, `a [in, r]` gets `P("fsdp", None)`
    and `b [r, out]` `P(None, "tensor")`; with stacked layers, heads and experts in front or between, likewise.

    Args:
        plan: which method rides on which leaf.
        base_shardings: of the structure of the params: for each leaf its `NamedSharding`, or an array (or
            `jax.ShapeDtypeStruct`) that has one. A leaf on one device has its adapter there.
        replicate_below: entries of fewer bytes are whole on every device: a small array costs more to fetch than to
            hold. 0: none is. `jpeft.explain(plan, shardings=...)` says which.

    Returns:
        `(trainable, frozen)`, of the structures that `jpeft.init` returns, with a sharding for each leaf: for
        `jpeft.init(..., shardings=...)`, and for `in_shardings` and `out_shardings` of `jax.jit`.

    Raises:
        ShardingError: a leaf has no sharding or one that does not fit its shape, or a method's axes do not fit theta.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> from jax.sharding import NamedSharding, PartitionSpec as P
        >>> params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
        >>> plan = jpeft.plan(lambda p, x: x @ p["w"], params, (x,), {"w": jpeft.LoRA(rank=2)})
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
        >>> base = {"w": NamedSharding(mesh, P("fsdp", "tensor"))}
        >>> trainable, frozen = jpeft.shardings(plan, base, replicate_below=0)
        >>> tuple(trainable["w"]["a"].spec), tuple(trainable["w"]["b"].spec)
        (('fsdp', None), (None, 'tensor'))
    """
    if isinstance(replicate_below, bool) or not isinstance(replicate_below, int) or replicate_below < 0:
        raise ShardingError(f"replicate_below = {replicate_below!r} must be a number of bytes, 0 or more")
    base, by_path = _of_base(plan, base_shardings)
    trainable: ThetaShardings = {}
    theta: Any = {}
    for entry in plan.entries:
        axes, where = entry.method.axes(entry.site), by_path[entry.path]
        parts = [{letter: _placed(entry, letter, struct, axes, where, replicate_below)
                  for letter, struct in shapes.items()} for shapes in entry.shapes()]
        trainable[entry.path] = parts[0]
        theta |= {entry.path: parts[1]} if parts[1] else {}
    return trainable, Frozen(base, theta)


def divide_rows(x: jax.Array) -> jax.Array:
    """Keep the rows of an activation `[B, ...]` divided over the axes "data" and "fsdp" of the mesh that is set.

    Where an axis divides both rows and weights ("fsdp"), the compiler may choose to gather the rows; a model that says
    this of its residual stream, once in each layer, has its weights gathered instead, layer by layer. The models of
    jpeft do. It changes no value, and does nothing outside `with jax.set_mesh(mesh)`, outside `jax.jit`, and for axes
    that do not divide B or are of type Explicit or Manual.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> with jax.set_mesh(jax.make_mesh((1,), ("fsdp",), (jax.sharding.AxisType.Auto,))):
        ...     print(jax.jit(divide_rows)(jnp.ones((2, 3))).shape)
        (2, 3)
    """
    sizes, axes = _set_axes(x), ()
    for axis in (a for a in ROWS if a in sizes):
        if x.shape[0] % math.prod(sizes[a] for a in (*axes, axis)) == 0:
            axes = (*axes, axis)
    return _first_dim(x, axes) if axes else x


def whole_inputs(kernel: jax.Array) -> jax.Array:
    """Keep a head `[D, V]` whole along D on the mesh that is set, where "fsdp" divides it.

    A loss that takes the tokens in chunks would otherwise fetch it for every chunk. Like `divide_rows`, it changes no
    value.

    Example:
        >>> import jax.numpy as jnp
        >>> whole_inputs(jnp.ones((2, 3))).shape
        (2, 3)
    """
    return _first_dim(kernel, None) if "fsdp" in _set_axes(kernel) else kernel


def _set_axes(x: jax.Array) -> dict[str, int]:
    """Return the sizes of the axes of type Auto of the mesh that is set, inside `jax.jit`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not isinstance(x, jax.core.Tracer) or not x.ndim:
        return {}
    return {axis: mesh.shape[axis] for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind is AxisType.Auto}


def _first_dim(x: jax.Array, axes: tuple[str, ...] | None) -> jax.Array:
    spec = PartitionSpec(axes, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)


def described(plan: Plan, given: tuple[Any, Any]) -> dict[str, str]:
    """Say, for each adapted leaf, how it and each entry of its theta are divided.

    Args:
        plan: the plan.
        given: what `shardings` returned.

    Raises:
        ShardingError: it is something else.
    """
    trainable, frozen = parts(plan, given)
    theta = {e.path: {**trainable[e.path], **frozen.theta.get(e.path, {})} for e in plan.entries}
    whole, said = shardings(plan, frozen.base, replicate_below=0), {}
    for entry in plan.entries:
        follow = {**whole[0][entry.path], **whole[1].theta.get(entry.path, {})}
        shapes = {letter: struct for part in entry.shapes() for letter, struct in part.items()}
        words = [f"base {_shown(_of_base(plan, frozen.base)[1][entry.path], len(entry.site.shape))}"]
        for letter, one in theta[entry.path].items():
            text = _shown(one, len(shapes[letter].shape))
            chosen = text == "whole" != _shown(follow[letter], len(shapes[letter].shape))
            words.append(f"{letter} {text}" + (f" by choice ({_bytes(shapes[letter]):,} bytes)" if chosen else ""))
        said[entry.path] = ", ".join(words)
    return said


def parts(plan: Plan, given: Any) -> tuple[ThetaShardings, Frozen]:
    """Return what `shardings` returned, checked to be of this plan.

    Raises:
        ShardingError: it is something else.
    """
    wanted = plan.theta_shapes()
    remedy = "pass what jpeft.shardings(plan, base_shardings) returned for this plan"
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Frozen)):
        raise ShardingError(f"shardings is a {type(given).__name__}, not (trainable, frozen); {remedy}")
    trainable, frozen = given
    for what, have, want in zip(("trainable", "frozen.theta"), (trainable, frozen.theta), wanted, strict=True):
        if _keys(have) != _keys(want):
            raise ShardingError(f"shardings has other entries in {what} than the plan: {_keys(have) ^ _keys(want)}; "
                                f"{remedy}")
    return trainable, frozen


def of_arrays(plan: Plan, names: Sequence[str], leaves: Sequence[Any]) -> tuple[ThetaShardings, Frozen] | None:
    """Derive where an adapter lies from arrays that lie on a mesh; None where they do not, or are not arrays yet."""
    if any(isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array) for leaf in leaves):
        return None
    mesh = mesh_of(leaves)
    if mesh is None:
        return None
    found = {name: leaf.sharding if isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh.size > 1
             else NamedSharding(mesh, PartitionSpec()) for name, leaf in zip(names, leaves, strict=True)}
    return shardings(plan, _Paths(found))


def mesh_of(tree: Any) -> Mesh | None:
    """Return the mesh of several devices that arrays lie on; None: they lie on one device, or on no mesh."""
    places = (leaf.sharding for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    return next((p.mesh for p in places if isinstance(p, NamedSharding) and p.mesh.size > 1), None)


def put(x: np.ndarray, where: Sharding) -> jax.Array:
    """Put an array that every process has whole on the host where it belongs, each process only its own parts."""
    return jax.make_array_from_callback(x.shape, where, lambda part: x[part])


def names_of(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, tuple) else ()


def _keys(theta: Any) -> set[tuple[str, str]]:
    """Return the names of all entries of theta."""
    return {(p, letter) for p, entries in theta.items() for letter in entries} if isinstance(theta, Mapping) else set()


class _Paths(dict[str, Any]):
    """Shardings by path, not by the structure of the params."""


def _of_base(plan: Plan, tree: Any) -> tuple[Any, dict[str, Sharding]]:
    """Return the shardings of the base, as a tree and by path."""
    if isinstance(tree, _Paths):
        found: dict[str, Any] = dict(tree)
    else:
        paths, leaves, treedef = flatten(tree, is_leaf=lambda x: isinstance(x, Sharding | PartitionSpec))
        found = {path: getattr(leaf, "sharding", leaf) for path, leaf in zip(paths, leaves, strict=True)}
        tree = treedef.unflatten(list(found.values()))
    sites = {site.path: site for site in plan.sites}
    missing, extra = sorted(set(sites) - set(found)), sorted(set(found) - set(sites))
    if missing or extra:
        raise ShardingError(f"base_shardings lacks {missing[:3]} and has {extra[:3]} beyond the plan; give a sharding "
                            "for each leaf of the params, in their structure")
    for path, one in found.items():
        _check(sites[path], one)
    return tree, found


def _check(site: Site, sharding: Any) -> None:
    """Raise `ShardingError` unless the leaf can lie like this."""
    if isinstance(sharding, PartitionSpec):
        raise ShardingError(f"base_shardings has the bare {sharding} for {site.path!r}; say on which mesh: "
                            "NamedSharding(mesh, spec)")
    if isinstance(sharding, SingleDeviceSharding):
        return
    if not isinstance(sharding, NamedSharding):
        raise ShardingError(f"base_shardings has a {type(sharding).__name__} for {site.path!r}, must be a "
                            "NamedSharding; jax.jit with out_shardings, or jax.device_put, gives an array one")
    spec = tuple(sharding.spec)
    if len(spec) > len(site.shape):
        raise ShardingError(f"base_shardings has {sharding.spec} for {site.path!r}, which has {len(site.shape)} dims "
                            f"{site.shape}; give one entry for each dim")
    for dim, (size, entry) in enumerate(zip(site.shape, spec, strict=False)):
        parts = math.prod(sharding.mesh.shape[axis] for axis in names_of(entry))
        if size % parts:
            raise ShardingError(f"base_shardings divides dim {dim} of {site.path!r}, of size {size}, by {parts} "
                                f"({', '.join(names_of(entry))}), which leaves a rest; put None there, or pad the dim "
                                f"to {-(-size // parts) * parts}")


def _placed(entry: Entry, letter: str, struct: jax.ShapeDtypeStruct, axes: Mapping[str, tuple[int | None, ...]],
            where: Sharding, replicate_below: int) -> Sharding:
    """Return where one entry of theta lies."""
    name, dims = type(entry.method).__name__, axes.get(letter)
    if dims is None or len(dims) != len(struct.shape):
        raise ShardingError(f"{name}.axes says {dims} for {letter!r} on {entry.path!r}, whose shape is {struct.shape}; "
                            "it must name a dim of the leaf, or None, for each axis")
    for dim, size in zip(dims, struct.shape, strict=True):
        if dim is not None and entry.site.shape[dim] != size:
            raise ShardingError(f"{name}.axes says that an axis of {letter!r} of size {size} follows dim {dim} of "
                                f"{entry.path!r}, of size {entry.site.shape[dim]}; write None for that axis")
    if not isinstance(where, NamedSharding):
        return where
    if _bytes(struct) < replicate_below:
        return NamedSharding(where.mesh, PartitionSpec())
    of_leaf = (*where.spec, *(None,) * (len(entry.site.shape) - len(where.spec)))
    spec: list[Any] = []
    seen: set[str] = set()
    for dim in dims:
        own = None if dim is None else of_leaf[dim]
        own = None if seen.intersection(names_of(own)) else own  # a mesh axis divides one axis of an array alone
        seen.update(names_of(own))
        spec.append(own)
    return NamedSharding(where.mesh, PartitionSpec(*spec))


def _bytes(struct: jax.ShapeDtypeStruct) -> int:
    return math.prod(struct.shape) * struct.dtype.itemsize


def _shown(sharding: Any, ndim: int) -> str:
    if not isinstance(sharding, NamedSharding):
        return "on one device"
    spec = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))
    if not any(names_of(entry) for entry in spec):
        return "whole"
    return "[" + ", ".join("+".join(names_of(entry)) or "-" for entry in spec) + "]"
