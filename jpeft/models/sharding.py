"""Where the leaves of a model lie on a mesh: which dim of a leaf is what, and which mesh axes divide it.

A leaf has logical axes (`LEAVES`), a logical axis has mesh axes (`MESH_AXES`): two tables of plain data. Leaves of
other models get logical axes from what the model does with them (`role_axes`). Sharding changes no value; what neither
knows is on every device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jpeft.core.paths import flatten
from jpeft.core.plan import Plan
from jpeft.core.sharding import names_of
from jpeft.core.site import Site
from jpeft.errors import ShardingError, nearest

Entry = str | tuple[str, ...] | None

LEAVES: tuple[tuple[str, tuple[str | int | None, ...]], ...] = (
    (r"(.*/)?(embed|word)/embedding", ("vocab", "embed")),
    (r"(.*/)?(position|token_type)/embedding", (None, "embed")),
    (r"(.*/)?lm_head/kernel", ("embed", "vocab")),
    (r"(.*/)?(classifier|pooler|router)/kernel", ("embed", None)),
    (r".*/query/kernel", ("embed", "heads", None)),
    (r".*/query/bias", ("heads", None)),
    (r".*/(key|value)/kernel", ("embed", "kv_heads", None)),
    (r".*/(key|value)/bias", ("kv_heads", None)),
    (r".*/qkv/kernel", ("embed", "heads", None)),
    (r".*/qkv/kernel", ("embed", "heads", 3, None)),
    (r".*/qkv/kernel", ("embed", 3, "heads", None)),
    (r".*/qkv/bias", ("heads", None)),
    (r".*/qkv/bias", ("heads", 3, None)),
    (r".*/qkv/bias", (3, "heads", None)),
    (r".*/(attention|cross)/out/kernel", ("heads", None, "embed")),
    (r".*/(gate|up)/kernel", ("embed", "mlp")),
    (r".*/(gate|up)/kernel", ("experts", "embed", "mlp")),
    (r".*/(gate|up)/bias", ("mlp",)),
    (r".*/gate_up/kernel", ("embed", 2, "mlp")),
    (r".*/gate_up/bias", (2, "mlp")),
    (r".*/down/kernel", ("mlp", "embed")),
    (r".*/down/kernel", ("experts", "mlp", "embed")),
)
"""Logical axes of a layer's leaf, by its path: the first row whose pattern, number of dims and sizes (numbers) fit. A
leaf of `layers` has one axis more, in front: "layers". Biases and scales that are not here are not divided."""

MESH_AXES: Mapping[str, tuple[str, ...]] = {
    "embed": ("fsdp",), "vocab": ("tensor",), "heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",),
    "experts": ("expert",), "layers": (),
}  # fmt: skip
"""The mesh axes that divide a logical axis, where the mesh has them."""

DATA_AXES = ("data", "sequence")
"""Mesh axes that divide batches and no parameter."""


class Placements(NamedTuple):
    """Where each leaf goes.

    Attributes:
        shardings: by path.
        notes: what could not be divided, a sentence each.
    """

    shardings: dict[str, NamedSharding]
    notes: tuple[str, ...]


def logical_axes(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Return the logical axis of each dim of a leaf; None: it has none.

    Example:
        >>> logical_axes("layers/attention/query/kernel", (2, 8, 4, 16))
        ('layers', 'embed', 'heads', None)
    """
    first = ("layers",) if "layers" in path.split("/") and shape else ()
    rest = shape[len(first):]
    for pattern, axes in LEAVES:
        fits = len(axes) == len(rest) and all(a == n for a, n in zip(axes, rest, strict=True) if isinstance(a, int))
        if fits and re.fullmatch(pattern, path):
            return (*first, *(None if isinstance(axis, int) else axis for axis in axes))
    return (*first, *[None] * len(rest))


def role_axes(site: Site) -> tuple[str | None, ...]:
    """Return the logical axes of a leaf by what the model does with it, for models that the tables do not know.

    A contraction weight has "embed" on its narrow side (inputs or outputs) and "mlp" on its wide one, so that the first
    of two projections is divided by outputs and the second by inputs, and no activation between them is exchanged. A
    side of several dims (heads) counts as the wide one, and its first dim is the one that is divided.

    Example:
        >>> role_axes(Site("up/kernel", (8, 32), "float32", "linear", (0,), (1,)))
        ('embed', 'mlp')
        >>> role_axes(Site("layers/o/kernel", (2, 4, 8, 32), "float32", "linear", (1, 2), (3,), (0,)))
        ('layers', 'mlp', None, 'embed')
    """
    axes: list[str | None] = [None] * len(site.shape)
    for dim in site.stack_dims:
        axes[dim] = "layers"
    if site.stack_dims and (len(site.stack_dims) > 1 or "expert" in site.path.lower()):
        axes[site.stack_dims[-1]] = "experts"
    ins, outs = site.in_dims[-1:] if site.use == "conv" else site.in_dims, site.out_dims
    if site.use in ("embedding", "tied") and ins and outs:
        axes[ins[0]], axes[outs[0]] = "vocab", "embed"
    elif site.use in ("linear", "conv") and ins and outs:
        sizes = [math.prod(site.shape[d] for d in dims) for dims in (ins, outs)]
        wide, narrow = (ins, outs) if (len(ins), sizes[0]) > (len(outs), sizes[1]) else (outs, ins)
        axes[wide[0]], axes[narrow[0]] = "mlp", "embed"
    return tuple(axes)


