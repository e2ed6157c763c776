"""Rules that papers recommend as a whole: several methods on the leaves of one model."""

from __future__ import annotations

from jpeft.core.method import Method
from jpeft.methods.bottleneck import ParallelAdapter
from jpeft.methods.prefix import PrefixTuning


def mam(attention: str = ".*/(key|value)/kernel", feed_forward: str = ".*/down/kernel", input_of: str = "../up/kernel",
        length: int = 30, bottleneck: int = 512, scaling: float = 4.0) -> dict[str, Method]:
    """Return the rules of the MAM adapter: a short prefix in attention and a parallel adapter beside the feed-forward.

    Args:
        attention: pattern of the kernels of keys and values.
        feed_forward: pattern of the last kernel of the feed-forward part.
        input_of: path of its first kernel, relative to the folder of the last.
        length: virtual tokens of the prefix.
        bottleneck: hidden units of the adapter.
        scaling: scale of the adapter.

    Returns:
        Rules for `jpeft.plan`, which needs `tokens=jpeft.Tokens(..)` with them.

    Source: arXiv 2110.04366.

    Example:
        >>> from jpeft.methods.presets import mam
        >>> [type(method).__name__ for method in mam(length=10, bottleneck=64).values()]
        ['PrefixTuning', 'ParallelAdapter']
    """
    beside = ParallelAdapter(bottleneck=bottleneck, scaling=scaling, input_of=input_of)
    return {attention: PrefixTuning(length=length), feed_forward: beside}
