"""A tag for each word: named entities, parts of speech."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.cli.config import JobConfig
from jpeft.cli.datakinds import TagRows, TagText
from jpeft.cli.tasks.base import SPLITS, Adapted, Apply, Loaded, Metrics, Tested
from jpeft.cli.tasks.classification import Classification
from jpeft.data.split import split
from jpeft.data.table import read_table
from jpeft.data.tags import TagBatches, encode_tags, read_conll
from jpeft.errors import ConfigError
from jpeft.interop import sources
from jpeft.interop.tokenizer import Tokenizer
from jpeft.train.evaluate import evaluate_tags

if TYPE_CHECKING:
    from jpeft.cli.runs import RunSummary


class TokenClassification(Classification):
    """A tag for each word."""

    monitor: ClassVar[str] = "f1"

    def load_data(self, job: JobConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        d: TagRows | TagText = job.data
        where = sources.resolve(d.source, d.sha256)
        if isinstance(d, TagText):
            table = read_conll(where, token=d.token, tag=d.tag)
            words, tags = table.column("tokens"), table.column("tags")
        else:
            table = read_table(where)
            words, tags = table.column(d.tokens), table.column(d.tags)
        made = encode_tags(tokenizer, words, tags, labels=d.labels, max_length=d.max_length)
        parts = split(len(made), test=d.test, validation=d.validation, seed=d.seed)
        found = {name: made.take(part) for name, part in zip(SPLITS, parts, strict=True)}
        return {**found, "train": dataclasses.replace(found["train"], lost=made.lost)}

    def batches(self, job: JobConfig, rows: Any, shuffle: bool) -> Any:
        return TagBatches(rows, job.train.batch_size, job.data.widths, seed=job.seed, shuffle=shuffle)

    def evaluate(self, loaded: Loaded, apply: Apply, trainable: Any, frozen: Any, batches: Iterable[Any]) -> Metrics:
        return evaluate_tags(apply, trainable, frozen, batches, loaded.config.data.names)

    def told(self, job: JobConfig, data: Mapping[str, Any], made: Any) -> list[str]:
        counts = ", ".join(f"{len(part):,} {name}" for name, part in data.items())
        words = sum(part.words for part in data.values())
        lost, cut = data["train"].lost, sum(part.truncated for part in data.values())
        return [f"sentences: {counts}, {words:,} words; {len(made):,} batches of {made.batch_size} an epoch, "
                f"{made.waste():.0%} of them padding",
                *([f"not there: {lost:,} words have no label: {cut:,} sentences are longer than data.max_length = "
                   f"{job.data.max_length} tokens, and the tokenizer drops some words"] if lost else [])]

    def test(self, adapted: Adapted, rows: Any, compare: bool) -> Tested:
        made = self.batches(adapted.loaded.config, rows, False)
        batches = (made.make(0, i) for i in range(len(made)))
        return Tested(self.evaluate(adapted.loaded, adapted.apply, adapted.trainable, adapted.frozen, batches))

    def predict(self, adapted: Adapted, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return for each text its words, apart by spaces, each with its tag behind a slash."""
        config = adapted.loaded.config
        if empty := [number for number, text in enumerate(texts, 1) if not text.split()]:
            raise ConfigError(f"text {empty[0]} has no words; leave it out")
        words = [text.split() for text in texts]
        tagged = encode_tags(adapted.loaded.tokenizer, words, None, labels=config.data.labels,
                             max_length=config.data.max_length)
        made = TagBatches(tagged, min(config.train.batch_size, len(texts)), config.data.widths)
        score = jax.jit(lambda t, f, tokens, mask, types: jnp.argmax(adapted.apply(t, f, tokens, mask, types), -1))
        lines, first = [""] * len(texts), tagged.places or []
        for i, (rows, _) in enumerate(made.epoch(0)):
            batch = made.make(0, i)
            said = np.asarray(score(adapted.trainable, adapted.frozen, batch["tokens"], batch["attention_mask"],
                                    batch.get("token_types")))
            for row, found in zip(rows, said, strict=False):
                tags = [config.data.names[found[place]] if place >= 0 else "?" for place in first[row]]
                lines[row] = " ".join(f"{word}/{tag}" for word, tag in zip(words[row], tags, strict=True))
        notes = [f"{tagged.lost} words have no tag (?): texts are cut at {config.data.max_length} tokens, and the "
                 "tokenizer drops some words"] if tagged.lost else []
        return lines, notes

    def headline(self, metrics: Mapping[str, float]) -> str:
        return f"F1 {metrics['f1']:.4f}"

    def line(self, metrics: Mapping[str, float]) -> str:
        return (f"F1 {metrics['f1']:.4f} (precision {metrics['precision']:.4f}, recall {metrics['recall']:.4f}, "
                f"{metrics['entities']:,.0f} entities), accuracy {metrics['accuracy']:.4f}, loss "
                f"{metrics['loss']:.4f}, {metrics['count']:,.0f} words")

    def result(self, summary: RunSummary) -> list[tuple[str, str]]:
        new = summary.test
        return [("test F1", f"{new['f1']:.4f} on {new['entities']:,.0f} entities (precision {new['precision']:.4f}, "
                            f"recall {new['recall']:.4f}), best step {summary.best_step} of {summary.steps}"),
                ("test accuracy", f"{new['accuracy']:.4f} on {new['count']:,.0f} words")]