def base_shardings(params: Any, mesh: Mesh, rules: Mapping[str, PartitionSpec] | None = None, *,
                   plan: Plan | None = None, mesh_axes: Mapping[str, tuple[str, ...]] = MESH_AXES) -> Any:
    """Decide where the params of any model go: `jpeft.shardings` derives from it where their adapter goes.

    A leaf goes by the first of: the user's rule; the tables of this module, where they know its path (the models of
    jpeft); with a plan, its role in the model (`role_axes`), and, where "fsdp" divides neither of the two dims, the
    largest dim that it does divide. Any other leaf is on every device.

    Args:
        params: a pytree of arrays or `jax.ShapeDtypeStruct`.
        mesh: its axes "fsdp", "tensor" and "expert" divide parameters, "data" and "sequence" batches; it may lack any.
            Its axes may be of type Auto or Explicit (which Flax Linen modules cannot be traced with).
        rules: path pattern (a regular expression for the whole path) -> `PartitionSpec`, the first that matches wins.
        plan: a plan for these params, which knows how the model uses each leaf.
        mesh_axes: logical axis -> the mesh axes that divide it.

    Returns:
        A `NamedSharding` for each leaf, in the structure of `params`. Where the size of a mesh axis does not divide a
        dim, that dim is whole; `jpeft.explain(plan, shardings=...)` shows how each adapted leaf is divided.

    Raises:
        ShardingError: as of `placements`, or the plan is of other params.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> params, x = {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))}, jnp.ones((2, 8))
        >>> rules = {"all-linear": jpeft.LoRA(rank=2)}
        >>> plan = jpeft.plan(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], params, (x,), rules)
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
        >>> {k: tuple(v.spec) for k, v in jpeft.base_shardings(params, mesh, plan=plan).items()}
        {'down': ('tensor', 'fsdp'), 'up': ('fsdp', 'tensor')}
    """
    paths, _, treedef = flatten(params)
    sites = {} if plan is None else {site.path: site for site in plan.sites}
    if plan is not None and set(sites) != set(paths):
        odd = sorted(set(sites) ^ set(paths))
        raise ShardingError(f"the plan and the params differ in the leaves {odd[:3]}; pass the params that the plan "
                            "was made for")
    found = placements(params, mesh, rules, sites, mesh_axes).shardings
    return treedef.unflatten([NamedSharding(mesh, found[path].spec) for path in paths])


def placements(shapes: Any, mesh: Mesh, rules: Mapping[str, PartitionSpec] | None = None,
               sites: Mapping[str, Site] | None = None, mesh_axes: Mapping[str, tuple[str, ...]] = MESH_AXES
               ) -> Placements:
    """Decide where the leaves of a model go.

    Args:
        shapes: a pytree of arrays or `jax.ShapeDtypeStruct`.
        mesh: its axes "fsdp", "tensor" and "expert" divide parameters; it may lack any of them. Axes of type Explicit
            are taken as Auto, and a note says so.
        rules: path pattern (a regular expression for the whole path) -> `PartitionSpec`; the first that matches wins
            over the tables.
        sites: by path, how the model uses a leaf, for leaves that the tables do not know.
        mesh_axes: logical axis -> the mesh axes that divide it.

    Returns:
        A sharding for each path. Where the size of a mesh axis does not divide a dim, that dim is not divided by it,
        and a note says so.

    Raises:
        ShardingError: `mesh` is no mesh, or a rule matches no leaf, names an axis that the mesh lacks or one twice, or
            is longer than a leaf has dims.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
        >>> shapes = {"lm_head": {"kernel": jax.ShapeDtypeStruct((8, 32), "float32")}}
        >>> tuple(placements(shapes, mesh).shardings["lm_head/kernel"].spec)
        ('fsdp', 'tensor')
    """
    if not isinstance(mesh, Mesh):
        raise ShardingError(f"mesh is a {type(mesh).__name__}, must be a jax.sharding.Mesh; jax.make_mesh makes one")
    notes = []
    if any(kind is not AxisType.Auto for kind in mesh.axis_types):
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
        notes.append("the mesh has explicit axes, which Flax modules cannot be traced with; the params lie on the same "
                     "devices and axes of type Auto")
    paths, leaves, _ = flatten(shapes)
    chosen = _chosen(paths, rules or {}, mesh)
    sizes = dict(mesh.shape)
    found, refused = {}, dict[tuple[str, int], list[str]]()
    for path, leaf in zip(paths, leaves, strict=True):
        shape = tuple(leaf.shape)
        names = logical_axes(path, shape)
        known = set(names) - {None, "layers"}
        site = None if known or path in chosen else (sites or {}).get(path)
        wanted: list[str | tuple[str, ...] | None] = _explicit(path, shape, *chosen[path]) if path in chosen else [
            tuple(a for a in mesh_axes.get(n or "", ()) if a in sizes) or None
            for n in (names if site is None else role_axes(site))]
        spec, left = _fitted(wanted, shape, sizes)
        if site is not None and left:
            spec, left = _elsewhere(site, spec, left, sizes)
        while spec and spec[-1] is None:
            spec.pop()
        found[path] = NamedSharding(mesh, PartitionSpec(*spec))
        for key in left:
            refused.setdefault(key, []).append(path)
    notes += [f"the mesh axis {axis} of {sizes[axis]} does not divide {size}, that dim is not divided: {_some(where)}"
              for (axis, size), where in refused.items()]
    dividing = {axis for axes in mesh_axes.values() for axis in axes}
    strange = [axis for axis in sizes if axis not in dividing and axis not in DATA_AXES and sizes[axis] > 1]
    used = {axis for one in found.values() for entry in one.spec for axis in names_of(entry)}
    if strange and not used & set(strange):
        notes.append(f"no leaf is divided over the mesh axes {', '.join(strange)}; the default divides over "
                     f"{', '.join(sorted(dividing))}, other axes need rules")
    return Placements(found, tuple(notes))


