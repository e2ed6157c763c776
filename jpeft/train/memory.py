"""How much memory training takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax


class PeakMemory(NamedTuple):
    """Bytes at the highest point so far: of this process on the host, and of the fullest device if devices tell."""

    host: int
    device: int | None


class StepMemory(NamedTuple):
    """Bytes that a compiled function takes on a device: its inputs, its outputs, and what it needs in between.

    Outputs that take the memory of donated inputs count in `aliased` too.
    """

    arguments: int
    outputs: int
    temporary: int
    aliased: int


def peak_memory() -> PeakMemory:
    """Return the highest memory use so far.

    Example:
        >>> peak_memory().host > 1_000_000
        True
    """
    peaks = [stats["peak_bytes_in_use"] for device in jax.local_devices()
             if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats]
    return PeakMemory(_host_peak(), max(peaks, default=None))


def step_memory(jitted: Any, *args: Any, **kwargs: Any) -> StepMemory:
    """Return what a call of a jitted function takes, without calling it.

    Compiles it for these arguments, which may be `jax.ShapeDtypeStruct`.

    Args:
        jitted: what `jax.jit` returned, such as a step of `compiled_step`.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> step_memory(jax.jit(lambda x: x @ x), jnp.ones((8, 8))).arguments
        256
    """
    found = jitted.lower(*args, **kwargs).compile().memory_analysis()
    return StepMemory(found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes,
                      found.alias_size_in_bytes)


def _host_peak() -> int:
    # `ru_maxrss` of Linux survives exec, so a child of a large process seems large; the kernel's own mark does not.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
