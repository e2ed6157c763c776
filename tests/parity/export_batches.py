"""Write what both sides of the yardstick share into one file.

    python tests/parity/export_batches.py batches.npz lora=configs/quickstart.yaml full=configs/quickstart_full.yaml

The rows, their split, the batches and their order are those that `jpeft train` uses with these configurations, which
may differ in their rules and learning rates only. `--set a.b=value` applies to all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from parity import batchfile
from parity.batchfile import FIELDS, Batch, BatchFile

from jpeft.cli import build, config
from jpeft.cli.config import JobConfig
from jpeft.data.batches import Batches
from jpeft.interop.sources import resolve
from jpeft.train.optimizer import schedule

MAY_DIFFER = ("rules", "train.learning_rate")


def jobs(files: dict[str, Path], settings: Sequence[str]) -> dict[str, JobConfig]:
    """Read the configuration of each method and see that they are of one experiment."""
    found = {method: config.load(path, settings) for method, path in files.items()}
    first = found["lora"]
    for method, job in found.items():
        other = [path for path in first.differences(job) if not path.startswith(MAY_DIFFER)]
        if other:
            raise SystemExit(f"{files[method]} and {files['lora']} differ in {', '.join(other)}: not comparable")
    if first.train.optimizer != "adamw" or first.train.lora_plus is not None:
        raise SystemExit("the torch side has AdamW with one learning rate alone")
    return found


def adapter(job: JobConfig) -> tuple[int, float]:
    """Return rank and alpha of the one LoRA rule."""
    rules = [rule for rule in job.rules.values() if rule["method"] == "LoRA"]
    if len(rules) != 1 or set(rules[0]) - {"method", "rank", "alpha"}:
        raise SystemExit(f"the torch side has one LoRA rule of rank and alpha, found {rules}")
    return int(rules[0]["rank"]), float(rules[0]["alpha"])


def batch(batches: Batches, epoch: int, number: int, rows: np.ndarray) -> Batch:
    made = batches.make(epoch, number)
    index = np.full(len(made["labels"]), -1, np.int32)
    index[: len(rows)] = rows
    if not np.array_equal(index >= 0, made["weights"] > 0):
        raise SystemExit(f"batch {number} of epoch {epoch} has weights on other rows than its {len(rows)} first")
    inputs = {name: made[name] for name in FIELDS if name in made}
    return Batch(inputs, made["labels"], made["weights"], index)


def all_of(batches: Batches, epochs: int = 1) -> tuple[Batch, ...]:
    return tuple(batch(batches, e, i, rows) for e in range(epochs) for i, (rows, _) in enumerate(batches.epoch(e)))


def parts(job: JobConfig) -> tuple[dict[str, Batches], float]:
    """Return the batches of each split, as `jpeft train` makes them, and the one rate of dropout."""
    loaded = build.load_model(job)
    made = {name: build.batches(job, examples, shuffle=name == "train")
            for name, examples in build.load_data(job, loaded.tokenizer).items()}
    c = loaded.model.config
    if len({c.dropout, c.attention_dropout, c.head_dropout}) > 1:
        raise SystemExit("the torch side has one rate of dropout for all places; set model.dropout")
    return made, c.dropout


def export(found: dict[str, JobConfig]) -> BatchFile:
    """Return the shared file of these jobs."""
    job = found["lora"]
    made, dropout = parts(job)
    per_epoch = len(made["train"])
    steps = per_epoch * job.train.epochs
    rate = schedule(job.train.schedule, 1.0, job.train.warmup, steps)
    rank, alpha = adapter(job)
    settings: dict[str, Any] = {
        "seed": job.seed, "classes": len(job.data.names), "dropout": dropout, "rank": rank, "alpha": alpha,
        "weight_decay": job.train.weight_decay, "clip": job.train.clip, "betas": list(job.train.betas or (0.9, 0.999)),
        "eps": job.train.eps, "eval_every": job.train.eval_every or per_epoch,
        "learning_rate": {method: one.train.learning_rate for method, one in found.items()},
        "model_folder": str(resolve(job.model.source, job.model.sha256).absolute())}
    return BatchFile(settings, np.array([float(rate(step)) for step in range(steps)]),
                     all_of(made["train"], job.train.epochs), all_of(made["validation"]), all_of(made["test"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("configs", nargs="+", help="method=file.yaml; lora must be among them")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    args = parser.parse_args()
    files = {method: Path(path) for method, _, path in (text.partition("=") for text in args.configs)}
    contents = export(jobs(files, args.settings))
    batchfile.write(args.out, contents)
    tests = sum(int((batch.index >= 0).sum()) for batch in contents.test)
    print(f"{args.out}: {len(contents.train)} steps, {tests} test examples, identity {contents.identity()}")


if __name__ == "__main__":
    main()
