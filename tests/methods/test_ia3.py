"""IA3 against its equation, in every layout."""

from __future__ import annotations

import pytest
from layouts import CONV, LINEAR, LOOKUP, RAGGED, Layout, check, each, prepare

import jpeft
from jpeft.errors import MethodConfigError


@pytest.mark.parametrize(**each(*LINEAR, RAGGED, *CONV, *LOOKUP))
def test_outputs(layout: Layout) -> None:
    check(jpeft.IA3(), layout, lambda theta, w: w * theta["l"].reshape(1, -1))


@pytest.mark.parametrize(**each(*LINEAR, RAGGED))
def test_inputs(layout: Layout) -> None:
    check(jpeft.IA3(on="in"), layout, lambda theta, w: w * theta["l"].reshape(-1, 1))


@pytest.mark.parametrize(**each(CONV[0], *LOOKUP))
def test_inputs_of_contractions_only(layout: Layout) -> None:
    with pytest.raises(MethodConfigError, match=r"use IA3\(on='out'\)"):
        prepare(jpeft.IA3(on="in"), layout)


def test_unknown_side() -> None:
    with pytest.raises(MethodConfigError, match="'out' or 'in'"):
        jpeft.IA3(on="both")
