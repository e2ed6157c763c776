"""Training laid out in every way on 1, 2, 4 and 8 simulated devices: `python tests/bench/sharding.py`.

For each cell: the largest difference of a loss from that of one device over the steps, relative; bytes of parameters
(base and adapter) and of the optimiser's state on one device; bytes that one device receives in a step, by kind.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
                           " --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import meshes
from collectives import summary
from support import distance

HEAD = ("| model | method | layout | devices | loss difference | parameters | optimiser | moved per step |",
        "|---|---|---|---:|---:|---:|---:|---|")


def row(subject: str, method: str, layout: str, devices: int, steps: int, below: int) -> str:
    """Return one line of the table."""
    alone = meshes.train(subject, method, "DP", 1, steps, below)
    run = alone if devices == 1 else meshes.train(subject, method, layout, devices, steps, below)
    parameters = meshes.per_device(run.frozen) + meshes.per_device(run.state.trainable)
    moved = ", ".join(f"{kind} {n:,}" for kind, n in summary(run.compiled).items()) or "nothing"
    cells = (subject, method, layout, devices, f"{distance(run.losses, alone.losses):.1e}", f"{parameters:,}",
             f"{meshes.per_device(run.state.opt_state):,}", moved)
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", choices=sorted(meshes.SUBJECTS), default="zoo")
    parser.add_argument("--methods", nargs="+", choices=list(meshes.METHODS), default=list(meshes.METHODS))
    parser.add_argument("--layouts", nargs="+", choices=meshes.LAYOUTS, default=list(meshes.LAYOUTS))
    parser.add_argument("--devices", nargs="+", type=int, choices=(1, 2, 4, 8), default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--below", type=int, default=0, help="adapter entries of fewer bytes are whole on every device")
    args = parser.parse_args()
    print(f"{jax.device_count()} simulated devices, jax {jax.__version__}", *HEAD, sep="\n", flush=True)
    for method in args.methods:
        for layout in args.layouts:
            for devices in args.devices:
                print(row(args.subject, method, layout, devices, args.steps, args.below), flush=True)


if __name__ == "__main__":
    main()
