"""A random encoder, a tokenizer of a few words and a CSV on disk, and the settings that put them into a job."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import NamedTuple

import jax
import tokenizers

from jpeft.interop.pretrained import save_pretrained
from jpeft.interop.tokenizer import Tokenizer
from jpeft.models.encoder import Encoder, EncoderConfig

GOOD, BAD, OTHER = ("good", "fine", "warm"), ("bad", "dull", "cold"), ("film", "plot", "cast", "a", "the", "is")
ROWS = 96


class Tiny(NamedTuple):
    """Where the model and the rows are."""

    model: Path
    data: Path

    def settings(self, output: Path, *more: str) -> list[str]:
        """Return `--set` words that make any quickstart configuration tiny."""
        sets = [f"model.source={self.model}", "model.sha256=null", f"data.source={self.data}", "data.sha256=null",
                "data.test=16", "data.validation=16", "data.max_length=8", "data.buckets=[8]", "train.batch_size=32",
                "train.epochs=1", "train.warmup=0", "train.eval_every=null", "model.dropout=0.0",
                f"output={output}", *more]
        return [word for one in sets for word in ("--set", one)]


def model_config() -> EncoderConfig:
    fields = {"vocab_size": 24, "hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 32, "positions": 32,
              "token_types": 2}
    return EncoderConfig(**fields, dropout=0.1, attention_dropout=0.1, head_dropout=0.1,
                         initializer_range=0.3)  # type: ignore[arg-type]


def make(folder: Path, seed: int = 0) -> Tiny:
    """Write the checkpoint and the rows."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *OTHER]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    model = Encoder(model_config())
    save_pretrained(folder / "model", model, model.init(jax.random.key(seed)), Tokenizer(raw, 0, 32, True))
    return Tiny(folder / "model", rows(folder / "rows.csv"))


def rows(path: Path, label: str = "label", count: int = ROWS, odd: str | None = None) -> Path:
    """Write rows whose label shows in their words; `odd` replaces the label of the last one."""
    draw = random.Random(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file)
        write.writerow(["text", label, "source"])
        for i in range(count):
            kind = i % 2
            text = [draw.choice(GOOD if kind else BAD), *draw.sample(OTHER, draw.randint(1, 4))]
            write.writerow([" ".join(draw.sample(text, len(text))), odd if odd and i == count - 1 else kind,
                            "rotten_tomatoes"])
    return path
