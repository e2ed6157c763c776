"""Everything that differs between JAX versions, and every reading of an equation's parameters that may drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.extend.core as jec
from jax.sharding import NamedSharding, PartitionSpec

Literal = jec.Literal
DropVar = jec.DropVar

# Options of the CPU compiler for programs that nobody runs: less time for machine code, the same HLO.
UNRUN: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones do not know it
    UNRUN["xla_cpu_use_fusion_emitters"] = False


def is_extended(x: Any) -> bool:
    """True for PRNG-key arrays and other extended dtypes."""
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Return `(jaxpr, consts)` of an open or closed jaxpr."""
    inner = getattr(jaxpr, "jaxpr", None)
    if inner is not None and hasattr(inner, "eqns"):
        return inner, tuple(jaxpr.consts)
    return jaxpr, ()


def literal_value(atom: Any) -> jax.Array:
    """A literal as an ordinary array of its own type (the raw value can be a private typed scalar)."""
    value = atom.val
    if isinstance(value, jax.Array):
        return value
    weak = getattr(atom.aval, "weak_type", False)
    if weak and atom.aval.shape == () and atom.aval.dtype.kind in "fib":
        return value.item() if hasattr(value, "item") else value
    return jax.numpy.asarray(value, dtype=atom.aval.dtype)


def rebind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation unchanged, under its own contexts and names."""
    slots: list[Any] = []
    inputs: list[Any] = []
    for atom, value in zip(eqn.invars, values, strict=True):
        if not isinstance(atom, Literal) and not any(atom is s for s in slots):
            slots.append(atom)
            inputs.append(value)
    info = jec.DebugInfo("jpeft", eqn.primitive.name, ("",) * len(slots), ("",) * len(eqn.outvars))
    one = jec.Jaxpr([], slots, list(eqn.outvars), [eqn], eqn.effects, info)
    return jax.core.eval_jaxpr(one, (), *inputs)


def moved(eqn: Any, axes: Sequence[int], by: int) -> Any:
    """The `slice` equation whose window is moved by `by` along `axes`."""
    shift = [by if d in axes else 0 for d in range(len(eqn.params["start_indices"]))]
    ends = {name: tuple(int(i) + s for i, s in zip(eqn.params[name], shift, strict=True))
            for name in ("start_indices", "limit_indices")}
    return eqn.replace(params={**eqn.params, **ends})


def context(eqn: Any) -> AbstractContextManager[Any]:
    """The mesh, the precision and the like under which the equation was traced."""
    return eqn.ctx.manager


def source_line(eqn: Any) -> str | None:
    """`file:line` of the user's code that made the equation, outside jax, flax, equinox and haiku, or None."""
    traceback = getattr(eqn.source_info, "traceback", None)
    frames = list(traceback.frames) if traceback is not None else []
    inside = ("/jax/", "/flax/", "/equinox/", "/haiku/", "/jpeft/core/", "/jaxtyping/", "/quax/", "/optax/")
    for frame in frames:
        name = frame.file_name.replace("\\", "/")
        if not any(part in name for part in inside) and not name.startswith("<"):
            return f"{'/'.join(name.split('/')[-2:])}:{frame.line_num}"
    return None


class ScanParts(NamedTuple):
    n_consts: int
    n_carry: int
    length: int
    reverse: bool
    unroll: Any
    jaxpr: Any


def scan_parts(eqn: Any) -> ScanParts:
    """Read a scan equation: `num_consts`/`num_carry` up to 0.10, `ft_in` (a flat tree of three) from 0.11."""
    p = eqn.params
    if "num_consts" in p:
        n_consts, n_carry = p["num_consts"], p["num_carry"]
    else:
        parts = p["ft_in"].unpack() if hasattr(p["ft_in"], "unpack") else p["ft_in"]
        n_consts, n_carry = (len(part) for part in tuple(parts)[:2])
    return ScanParts(n_consts, n_carry, p["length"], p["reverse"], p["unroll"], p["jaxpr"])


def specified(sharding: Any) -> bool:
    """True if a `jit` equation's in or out sharding says something."""
    return isinstance(sharding, jax.sharding.Sharding)


