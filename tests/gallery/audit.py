"""Find dense adapted weights in a jaxpr: values made of weights and theta, or of theta alone, that no data has met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

Taint = frozenset[str]
NONE: Taint = frozenset()
DATA: Taint = frozenset({"data"})
DENSE: Taint = frozenset({"weight", "theta"})


def dense_weights(adapted: Any, trainable: Any, frozen: Any, *args: Any) -> list[str]:
    """Return the equations of `adapted(trainable, frozen, *args)` that form W + dW or dW."""

    def base(leaf: Any) -> Taint:
        return frozenset({"weight"}) if leaf.ndim > 1 else DATA

    theta = frozenset({"theta"})
    taints = (
        jax.tree.map(lambda _: theta, trainable),
        type(frozen)(jax.tree.map(base, frozen.base), jax.tree.map(lambda _: theta, frozen.theta)),
        *jax.tree.map(lambda _: DATA, args),
    )
    closed = jax.make_jaxpr(adapted)(trainable, frozen, *args)
    found: list[str] = []
    _walk(closed.jaxpr, jax.tree.leaves(taints, is_leaf=lambda t: isinstance(t, frozenset)), found)
    return sorted(set(found))


def _walk(jaxpr: Any, taints: Sequence[Taint], found: list[str]) -> list[Taint]:
    env: dict[Any, Taint] = dict(zip(jaxpr.invars, taints, strict=True))

    def read(atom: Any) -> Taint:
        return NONE if hasattr(atom, "val") else env.get(atom, DATA if atom.aval.shape else NONE)

    for eqn in jaxpr.eqns:
        ins = [read(v) for v in eqn.invars]
        outs = _inner(eqn, ins, found)
        if outs is None:
            outs = ins if eqn.primitive.name == "optimization_barrier" else [_plain(eqn, ins, found)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _plain(eqn: Any, ins: list[Taint], found: list[str]) -> Taint:
    union = NONE.union(*ins)
    theta_only = [t for t in ins if "theta" in t and "data" not in t]
    if union == DENSE or (eqn.primitive.name == "dot_general" and len(theta_only) == 2):
        found.append(f"{eqn.primitive.name} of {[str(v.aval) for v in eqn.invars]}")
    return union or (DATA if eqn.outvars and eqn.outvars[0].aval.shape else NONE)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _inner(eqn: Any, ins: list[Taint], found: list[str]) -> list[Taint] | None:
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        results = [_walk(_open(branch), ins[1:], found) for branch in params["branches"]]
        return [NONE.union(*each) for each in zip(*results, strict=True)]
    if name == "while":
        skip, body = params["cond_nconsts"], _open(params["body_jaxpr"])
        return _loop(body, ins[skip:], len(eqn.outvars), 0, found)
    for value in params.values():
        inner = _open(value)
        if hasattr(inner, "eqns") and len(inner.invars) == len(ins):
            if name != "scan":
                return _walk(inner, ins, found)
            carry = sum(v.aval.shape == w.aval.shape for v, w in zip(eqn.outvars, inner.outvars, strict=True))
            xs = sum(v.aval.shape != w.aval.shape for v, w in zip(eqn.invars, inner.invars, strict=True))
            return _loop(inner, ins, carry, xs, found)
    return None


def _loop(body: Any, ins: list[Taint], carry: int, xs: int, found: list[str]) -> list[Taint]:
    """Walk a loop body until the taints of its carry stop growing; `ins` are constants, carry, xs."""
    first = len(ins) - xs - carry
    while True:
        local: list[str] = []
        outs = _walk(body, ins, local)
        grown = [*ins[:first], *(a | b for a, b in zip(ins[first:], outs[:carry], strict=False)), *ins[first + carry :]]
        if grown == ins:
            found.extend(local)
            return outs
        ins = grown
