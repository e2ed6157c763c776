"""Rules as a configuration writes them: `pattern: {method: LoRA, rank: 8}`, checked field by field."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pydantic

import jpeft.methods
from jpeft.core.match import Layers, Pattern, find, layers
from jpeft.core.method import Method
from jpeft.core.plan import Plan
from jpeft.core.tokens import Tokens
from jpeft.errors import ConfigError, nearest
from jpeft.methods import Chain, PrefixTuning

METHODS: dict[str, type[Any]] = {name: getattr(jpeft.methods, name) for name in jpeft.methods.__all__}
BESIDE = ("layers", "learning_rate")  # keys of a rule that are no fields of its method
WORDS = ("init_text", "init_labels")  # keys that a method of virtual tokens gets as ids
Rules = Mapping[str, Mapping[str, Any]]


class Words(NamedTuple):
    """What the words of a rule become ids with.

    Attributes:
        encode: the ids of a text, without special tokens.
        labels: names of the job's classes; None: it has none.
    """

    encode: Callable[[str], list[int]]
    labels: tuple[str, ...] | None


def to_methods(rules: Rules, words: Words | None = None) -> dict[Pattern, Method]:
    """Make the rules of `jpeft.plan` from plain data.

    A rule is `{method: Name, field: value, ...}`; `layers: [0, 1]` beside them limits it to some layers,
    `learning_rate: 1e-3` gives what it trains a rate of its own (see `rates`), and `{method: Chain, methods: [{method:
    ...}, ...]}` puts several methods on one leaf. Virtual tokens start from a text with `init_text: a text`, prompts
    also from the names of classes, `init_labels: true` (those of the job) or `init_labels: [yes, no]`.

    Args:
        rules: pattern -> rule, in order.
        words: what makes ids of texts and labels; None: they are checked, and stand for token 0.

    Raises:
        ConfigError: a method or a field is unknown, or a value is of the wrong kind or no learning rate.
        MethodConfigError: a value is out of its range.

    Example:
        >>> to_methods({"attention": {"method": "LoRA", "rank": 4}})["attention"].rank
        4
    """
    for pattern, rule in rules.items():
        rate = rule.get("learning_rate", 1.0)
        if type(rate) not in (int, float) or not 0 < rate < float("inf"):
            raise ConfigError(f"rules.{pattern}.learning_rate = {rate!r} must be a number above 0")
    found = {_pattern(pattern, rule): _method(f"rules.{pattern}", {k: v for k, v in rule.items() if k not in BESIDE},
                                              words) for pattern, rule in rules.items()}
    for (pattern, method) in zip(rules, found.values(), strict=True):
        late = [type(part).__name__ for _, part in method.parts if part.goes_on]
        if late:
            raise ConfigError(f"rules.{pattern} has {late[0]}, which acts from a token on that each call names "
                              "(jpeft.Call(lengths=...)), and a job's rows name none; use LoRA, or a loop of your own")
        if method.tasks > 1:
            raise ConfigError(f"rules.{pattern} has {method.tasks} tasks, of which each call names one "
                              "(jpeft.Call(task=...)), and a job's rows name none; use num_tasks: 1, or a loop of your "
                              "own")
    return found


def places(methods: Mapping[Pattern, Method]) -> dict[str, int]:
    """Return what the methods ask of a model's configuration (`Method.places`).

    Raises:
        ConfigError: two of them ask for different things.

    Example:
        >>> places(to_methods({"adapter_.*": {"method": "LLaMAAdapter", "length": 4}}))
        {'adapter_length': 4}
    """
    found: dict[str, int] = {}
    for method in methods.values():
        for name, value in method.places.items():
            if found.setdefault(name, value) != value:
                raise ConfigError(f"rules with {type(method).__name__} ask for {name} = {found[name]} and for {value}; "
                                  "give them one length")
    return found


def read_first(rules: Rules) -> str | None:
    """Return the text that prefixes start from; None: none does.

    Raises:
        ConfigError: there are several.
    """
    found = {rule["init_text"] for _, rule in _each(rules) if "init_text" in rule and _reads(rule["method"])}
    if len(found) > 1:
        raise ConfigError(f"the prefixes of rules start from {len(found)} texts, {sorted(found)[0]!r} first; give them "
                          "one init_text, as the model reads it once")
    return found.pop() if found else None


def worded(rules: Rules, words: Words) -> list[str]:
    """Say where a text has not as many tokens as there are virtual ones."""
    notes = []
    for where, rule in _each(rules):
        if "init_text" not in rule:
            continue
        count, length = len(words.encode(rule["init_text"])), rule.get("length", METHODS[rule["method"]].length)
        if count != length:
            notes.append(f"{where}.init_text has {count} tokens for {length} virtual ones: " + (
                f"the first {length} are used" if count > length else "they are repeated"))
    return notes


def _each(rules: Rules) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield all rules, those inside a chain one by one, with their places."""
    for pattern, rule in rules.items():
        yield f"rules.{pattern}", rule
        for i, part in enumerate(rule.get("methods", ())):
            yield f"rules.{pattern}.methods.{i}", part