def _chosen(paths: Iterable[str], rules: Mapping[str, PartitionSpec], mesh: Mesh) -> dict[str, tuple[str, list[Entry]]]:
    """Return the rule of each path that has one, as its pattern and entries."""
    chosen: dict[str, tuple[str, list[Entry]]] = {}
    for pattern, spec in rules.items():
        try:
            hits = [path for path in paths if re.fullmatch(pattern, path)]
        except re.error as error:
            raise ShardingError(f"the sharding rule {pattern!r} is no regular expression: {error}") from error
        if not isinstance(spec, PartitionSpec):
            raise ShardingError(f"the sharding rule {pattern!r} has a {type(spec).__name__}, must be a "
                                "jax.sharding.PartitionSpec")
        entries = list(spec)
        odd = [entry for entry in entries if not (entry is None or isinstance(entry, str | tuple))]
        if odd:
            raise ShardingError(f"the sharding rule {pattern!r} has the entry {odd[0]!r}, must be mesh axes or None")
        axes = [axis for entry in entries for axis in names_of(entry)]
        wrong = [axis for axis in axes if axis not in mesh.shape]
        if wrong:
            raise ShardingError(f"the sharding rule {pattern!r} names the axis {wrong[0]!r}, the mesh has "
                                f"{dict(mesh.shape)} ({nearest(str(wrong[0]), mesh.axis_names, 1)})")
        if len(set(axes)) < len(axes):
            raise ShardingError(f"the sharding rule {pattern!r} names a mesh axis twice: {spec}")
        if not hits:
            raise ShardingError(f"the sharding rule {pattern!r} matches no leaf ({nearest(pattern, paths)})")
        if all(path in chosen for path in hits):
            raise ShardingError(f"the sharding rule {pattern!r} matches only leaves that earlier rules have taken; put "
                                "it before them")
        chosen.update({path: (pattern, entries) for path in hits if path not in chosen})
    return chosen


def _explicit(path: str, shape: tuple[int, ...], pattern: str, entries: list[Entry]) -> list[Entry]:
    if len(entries) > len(shape):
        raise ShardingError(f"the sharding rule {pattern!r} has {len(entries)} entries, {path} has {len(shape)} dims "
                            f"{shape}; put a rule for that leaf before it")
    return [*entries, *[None] * (len(shape) - len(entries))]


def _fitted(entries: list[Entry], shape: tuple[int, ...], sizes: Mapping[str, int]
            ) -> tuple[list[Entry], list[tuple[str, int]]]:
    """Leave out the mesh axes that do not divide their dim; return the rest, and what was left out."""
    kept: list[Entry] = []
    left = []
    used: set[str] = set()
    for entry, size in zip(entries, shape, strict=True):
        axes: tuple[str, ...] = ()
        for axis in names_of(entry):
            if axis in used:
                continue
            if size % math.prod(sizes[a] for a in (*axes, axis)):
                left.append((axis, size))
            else:
                axes = (*axes, axis)
        used.update(axes)
        kept.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return kept, [(axis, size) for axis, size in left if axis not in used]


def _elsewhere(site: Site, spec: list[Entry], left: list[tuple[str, int]], sizes: Mapping[str, int]
               ) -> tuple[list[Entry], list[tuple[str, int]]]:
    """Let a mesh axis that divides neither dim it was meant for divide the largest one that is whole."""
    rest = []
    for axis, size in left:
        free = [d for d, entry in enumerate(spec) if entry is None and d not in site.stack_dims
                and site.shape[d] % sizes[axis] == 0]
        if free:
            spec[max(free, key=lambda d: site.shape[d])] = axis
        else:
            rest.append((axis, size))
    return spec, rest


def _some(paths: list[str], most: int = 4) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")
