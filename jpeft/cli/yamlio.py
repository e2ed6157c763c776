"""YAML 1.2 in and out (`1e-4` is a number, `no` is a word), and `a.b=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from jpeft.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_LETTERS = [*"~nNtTfF", ""]
# The core schema of YAML 1.2, and no more: PyYAML's own tables are those of 1.1.
_SCHEMA: tuple[tuple[str, str, list[str]], ...] = (
    ("null", r"~|null|Null|NULL|", _LETTERS),
    ("bool", r"true|True|TRUE|false|False|FALSE", _LETTERS),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema of YAML 1.2; a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key that is a list or a mapping",
                                                        key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice",
                                                        key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number; keeps the order of keys."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(str(node.value).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _number(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    words = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}
    return dumper.represent_scalar(_TAG + "float", words.get(repr(value), repr(value)))


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {}
    for _name, _pattern, _starts in _SCHEMA:
        _kind.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})\\Z"), _starts)
_Loader.add_constructor(_TAG + "int", _int)
_Loader.add_constructor(_TAG + "float", _float)
_Dumper.add_representer(float, _number)


def parse(text: str, where: str) -> Any:
    r"""Parse YAML 1.2.

    Args:
        text: the document.
        where: what it is called in messages.

    Raises:
        ConfigError: it is no YAML, or a key is there twice.

    Example:
        >>> parse("lr: 1e-4\nclasses: [no, yes]", "example")
        {'lr': 0.0001, 'classes': ['no', 'yes']}
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}{at}: {' '.join(said.split())}; correct the YAML") from error


def dump(data: Any) -> str:
    """Write plain data as YAML that `parse` reads back.

    Example:
        >>> print(dump({"lr": 1e-4, "name": "1e-4", "buckets": [16, 32]}), end="")
        lr: 0.0001
        name: '1e-4'
        buckets: [16, 32]
    """
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def override(data: dict[str, Any], setting: str) -> None:
    """Apply one `a.b.c=value` to nested mappings, in place.

    A key that is there already may hold dots (the pattern of a rule); any key may be put in quotes. The value is YAML.

    Args:
        data: the configuration as plain data.
        setting: what follows `--set`.

    Raises:
        ConfigError: it is not of that form, or leads through something that is no mapping.

    Example:
        >>> data = {"train": {"epochs": 2}, "rules": {".*/kernel": {"method": "LoRA"}}}
        >>> override(data, "train.learning_rate=1e-4")
        >>> override(data, "rules..*/kernel.rank=4")
        >>> override(data, "rules.'head/.*'={method: Full}")
        >>> data["train"]["learning_rate"], data["rules"]
        (0.0001, {'.*/kernel': {'method': 'LoRA', 'rank': 4}, 'head/.*': {'method': 'Full'}})
    """
    path, text = _halves(setting)
    place: Any = data
    walked: list[str] = []
    while True:
        if place is None and walked:
            raise ConfigError(f"--set {setting}: {'.'.join(walked)} is empty; set the whole of it, as "
                              f"{'.'.join(walked)}={{...}}")
        if not isinstance(place, dict):
            raise ConfigError(f"--set {setting}: {'.'.join(walked)} is {place!r} and has no parts; set it as a whole")
        key, path = _first(path, place, setting)
        walked.append(key)
        if not path:
            place[key] = parse(text, f"--set {setting}")
            return
        place = place.setdefault(key, {})


def _halves(setting: str) -> tuple[str, str]:
    """Split at the first `=` outside quotes."""
    found = re.match(r"""((?:"[^"]*"|'[^']*'|[^='"])+)=(.*)\Z""", setting, re.DOTALL)
    if not found:
        raise ConfigError(f"--set {setting!r} is not of the form a.b=value; write a key with = or quotes in quotes")
    return found[1].strip(), found[2]


def _first(path: str, place: dict[str, Any], setting: str) -> tuple[str, str]:
    """Split a dotted path into its first key and the rest: the longest key that is there, else up to the first dot."""
    known = [str(k) for k in place if path == str(k) or path.startswith(f"{k}.")]
    if known:
        key = max(known, key=len)
        return key, path[len(key) + 1:]
    found = re.match(r"""(?:"([^"]*)"|'([^']*)'|([^.'"]+))(?:\.(.+)|)\Z""", path, re.DOTALL)
    if not found:
        raise ConfigError(f"--set {setting!r}: {path!r} is no dotted path; write a key with dots in quotes")
    return next(part for part in found.groups()[:3] if part is not None), found[4] or ""
