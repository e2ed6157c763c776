"""A random decoder with a chat template, rows and texts on disk, and configurations that train on them in seconds."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import NamedTuple

import jax
import tokenizers

from jpeft.interop.pretrained import save_pretrained
from jpeft.interop.tokenizer import MAIN, Tokenizer
from jpeft.models.decoder import Decoder
from jpeft.models.decoder_config import DecoderConfig
from jpeft.models.rope import Rope

SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")
ROLES = ("system", "user", "assistant", "helpful")
GOOD, BAD, OTHER = ("good", "fine", "warm"), ("bad", "dull", "cold"), ("film", "plot", "cast", "a", "the", "is")
ANSWERS = ("negative", "positive")
TEMPLATE = ("{% if messages[0]['role'] != 'system' %}<|im_start|>system helpful<|im_end|>\n{% endif %}"
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PLAYS = ("hamlet", "lear", "macbeth", "othello")


class TinyLm(NamedTuple):
    """Where the model and the rows are."""

    model: Path
    pairs: Path
    chats: Path
    plays: Path

    def config(self, data: str, *more: str) -> str:
        """Return a configuration whose data section is `data`."""
        return "\n".join([
            f"model: {{source: {self.model}, task: causal-lm}}", f"data: {data.format(**self._asdict())}",
            "rules: {attention: {method: LoRA, rank: 2, alpha: 4}}",
            "train: {steps: 4, batch_size: 2, learning_rate: 1e-2, warmup: 0, eval_every: 2, keep: 3}", *more])


PAIRS = ("{{format: pairs, source: {pairs}, chat: true, prompt: 'the {{text}}', completion: '{{label}}', "
         "names: {{label: [negative, positive]}}, test: 10, validation: 8, max_length: 48}}")
CHATS = "{{format: chat, source: {chats}, test: 8, validation: 8, max_length: 64}}"
TEXTS = ("{{format: text, source: {plays}, test: [macbeth], validation: [lear], max_length: 16, test_windows: 6, "
         "validation_windows: 4, dialogue: '^> (.*)$'}}")
GENERATE = "test: {generate: {rows: 7, max_new_tokens: 3, batch_size: 4, samples: 2}}"


def make(folder: Path, seed: int = 0) -> TinyLm:
    """Write the checkpoint, the rows and the texts."""
    words = [*SPECIAL, *ROLES, *GOOD, *BAD, *OTHER, *ANSWERS, ">"]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(list(SPECIAL))
    special = {"pad_token": 0, "unk_token": 1, "eos_token": 3}
    said = {role: SPECIAL[i] for role, i in special.items()}
    files = {MAIN: raw.to_str().encode(), "tokenizer_config.json": json.dumps(said).encode(),
             "chat_template.jinja": TEMPLATE.encode()}
    model = Decoder(DecoderConfig(vocab_size=len(words), hidden_size=16, layers=2, heads=2, kv_heads=1, head_size=8,
                                  mlp_size=32, positions=64, rope=Rope(), tied=True))
    save_pretrained(folder / "model", model, model.init(jax.random.key(seed)),
                    Tokenizer(raw, 0, 64, False, special, files, TEMPLATE))
    draw = random.Random(0)
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file)
        write.writerow(["text", "label"])
        for i in range(60):
            write.writerow([" ".join([draw.choice(GOOD if i % 2 else BAD), *draw.sample(OTHER, draw.randint(1, 4))]),
                            i % 2])
    chats = [{"messages": [
        {"role": "user", "content": draw.choice(GOOD if i % 2 else BAD)},
        {"role": "assistant", "content": ANSWERS[i % 2]}, {"role": "user", "content": "is the film good"},
        {"role": "assistant", "content": ANSWERS[i % 2]}]} for i in range(40)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "plays").mkdir()
    for name in PLAYS:
        lines = [draw.choice(("", "> ")) + " ".join(draw.choices([*GOOD, *BAD, *OTHER], k=6)) for _ in range(30)]
        (folder / "plays" / f"{name}.md").write_text("\n".join([*lines, "> good film"]) + "\n")
    return TinyLm(folder / "model", folder / "pairs.csv", folder / "chats.jsonl", folder / "plays")
