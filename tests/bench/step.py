"""Time of a LoRA step over the floor (forward + input gradients, no adapter): `python tests/bench/step.py`.

Both sides run in one process, interleaved; the figures are medians of 7 runs, their ratio, and full fine-tuning beside.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import transformer as T

import jpeft


def seconds(fns: dict, runs: int) -> dict[str, float]:
    """Median seconds of each function, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in fns}
    for fn in fns.values():
        jax.block_until_ready(fn())
    for _ in range(runs):
        for name, fn in fns.items():
            start = time.perf_counter()
            jax.block_until_ready(fn())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--full", action="store_true", help="time full fine-tuning too")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.default_backend()} x {jax.device_count()}, {args.layers} layers, d {args.d}, "
          f"{args.batch} x {args.length} tokens, rank {args.rank}, median of {args.runs} interleaved runs")
    for scanned in (False, True):
        for remat in (False, True):
            params = T.init(jax.random.key(0), args.layers, args.d, 4 * args.d, scanned)
            x = jax.random.normal(jax.random.key(1), (args.batch, args.length, args.d))

            def apply(p, x, remat=remat):
                return T.apply(p, x, 8, remat)

            plan = jpeft.plan(apply, params, (x,), {"all-linear": jpeft.LoRA(rank=args.rank)})
            trainable, frozen = jpeft.init(plan, params, jax.random.key(2))
            trainable = jax.tree.map(lambda a: a + jnp.asarray(0.01, a.dtype), trainable)
            adapted = jpeft.adapt(apply, plan)
            floor = jax.jit(jax.value_and_grad(lambda x, p, f=apply: T.loss(f(p, x))))
            lora = jax.jit(jax.value_and_grad(lambda t, f, x, g=adapted: T.loss(g(t, f, x))))
            full = jax.jit(jax.value_and_grad(lambda p, x, f=apply: T.loss(f(p, x))))
            fns = {"floor": lambda: floor(x, params), "lora": lambda: lora(trainable, frozen, x)}  # noqa: B023
            if args.full:
                fns["full"] = lambda: full(params, x)  # noqa: B023
            t = seconds(fns, args.runs)
            name = f"{'scanned' if scanned else 'unrolled'}{' + remat' if remat else ''}"
            print(f"{name:18s} floor {t['floor'] * 1e3:7.1f} ms   LoRA {t['lora'] * 1e3:7.1f} ms   "
                  f"ratio {t['lora'] / t['floor']:.2f}"
                  + (f"   full {t['full'] / t['floor']:.2f}" if args.full else ""))


if __name__ == "__main__":
    main()
