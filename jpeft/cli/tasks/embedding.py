"""Texts into vectors, near for texts that belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.cli.config import JobConfig
from jpeft.cli.datakinds import EmbeddingData
from jpeft.cli.tasks import tables
from jpeft.cli.tasks.base import SPLITS, Adapted, Apply, Loaded, Metrics, Task, Tested
from jpeft.core import transform
from jpeft.core.method import Call
from jpeft.core.plan import Plan
from jpeft.data.groups import GroupBatches, Groups, encode_groups
from jpeft.data.split import split
from jpeft.data.table import Table
from jpeft.errors import ColumnError, ConfigError, EmptyDataError
from jpeft.interop.tokenizer import Tokenizer
from jpeft.train import losses, objectives
from jpeft.train.evaluate import Judged, evaluate_embeddings
from jpeft.train.losses import Penalty
from jpeft.train.step import LossFn

if TYPE_CHECKING:
    from jpeft.cli.runs import RunSummary


class Embedding(Task):
    """A vector for each text."""

    monitor: ClassVar[str] = "mrr"
    mode: ClassVar[Literal["max", "min"]] = "max"

    def labels(self, job: JobConfig) -> None:
        return None

    def example(self, loaded: Loaded) -> tuple[tuple[Any, ...], dict[str, Any]]:
        config = loaded.config
        rows = config.train.batch_size * (2 if config.data.negative is None else 3)
        ids = jax.ShapeDtypeStruct((rows, config.data.max_length), jnp.int32)
        return (ids,), {"attention_mask": ids}

    def base(self, loaded: Loaded) -> Apply:
        def embedding(params: Any, tokens: Any, attention_mask: Any, key: Any = None) -> Any:
            return loaded.model.apply(params, tokens, attention_mask, key=key).embedding

        return embedding

    def apply(self, loaded: Loaded, plan: Plan | None) -> Apply:
        """Return `(trainable, frozen, batch, key=None) -> embeddings [B, S, D]`."""
        plain = self.base(loaded)
        adapted = None if plan is None else transform.adapt(plain, plan)

        def apply(trainable: Any, frozen: Any, batch: Any, key: Any = None) -> Any:
            shape = jnp.shape(batch["tokens"])
            tokens, mask = (jnp.reshape(batch[name], (-1, shape[-1])) for name in ("tokens", "attention_mask"))
            if adapted is None:
                found = plain(frozen, tokens, mask, key=key)
            elif key is None:
                found = adapted(trainable, frozen, tokens, attention_mask=mask)
            else:
                mine, theirs = jax.random.split(key)
                found = adapted(trainable, frozen, tokens, attention_mask=mask, key=mine, peft=Call(key=theirs))
            return jnp.reshape(found, (*shape[:-1], -1))

        return apply

    def loss(self, loaded: Loaded, apply: Apply, penalty: Penalty | None) -> LossFn:
        return losses.embedding(apply, **loaded.config.objective.options("contrastive"), penalty=penalty)

    def load_data(self, job: JobConfig, tokenizer: Tokenizer) -> dict[str, Groups]:
        d: EmbeddingData = job.data
        notes: list[str] = []
        table = tables.read(d, notes)
        sides = {"anchor": d.anchor, "positive": d.positive, **({} if d.negative is None else {"negative": d.negative})}
        texts = {name: tables.fill(d, table, template) for name, template in sides.items()}
        made = encode_groups(tokenizer, texts, max_length=d.max_length)
        if d.score is not None and d.min_score is not None:
            made = dataclasses.replace(made, scores=_numbers(table, d.score), least=d.min_score)
        parts = split(len(made), test=d.test, validation=d.validation, seed=d.seed)
        found = {name: made.take(part) for name, part in zip(SPLITS, parts, strict=True)}
        learnt = np.flatnonzero(found["train"].pairs)
        if not len(learnt):
            raise EmptyDataError(f"no training row has a score of {d.min_score} or more; lower data.min_score")
        if low := len(found["train"]) - len(learnt):
            notes.append(f"left out: {low:,} training rows have a score below data.min_score = {d.min_score}")
        return {**found, "train": dataclasses.replace(found["train"].take(learnt), notes=tuple(notes))}

    def batches(self, job: JobConfig, rows: Groups, shuffle: bool) -> GroupBatches:
        return GroupBatches(rows, job.train.batch_size, job.data.widths, seed=job.seed, shuffle=shuffle)

    def evaluate(self, loaded: Loaded, apply: Apply, trainable: Any, frozen: Any, batches: Iterable[Any]) -> Metrics:
        return self._judged(loaded, apply, trainable, frozen, batches).metrics

    def _judged(self, loaded: Loaded, apply: Apply, trainable: Any, frozen: Any, batches: Iterable[Any]) -> Judged:
        return evaluate_embeddings(apply, trainable, frozen, batches, **loaded.config.objective.options("contrastive"))

    def told(self, job: JobConfig, data: Mapping[str, Groups], made: GroupBatches) -> list[str]:
        counts = ", ".join(f"{len(part):,} {name}" for name, part in data.items())
        cut = sum(part.truncated for part in data.values())
        return [f"rows: {counts}; {len(made):,} batches of {made.batch_size} x {made.sides} texts an epoch, "
                f"{made.waste():.0%} of them padding", *data["train"].notes,
                *([f"truncated: {cut:,} rows have a text longer than data.max_length = {job.data.max_length} tokens"]
                  if cut else [])]

    def test(self, adapted: Adapted, rows: Groups, compare: bool) -> Tested:
        loaded = adapted.loaded
        made = self.batches(loaded.config, rows, False)

        def batches() -> Iterable[Any]:
            return (made.make(0, i) for i in range(len(made)))

        found = self._judged(loaded, adapted.apply, adapted.trainable, adapted.frozen, batches())
        order = np.concatenate([part for part, _ in made.epoch(0)])
        order = order[rows.pairs[order]]
        hits = found.right[np.argsort(order)]
        before = self.evaluate(loaded, loaded.unadapted, None, loaded.params, batches()) if compare else {}
        return Tested(found.metrics, before, hits=hits)

    def vectors(self, adapted: Adapted, texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        config = adapted.loaded.config
        made = encode_groups(adapted.loaded.tokenizer, {"text": texts}, max_length=config.data.max_length)
        batches = GroupBatches(made, min(config.train.batch_size, len(texts)), config.data.widths)
        score = jax.jit(lambda t, f, batch: objectives.unit(adapted.apply(t, f, batch)))
        found: dict[int, np.ndarray] = {}
        for i, (rows, _) in enumerate(batches.epoch(0)):
            vectors = np.asarray(score(adapted.trainable, adapted.frozen, batches.make(0, i)))[:, 0]
            found.update(zip(rows.tolist(), vectors, strict=False))
        notes = [f"{made.truncated} of {len(texts)} texts were truncated to {config.data.max_length} tokens"] * bool(
            made.truncated)
        return np.stack([found[i] for i in range(len(texts))]), notes

    def predict(self, adapted: Adapted, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return how near the two halves of each text are (apart by a tab), or each text to the first of them."""
        pairs = [text.split("\t") for text in texts]
        if any(len(pair) != len(pairs[0]) or len(pair) > 2 for pair in pairs):
            raise ConfigError("some texts are two with a tab between them and some are not; give pairs, or none")
        if len(pairs[0]) == 1:
            if len(texts) < 2:
                raise ConfigError("one text alone is near to nothing; give several, which are compared with the first, "
                                  "or two with a tab between them, or --out for the vector itself")
            pairs = [[texts[0], text] for text in texts[1:]]
        both = [text for pair in pairs for text in pair]
        known = list(dict.fromkeys(both))
        vectors, notes = self.vectors(adapted, known)
        rows = {text: vectors[i] for i, text in enumerate(known)}
        return [f"{float(rows[a] @ rows[b]):.4f}\t{a}\t{b}" for a, b in pairs], notes

    def headline(self, metrics: Mapping[str, float]) -> str:
        return f"MRR {metrics['mrr']:.4f}"

    def line(self, metrics: Mapping[str, float]) -> str:
        said = (f"recall@1 {metrics['recall_at_1']:.4f}, MRR {metrics['mrr']:.4f}, loss {metrics['loss']:.4f}, "
                f"{metrics['count']:,.0f} pairs")
        return said + (f", Spearman {metrics['spearman']:.4f}" if "spearman" in metrics else "")

    def result(self, summary: RunSummary) -> list[tuple[str, str]]:
        new, old = summary.test, summary.before
        names = {"recall_at_1": "test recall@1", "mrr": "test MRR", "spearman": "Spearman"}
        lines = [(said, (f"{old[name]:.4f} before, " if name in old else "") + f"{new[name]:.4f}"
                  + (" after" if name in old else "")) for name, said in names.items() if name in new]
        first, said = lines[0]
        return [(first, f"{said}, among {new['count']:,.0f} pairs; best step {summary.best_step} of {summary.steps}"),
                *lines[1:]]


def _numbers(table: Table, name: str) -> np.ndarray:
    """Return a column of numbers."""
    found = []
    for i, value in enumerate(table.column(name)):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not np.isfinite(number):
            raise ColumnError(f"{table.where}: {name!r} of row {i} (counted from 0) is {value!r:.60}, expected a "
                              "number; fill it in or leave the row out")
        found.append(number)
    return np.array(found, np.float32)
