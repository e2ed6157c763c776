"""Tiny models of every framework and style, one table: what the engine must get right without being told."""

from __future__ import annotations

from gallery import equinox, foreign, haiku, linen, loops, nnx, plain, sharded
from gallery.case import Case, Dims

PARTS = (linen, nnx, equinox, haiku, plain, loops, sharded, foreign)
CASES: list[Case] = [case for part in PARTS for case in part.CASES]
__all__ = ["CASES", "Case", "Dims"]
