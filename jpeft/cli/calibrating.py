"""Data for the methods of a job whose start depends on it: its own training rows, or a text of its rules."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jpeft.cli.rules import read_first, worded
from jpeft.cli.sections import CalibrationConfig
from jpeft.cli.tasks.base import Loaded
from jpeft.core.calibrate import Calibration
from jpeft.core.plan import Plan
from jpeft.data.epochs import Epochs
from jpeft.errors import ConfigError


def calibration(loaded: Loaded, plan: Plan, made: Epochs) -> tuple[Calibration | None, tuple[str, ...]]:
    """Return what `jpeft.init` wants to know of the data, and what to say of it.

    Args:
        loaded: the model; the loss of its task, without dropout, is what gradients are of.
        plan: the plan.
        made: the batches of training, the first of which are read.

    Raises:
        ConfigError: some methods start from rows and others from a text, the text is shorter than the prefix, or the
            model is an encoder-decoder, of which no text can be read alone.
    """
    notes = worded(loaded.config.rules, loaded.words)
    wanted = frozenset[str]().union(*(e.method.calibration for e in plan.entries))
    if not wanted:
        return None, tuple(notes)
    if "outputs" in wanted:
        if len(wanted) > 1:
            raise ConfigError("'rules' has prefixes that start from a text and methods that start from rows; a job "
                              "can do one of the two")
        return _text(loaded, plan), tuple(notes)
    config = loaded.config.calibration or CalibrationConfig()
    count = min(config.batches, len(made))
    loss = loaded.task.loss(loaded.unadapted, None)

    def apply(params: Any, batch: Any) -> Any:
        return loss(None, params, batch, None)[0]  # type: ignore[arg-type] # no key: no dropout

    fewer = f" (an epoch has no {config.batches})" if count < config.batches else ""
    notes.append(f"calibration: {count} batches of the training rows{fewer}")
    return Calibration(apply, ((made.make(0, i),) for i in range(count))), tuple(notes)


def _text(loaded: Loaded, plan: Plan) -> Calibration:
    text = read_first(loaded.config.rules)
    assert text is not None
    if loaded.config.model.task == "seq2seq":
        raise ConfigError("init_text: a prefix of an encoder-decoder cannot start from a text; drop it")
    ids = loaded.words.encode(text)
    longest = max(e.method.virtual_tokens for e in plan.entries if e.method.calibration)
    if len(ids) < longest:
        raise ConfigError(f"init_text has {len(ids)} tokens, and a prefix of {longest} needs as many: {text!r}; write "
                          f"a longer one, or set length to {len(ids)}")
    return Calibration(loaded.model.apply, [(jnp.asarray([ids], jnp.int32),)])
