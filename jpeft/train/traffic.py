"""Bytes that a compiled program moves: between devices, and between memory and its matrix products.

Read from the optimised HLO of one device's program, loop trips counted. A collective over a group of `g` devices sends
from each device at least (ring algorithms)

    all-gather         (g - 1) / g * bytes of the result
    reduce-scatter     (g - 1) / g * bytes of the operand
    all-reduce         2 (g - 1) / g * bytes of the result
    all-to-all         (g - 1) / g * bytes of the result
    collective-permute bytes of the result

Two things the compilers of accelerators do that the CPU compiler does not, and that are counted as they do them: an
all-reduce of which every reader takes its own slice is a reduce-scatter; one that a loop only adds up comes once, after
the loop.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jpeft.errors import UncountedError
from jpeft.train.hlo import Computation, Instruction, Module, runs

_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4,
           "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Moved(NamedTuple):
    """What one kind of collective sends.

    Attributes:
        kind: one of `COLLECTIVES`.
        group: devices that exchange.
        calls: how often per step.
        sent: bytes that each device sends per step.
    """

    kind: str
    group: int
    calls: int
    sent: int


def size(shape: str) -> int:
    """Return the bytes of an HLO shape, of all parts of a tuple.

    Example:
        >>> size("(f16[2,3]{1,0}, s32[])")
        16
    """
    total = 0.0
    for kind, dims in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]", shape):
        width = 1 if kind.startswith("f8") else _WIDTHS.get(kind)
        if width is None:
            raise UncountedError(f"the HLO shape {shape!r} has the element type {kind!r}, whose size is not known here")
        total += width * math.prod(int(d.removeprefix("<=")) for d in dims.split(",") if d)
    return int(total)


def collectives(module: Module, devices: int) -> list[Moved]:
    """Return what the devices exchange in one call, by kind and size of the group, most bytes first.

    Args:
        module: the program of one device.
        devices: how many there are, for collectives that name no groups.

    Raises:
        UncountedError: a loop has unknown trips, or a collective is asynchronous.
    """
    total: dict[tuple[str, int], tuple[int, float]] = {}
    for instruction, computation, times, trips in runs(module):
        kind = next((c for c in COLLECTIVES if instruction.op.startswith(c)), None)
        if kind is None or not times:
            continue
        if instruction.op != kind:
            raise UncountedError(f"the collective {instruction.op} ({instruction.name!r}) is asynchronous, which is "
                                 "not counted here; compile for CPU devices")
        group = _group(instruction, devices)
        if group < 2:
            continue
        parts: dict[tuple[str, int], float] = {}
        for name, repeats, sent in _parts(kind, (group - 1) / group, instruction, computation, module, trips):
            key = name, times // trips * repeats
            parts[key] = parts.get(key, 0.0) + sent
        for (name, repeats), sent in parts.items():
            calls, before = total.get((name, group), (0, 0.0))
            total[name, group] = calls + repeats, before + repeats * sent
    return sorted((Moved(kind, group, calls, int(sent)) for (kind, group), (calls, sent) in total.items()),
                  key=lambda one: -one.sent)


def _parts(kind: str, share: float, instruction: Instruction, computation: Computation, module: Module,
           trips: int) -> Iterator[tuple[str, int, float]]:
    """Yield of each array of a collective what it is, how often a loop of `trips` runs it, and the bytes sent."""
    if kind != "all-reduce":
        factor = 1.0 if kind == "collective-permute" else share
        operands = sum(size(computation[name].shape) for name in instruction.operands)
        yield kind, trips, factor * (operands if kind == "reduce-scatter" else size(instruction.shape))
        return
    results = [instruction]
    if instruction.shape.startswith("("):
        results = [other for other in computation.values() if other.op == "get-tuple-element"
                   and other.operands[0] == instruction.name]
    for result in results:
        if _sliced(result, computation, module):
            yield "reduce-scatter", trips, share * size(result.shape)
        else:
            once = trips > 1 and _added_up(result, computation, module)
            yield kind, 1 if once else trips, 2 * share * size(result.shape)


def _added_up(result: Instruction, computation: Computation, module: Module) -> bool:
    """Return whether the body of a loop adds an array to what it carries, and does nothing else with it."""
    readers = [other for other in computation.values() if result.name in other.operands]
    if len(readers) != 1 or computation.root.op != "tuple" or readers[0].name not in computation.root.operands:
        return False
    reader = readers[0]
    if reader.op == "fusion":
        inside = {one.op for one in module.computations[reader.called("calls")[0]].values()}
        if "add" not in inside or not inside <= {"parameter", "add", "copy", "bitcast", "transpose", "convert"}:
            return False
    elif reader.op != "add":
        return False
    carried = [computation[name] for name in reader.operands if name != result.name]
    place = computation.root.operands.index(reader.name)
    return len(carried) == 1 and carried[0].op == "get-tuple-element" and carried[0].attribute("index") == (place,)


def _group(instruction: Instruction, devices: int) -> int:
    """Return the number of devices in each group of a collective."""
    text = instruction.attributes
    if instruction.op == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
        return 2 if pairs and any(a != b for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0])) else 1
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", text)
    if tiled:
        return int(tiled[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return len(listed[1].split(",")) if listed else devices


def _sliced(instruction: Instruction, computation: Computation, module: Module) -> bool:
    """Return whether every reader of an all-reduce takes a slice of it."""
    readers = [other for other in computation.values() if instruction.name in other.operands]
    return bool(readers) and all(_slices(reader, instruction.name, computation, module) for reader in readers)


def _slices(reader: Instruction, name: str, computation: Computation, module: Module) -> bool:
    if reader.op == "dynamic-slice":
        return reader.operands[0] == name
    if reader.op in ("bitcast", "copy", "convert", "transpose", "reshape"):
        return _sliced(reader, computation, module)
    if reader.op == "get-tuple-element":
        return _sliced(reader, computation, module)
    if reader.op != "fusion":
        return False
    inner = module.computations[reader.called("calls")[0]]
    given = [i for i in inner.values() if i.op == "parameter" and reader.operands[int(i.literal)] == name]
    return bool(given) and all(_sliced(one, inner, module) for one in given)


def product_bytes(module: Module) -> int:
    """Return the bytes of operands and results of all matrix products and convolutions of one call.

    Whatever else is fused into them or between them, these pass through the device's memory: what the products cannot
    be faster than. (A fused attention kernel is the exception, and has no such products.)
    """
    return sum(times * (size(instruction.shape) + sum(size(computation[name].shape) for name in instruction.operands))
               for instruction, computation, times, _ in runs(module) if instruction.op in ("dot", "convolution"))
