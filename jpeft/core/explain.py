"""What will train, what it costs, and how: the table to read before a run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jpeft.core.plan import Entry, Plan
from jpeft.core.sharding import described
from jpeft.core.site import Site


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted leaf.

    Attributes:
        path: the leaf.
        shape: its shape.
        use: how the model uses it.
        method: class name of its method.
        trainable: live trainable values.
        frozen: values of theta that are not trained.
        rule: how the method enters: `fused into ...`, `array`, `output of ...`, or `materialised at ...`.
        flops: extra dot FLOPs of one forward call with the example arguments.
        placement: how the leaf and each entry of theta are divided over a mesh; empty where `explain` was not told.
    """

    path: str
    shape: tuple[int, ...]
    use: str
    method: str
    trainable: int
    frozen: int
    rule: str
    flops: int
    placement: str = ""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The rows and their totals; `str` and `repr` are the printed table.

    Attributes:
        rows: one for each adapted leaf.
        untouched: leaves that no method rides on.
        parameters: values of the base.
        trainable: live trainable values.
        base_flops: dot FLOPs of the base's own weights in one forward call with the example arguments.
        flops: what the methods add.
        virtual_tokens: tokens that the batch is padded by.
    """

    rows: tuple[Row, ...]
    untouched: tuple[Site, ...]
    parameters: int
    trainable: int
    base_flops: int
    flops: int
    virtual_tokens: int

    @property
    def percent(self) -> float:
        """Trainable values in percent of the base's."""
        return 100.0 * self.trainable / max(self.parameters, 1)

    @property
    def materialised(self) -> tuple[Row, ...]:
        """Rows whose adapted weight is formed whole."""
        return tuple(r for r in self.rows if r.rule.startswith("materialised"))

    def __str__(self) -> str:
        head = ("leaf", "shape", "use", "method", "trainable", "rule", "extra FLOPs")
        body = [(r.path, "x".join(map(str, r.shape)) or "scalar", r.use, r.method, f"{r.trainable:,}", r.rule,
                 f"{r.flops:,}") for r in self.rows]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        right = {4, 6}
        lines = ["  ".join(c.rjust(w) if i in right else c.ljust(w)
                           for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
                 for line in (head, *body)]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines += [f"on the mesh: {r.path}: {r.placement}" for r in self.rows if r.placement]
        extra = f", {100.0 * self.flops / self.base_flops:.2f} % of the base's" if self.base_flops else ""
        lines.append(f"trainable {self.trainable:,} of {self.parameters:,} parameters ({self.percent:.3f} %) on "
                     f"{len(self.rows)} leaves; {len(self.untouched)} leaves untouched; "
                     f"extra FLOPs {self.flops:,}{extra}"
                     + (f"; {self.virtual_tokens} virtual tokens" if self.virtual_tokens else ""))
        return "\n".join(lines)

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"rows": [dataclasses.asdict(r) for r in self.rows], "parameters": self.parameters,
                "trainable": self.trainable, "percent": self.percent, "base_flops": self.base_flops,
                "flops": self.flops, "untouched": [s.path for s in self.untouched],
                "virtual_tokens": self.virtual_tokens}


def site_flops(site: Site) -> int:
    """Dot FLOPs of a leaf's own contractions in one forward call with the example arguments."""
    return 2 * site.in_size * site.out_size * site.rows if site.use in ("linear", "conv") else 0


def _rule(plan: Plan, entry: Entry) -> str:
    names = ", ".join(dict.fromkeys(c.split(" @ ")[0] for c in entry.site.consumers))
    if entry.method.hooks:
        return f"output of {names}"
    if entry.method.dense:
        return "array"
    if entry.path in plan.materialise and entry.site.problems:
        return f"materialised at {entry.site.problems[0]}"
    return f"fused into {names}"


def explain(plan: Plan, *, shardings: Any = None) -> Explanation:
    """Say what a plan trains: leaf, use, method, size, how it enters, extra FLOPs, totals and percent.

    Args:
        plan: the plan.
        shardings: what `jpeft.shardings` returned, to be told how each entry is divided over a mesh, and which are
            whole on every device by choice.

    Returns:
        The data; printing it prints the table.

    Raises:
        ShardingError: `shardings` is something else.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
        >>> plan = jpeft.plan(lambda p, x: x @ p["w"], params, (x,), {"w": jpeft.LoRA(rank=2)})
        >>> jpeft.explain(plan).trainable
        24
    """
    rows = []
    where = {} if shardings is None else described(plan, shardings)
    for e in plan.entries:
        per_row, per_call = e.method.flops(e.site)
        frozen = sum(math.prod(s.shape) for s in e.shapes()[1].values())
        rows.append(Row(e.path, e.site.shape, e.site.use, type(e.method).__name__, e.count(), frozen, _rule(plan, e),
                        per_row * e.site.rows + per_call, where.get(e.path, "")))
    adapted = {r.path for r in rows}
    total = int(sum(np.prod(s.shape, dtype=np.int64) for s in plan.sites))
    return Explanation(tuple(rows), tuple(s for s in plan.sites if s.path not in adapted), total,
                       sum(r.trainable for r in rows), sum(site_flops(s) for s in plan.sites),
                       sum(r.flops for r in rows), plan.virtual_tokens)
