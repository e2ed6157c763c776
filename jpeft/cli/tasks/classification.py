"""Texts into classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.cli.config import JobConfig
from jpeft.cli.datakinds import DataConfig
from jpeft.cli.tasks.base import SPLITS, Adapted, Apply, Loaded, Metrics, Task, Tested
from jpeft.core import transform
from jpeft.core.method import Call
from jpeft.core.plan import Plan
from jpeft.data import rows as tables
from jpeft.data.batches import Batches
from jpeft.data.classify import Examples, encode
from jpeft.data.split import split
from jpeft.data.table import Table, read_table
from jpeft.interop import sources
from jpeft.interop.tokenizer import Tokenizer
from jpeft.train import losses
from jpeft.train.evaluate import evaluate, judged
from jpeft.train.losses import Penalty
from jpeft.train.step import LossFn

if TYPE_CHECKING:
    from jpeft.cli.runs import RunSummary


class Classification(Task):
    """A class for each text."""

    monitor: ClassVar[str] = "accuracy"
    mode: ClassVar[Literal["max", "min"]] = "max"

    def labels(self, job: JobConfig) -> int:
        return len(job.data.names)

    def names(self, job: JobConfig) -> tuple[str, ...]:
        return tuple(job.data.names)

    def example(self, loaded: Loaded) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = jax.ShapeDtypeStruct((loaded.config.train.batch_size, loaded.config.data.max_length), jnp.int32)
        return (ids,), {"attention_mask": ids, **({"token_types": ids} if loaded.tokenizer.token_types else {})}

    def base(self, loaded: Loaded) -> Apply:
        def logits(params: Any, tokens: Any, attention_mask: Any, token_types: Any = None, key: Any = None) -> Any:
            return loaded.model.apply(params, tokens, attention_mask, token_types, key=key).logits

        return logits

    def apply(self, loaded: Loaded, plan: Plan | None) -> Apply:
        """Return `(trainable, frozen, tokens, attention_mask, token_types=None, key=None) -> logits [B, C]`."""
        plain = self.base(loaded)
        adapted = None if plan is None else transform.adapt(plain, plan)

        def apply(trainable: Any, frozen: Any, tokens: Any, attention_mask: Any, token_types: Any = None,
                  key: Any = None) -> Any:
            types = {} if token_types is None else {"token_types": token_types}
            if adapted is None:
                return plain(frozen, tokens, attention_mask, **types, key=key)
            if key is None:
                return adapted(trainable, frozen, tokens, attention_mask=attention_mask, **types)
            mine, theirs = jax.random.split(key)
            return adapted(trainable, frozen, tokens, attention_mask=attention_mask, key=mine, **types,
                           peft=Call(key=theirs))

        return apply

    def loss(self, loaded: Loaded, apply: Apply, penalty: Penalty | None) -> LossFn:
        return losses.classification(apply, penalty=penalty)

    def load_data(self, job: JobConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        d = job.data
        notes: list[str] = []
        table = _read(d, d.source, notes)
        examples = self._encoded(d, tokenizer, table, notes)
        labels = examples.labels.tolist()
        if d.test_source is None:
            parts = split(len(examples), test=d.test, validation=d.validation, seed=d.seed, labels=labels)
            return {name: examples.take(part) for name, part in zip(SPLITS, parts, strict=True)}
        others = _read(d, d.test_source, notes)
        if d.unique:
            others, dropped = tables.without(others, table, d.unique)
            notes += [f"left out: {dropped:,} test rows equal another one in {', '.join(d.unique)}"] * bool(dropped)
        parts = split(len(examples), test=0, validation=d.validation, seed=d.seed, labels=labels)
        held = self._encoded(d, tokenizer, others, notes)
        test = split(len(held), test=d.test, validation=0, seed=d.seed, labels=held.labels.tolist()).test
        learnt = dataclasses.replace(examples, notes=tuple(notes))
        return {"train": learnt.take(parts.train), "validation": learnt.take(parts.validation), "test": held.take(test)}

    def _encoded(self, d: DataConfig, tokenizer: Tokenizer, table: Table, notes: list[str]) -> Examples:
        classes = list(d.names) if isinstance(d.classes, list) else d.classes
        made = encode(tokenizer, table.column(d.text), table.column(d.label), classes=classes, max_length=d.max_length)
        return dataclasses.replace(made, notes=tuple(notes))

    def batches(self, job: JobConfig, rows: Any, shuffle: bool) -> Any:
        return Batches(rows, job.train.batch_size, job.data.widths, seed=job.seed, shuffle=shuffle)

    def evaluate(self, loaded: Loaded, apply: Apply, trainable: Any, frozen: Any, batches: Iterable[Any]) -> Metrics:
        return evaluate(apply, trainable, frozen, batches)

    def told(self, job: JobConfig, data: Mapping[str, Any], made: Any) -> list[str]:
        counts = ", ".join(f"{len(examples):,} {name}" for name, examples in data.items())
        cut = sum(examples.truncated for examples in data.values())
        said = f"{len(made):,} batches of {made.batch_size} an epoch, {made.waste():.0%} of them padding"
        long = f"truncated: {cut:,} texts are longer than data.max_length = {job.data.max_length} tokens"
        return [f"rows: {counts}; {said}", *data["train"].notes, *([long] if cut else [])]

    def test(self, adapted: Adapted, rows: Any, compare: bool) -> Tested:
        made = self.batches(adapted.loaded.config, rows, False)
        batches = (made.make(0, i) for i in range(len(made)))
        found = judged(adapted.apply, adapted.trainable, adapted.frozen, batches)
        hits = np.zeros(len(rows), bool)
        hits[np.concatenate([part for part, _ in made.epoch(0)])] = found.right
        return Tested(found.metrics, hits=hits)

    def predict(self, adapted: Adapted, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        found, truncated = self.probabilities(adapted, list(texts))
        data = adapted.loaded.config.data
        lines = [f"{data.names[int(row.argmax())]}\t{row.max():.4f}\t{one}"
                 for one, row in zip(texts, found, strict=True)]
        notes = [f"{truncated} of {len(texts)} texts were truncated to {data.max_length} tokens"] if truncated else []
        return lines, notes

    def probabilities(self, adapted: Adapted, texts: list[str]) -> tuple[np.ndarray, int]:
        """Return the probability of each class for each text, float32 `[N, C]`, and how many texts were truncated."""
        config = adapted.loaded.config
        examples = encode(adapted.loaded.tokenizer, texts, [0] * len(texts), classes=len(config.data.names),
                          max_length=config.data.max_length)
        made = Batches(examples, min(config.train.batch_size, len(texts)), config.data.widths, seed=0, shuffle=False)
        score = jax.jit(lambda t, f, tokens, mask, types: jax.nn.softmax(
            adapted.apply(t, f, tokens, mask, types).astype(jnp.float32), -1))
        found = np.zeros((len(texts), len(config.data.names)), np.float32)
        for i, (rows, _) in enumerate(made.epoch(0)):
            batch = made.make(0, i)
            scores = score(adapted.trainable, adapted.frozen, batch["tokens"], batch["attention_mask"],
                           batch.get("token_types"))
            found[rows] = np.asarray(scores)[:len(rows)]
        return found, examples.truncated

    def headline(self, metrics: Mapping[str, float]) -> str:
        return f"accuracy {metrics['accuracy']:.4f}"

    def line(self, metrics: Mapping[str, float]) -> str:
        return f"accuracy {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f}, {metrics['count']:,.0f} rows"

    def result(self, summary: RunSummary) -> list[tuple[str, str]]:
        said = f"{summary.test['accuracy']:.4f} on {summary.test['count']:,.0f} rows"
        return [("test accuracy", f"{said}, best step {summary.best_step} of {summary.steps}")]


def _read(d: DataConfig, source: str, notes: list[str]) -> Table:
    """Return the rows of one file, without those that equal an earlier one, and note how many were left out."""
    table = read_table(sources.resolve(source, d.sha256), where=d.where or None)
    if not d.unique:
        return table
    kept = tables.distinct(table, d.unique)
    notes += [f"left out: {kept.dropped:,} rows of {table.where} equal an earlier one in {', '.join(d.unique)}"] * bool(
        kept.dropped)
    return kept.table
