"""YAML 1.2 in and out, and overrides."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jpeft.cli.yamlio import dump, override, parse
from jpeft.errors import ConfigError


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), ("1E+3", 1000.0), ("-.5", -0.5), ("2.", 2.0), ("6.02e23", 6.02e23), (".inf", math.inf),
    ("010", 10), ("0x1f", 31), ("0o17", 15), ("-3", -3), ("no", "no"), ("on", "on"), ("true", True), ("~", None),
    ("", None), ("12:30:45", "12:30:45"), ("2024-01-02", "2024-01-02"), ("1_000", "1_000"), ("'1e-4'", "1e-4"),
    ("[a, 1e-4]", ["a", 1e-4]), (".*/kernel", ".*/kernel"),
])
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse(text, "test")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("value", [
    "1e-4", "no", "true", "null", "", "010", "~", ".*/(a|b)/kernel", "a: b", "x\ny", 1e-4, 1e300, -0.0, math.inf,
    7, True, None, [1, [2.5, "3"]], {"a": {"b": [], "c": {}}}, "ü",
])
def test_what_is_written_is_read_back(value: Any) -> None:
    found = parse(dump({"key": value}), "test")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("text", "said"), [
    ("a: 1\na: 2", "line 2, column 1: the key 'a' is there twice"), ("a: [1", "line 1, column"),
    ("? [1]\n: 2", "a key that is a list"), ("a: !!python/name:os.system", "could not determine a constructor"),
])
def test_faults_are_one_line_with_their_place(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.yaml")
    assert said in str(caught.value)
    assert str(caught.value).startswith("x.yaml, line")
    assert "\n" not in str(caught.value)


def test_override_reaches_keys_with_dots_and_new_keys() -> None:
    data: dict[str, Any] = {"rules": {"h.0/.*": {"method": "LoRA"}}}
    for one in ("rules.h.0/.*.rank=4", 'rules."a.b=c".method=IA3', "train.epochs=3", "data.where.kind='1'"):
        override(data, one)
    assert data["rules"] == {"h.0/.*": {"method": "LoRA", "rank": 4}, "a.b=c": {"method": "IA3"}}
    assert data["train"] == {"epochs": 3}
    assert data["data"] == {"where": {"kind": "1"}}


@pytest.mark.parametrize(("one", "said"), [
    ("epochs", "not of the form"), ("a.b=1", "a is 5 and has no parts"), ("c.d=1", "c is empty"),
    ("=1", "not of the form"), ("a..b=1", "has no parts"), ("x=[1", "correct the YAML"),
])
def test_override_that_makes_no_sense(one: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        override({"a": 5, "c": None}, one)