def _reads(name: str) -> bool:
    """Whether a method's text is one that the model reads before it, and no table of rows."""
    return issubclass(METHODS[name], PrefixTuning)


def rates(rules: Rules, plan: Plan) -> dict[str, float]:
    """Return the learning rates that checked rules set for themselves, by the path of each leaf that they took.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> rules = {"head": {"method": "Full", "learning_rate": 0.1}, ".*": {"method": "Full"}}
        >>> params = {"w": jnp.ones((2, 2)), "head": jnp.ones((2, 2))}
        >>> plan = jpeft.plan(lambda p, x: x @ p["w"] @ p["head"], params, (jnp.ones((1, 2)),), to_methods(rules))
        >>> rates(rules, plan)
        {'head': 0.1}
    """
    sites = {site.path: site for site in plan.sites}
    found: dict[str, float | None] = {}
    for pattern, rule in rules.items():
        for path in find(_pattern(pattern, rule), sites, "rule"):
            found.setdefault(path, rule.get("learning_rate"))
    return {path: float(rate) for path, rate in found.items() if rate is not None}


def tokens_for(methods: Mapping[Pattern, Method], token_types: bool) -> Tokens | None:
    """Say where the token axis is, if one of the methods has virtual tokens or acts by position.

    Args:
        methods: the rules.
        token_types: whether calls pass token types, which virtual tokens need as well.
    """
    if not any(m.virtual_tokens or m.positions for m in methods.values()):
        return None
    return Tokens(ids=0, mask="attention_mask", segments="token_types" if token_types else None)


def _pattern(pattern: str, rule: Mapping[str, Any]) -> str | Layers:
    if "layers" not in rule:
        return pattern
    which = rule["layers"]
    if not isinstance(which, list) or not all(type(i) is int for i in which):
        raise ConfigError(f"rules.{pattern}.layers = {which!r} must be a list of layer numbers, as [0, 1]")
    return layers(pattern, which)


def _method(where: str, rule: Any, words: Words | None) -> Method:
    if not isinstance(rule, Mapping) or not isinstance(rule.get("method"), str):
        raise ConfigError(f"{where} = {rule!r} names no method; write {{method: LoRA, rank: 8}}")
    name = str(rule["method"])
    if name not in METHODS:
        folded = {known.lower(): known for known in METHODS}
        hint = nearest(folded.get(name.lower(), name), METHODS, 1)
        raise ConfigError(f"{where}.method = {name!r} is no method ({hint}); `jpeft methods` "
                          "lists them")
    known = [f.name for f in dataclasses.fields(METHODS[name])]
    fields = _spelt(where, name, {k: v for k, v in rule.items() if k != "method"}, known, words)
    for key in fields:
        if key not in known:
            hint = f"the nearest is {_full(where, key, [*known, *(one for one in BESIDE if one != key)])!r}"
            raise ConfigError(f"unknown key '{where}.{key}'; {hint}")
    if name == "Chain":
        parts = fields.get("methods")
        if not isinstance(parts, list):
            raise ConfigError(f"{where}.methods must be a list of two or more rules, as [{{method: LoRA}}, ...]")
        return Chain(methods=tuple(_method(f"{where}.methods.{i}", p, words) for i, p in enumerate(parts)))
    try:
        checked = _fields(name).model_validate(fields)
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        key = str(fault["loc"][0])
        kinds = typing.get_type_hints(METHODS[name])[key]
        wanted = getattr(kinds, "__name__", None) if isinstance(kinds, type) else str(kinds)
        raise ConfigError(f"{where}.{key} = {fields[key]!r} must be {wanted}") from error
    return METHODS[name](**{k: getattr(checked, k) for k in fields})


