"""The torch side of the yardstick: peft LoRA (or full fine-tuning, or the head alone) on exported batches.

    python tests/parity/torch_peft.py batches.npz result.json --method lora

Needs torch, transformers, peft and numpy, and nothing of jpeft. Batches, their order, padded lengths, learning rates
and evaluation steps are those of the file. As on the jpeft side: AdamW with decay on matrices alone (no bias, no norm:
what `jpeft.optim.decay_mask` says of these leaves), gradients of the trainable parameters clipped by their global norm
where the settings say so, the parameters of the best validation accuracy kept, the first of equals. Rows that only fill
a batch up are left out here: torch needs no fixed shapes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import peft
import torch
import transformers
from parity import batchfile, compare
from parity.batchfile import Batch, BatchFile
from parity.memory import Memory

NAMES = {"tokens": "input_ids", "attention_mask": "attention_mask", "token_types": "token_type_ids"}
IN_LAYERS = (r".*\.encoder\.layer\.\d+\."
             r"(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)")
HEAD = ("pooler", "classifier")


def build(folder: Path, settings: dict[str, Any], method: str, seed: int) -> torch.nn.Module:
    """Return the classifier with what `method` trains switched on, and all else frozen.

    Args:
        folder: a BERT checkpoint without a classifier.
        settings: of the batch file.
        method: one of `compare.METHODS`.
        seed: of the new classifier, the adapters and dropout.
    """
    torch.manual_seed(seed)
    rate = settings["dropout"]
    model = transformers.BertForSequenceClassification.from_pretrained(
        folder, num_labels=settings["classes"], hidden_dropout_prob=rate, attention_probs_dropout_prob=rate,
        classifier_dropout=rate, dtype=torch.float32)
    with torch.no_grad():
        model.classifier.weight.normal_(0.0, 0.02)
        model.classifier.bias.zero_()
    if method == "lora":
        config = peft.LoraConfig(
            task_type=peft.TaskType.SEQ_CLS, r=settings["rank"], lora_alpha=settings["alpha"], lora_dropout=0.0,
            bias="none", target_modules=IN_LAYERS, modules_to_save=list(HEAD))
        return peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method == "full" or any(part in HEAD for part in name.split(".")))
    return model


def decays(parameter: torch.Tensor) -> bool:
    """Say whether weight decay applies: matrices and tables, not biases and norms."""
    return parameter.ndim >= 2


def optimiser(model: torch.nn.Module, settings: dict[str, Any], peak: float) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if decays(p)], "weight_decay": settings["weight_decay"]},
              {"params": [p for p in trainable if not decays(p)], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=tuple(settings["betas"]), eps=settings["eps"])


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {NAMES[name]: torch.from_numpy(value).long() for name, value in batch.inputs.items()}


def right(model: torch.nn.Module, batches: Sequence[Batch]) -> np.ndarray:
    """Return which examples of a split are classified right, in the order of the split."""
    model.eval()
    found: dict[int, bool] = {}
    with torch.no_grad():
        for batch in map(Batch.real, batches):
            hits = model(**tensors(batch)).logits.argmax(-1).numpy() == batch.labels
            found |= dict(zip(batch.index.tolist(), hits.tolist(), strict=True))
    return np.array([found[number] for number in sorted(found)], bool)


def train(model: torch.nn.Module, contents: BatchFile, peak: float, steps: int | None = None) -> dict[str, Any]:
    """Train, keep the parameters of the best validation accuracy in the model, and say what happened.

    Args:
        model: as `build` returned it.
        contents: the batch file.
        peak: the largest learning rate.
        steps: stop after so many; None: never before the last batch.
    """
    s = contents.settings
    optimizer = optimiser(model, s, peak)
    trainable = [p for p in model.parameters() if p.requires_grad]
    total = len(contents.train) if steps is None else min(steps, len(contents.train))
    losses, seconds, best = [], [], (-1.0, 0, [p.detach().clone() for p in trainable])
    start = time.perf_counter()
    for step in range(total):
        begin = time.perf_counter()
        model.train()
        batch = contents.train[step].real()
        for group in optimizer.param_groups:
            group["lr"] = peak * float(contents.rates[step])
        logits = model(**tensors(batch)).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels).long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if s["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(trainable, s["clip"])
        optimizer.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - begin)
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of step {step + 1} is {losses[-1]}")
        if step + 1 == total or (s["eval_every"] and (step + 1) % s["eval_every"] == 0):
            accuracy = float(right(model, contents.validation).mean())
            print(f"step {step + 1}/{total} loss {np.mean(losses[-50:]):.4f} validation {accuracy:.4f} "
                  f"{1000 * statistics.median(seconds):.1f} ms/step", file=sys.stderr)
            if accuracy > best[0]:
                best = (accuracy, step + 1, [p.detach().clone() for p in trainable])
    wall = time.perf_counter() - start
    with torch.no_grad():
        for parameter, kept in zip(trainable, best[2], strict=True):
            parameter.copy_(kept)
    return {"losses": losses, "seconds": seconds, "wall": wall, "validation": best[0], "best_step": best[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batches", type=Path, help="as export_batches.py wrote it")
    parser.add_argument("result", type=Path, help="the JSON file to write")
    parser.add_argument("--method", choices=compare.METHODS, default="lora")
    parser.add_argument("--lr", type=float, help="peak learning rate; the settings' of this method if left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="stop after so many, to see that it runs")
    parser.add_argument("--model", type=Path, help="checkpoint folder, if not where the settings say")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    contents = batchfile.read(args.batches)
    s = contents.settings
    peak = s["learning_rate"][args.method] if args.lr is None else args.lr
    model = build(args.model or Path(s["model_folder"]), s, args.method, s["seed"])
    memory = Memory()
    told = train(model, contents, peak, args.steps)
    memory.stop()
    correct = right(model, contents.test)
    result = {
        "side": "peft", "method": args.method, "seed": s["seed"], "batches": contents.identity(),
        "tests": contents.examples("test"), "correct": correct.tolist(),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": len(told["losses"]), "step_ms": 1000 * statistics.median(told["seconds"]),
        "train_s": told["wall"],
        "peak_bytes": memory.peak, "growth_bytes": memory.growth,
        "about": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
                  "threads": args.threads, "learning_rate": peak, "validation": told["validation"],
                  "best_step": told["best_step"], "loss": [round(loss, 6) for loss in told["losses"]]}}
    compare.write(args.result, result)
    print(f"{args.method} seed {s['seed']}: test accuracy {correct.mean():.4f} on {len(correct)}, "
          f"{result['trainable']:,} trainable, {result['step_ms']:.1f} ms/step, peak "
          f"{result['peak_bytes'] / 2**20:,.0f} MiB, growth {(memory.growth or 0) / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
