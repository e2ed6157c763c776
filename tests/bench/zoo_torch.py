"""What `zoo.py` measures of transformers and peft on torch; the last line of the output is JSON. Needs no jax."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import peft
import torch
import transformers
from parity.memory import Memory


def read(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load(folder: Path) -> dict[str, Any]:
    tiny = transformers.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                    vocab_size=16)
    transformers.LlamaForCausalLM(tiny)
    memory, start = Memory(), time.perf_counter()
    model = read(folder)
    seconds = time.perf_counter() - start
    memory.stop()
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    return {"seconds": seconds, "growth": memory.growth, "model": sum(sizes), "leaf": max(sizes)}


def train(folder: Path, rows: int, length: int, runs: int) -> dict[str, Any]:
    model = read(folder)
    ids = torch.tensor(np.random.RandomState(0).randint(0, model.config.vocab_size, (rows, length))).long()
    memory = Memory()
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.0)
    seconds, losses = [], []
    for _ in range(runs + 2):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            memory.mark()
    memory.stop()
    return {"first": seconds[0], "seconds": seconds[2:], "losses": losses, "steps_peak": memory.last,
            "trainable": sum(p.numel() for p in trainable)}


def decode(folder: Path, new: int, runs: int) -> dict[str, Any]:
    model = read(folder).eval()
    model.generation_config.eos_token_id = None
    ids, seconds = torch.tensor(np.load(folder / "prompts.npy")).long(), []
    with torch.no_grad():
        for _ in range(runs + 1):
            start = time.perf_counter()
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                                 max_new_tokens=new)
            seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "seconds": seconds[1:], "tokens": out[:, ids.shape[1]:].tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("load", "train", "decode"))
    parser.add_argument("--folder", type=Path)
    for name, value in (("rows", 4), ("length", 256), ("new", 128), ("runs", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    told = {"load": lambda: load(args.folder), "train": lambda: train(args.folder, args.rows, args.length, args.runs),
            "decode": lambda: decode(args.folder, args.new, args.runs)}[args.what]()
    print(json.dumps({**told, "about": f"torch {torch.__version__}, transformers {transformers.__version__}, "
                                       f"peft {peft.__version__}, {args.threads} threads"}))


if __name__ == "__main__":
    main()
