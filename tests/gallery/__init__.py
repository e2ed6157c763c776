"""Tiny models of every framework and style, one table: what the engine must get right without being told."""

from __future__ import annotations

from gallery import equinox, haiku, linen, loops, nnx, plain, sharded
from gallery.case import Case, Dims

CASES: list[Case] = [case for part in (linen, nnx, equinox, haiku, plain, loops, sharded) for case in part.CASES]
__all__ = ["CASES", "Case", "Dims"]
