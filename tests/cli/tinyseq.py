"""A few pairs that a tiny encoder-decoder of characters learns in seconds, and files of names as babel has them."""

from __future__ import annotations

import csv
import pickle
import random
from pathlib import Path

T5 = ("{model_type: t5, d_model: 16, d_kv: 8, d_ff: 32, num_layers: 1, num_decoder_layers: 1, num_heads: 2, "
      "dropout_rate: 0.0}")
LORA = "{all-linear: {method: LoRA, rank: 2, alpha: 4}}"
FULL = "{'.*': {method: Full}}"
TRAIN = "train: {steps: 4, batch_size: 4, learning_rate: 1e-2, warmup: 0, eval_every: 2}"
GENERATE = "test: {generate: {rows: 5, max_new_tokens: 6, batch_size: 3, samples: 2}}"


def pairs(path: Path, count: int = 40) -> Path:
    """Write words and the same words backwards."""
    draw = random.Random(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file)
        write.writerow(["word", "back"])
        for _ in range(count):
            word = "".join(draw.choices("abcde", k=draw.randint(2, 6)))
            write.writerow([word, word[::-1]])
    return path


def names(folder: Path) -> Path:
    """Write the names of 60 languages in two languages, as babel pickles them."""
    folder.mkdir()
    words = {f"l{i:02d}": "".join(random.Random(i).choices("abcde", k=4)) for i in range(60)}
    for language, change in (("xx", str.lower), ("yy", str.upper)):
        held = {"languages": {key: change(word) for key, word in words.items()}, "territories": {"AA": change("ab")},
                "currency_names": {}, "scripts": {}}
        (folder / f"{language}.dat").write_bytes(pickle.dumps(held))
    return folder


def config(source: str, data: str, rules: str, output: Path) -> str:
    """Return a configuration."""
    return "\n".join([f"model: {{source: {source}, task: seq2seq}}", f"data: {data}", f"rules: {rules}", TRAIN,
                      GENERATE, f"output: {output}"])
