"""Language models that learn which of two answers is preferred, by direct preference optimisation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.cli.config import JobConfig
from jpeft.cli.datakinds import PreferenceData
from jpeft.cli.tasks import tables
from jpeft.cli.tasks.answers import Question, decoded
from jpeft.cli.tasks.base import SPLITS, Adapted, Apply, Loaded, Metrics, Tested
from jpeft.cli.tasks.causal_lm import CausalLm
from jpeft.core.frozen import Frozen
from jpeft.core.plan import Plan
from jpeft.data import sft
from jpeft.data.groups import GroupBatches, Groups, preferences
from jpeft.data.split import split
from jpeft.interop.tokenizer import Tokenizer
from jpeft.train import losses
from jpeft.train.evaluate import Judged, evaluate_preferences
from jpeft.train.losses import Batch, Penalty
from jpeft.train.step import LossFn

if TYPE_CHECKING:
    from jpeft.cli.runs import RunSummary


class Preference(CausalLm):
    """The better of two answers."""

    monitor: ClassVar[str] = "loss"
    mode: ClassVar[Literal["max", "min"]] = "min"

    def example(self, loaded: Loaded) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = (2 * loaded.config.train.batch_size, loaded.config.data.max_length)
        ids, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
        return (ids,), {"attention_mask": ids, "labels": ids, "label_weights": weights}

    def base(self, loaded: Loaded) -> Apply:
        def log_probs(params: Any, tokens: Any, key: Any = None, **named: Any) -> Any:
            return loaded.model.apply(params, tokens, **named, key=key).log_probs

        return log_probs

    def apply(self, loaded: Loaded, plan: Plan | None) -> Apply:
        """Return `(trainable, frozen, batch, key=None) -> log-probabilities [B, 2]`."""
        rows = super().apply(loaded, plan)

        def apply(trainable: Any, frozen: Any, batch: Any, key: Any = None) -> Any:
            flat = {name: jnp.reshape(x, (-1, jnp.shape(x)[-1])) for name, x in batch.items()}
            return jnp.reshape(rows(trainable, frozen, flat, key), (-1, 2))

        return apply

    def loss(self, loaded: Loaded, apply: Apply, penalty: Penalty | None) -> LossFn:
        return losses.dpo(apply, _reference(loaded.unadapted), **loaded.config.objective.options("preference"),
                          penalty=penalty)

    def load_data(self, job: JobConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        d: PreferenceData = job.data
        notes: list[str] = []
        table = tables.read(d, notes)
        prompts = tables.fill(d, table, d.prompt)
        chosen, rejected = (
            sft.pairs(tokenizer, prompts, tables.fill(d, table, template), max_length=d.max_length, chat=d.chat,
                      default_system=d.default_system, keep=d.keep, on_long=d.on_long)
            for template in (d.chosen, d.rejected))
        made, dropped, same = preferences(chosen, rejected)
        notes += [f"dropped: nothing of an answer of {dropped:,} rows fits into data.max_length = {d.max_length} "
                  "tokens"] * bool(dropped)
        notes += [f"left out: {same:,} rows have the same answer twice, and none is the better"] * bool(same)
        parts = split(len(made), test=d.test, validation=d.validation, seed=d.seed)
        made = dataclasses.replace(made, notes=tuple(notes))
        return {name: made.take(part) for name, part in zip(SPLITS, parts, strict=True)}

    def batches(self, job: JobConfig, rows: Any, shuffle: bool) -> Any:
        return GroupBatches(rows, job.train.batch_size, (job.data.max_length,), seed=job.seed, shuffle=shuffle)

    def evaluate(self, loaded: Loaded, apply: Apply, trainable: Any, frozen: Any, batches: Iterable[Any]) -> Metrics:
        return self._judged(loaded, apply, trainable, frozen, batches).metrics

    def _judged(self, loaded: Loaded, apply: Apply, trainable: Any, frozen: Any, batches: Iterable[Any]) -> Judged:
        return evaluate_preferences(apply, _reference(loaded.unadapted), trainable, frozen, batches,
                                    **loaded.config.objective.options("preference"))

    def told(self, job: JobConfig, data: Mapping[str, Any], made: Any) -> list[str]:
        counts = ", ".join(f"{len(part):,} {name}" for name, part in data.items())
        cut = sum(part.truncated for part in data.values())
        side = "end" if job.data.keep == "start" else "start"
        return [f"pairs of answers: {counts}; {len(made):,} batches of {made.batch_size} x 2 x {job.data.max_length} "
                f"tokens an epoch, {made.waste():.0%} of them padding", *data["train"].notes,
                f"truncated: {cut:,} pairs have more than data.max_length = {job.data.max_length} tokens on a side"
                + (f" and lost their {side}" if cut else "")]

    def test(self, adapted: Adapted, rows: Any, compare: bool) -> Tested:
        loaded = adapted.loaded
        made = self.batches(loaded.config, rows, False)

        def judged(apply: Apply, trainable: Any, frozen: Any) -> Judged:
            return self._judged(loaded, apply, trainable, frozen, (made.make(0, i) for i in range(len(made))))

        found = judged(adapted.apply, adapted.trainable, adapted.frozen)
        order = np.concatenate([part for part, _ in made.epoch(0)])
        tested = Tested(found.metrics, hits=found.right[np.argsort(order)])
        if loaded.config.test.generate is None:
            return tested
        count = min(loaded.config.test.generate.rows, len(rows))
        questions = [_question(loaded.tokenizer, rows, i) for i in range(count)]
        return self.answered(adapted, questions, (), tested, compare)

    def headline(self, metrics: Mapping[str, float]) -> str:
        return f"reward accuracy {metrics['accuracy']:.4f}"

    def line(self, metrics: Mapping[str, float]) -> str:
        return (f"reward accuracy {metrics['accuracy']:.4f}, margin {metrics['margin']:.4f}, loss "
                f"{metrics['loss']:.4f}, {metrics['count']:,.0f} pairs; the chosen answer is the more probable one of "
                f"{metrics['likelier']:.4f} (without the adapter {metrics['likelier_before']:.4f})")

    def result(self, summary: RunSummary) -> list[tuple[str, str]]:
        new = summary.test
        return [("reward accuracy", f"{new['accuracy']:.4f} on {new['count']:,.0f} pairs, margin {new['margin']:.4f}; "
                                    f"best step {summary.best_step} of {summary.steps}"),
                ("test loss", f"{new['loss']:.4f}"),
                ("more probable", f"the chosen answer in {new['likelier_before']:.4f} of the pairs before, "
                                  f"{new['likelier']:.4f} after")]


@functools.lru_cache(maxsize=16)
def _reference(unadapted: Apply) -> Callable[[Any, Batch], jax.Array]:
    """Return the model without its adapter, on its params, frozen or plain: one function for each model."""
    def reference(frozen: Any, batch: Batch) -> jax.Array:
        found: jax.Array = unadapted(None, frozen.base if isinstance(frozen, Frozen) else frozen, batch)
        return found

    return reference


def _question(tokenizer: Tokenizer, groups: Groups, i: int) -> Question:
    """Return the prompt of a row, and its chosen answer."""
    ids, weights = groups.ids[0][i], (groups.weights or [[]])[0][i]
    first = int(np.flatnonzero(weights)[0])
    return Question(ids[:first].tolist(), decoded(tokenizer, [ids[first:]])[0])
