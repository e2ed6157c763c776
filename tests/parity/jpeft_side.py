"""The jpeft side of the yardstick: `jpeft train`, with its memory watched, then the best adapter on the test batches.

    python tests/parity/jpeft_side.py batches.npz result.json --method lora --config configs/quickstart.yaml

A run of that name in `--runs` that is there already is replaced: a resumed one could not be timed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from parity import batchfile, compare
from parity.batchfile import Batch
from parity.memory import Memory

from jpeft.cli import build, runs
from jpeft.cli.main import main as jpeft_command


def train(words: list[str]) -> tuple[Memory, int]:
    """Run `jpeft train`; memory counts from when model and rows are there, as on the torch side.

    The run's folder is begun when all is compiled: what comes after is the phase of the steps. Returned with the
    memory is the largest resident set until then.
    """
    watched: list[Memory] = []
    compiled: list[int] = []
    load_data, begin = build.load_data, runs.begin

    def load_and_watch(*args: Any) -> Any:
        data = load_data(*args)
        watched.append(Memory())
        return data

    def begin_and_mark(*args: Any) -> None:
        watched[0].mark()
        compiled.append(watched[0].peak)
        begin(*args)

    build.load_data, runs.begin = load_and_watch, begin_and_mark
    try:
        code = jpeft_command(["train", *words])
    finally:
        build.load_data, runs.begin = load_data, begin
    if code:
        raise SystemExit(f"exit status {code} of jpeft train {' '.join(words)}")
    watched[0].stop()
    return watched[0], compiled[0]


def right(adapted: build.Adapted, batches: tuple[Batch, ...]) -> np.ndarray:
    """Return which examples of a split are classified right, in the order of the split."""
    score, found = jax.jit(adapted.apply), {}
    for batch in batches:
        hits = np.argmax(score(adapted.trainable, adapted.frozen, **batch.inputs), -1) == batch.labels
        found |= dict(zip(batch.index.tolist(), hits.tolist(), strict=True))
    found.pop(-1, None)
    return np.array([found[number] for number in sorted(found)], bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batches", type=Path, help="as export_batches.py wrote it, with the same --set")
    parser.add_argument("result", type=Path, help="the JSON file to write")
    parser.add_argument("--method", choices=compare.METHODS, required=True)
    parser.add_argument("--config", type=Path, required=True, help="the configuration of the method")
    parser.add_argument("--runs", type=Path, default=Path("runs/yardstick/runs"), help="folder for the run")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    args = parser.parse_args()
    contents = batchfile.read(args.batches)
    seed = contents.settings["seed"]
    name = f"{args.method}-{seed}"
    folder = args.runs / name
    shutil.rmtree(folder, ignore_errors=True)
    settings = [word for setting in (*args.settings, f"output={args.runs}") for word in ("--set", setting)]
    memory, compiled = train([str(args.config), *settings, "--name", name])
    summary, job = runs.summary(folder), runs.read(folder)
    if summary is None or (job.seed, summary.steps) != (seed, len(contents.train)):
        raise SystemExit(f"{folder} is not the run of {args.batches}: give both the same --set")
    adapted = build.load_adapter(build.load_model(job), folder / runs.ADAPTER)
    correct = right(adapted, contents.test)
    if abs(correct.mean() - summary.test["accuracy"]) > 1e-6:
        raise SystemExit(f"test accuracy is {correct.mean()} on {args.batches}, {summary.test['accuracy']} in {folder}")
    result = {
        "side": "jpeft", "method": args.method, "seed": seed, "batches": contents.identity(),
        "tests": contents.examples("test"), "correct": correct.tolist(), "trainable": summary.trainable_parameters,
        "steps": summary.steps, "step_ms": summary.ms_per_step, "train_s": summary.seconds + summary.compile_seconds,
        "peak_bytes": memory.peak, "growth_bytes": memory.growth,
        "about": {"jax": jax.__version__, "jpeft": importlib.metadata.version("jpeft"), "device": summary.device,
                  "cores": os.cpu_count(), "learning_rate": summary.learning_rate, "compile_s": summary.compile_seconds,
                  "temp_bytes": summary.temp_bytes, "compile_peak_bytes": compiled,
                  "steps_peak_bytes": memory.last,
                  "validation": summary.best.get("accuracy"), "best_step": summary.best_step}}
    compare.write(args.result, result)


if __name__ == "__main__":
    main()
