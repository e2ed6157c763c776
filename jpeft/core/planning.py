"""From rules to a plan: find the roles, give each leaf its method, prove on an abstract trace that each can work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jpeft.core.match import Pattern, find, resolve
from jpeft.core.method import Method
from jpeft.core.plan import Entry, Plan
from jpeft.core.roles import analyse, as_matrix, integer_leaves, unite
from jpeft.core.site import Site
from jpeft.core.tokens import Tokens
from jpeft.core.trace import Apply, example, leaves_of, trace
from jpeft.core.transform import verify
from jpeft.errors import PlanError


def _arrange_tokens(entries: list[Entry], tokens: Tokens | None) -> list[Entry]:
    """Give every virtual-token method its rows: prefixes share the first, prompts come behind them."""
    virtual = [e for e in entries if e.method.virtual_tokens]
    asking = [e for e in entries if e.method.positions]
    if asking and tokens is None:
        raise PlanError(f"{type(asking[0].method).__name__} acts by position; pass tokens=jpeft.Tokens(ids=0) to say "
                        "which argument holds the tokens")
    if not virtual:
        return entries
    if tokens is None:
        raise PlanError(f"{type(virtual[0].method).__name__} adds virtual tokens; pass tokens=jpeft.Tokens(ids=0) to "
                        "say which argument holds the tokens")
    lengths = {e.method.virtual_tokens for e in virtual if e.site.use == "linear"}
    prompts = [e for e in virtual if e.site.use != "linear"]
    if len(lengths) > 1 or len(prompts) > 1:
        found = f"lengths {sorted(lengths)}" if len(lengths) > 1 else f"prompts on {[e.path for e in prompts]}"
        raise PlanError(f"virtual tokens must agree, found {found}; "
                        "use one prefix length and one prompt on the token embedding")
    start = next(iter(lengths), 0)
    return [dataclasses.replace(e, start=start) if e in prompts else e for e in entries]


def plan(apply: Apply, params: Any, example_args: Sequence[Any], rules: Mapping[Pattern, Method], *,
         example_kwargs: Mapping[str, Any] | None = None, uses: Sequence[tuple[Any, ...]] = (),
         exclude: Sequence[Pattern] = (), tokens: Tokens | None = None, materialise: Sequence[Pattern] = (),
         site: Sequence[Pattern] = ()) -> Plan:
    """Decide which method rides on which leaf, and prove on an abstract trace that each can.

    Args:
        apply: pure function `apply(params, *args, **kwargs)` that `jax.jit` accepts.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`.
        example_args: positional arguments; arrays (or structs) are traced, everything else is static.
        rules: ordered mapping pattern -> method; the first match wins. A pattern is a regular expression that must
            match a whole path `a/b/c`, a predicate `(path, site) -> bool`, `jpeft.layers(pattern, range)`, or a word:
            `"all-linear"` (every contraction weight but the output head), `"attention"`, `"mlp"`, `"embedding"`,
            `"conv"`, `"bias"`, `"norm"`; or one that names a part of a layer as most families do: `"query"`, `"key"`,
            `"value"`, `"qkv"`, `"attention-out"`, `"gate"`, `"up"`, `"gate-up"`, `"down"`.
        example_kwargs: keyword arguments of the example call.
        uses: further `(apply, args[, kwargs])` of the same params, whose roles are added.
        exclude: patterns of leaves that no rule may take.
        tokens: which arguments and outputs carry the token axis, for methods that add virtual tokens.
        materialise: patterns of leaves whose adapted weight may be formed whole where no rule exists.
        site: patterns of leaves with *site* semantics: the adapter is added at the contraction, and elementwise
            operations on the way (a dequantisation) act on the base alone. Integer leaves always have it. All others
            have *value* semantics: every use sees W + dW.

    Returns:
        An immutable, hashable `Plan`.

    Raises:
        NoMatchError, UnusedLeafError, WrongUseError, MethodConfigError, PathError: a mistake in rules or params.
        UnsupportedUse: the model uses an adapted leaf in a way that would need the whole adapted weight.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply = lambda p, x: x @ p["w"]
        >>> plan = jpeft.plan(apply, {"w": jnp.ones((8, 4))}, (jnp.ones((2, 8)),), {"w": jpeft.LoRA(rank=2)})
        >>> plan.count()
        24
    """
    functions = [(apply, example(example_args), dict(example_kwargs or {}))]
    for use in uses:
        functions.append((use[0], example(use[1]), dict(use[2]) if len(use) > 2 else {}))
    sites: dict[str, Site] = {}
    names, leaves, _ = leaves_of(params)
    sited = integer_leaves(names, leaves)
    if site:
        blank = {n: Site(n, tuple(v.shape), str(v.dtype), "other") for n, v in zip(names, leaves, strict=True)}
        sited += [p for pattern in site for p in find(pattern, blank, "site")]
    for fn, args, kwargs in functions:
        found = analyse(trace(fn, params, args, kwargs), leaves, sited)
        sites = {p: unite(sites[p], s) if p in sites else s for p, s in found.items()}
    allowed = [p for pattern in materialise for p in find(pattern, sites, "materialise")]
    sites |= {p: as_matrix(sites[p]) for p in allowed}
    chosen = resolve(rules, exclude, sites)
    entries = _arrange_tokens([Entry(sites[p], m, limit) for p, (m, limit) in chosen.items()], tokens)
    for e in entries:
        if e.layers is not None:
            e.live()
    result = Plan(tuple(entries), tuple(sites.values()), tokens, tuple(allowed), tuple(sited))
    for fn, args, kwargs in functions:
        verify(fn, result, params, args, kwargs)
    return result
