"""The half of an adapted model that is never trained."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class Frozen(NamedTuple):
    """What an adapted function needs besides the trainable parameters; a pytree.

    Attributes:
        base: the caller's own parameters, untouched.
        theta: `{path: {letter: array}}`, the methods' entries that are not trained (scales, masks, projections).
    """

    base: Any
    theta: dict[str, dict[str, jax.Array]]
