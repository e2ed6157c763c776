"""Rules: which leaf gets which method. Ordered; the first that matches wins; every one must match something."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jpeft.core.method import Method
from jpeft.core.paths import layer_index, names
from jpeft.core.site import Site
from jpeft.errors import (
    MethodConfigError,
    NoMatchError,
    PlanError,
    UnsupportedUse,
    UnusedLeafError,
    WrongUseError,
    nearest,
)

Pattern = Any  # str | Callable[[str, Site], bool] | Layers

_ATTENTION = re.compile(
    r"(.*_)?(attn|attention|self_attn|selfattn|selfattention|self_attention|cross|cross_attn|crossattention|"
    r"cross_attention|"
    r"encdecattention|multiheaddotproductattention|mha|query|key|value|qkv|q|k|v|o|q_proj|k_proj|v_proj|o_proj|"
    r"qkv_proj|c_attn|q_einsum|kv_einsum|attn_vec_einsum|wq|wk|wv|wo_attn|query_proj|key_proj|value_proj|output_proj|"
    r"out_proj)(_\d+)?")
_MLP = re.compile(
    r"(.*_)?(mlp|mlps|ffn|ff|feed_forward|feedforward|intermediate|moe|experts|fc|c_fc|fc1|fc2|fc_in|fc_out|"
    r"gate_proj|up_proj|down_proj|gate_up_proj|gate|up|down|wi|wi_0|wi_1|w1|w2|w3|dense_h_to_4h|dense_4h_to_h|"
    r"gating_einsum|linear_up|linear_down|densereludense|lin1|lin2)(_\d+)?")
# What families of models call the parts of a layer: word -> (in attention, names).
_PARTS: dict[str, tuple[bool, str]] = {
    "query": (True, "query|q|q_proj|query_proj|q_lin|wq|q_einsum"),
    "key": (True, "key|k|k_proj|key_proj|k_lin|wk"),
    "value": (True, "value|v|v_proj|value_proj|v_lin|wv"),
    "qkv": (True, "qkv|qkv_proj|c_attn|query_key_value|qkv_einsum"),
    "attention-out": (True, "out|o|o_proj|out_proj|output_proj|out_lin|c_proj|wo|attn_vec_einsum"),
    "gate": (False, "gate|gate_proj|linear_gate|wi_0|w1"),
    "up": (False, "up|up_proj|linear_up|wi|wi_1|w3|fc1|fc_in|c_fc|lin1|dense_h_to_4h"),
    "gate-up": (False, "gate_up|gate_up_proj|gating_einsum"),
    "down": (False, "down|down_proj|linear_down|wo|w2|fc2|fc_out|c_proj|lin2|dense_4h_to_h"),
}
_FUSED = {"query": "qkv", "key": "qkv", "value": "qkv", "gate": "gate-up", "up": "gate-up"}
_HEAD = re.compile(r"lm_head|output_projection|embed_out")


def _segments(path: str) -> list[str]:
    return [s.lower() for s in names(path)]


def _linear(site: Site) -> bool:
    return site.use == "linear" and bool(site.in_dims) and bool(site.out_dims)


def _attention(site: Site) -> bool:
    return _linear(site) and any(_ATTENTION.fullmatch(s) for s in _segments(site.path))


def _part(word: str, site: Site) -> bool:
    inside, known = _PARTS[word]
    return _linear(site) and _attention(site) == inside and any(re.fullmatch(known, s) for s in _segments(site.path))


WORDS: dict[str, Callable[[Site], bool]] = {
    "all-linear": lambda s: _linear(s) and not any(_HEAD.fullmatch(p) for p in _segments(s.path)),
    "attention": _attention,
    "mlp": lambda s: _linear(s) and not _attention(s) and any(_MLP.fullmatch(p) for p in _segments(s.path)),
    "embedding": lambda s: s.use in ("embedding", "tied"),
    "conv": lambda s: s.use == "conv",
    "bias": lambda s: s.use == "bias",
    "norm": lambda s: s.use == "scale",
    **{word: functools.partial(_part, word) for word in _PARTS},
}


@dataclasses.dataclass(frozen=True)
class Layers:
    """A pattern limited to some layers; see `layers`."""

    pattern: Any
    layers: tuple[int, ...]


def layers(pattern: Pattern, which: Iterable[int]) -> Layers:
    """Limit a rule to some layers, of an unrolled model (by path) or of a scanned one (by a 0/1 mask on the stack).

    Args:
        pattern: any pattern that a rule may have.
        which: layer numbers, from 0: `range(0, 6)`, `[0, 2, 4]`.

    Returns:
        A pattern, to be used as the key of a rule.

    Example:
        >>> import jpeft
        >>> rules = {jpeft.layers("attention", range(6, 12)): jpeft.LoRA(rank=8)}
    """
    chosen = tuple(sorted({int(i) for i in which}))
    if not chosen or chosen[0] < 0:
        raise PlanError(f"layers {list(which)!r} names no layer; pass numbers from 0, as range(0, 6)")
    return Layers(pattern, chosen)


def _hits(pattern: Pattern, sites: Mapping[str, Site]) -> list[str]:
    if isinstance(pattern, str):
        if pattern in WORDS and pattern not in sites:  # a leaf of that very name comes first
            found = [p for p, s in sites.items() if WORDS[pattern](s)]
            if pattern == "norm":
                homes = {p.rpartition("/")[0] for p in found}
                found = [p for p, s in sites.items()
                         if p in found or (s.use == "bias" and p.rpartition("/")[0] in homes)]
            return found
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise PlanError(
                f"rule {pattern!r} is no regular expression: {error}; escape its special characters") from error
        return [p for p in sites if regex.fullmatch(p)]
    if callable(pattern):
        return [p for p, s in sites.items() if pattern(p, s)]
    raise PlanError(f"rule {pattern!r} is a {type(pattern).__name__}; use a regular expression, a predicate "
                    f"(path, site) -> bool, jpeft.layers(...), or one of {sorted(WORDS)}")


def _limited(path: str, site: Site, wanted: tuple[int, ...]) -> tuple[bool, tuple[int, ...] | None]:
    """Whether a leaf is among the wanted layers, and which slices of a stacked one are."""
    index = layer_index(path)
    if index is not None:
        return index in wanted, None
    stack = site.stack_dims or ((0,) if site.use in ("bias", "scale") and len(site.shape) > 1 else ())
    if not stack:
        return False, None
    inside = tuple(i for i in wanted if i < site.shape[stack[0]])
    return bool(inside), inside


def _name(pattern: Pattern) -> str:
    if isinstance(pattern, Layers):
        return f"{_name(pattern.pattern)} in layers {list(pattern.layers)}"
    return repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))


def find(pattern: Pattern, sites: Mapping[str, Site], what: str) -> dict[str, tuple[int, ...] | None]:
    """Return the leaves that a pattern matches, each with its limit to layers; none is an error."""
    inner, wanted = (pattern.pattern, pattern.layers) if isinstance(pattern, Layers) else (pattern, None)
    hits: dict[str, tuple[int, ...] | None] = dict.fromkeys(_hits(inner, sites))
    if wanted is not None:
        limits = {p: _limited(p, sites[p], wanted) for p in hits}
        hits = {p: some for p, (inside, some) in limits.items() if inside}
        beyond = [i for i in wanted if not any(some is None or i in some for some in hits.values())]
        if hits and beyond:
            raise NoMatchError(f"{what} {_name(pattern)}: no matched leaf has the layers {beyond}; lower the range")
    if not hits:
        hint = nearest(inner, [*sites, *WORDS]) if isinstance(inner, str) and inner not in WORDS else \
            "uses found: " + ", ".join(sorted({f"{s.use}" for s in sites.values()}))
        if isinstance(inner, str) and inner in _PARTS:
            fused = _FUSED.get(inner, "")
            hint = f"here it is a part of the word {fused!r}" if fused and _hits(fused, sites) else \
                "contraction weights: " + nearest(inner, [p for p, s in sites.items() if _linear(s)])
        raise NoMatchError(f"{what} {_name(pattern)} matches none of the {len(sites)} leaves; {hint}")
    return hits


def resolve(rules: Mapping[Pattern, Method], exclude: Sequence[Pattern],
            sites: Mapping[str, Site]) -> dict[str, tuple[Method, tuple[int, ...] | None]]:
    """Give each leaf the method of the first rule that matches it.

    Raises:
        NoMatchError: a rule or an exclusion matches nothing, or nothing that earlier rules have left.
        UnusedLeafError: a rule matches a leaf that the model never reads.
        WrongUseError: a method cannot ride on the leaf in the way the model uses it.
    """
    if not isinstance(rules, Mapping):
        raise PlanError(f"rules is a {type(rules).__name__}, not a mapping; pass {{pattern: method}}, as "
                        "{'all-linear': jpeft.LoRA()}")
    if not rules:
        raise NoMatchError("rules is empty; pass an ordered mapping pattern -> method, as {'all-linear': jpeft.LoRA()}")
    excluded = (exclude,) if isinstance(exclude, str) else exclude
    out = {p for pattern in excluded for p in find(pattern, sites, "exclude")}
    chosen: dict[str, tuple[Method, tuple[int, ...] | None]] = {}
    for pattern, method in rules.items():
        if not isinstance(method, Method):
            raise PlanError(f"rule {_name(pattern)} maps to {method!r}; "
                            "give an instance of a method, as jpeft.LoRA(rank=8)")
        hits = {p: limit for p, limit in find(pattern, sites, "rule").items() if p not in out}
        fresh = {p: limit for p, limit in hits.items() if p not in chosen}
        if not fresh:
            why = "is excluded or " if out else ""
            raise NoMatchError(f"rule {_name(pattern)} matches only what {why}earlier rules have taken; "
                               "put it before them or drop it")
        _check_all(pattern, method, [sites[path] for path in fresh])
        chosen |= {path: (method, limit) for path, limit in fresh.items()}
    return {p: chosen[p] for p in sites if p in chosen}


def _check_all(pattern: Pattern, method: Method, sites: Sequence[Site]) -> None:
    """Check every leaf of a rule; where a method fits some and not others, say which to leave out."""
    wrong: dict[str, MethodConfigError] = {}
    for site in sites:
        try:
            _check(site.path, site, method, pattern)
        except MethodConfigError as error:
            wrong[site.path] = error
    if not wrong:
        return
    first = next(iter(wrong.values()))
    if len(wrong) == len(sites):
        raise first
    raise MethodConfigError(f"{first}; it fits the other {len(sites) - len(wrong)} leaves of rule {_name(pattern)}: "
                            f"pass exclude={list(wrong)}, or give them a rule of their own before it") from first


def _check(path: str, site: Site, method: Method, pattern: Pattern) -> None:
    name = type(method).__name__
    if site.use == "unused":
        raise UnusedLeafError(f"rule {_name(pattern)} targets {path!r}, which the model does not read with these "
                              "example arguments; exclude it, or pass uses=[...] with the function that reads it")
    if site.use == "other" and site.problems and "other" not in method.uses:
        raise UnsupportedUse(f"{name} cannot ride on {path!r}: {site.problems[0]} needs the whole adapted weight; "
                             "exclude the leaf, register a rule (jpeft.register_rule), or pass materialise=[...] to "
                             "jpeft.plan")
    if site.use not in method.uses:
        read = f" ({'; '.join(site.consumers[:2])})" if site.consumers else ""
        raise WrongUseError(f"{name} cannot ride on {path!r}, which the model uses as {site.use}{read}; "
                            f"it needs {' or '.join(sorted(method.uses))}: narrow rule {_name(pattern)}")
    method.check(site)
