"""Training: a state, a compiled step, a thin loop around them, and checkpoints that outlive a crash.

Reading order: `state` (what changes from step to step) with `sharding` (where it lies), `objectives`, `losses` and
`optimizer` (what the step needs), `step` (the pure function, and compiled) with `scaling` (of the loss, for float16),
`checkpoint` with `manifest` (how a state gets to disk and back), `hooks` (who may watch), `loop` (which ties them
together) with `stall` (batches in time), then `evaluate`, `metrics`, `tensorboard`, `profile`, `memory` and `report`,
which stand alone.
"""

from __future__ import annotations

from jpeft.train.sharding import batch_shardings
from jpeft.train.state import TrainState, create, state_shardings
from jpeft.train.step import compiled_step, make_train_step, pure_step

__all__ = ["TrainState", "batch_shardings", "compiled_step", "create", "make_train_step", "pure_step",
           "state_shardings"]
