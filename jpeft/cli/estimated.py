"""What `jpeft estimate` prints: per device what is held, computed and sent, and what that means on each chip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jpeft.cli.request import Request
from jpeft.cli.tables import size
from jpeft.train.chips import CHIPS, bound
from jpeft.train.traffic import Moved


def lines(request: Request, found: Mapping[str, Any], chips: Sequence[str]) -> list[str]:
    """Return the lines of the answer to a request.

    Args:
        request: what was asked.
        found: what `jpeft.cli.estimate.run` returned.
        chips: names of `CHIPS`.
    """
    mesh = ", ".join(f"{axis} {count}" for axis, count in request.mesh.items())
    methods = "; ".join(_method(pattern, rule) for pattern, rule in request.rules.items())
    share = 100 * found["trainable"] / found["parameters"]
    held = [("base", found["base"], "frozen parameters, by their shardings"),
            ("adapters", found["adapters"], "what trains, and what methods keep frozen, by their shardings"),
            ("optimizer", found["optimizer"], f"{request.optimizer}, by its shardings"),
            ("batch", found["inputs"], "tokens, labels, weights"),
            ("activations", found["activations"], "the compiler's: all that is neither argument nor result in place")]
    wide = {"scores": "the attention scores of one layer are {} in float32; --attention fused leaves them out",
            "fused": "as with a fused attention kernel, without the scores of {} of a layer"}[request.attention]
    kinds = ", ".join(f"{m['kind']} {size(m['sent'])}" for m in found["moved"]) or "nothing"
    devices = found["devices"]
    return [
        f"model        {request.where}, {found['parameters'] / 1e9:.2f} B parameters",
        f"method       {methods}: {found['trainable']:,} trainable ({share:.3f} %)",
        f"step         {found['batch']} x {request.length} tokens in {request.dtype} on {devices} "
        f"device{'s' if devices > 1 else ''} ({mesh}), remat {request.remat}",
        "",
        "each device holds",
        *(f"  {name:<12} {size(count):>10}   {why}" for name, count, why in held),
        f"  {'total':<12} {size(found['total']):>10}",
        f"  {wide.format(size(found['scores']))}",
        "",
        f"computes     {found['flops'] * devices:.3e} operations a step ({found['flops']:.3e} each): matrix "
        "products, loops by their trips",
        f"sends        {size(found['sent'])} from each device a step: {kinds}",
        "",
        "time of a step at least, each alone at its peak",
        *_table(request, found, chips),
        *(["", f"largest batch for {size(int(request.memory))}: {found['batch']} sequences"]
          if request.memory is not None else []),
        *(f"note: {note}" for note in found["notes"]),
        f"compiled for simulated devices, {found['compiled']} time{'s' if found['compiled'] > 1 else ''}, the last in "
        f"{found['seconds']:.1f} s; nothing was allocated",
    ]


def _method(pattern: str, rule: Mapping[str, Any]) -> str:
    fields = ", ".join(f"{name}={value}" for name, value in rule.items() if name not in ("method", "keep_base"))
    return f"{rule['method']}{f'({fields})' if fields else ''} on {pattern}"


def _table(request: Request, found: Mapping[str, Any], chips: Sequence[str]) -> list[str]:
    moved = [Moved(**one) for one in found["moved"]]
    rows: list[tuple[str, ...]] = [("chip", "memory", "compute", "memory", "links", "limit", "tokens/s at most")]
    for name in chips:
        chip = CHIPS[name]
        least = bound(chip, found["flops"], found["product_bytes"], moved, found["full"])
        fits = "fits" if found["total"] <= chip.memory else "too small"
        rows.append((name, f"{size(int(chip.memory))}, {fits}", *(_time(part) for part in least), least.limit,
                     f"{found['tokens'] / least.seconds:,.0f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w)
                             for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
