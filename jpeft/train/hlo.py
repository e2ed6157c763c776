"""Dot and convolution FLOPs of a compiled program, counted from its optimised HLO with loop trip counts.

XLA's own `cost_analysis()` counts the body of a loop once, so a scanned model looks as cheap as one of its layers.
`count_text` walks the optimised module instead:

    dot           2 * (elements of the result) * (contracted elements)
    convolution   2 * (output features) * (input features per group) * (batch) * (window positions that read data)
    while         trips * (body + condition) + condition
    conditional   the dearest branch

Window positions on padding or on the holes of a dilated input are not counted (as in `cost_analysis()`), so the
forward product of a convolution and its two gradients cost the same. Complex products count as real ones.

A module of several devices is one device's program: the figures are per device. A product that XLA writes as
elementwise `multiply` (contracted size 1) or as `multiply` and `reduce` (vector by vector) is no dot any more and is
not counted: measure with sizes of 2 and more. Whatever could hide a product (a custom call, an operation this file
does not know) raises `UncountedError`; nothing is skipped in silence.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpeft.errors import UncountedError

HARMLESS_CALLS = ("TopK", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "AllocateBuffer")
# Operations with a called computation that runs once per element: scalar arithmetic, which must hold no product.
PER_ELEMENT = ("reduce", "reduce-window", "reduce-scatter", "all-reduce", "all-reduce-start", "map", "scatter",
               "select-and-scatter", "sort", "custom-call", "topk")
PRODUCTS_UNKNOWN = re.compile(r"dot|conv|cholesky|triangular-solve")
CONVERSIONS = ("convert", "bitcast-convert", "stochastic-convert")
CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)


class Flops(NamedTuple):
    """Floating point operations, a multiplication and an addition counted as two."""

    dot: int = 0
    conv: int = 0

    @property
    def total(self) -> int:
        return self.dot + self.conv

    def plus(self, other: Flops, times: int = 1) -> Flops:
        """Return `self + times * other`."""
        return Flops(self.dot + times * other.dot, self.conv + times * other.conv)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One HLO instruction: `name = shape op(operands), attributes`."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def dims(self) -> tuple[int, ...]:
        """Dims of an array result."""
        found = re.match(r"\w+\[([\d,<=]*)\]", self.shape)
        if not found:
            raise UncountedError(f"{self.op} {self.name!r} has the shape {self.shape!r}; an array was expected")
        return tuple(int(d.removeprefix("<=")) for d in found[1].split(",") if d)

    def attribute(self, key: str) -> tuple[int, ...]:
        """Return the integers of `key={1,2}` or `key=1`; () where the key is not there."""
        found = re.search(rf"\b{key}=(?:\{{([\d,]*)\}}|(\d+))", self.attributes)
        return tuple(int(d) for d in (found[1] or found[2] or "").split(",") if d) if found else ()

    def called(self, key: str | None = None) -> tuple[str, ...]:
        """Return the computations named by `key=`, or by any of the keys that call once."""
        pattern = re.compile(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))") if key else CALLED
        hits = [many or one for many, one in pattern.findall(self.attributes)]
        return tuple(name.strip().lstrip("%") for hit in hits for name in hit.split(","))


class Computation(dict[str, Instruction]):
    """The instructions of one computation, by name and in order."""

    @property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.root)


@dataclasses.dataclass
class Module:
    """A parsed HLO module."""

    computations: dict[str, Computation]
    entry: str


def _closing(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "({[") - (text[i] in ")}]")
        if depth == 0:
            return i
    raise UncountedError(f"unbalanced brackets in the HLO line {text!r}")


def _instruction(line: str) -> Instruction:
    found = re.match(r"\s+(ROOT )?%?([^\s=]+) = (.*)", line)
    if not found:
        raise UncountedError(f"cannot read the HLO line {line!r}")
    root, name, rest = found.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening) if rest[:opening] != "constant" else rest.find(")", opening)
    inside, attributes = rest[opening + 1 : closing], rest[closing + 1 :]
    names = re.findall(r"%([\w.\-]+)", inside) or [part.split()[-1] for part in inside.split(",") if part.strip()]
    attributes = re.sub(r'metadata=\{(?:[^"{}]|"(?:\\.|[^"\\])*")*\}', "", attributes)
    return Instruction(name, shape, rest[:opening], tuple(names), inside, attributes, bool(root))


def parse(text: str) -> Module:
    """Parse the text of an HLO module, as `compiled.as_text()` prints it."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+)\s.*\{$", line)
        if line.startswith("HloModule"):
            continue
        if header and current is None:
            current = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and line.strip():
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if not entry:
        raise UncountedError("the text holds no ENTRY computation; pass the text of an HLO module")
    return Module(computations, entry)


