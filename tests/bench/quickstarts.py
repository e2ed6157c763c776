"""Milliseconds of a training step of every quickstart configuration, interleaved: medians, and ratios to LoRA's.

    python tests/bench/quickstarts.py [--rounds 7] [--width 32]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jpeft.cli import build, config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def prepare(path: Path, width: int) -> tuple[Any, Any, Any, Any]:
    """Return the compiled step of a configuration for batches of `width` tokens, and its arguments."""
    job = config.load(path)
    loaded = build.load_model(job)
    made = build.batches(job, build.load_data(job, loaded.tokenizer)["train"], shuffle=True)
    start = build.training(loaded, made)
    batch = next(made.make(0, i) for i, (_, found) in enumerate(made.epoch(0)) if found == width)
    return start.step.lower(start.state, start.frozen, batch).compile(), start.state, start.frozen, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=32, help="tokens of a row; a bucket of the configurations")
    args = parser.parse_args()
    paths = sorted(CONFIGS.glob("quickstart*.yaml"))
    ready: dict[str, tuple[Any, Any, Any, Any]] = {}
    for path in paths:
        print(f"compiling {path.stem}", file=sys.stderr)
        ready[path.stem] = prepare(path, args.width)
    states = {name: one[1] for name, one in ready.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for number in range(args.rounds + 1):
        for name, (step, _, frozen, batch) in ready.items():
            begin = time.perf_counter()
            states[name], _ = jax.block_until_ready(step(states[name], frozen, batch))
            if number:
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: 1000 * statistics.median(found) for name, found in seconds.items()}
    print("| configuration | ms/step | of LoRA's |\n|---|---:|---:|")
    for name, found in sorted(medians.items(), key=lambda item: item[1]):
        print(f"| {name} | {found:,.0f} | {found / medians['quickstart']:.2f} |")


if __name__ == "__main__":
    main()