def single_cpu_device() -> bool:
    """True on one CPU device and no other, where 2-D operands make the small products much faster."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def attends_in(dtype: Any) -> bool:
    """Whether `jax.nn.dot_product_attention` compiles: it asks for a float16 product that the CPU does not have."""
    return not (jax.default_backend() == "cpu" and dtype == "float16")


def _spec(x: Any) -> tuple[Any, PartitionSpec | None]:
    sharding = getattr(jax.typeof(x), "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty or not sharding.mesh.are_all_axes_explicit:
        return None, None
    return sharding.mesh, sharding.spec


def contraction_sharding(a: Any, b: Any, numbers: Any) -> NamedSharding | None:
    """The out_sharding of a product in explicit mode over sharded dims, or of two sides that have one mesh axis."""
    mesh, spec_a = _spec(a)
    other, spec_b = _spec(b)
    mesh = mesh if mesh is not None else other
    if mesh is None:
        return None
    (ca, cb), (ba, bb) = numbers
    sa: tuple[Any, ...] = (*(spec_a or ()), *(None,) * (a.ndim - len(spec_a or ())))
    sb: tuple[Any, ...] = (*(spec_b or ()), *(None,) * (b.ndim - len(spec_b or ())))
    wanted = [sa[i] if sa[i] is not None else sb[j] for i, j in zip(ba, bb, strict=True)]
    wanted += [sa[i] for i in range(a.ndim) if i not in (*ca, *ba)]
    wanted += [sb[i] for i in range(b.ndim) if i not in (*cb, *bb)]
    seen: set[str] = set()
    spec: list[Any] = []
    for entry in wanted:
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        spec.append(None if seen.intersection(names) else entry)
        seen.update(names if spec[-1] is not None else ())
    contracted = any(sa[i] is not None for i in ca) or any(sb[i] is not None for i in cb)
    return NamedSharding(mesh, PartitionSpec(*spec)) if contracted or spec != wanted else None


def shard_map(f: Callable[..., Any], eqn: Any, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Rebuild a `shard_map` equation around another function."""
    p = eqn.params
    return jax.shard_map(f, mesh=p["mesh"], in_specs=in_specs, out_specs=out_specs,
                         axis_names=set(p["newly_manual_axes"]), check_vma=p["check_vma"])


def varying_axes(x: Any) -> tuple[str, ...]:
    """Manual mesh axes over which `x` differs between shards."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return tuple(sorted(getattr(kind, "varying", None) or getattr(aval, "vma", None) or ()))


def pvary(x: Any, axes: Sequence[str]) -> Any:
    """Mark `x` as varying over those of `axes` over which it is not yet."""
    missing = tuple(a for a in axes if a not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def match_sharding(x: Any, like: Any) -> Any:
    """In explicit mode, bring `x` to the sharding of `like`; elsewhere return it."""
    mesh, spec = _spec(like)
    if mesh is None or spec is None or _spec(x)[1] == spec:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def sub_jaxprs(eqn: Any) -> list[Any]:
    """Every jaxpr that an equation holds, open."""
    remat = remat_parts(eqn)
    if remat is not None:
        return [open_jaxpr(remat[0])[0]]
    found: list[Any] = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = open_jaxpr(item)[0]
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


def remat_parts(eqn: Any) -> tuple[Any, Any, Any] | None:
    """Return `(jaxpr, policy, prevent_cse)` of a checkpoint equation in any of its forms, else None."""
    p = eqn.params
    if eqn.primitive.name in ("checkpoint", "remat", "remat2"):
        return p["jaxpr"], p["policy"], p["prevent_cse"]
    prim = p.get("_prim", p.get("prim"))
    if prim is not None and hasattr(prim, "jaxpr") and hasattr(prim, "policy"):
        return prim.jaxpr, prim.policy, getattr(prim, "prevent_cse", True)
    return None


def any_algorithm(closed: Any) -> Any:
    """Return a closed jaxpr whose contractions do not say by which algorithm, at all depths.

    Some platforms refuse to compile algorithms that they do not have; shapes and dtypes are the same without.
    """
    def opened(jaxpr: Any) -> Any:
        return jaxpr.replace(eqns=[one(eqn) for eqn in jaxpr.eqns])

    def value(item: Any) -> Any:
        if isinstance(item, tuple | list):
            return type(item)(map(value, item)) if type(item) in (tuple, list) else item
        inner, _ = open_jaxpr(item)
        if not hasattr(inner, "eqns"):
            return item
        return opened(item) if inner is item else item.replace(jaxpr=opened(inner))

    def one(eqn: Any) -> Any:
        params = {name: value(item) for name, item in eqn.params.items()}
        if eqn.primitive.name == "dot_general":
            params["precision"] = None
        return eqn.replace(params=params)

    return closed.replace(jaxpr=opened(closed.jaxpr))