def _dot(instruction: Instruction, computation: Computation) -> int:
    left = computation[instruction.operands[0]].dims
    contracted = math.prod(left[d] for d in instruction.attribute("lhs_contracting_dims"))
    return 2 * math.prod(instruction.dims) * contracted


def _window(instruction: Instruction, key: str, rank: int) -> list[list[int]]:
    """Return the entry `key` of a convolution's window per dim: `[n]`, or `[low, high]` for `pad`."""
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    found = re.search(rf"\b{key}=(\S+)", window[1]) if window else None
    default = [0, 0] if key == "pad" else [1]
    return [[int(n) for n in part.split("_")] for part in found[1].split("x")] if found else [default] * rank


def _convolution(instruction: Instruction, computation: Computation) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        raise UncountedError(f"the convolution {instruction.name!r} has no dim_labels")
    shapes = *(computation[operand].dims for operand in instruction.operands), instruction.dims
    pairs = zip(labels.groups(), shapes, strict=True)
    left, right, out = (dict(zip(names, dims, strict=True)) for names, dims in pairs)
    spatial = sorted(set(out) - set("bf"))
    positions = 1
    keys = ("stride", "pad", "lhs_dilate", "rhs_dilate")
    settings = zip(*(_window(instruction, key, len(spatial)) for key in keys), strict=True)
    for axis, ((stride,), (low, *_), (hole,), (step,)) in zip(spatial, settings, strict=True):
        reads = np.arange(out[axis])[:, None] * stride + np.arange(right[axis])[None, :] * step - low
        positions *= int(np.sum((reads >= 0) & (reads <= (left[axis] - 1) * hole) & (reads % hole == 0)))
    batch = left["b"] // (instruction.attribute("batch_group_count") or (1,))[0]
    return 2 * right["i"] * right["o"] * batch * positions


def _source(module: Module, computation: Computation, name: str, given: Sequence[Any] | None = None) -> Any:
    """Follow a scalar to where it comes from.

    Returns an int, `("element", i)` of the computation's own argument, `(op, attributes, *sources)`, or None.
    """
    instruction = computation[name]
    if instruction.op == "constant":
        return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
    if instruction.op == "parameter":
        return given[int(instruction.literal)] if given is not None else None
    if instruction.op == "get-tuple-element":
        origin = computation[instruction.operands[0]]
        if origin.op == "tuple":
            return _source(module, computation, origin.operands[instruction.attribute("index")[0]], given)
        return ("element", instruction.attribute("index")[0]) if origin.op == "parameter" else None
    sources = [_source(module, computation, operand, given) for operand in instruction.operands]
    if instruction.op in ("copy", "bitcast"):
        return sources[0]
    if instruction.op in ("fusion", "call"):
        inner = module.computations[instruction.called()[0]]
        return None if inner.root.op == "tuple" else _source(module, inner, inner.root.name, sources)
    if instruction.op in ("compare", "add"):
        return (instruction.op, instruction.attributes, *sources)
    return None


