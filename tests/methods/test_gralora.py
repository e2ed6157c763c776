"""GraLoRA against its grid of blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from layouts import LINEAR, PLAIN, Layout, check, prepare, sample

import jpeft
from jpeft.errors import MethodConfigError


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    k, _, r = theta["a"].shape
    part = r // k
    change = jnp.block([[theta["a"][i][:, j * part:(j + 1) * part] @ theta["b"][j][i * part:(i + 1) * part]
                         for j in range(k)] for i in range(k)])
    if "ga" in theta:
        h = theta["ga"].shape[-1]
        change = change + theta["ga"].reshape(-1, h) @ theta["gb"].reshape(h, -1)
    return w + theta["scale"] * change


@pytest.mark.parametrize("hybrid", [0, 2])
@pytest.mark.parametrize(**sample(LINEAR[4], *LINEAR))
def test_equation(layout: Layout, hybrid: int) -> None:
    check(jpeft.GraLoRA(rank=4, alpha=3, hybrid_r=hybrid), layout, equation)


def test_fields() -> None:
    with pytest.raises(MethodConfigError, match="multiple of gralora_k"):
        jpeft.GraLoRA(rank=5)
    with pytest.raises(MethodConfigError, match="divisor of both"):
        prepare(jpeft.GraLoRA(rank=4, gralora_k=4), PLAIN)
