"""Training: a state, a compiled step, a thin loop around them, and checkpoints that outlive a crash.

Reading order: `state` (what changes from step to step), `losses` and `optimizer` (what the step needs), `step` (the
compiled function), `checkpoint` with `manifest` (how a state gets to disk and back), `hooks` (who may watch), `loop`
(which ties them together), then `evaluate`, `metrics`, `memory` and `report`, which stand alone.
"""
