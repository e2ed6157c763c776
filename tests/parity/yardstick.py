"""The yardstick of the main job: jpeft against peft on torch, with the same data, batches and hyperparameters.

    python tests/parity/yardstick.py run --torch-python /path/to/torch/env/bin/python --seeds 0 1 2
    python tests/parity/yardstick.py table runs/yardstick

`run` does all of it, one process at a time, and prints the table: for each seed it exports the batches, and for each
method (LoRA, full fine-tuning, head alone) it trains with jpeft and with peft. Results lie in `--work`; what is there
already is not done again, so a run that was interrupted goes on. The torch environment needs torch, transformers, peft
and numpy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parity import batchfile, compare

HERE = Path(__file__).resolve().parent
Command = list[str]


def configs(lora: Path) -> dict[str, Path]:
    """Return the configuration of each method: `x.yaml` for LoRA, `x_full.yaml` and `x_head.yaml` beside it."""
    found = {m: lora if m == "lora" else lora.with_stem(f"{lora.stem}_{m}") for m in compare.METHODS}
    absent = [str(path) for path in found.values() if not path.is_file()]
    if absent:
        raise SystemExit(f"there is no {', '.join(absent)}")
    return found


def results(work: Path) -> list[compare.Result]:
    """Read the results in a folder."""
    return [compare.read(path) for side in compare.SIDES for path in sorted(work.glob(f"{side}-*.json"))]


def run(command: Command) -> None:
    """Run a command and stop everything if it fails."""
    print("+", " ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(f"exit status {done.returncode} of {' '.join(command)}")


def drive(
    work: Path, found: dict[str, Path], methods: Sequence[str], seeds: Sequence[int], python: str, threads: int,
    settings: Sequence[str], execute: Callable[[Command], None] = run,
) -> None:
    """Make all results that `work` lacks.

    Args:
        work: folder of batches, runs and results.
        found: configuration of each method.
        methods: which of them to run.
        seeds: of the training; the split has a seed of its own.
        python: interpreter of the torch environment.
        threads: that torch uses.
        settings: `a.b=value` each, for every configuration.
        execute: runs a command; raises if it fails.
    """
    work.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        batches = work / f"batches-{seed}.npz"
        over = [word for setting in (*settings, f"seed={seed}") for word in ("--set", setting)]
        files = [f"{method}={path}" for method, path in found.items()]
        execute([sys.executable, str(HERE / "export_batches.py"), str(batches), *files, *over])
        identity = batchfile.read(batches).identity()
        for method in methods:
            for side in compare.SIDES:
                result = work / f"{side}-{method}-{seed}.json"
                if result.is_file():
                    if compare.read(result).batches != identity:
                        raise SystemExit(f"{result} is of other settings or batches; move it or name another --work")
                    continue
                common = [str(batches), str(result), "--method", method]
                if side == "jpeft":
                    execute([sys.executable, str(HERE / "jpeft_side.py"), *common, "--config", str(found[method]),
                             "--runs", str(work / "runs"), *over])
                else:
                    execute([python, str(HERE / "torch_peft.py"), *common, "--threads", str(threads)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("table", help="print the table of results")
    show.add_argument("work", type=Path)
    go = commands.add_parser("run", help="make what is missing, then print the table")
    go.add_argument("--torch-python", required=True, help="interpreter of an environment with torch and peft")
    go.add_argument("--config", type=Path, default=HERE.parents[1] / "configs" / "quickstart.yaml")
    go.add_argument("--work", type=Path, default=Path("runs/yardstick"))
    go.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    go.add_argument("--methods", nargs="+", choices=compare.METHODS, default=["lora", "full"])
    go.add_argument("--threads", type=int, default=2, help="of torch; XLA takes all cores of the machine")
    go.add_argument("--set", dest="settings", action="append", default=[], help="a.b=value for every configuration")
    args = parser.parse_args()
    if args.command == "run":
        drive(args.work, configs(args.config), args.methods, args.seeds, args.torch_python, args.threads, args.settings)
    print(compare.table(results(args.work)))


if __name__ == "__main__":
    main()