def derive_trips(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """Return the trips of a loop `for (i = a; i < b; i += s)`, read from its constants; None for any other loop."""
    condition = module.computations[loop.called("condition")[0]]
    body = module.computations[loop.called("body")[0]]
    start = caller[loop.operands[0]]
    match _source(module, condition, condition.root.name):
        case ("compare", str(how), ("element", int(i)), int(bound)):
            pass
        case _:
            return None
    if body.root.op != "tuple" or start.op != "tuple":
        return None
    match _source(module, body, body.root.operands[i]), _source(module, caller, start.operands[i]):
        case (("add", _, ("element", j), int(step)) | ("add", _, int(step), ("element", j)), int(first)) if i == j:
            pass
        case _:
            return None
    direction = re.search(r"direction=(\w+)", how)
    span = {"LT": bound - first, "LE": bound - first + 1, "GT": bound - first, "GE": bound - first - 1}
    if not direction or direction[1] not in span or step == 0 or (step > 0) != (direction[1] in ("LT", "LE")):
        return None
    return max(0, math.ceil(span[direction[1]] / step))


def trips_of(module: Module, caller: Computation, loop: Instruction, default: int | None = None) -> int:
    """Return the trips of a loop: as XLA notes them, or as its constants say.

    Args:
        module: the module.
        caller: the computation that holds the loop.
        loop: a `while` instruction.
        default: what to assume where the trips depend on data; None: raise.

    Raises:
        UncountedError: the trips depend on data.
    """
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    trips = int(found[1]) if found else derive_trips(module, caller, loop)
    trips = default if trips is None else trips
    if trips is None:
        raise UncountedError(f"the trips of the loop {loop.name!r} depend on data; say how many to count with trips=N")
    return trips


class Run(NamedTuple):
    """An instruction and the computation that holds it; how often the program, and its innermost loop, run it."""

    instruction: Instruction
    computation: Computation
    times: int
    trips: int


def runs(module: Module) -> Iterator[Run]:
    """Yield every instruction that is reached from the entry, loops counted by their trips, every branch once.

    Raises:
        UncountedError: the trips of a loop depend on data.
    """
    def walk(name: str, times: int, trips: int) -> Iterator[Run]:
        computation = module.computations[name]
        for instruction in computation.values():
            yield Run(instruction, computation, times, trips)
            if instruction.op == "while":
                inner = trips_of(module, computation, instruction)
                for key in ("body", "condition"):
                    yield from walk(instruction.called(key)[0], times * inner, inner)
            elif instruction.op not in PER_ELEMENT:
                for called in instruction.called():
                    yield from walk(called, times, trips)

    yield from walk(module.entry, 1, 1)


class _Counter:
    def __init__(self, module: Module, trips: int | None, ignore: Iterable[str]):
        self.module, self.trips, self.ignore = module, trips, tuple(ignore)
        self.known: dict[str, Flops] = {}

    def computation(self, name: str) -> Flops:
        if name not in self.known:
            computation = self.module.computations[name]
            total = Flops()
            for instruction in computation.values():
                total = total.plus(self.instruction(instruction, computation))
            self.known[name] = total
        return self.known[name]

    def instruction(self, instruction: Instruction, computation: Computation) -> Flops:
        op = instruction.op
        if op == "dot":
            return Flops(dot=_dot(instruction, computation))
        if op == "convolution":
            return Flops(conv=_convolution(instruction, computation))
        if op == "while":
            return self.loop(instruction, computation)
        inner = [self.computation(name) for name in instruction.called()]
        if op == "conditional":
            return max(inner, key=lambda flops: flops.total)
        if op == "custom-call":
            self.check_custom_call(instruction)
        if op in PER_ELEMENT:
            if any(flops.total for flops in inner):
                raise UncountedError(f"the {op} {instruction.name!r} calls a computation with products: not counted")
            return Flops()
        if op.endswith(("-done", "-update")):  # of an asynchronous operation, counted at its start
            return Flops()
        if PRODUCTS_UNKNOWN.search(op) and op not in CONVERSIONS:
            raise UncountedError(f"the operation {op} ({instruction.name!r}) is a product that has no rule here")
        total = Flops()
        for flops in inner:
            total = total.plus(flops)
        return total

    def loop(self, instruction: Instruction, computation: Computation) -> Flops:
        body, condition = (self.computation(instruction.called(key)[0]) for key in ("body", "condition"))
        if not body.total + condition.total:
            return Flops()
        trips = trips_of(self.module, computation, instruction, self.trips)
        return condition.plus(body, trips).plus(condition, trips)

    def check_custom_call(self, instruction: Instruction) -> None:
        found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        target = found[1] if found else "?"
        if target not in HARMLESS_CALLS and not any(target.startswith(prefix) for prefix in self.ignore):
            raise UncountedError(
                f"the custom call {target!r} may hide products; if it holds none worth counting, ignore=({target!r},)"
            )


def count_text(text: str, *, trips: int | None = None, ignore: Iterable[str] = ()) -> Flops:
    """Count the products of one call of an HLO module, loop trips included.

    Args:
        text: what `compiled.as_text()` returns.
        trips: trips to assume for loops whose number depends on data; without it they raise.
        ignore: prefixes of custom call targets that may be left out (`"lapack_"`).

    Raises:
        UncountedError: something may hide a product, or trips are not known.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> count_text(jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile().as_text()).total == 2 * 8**3
        True
    """
    module = parse(text)
    return _Counter(module, trips, ignore).computation(module.entry)