def _spelt(where: str, name: str, fields: dict[str, Any], known: list[str], words: Words | None) -> dict[str, Any]:
    """Return the fields of a method with texts and labels as ids."""
    given = [key for key in WORDS if key in fields]
    if not given:
        if fields.get("init_weights") == "text" and _reads(name):
            raise ConfigError(f"{where}.init_weights = 'text' says no text; write init_text: ... in its place")
        return fields
    key = given[0]
    if "init_ids" not in known and not (key == "init_text" and _reads(name)):
        raise ConfigError(f"{where}.{key}: {name} does not start from it; use PromptTuning, or drop it")
    if other := [one for one in (*given[1:], "init_weights", "init_ids") if one in fields]:
        raise ConfigError(f"{where} has {key} and {other[0]}, which both say where it starts; drop one")
    kind, value = key.removeprefix("init_"), fields.pop(key)
    ids = _text_ids(where, value, words) if kind == "text" else _label_ids(where, value, words)
    return {**fields, "init_weights": kind, **({"init_ids": ids} if "init_ids" in known else {})}


def _text_ids(where: str, text: Any, words: Words | None) -> tuple[int, ...]:
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}.init_text = {text!r} must be a text")
    return (0,) if words is None else tuple(words.encode(text))


def _label_ids(where: str, labels: Any, words: Words | None) -> tuple[tuple[int, ...], ...]:
    if labels is not True and not (isinstance(labels, list) and labels and all(isinstance(n, str) for n in labels)):
        raise ConfigError(f"{where}.init_labels = {labels!r} must be true, or a list of names")
    if words is None:
        return ((0,),)
    names = words.labels if labels is True else labels
    if names is None:
        raise ConfigError(f"{where}.init_labels = true, and this job has no classes; name them, as [yes, no]")
    return tuple(tuple(words.encode(name)) for name in names)


def _full(where: str, key: str, known: list[str]) -> str:
    return f"{where}.{difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]}"


@functools.lru_cache(maxsize=64)
def _fields(name: str) -> type[pydantic.BaseModel]:
    """Return a pydantic model of the fields of a method; lists stand for tuples."""
    hints = typing.get_type_hints(METHODS[name])
    kinds: dict[str, Any] = {f.name: (_listed(hints[f.name]), None) for f in dataclasses.fields(METHODS[name])}
    return pydantic.create_model(name, __config__=pydantic.ConfigDict(strict=True), **kinds)


def _listed(kind: Any) -> Any:
    """Return an annotation with every tuple taken from a list as well."""
    if typing.get_origin(kind) is tuple:
        return typing.Annotated[kind, pydantic.BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
    if isinstance(kind, types.UnionType):
        return functools.reduce(operator.or_, map(_listed, typing.get_args(kind)))
    return kind


def described(name: str) -> tuple[str, str]:
    """Return what a method does (the first sentence of its docstring) and its paper (arXiv ids), for a table.

    Example:
        >>> described("IA3")
        ('Train one factor for each output (or input) of a frozen weight.', 'arXiv 2205.05638')
    """
    text = inspect.getdoc(METHODS[name]) or ""
    source = next((line.removeprefix("Source: ") for line in text.splitlines() if line.startswith("Source: ")), "")
    return " ".join(text.split("\n\n")[0].split()), source.rstrip(".")
