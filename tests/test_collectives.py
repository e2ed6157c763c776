"""The reading of collectives: kinds, bytes, loop trips, copies."""

from __future__ import annotations

import pytest
from collectives import Array, Move, copied, moves, total

from jpeft.errors import UncountedError

TEXT = """HloModule jit_f, entry_computation_layout={(f32[3,4]{1,0})->f32[3,4]{1,0}}

add (a: f32[], b: f32[]) -> f32[] {
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT sum = f32[] add(a, b)
}

body (p: (s32[], f32[3,4])) -> (s32[], f32[3,4]) {
  p = (s32[], f32[3,4]) parameter(0)
  i = s32[] get-tuple-element(p), index=0
  one = s32[] constant(1)
  next = s32[] add(i, one)
  x = f32[3,4]{1,0} get-tuple-element(p), index=1
  y = bf16[3,4]{1,0} convert(x)
  both = (bf16[3,4]{1,0}, f32[]) all-reduce(y, z), channel_id=1, replica_groups={{0,1}}, to_apply=add
  z = f32[] constant(1)
  w = f32[3,4]{1,0} copy(x)
  ROOT out = (s32[], f32[3,4]) tuple(next, w)
}

condition (p: (s32[], f32[3,4])) -> pred[] {
  p = (s32[], f32[3,4]) parameter(0)
  i = s32[] get-tuple-element(p), index=0
  n = s32[] constant(5)
  ROOT less = pred[] compare(i, n), direction=LT
}

ENTRY main (x: f32[3,4]) -> f32[6,4] {
  x = f32[3,4]{1,0} parameter(0)
  zero = s32[] constant(0)
  start = (s32[], f32[3,4]) tuple(zero, x)
  loop = (s32[], f32[3,4]) while(start), condition=condition, body=body%s
  y = f32[3,4]{1,0} get-tuple-element(loop), index=1
  ROOT out = f32[6,4]{1,0} %s(y), channel_id=2, dimensions={0}
}
"""
KNOWN = ', backend_config={"known_trip_count":{"n":"5"}}'


@pytest.mark.parametrize("known", ["", KNOWN])
def test_moves_are_counted_once_for_each_trip(known: str) -> None:
    text = TEXT % (known, "all-gather")
    assert moves(text) == [
        Move("all-reduce", (Array("bf16", (3, 4)), Array("f32", ())), 5, True),
        Move("all-gather", (Array("f32", (6, 4)),), 1, False)]
    assert total(text) == 5 * (24 + 4) + 96
    assert total(text, "all-gather") == 96
    assert copied(text) == [(3, 4)]


def test_what_cannot_be_read_is_an_error() -> None:
    with pytest.raises(UncountedError, match="all-gather-start is asynchronous"):
        moves(TEXT % (KNOWN, "all-gather-start"))
    with pytest.raises(UncountedError, match="trips of the loop 'loop' depend on data"):
        moves(TEXT.replace("constant(5)", "parameter(1)") % ("", "all-gather"))
