"""Accelerators as data: what they can do at best, and how long a step takes on them at least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jpeft.errors import EstimateError, nearest
from jpeft.train.traffic import Moved


class Chip(NamedTuple):
    """One accelerator; decimal units, peaks without sparsity.

    Attributes:
        flops: bfloat16 matrix products, operations per second.
        memory: bytes.
        bandwidth: of that memory, bytes per second.
        link: bytes per second that it can send to its neighbours (half of the figure for both directions).
        domain: chips that are linked like this.
        network: bytes per second that it can send out of the domain; 0: there is nothing outside.
        source: where the figures are published.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    domain: int
    network: float
    source: str


CHIPS: Mapping[str, Chip] = {
    "H100": Chip(989.4e12, 80e9, 3.35e12, 450e9, 8, 50e9, "NVIDIA H100 SXM5 datasheet, DGX H100 (8 x 400 Gb/s)"),
    "H200": Chip(989.4e12, 141e9, 4.8e12, 450e9, 8, 50e9, "NVIDIA H200 SXM datasheet, DGX H200 (8 x 400 Gb/s)"),
    "B200": Chip(2250e12, 180e9, 8.0e12, 900e9, 8, 50e9, "NVIDIA HGX B200 datasheet, DGX B200 (8 x 400 Gb/s)"),
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 256, 0.0, "docs.cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 8960, 0.0, "docs.cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, 256, 0.0, "docs.cloud.google.com/tpu/docs/v6e"),
}


_KINDS = {"H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200", "B200": "NVIDIA B200", "v5e": "TPU v5 lite",
          "v5p": "TPU v5", "v6e": "TPU v6 lite"}


def of_kind(device_kind: str) -> str | None:
    """Return the name of the chip that JAX calls `device_kind`; None: it is none of the table.

    Example:
        >>> of_kind("NVIDIA H100 80GB HBM3"), of_kind("cpu")
        ('H100', None)
    """
    return next((name for name, kind in _KINDS.items() if kind.lower() == device_kind.lower()), None)


class Bound(NamedTuple):
    """Seconds that a step takes at least on a chip, each part as if the others were free.

    Attributes:
        compute: matrix products at peak.
        memory: operands and results of the products through the memory.
        links: what the devices exchange.
    """

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The largest: they may overlap in full, and will not."""
        return max(self)

    @property
    def limit(self) -> str:
        """Which it is."""
        return self._fields[self.index(self.seconds)]


def chip(name: str) -> Chip:
    """Look a chip up.

    Raises:
        EstimateError: there is no such chip.

    Example:
        >>> chip("h100").memory / 1e9
        80.0
    """
    plain = name.lower().removeprefix("tpu").strip(" -")
    found = next((known for known in CHIPS if known.lower() == plain), None)
    if found is None:
        raise EstimateError(f"the chip {name!r} is none of {', '.join(CHIPS)} ({nearest(name, CHIPS, 1)})")
    return CHIPS[found]


def bound(chip: Chip, flops: float, product_bytes: float, moved: Sequence[Moved], full: float = 1.0) -> Bound:
    """Return the least time of a step.

    A group of more chips than a domain sends through the network too: what the chips of a domain share, each fetches an
    equal part of from outside, so that a domain's network counts as one link of `domain * network` for each of them.

    Args:
        chip: the accelerator.
        flops: matrix products of one device.
        product_bytes: what they read and write.
        moved: what one device exchanges.
        full: how many bfloat16 products one product of the program costs: 2 for float32.

    Example:
        >>> bound(CHIPS["H100"], 989.4e12, 0, []).limit
        'compute'
    """
    links = 0.0
    for one in moved:
        outside = chip.domain * chip.network if one.group > chip.domain and chip.network else chip.link
        links += one.sent / min(chip.link, outside)
    return Bound(full * flops / chip.flops, product_bytes / chip.bandwidth, links)
