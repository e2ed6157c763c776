"""Tables: for a terminal by rich, for a document as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import rich.box
import rich.table

from jpeft.cli.runs import RunSummary
from jpeft.cli.tasks import TASKS

Rows = Sequence[Sequence[str]]
COMPARED = ("run", "method", "lr", "test accuracy", "trainable", "%", "adapter", "ms/step", "temp memory", "seconds")
_ALONE = "classification"  # where all runs are of this task, the head of the column says what the number is


def size(count: int) -> str:
    """Return a number of bytes for people.

    Example:
        >>> size(1_300_000), size(512)
        ('1.3 MB', '512 B')
    """
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def heads(summaries: Sequence[RunSummary]) -> tuple[str, ...]:
    """Return the heads of the columns that runs are compared in."""
    alone = all(s.task == _ALONE for s in summaries)
    return tuple("test" if name == "test accuracy" and not alone else name for name in COMPARED)


def compared(summaries: Sequence[RunSummary]) -> list[list[str]]:
    """Return a row of `heads(summaries)` for each run."""
    alone = heads(summaries) == COMPARED
    return [[s.name, s.methods, f"{s.learning_rate:g}",
             f"{s.test['accuracy']:.4f}" if alone else TASKS[s.task].headline(s.test), f"{s.trainable_parameters:,}",
             f"{s.percent:.3f}", size(s.adapter_bytes), "-" if s.ms_per_step is None else f"{s.ms_per_step:.1f}",
             size(s.temp_bytes), f"{s.seconds:.0f}"] for s in summaries]


def markdown(head: Sequence[str], rows: Rows, left: int = 1) -> str:
    r"""Return a Markdown table; columns from number `left` on are aligned to the right.

    Example:
        >>> print(markdown(("run", "accuracy"), [["a|b", "0.8"]]))
        | run | accuracy |
        |---|---:|
        | a\|b | 0.8 |
    """
    lines = [head, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text.insert(1, "|" + "|".join("---" if i < left else "---:" for i in range(len(head))) + "|")
    return "\n".join(text)


def table(head: Sequence[str], rows: Rows, left: int = 1) -> rich.table.Table:
    """Return the same for a terminal."""
    made = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        made.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def result(s: RunSummary) -> list[str]:
    """Return the lines that a run ends with."""
    memory = size(s.peak_host_bytes) + (f" host, {size(s.peak_device_bytes)} device" if s.peak_device_bytes else "")
    speed = "" if s.ms_per_step is None else f", {s.ms_per_step:.1f} ms/step on {s.device}"
    many = f"{s.examples_per_second:.0f} examples/s" if s.task == _ALONE or s.tokens_per_second is None else (
        f"{s.tokens_per_second:,.0f} tokens/s")
    return [
        *(f"{name:<15} {said}" for name, said in TASKS[s.task].result(s)),
        f"trainable       {s.trainable_parameters:,} of {s.base_parameters:,} parameters ({s.percent:.3f} %)",
        f"adapter file    {size(s.adapter_bytes)}, the model {size(s.model_bytes)}",
        f"peak memory     {memory}; a step's temporaries {size(s.temp_bytes)}",
        f"time            {s.seconds:.1f} s, {many}{speed}; "
        f"{s.compile_seconds:.1f} s of compiling before",
        *([] if s.step_flops is None or not s.ms_per_step else [f"speed           {_speed(s)}"]),
        *([f"mesh            {', '.join(f'{axis}={n}' for axis, n in s.mesh.items())}, {s.processes} "
           f"process{'es' if s.processes > 1 else ''}; each device holds "
           + ", ".join(f"{name} {size(count)}" for name, count in s.device_bytes.items())] if s.mesh else []),
        *(f"note            {note}" for note in s.notes),
    ]


def _speed(s: RunSummary) -> str:
    """Say how fast a step is: tokens, products, and their share of what the device can do."""
    tokens = "" if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f} tokens/s, "
    per_second = 1000 * (s.step_flops or 0.0) / (s.ms_per_step or 1.0)
    share = f"the peak of {s.device} is not known" if s.mfu is None else f"{100 * s.mfu:.1f} % MFU of bfloat16's peak"
    return f"{tokens}{per_second:.3g} FLOP/s; {share}"
