"""Rules that papers recommend as a whole: several methods on the leaves of one model.

Patterns are those of `jpeft.plan`; as all of them have virtual tokens, it needs `tokens=jpeft.Tokens(..)` with them.
Defaults such as "query" and "down" are its words for the parts of a layer, which most families of models have.
"""

from __future__ import annotations

from jpeft.core.method import Method
from jpeft.methods.chain import Chain
from jpeft.methods.gated import GatedAdapter, GatedLoRA, GatedPrefixTuning
from jpeft.methods.parallel import ParallelAdapter
from jpeft.methods.prefix import PrefixTuning
from jpeft.methods.selective import Full


def mam(attention: str = ".*/(key|value)/kernel", feed_forward: str = "down", input_of: str = "../up/kernel",
        length: int = 30, bottleneck: int = 512, scaling: float = 4.0) -> dict[str, Method]:
    """Return the rules of the MAM adapter: a short prefix in attention and a parallel adapter beside the feed-forward.

    Args:
        attention: pattern of the kernels of keys and values.
        feed_forward: pattern of the last kernel of the feed-forward part.
        input_of: path of its first kernel, relative to the folder of the last.
        length: virtual tokens of the prefix.
        bottleneck: hidden units of the adapter.
        scaling: scale of the adapter.

    Source: arXiv 2110.04366.

    Example:
        >>> from jpeft.methods.presets import mam
        >>> [type(method).__name__ for method in mam(length=10, bottleneck=64).values()]
        ['PrefixTuning', 'ParallelAdapter']
    """
    beside = ParallelAdapter(bottleneck=bottleneck, scaling=scaling, input_of=input_of)
    return {attention: PrefixTuning(length=length), feed_forward: beside}


def unipelt(query: str = "query", key: str = "key", value: str = "value", feed_forward: str = "down",
            length: int = 10, rank: int = 8, reduction_factor: float = 16.0) -> dict[str, Method]:
    """Return the rules of UniPELT: LoRA on queries and values, a prefix, and an adapter, each behind a gate.

    The gates of LoRA and of the adapter are for each token, that of the prefix is the mean over the row; the paper's
    code takes the mean for all three.

    Args:
        query: pattern of the kernels of queries.
        key: of keys.
        value: of values.
        feed_forward: pattern of the last kernel of the feed-forward part.
        length: virtual tokens of the prefix.
        rank: of LoRA.
        reduction_factor: of the adapter.

    Source: arXiv 2110.07577.

    Example:
        >>> from jpeft.methods.presets import unipelt
        >>> [type(method).__name__ for method in unipelt().values()]
        ['GatedLoRA', 'GatedPrefixTuning', 'Chain', 'GatedAdapter']
    """
    lora, prefix = GatedLoRA(rank=rank), GatedPrefixTuning(length=length)
    return {query: lora, key: prefix, value: Chain((lora, prefix)),
            feed_forward: GatedAdapter(reduction_factor=reduction_factor)}


def ptuning_v2(attention: str = ".*/(key|value)/kernel", head: str = "classifier/.*", length: int = 20,
               prefix_projection: bool = False) -> dict[str, Method]:
    """Return the rules of P-Tuning v2: deep prompts in every layer of an encoder, and its head.

    Its deep prompts are keys and values before those of the text, in every layer: the maths is that of prefix tuning.
    What the paper changes is around it: a classification head that is trained in full, the encoder of the prompts left
    out on most tasks, and a length that is chosen for each task.

    Args:
        attention: pattern of the kernels of keys and values.
        head: pattern of the leaves of the head.
        length: virtual tokens.
        prefix_projection: whether the prompts come out of an encoder.

    Source: arXiv 2110.07602.

    Example:
        >>> from jpeft.methods.presets import ptuning_v2
        >>> [type(method).__name__ for method in ptuning_v2().values()]
        ['PrefixTuning', 'Full']
    """
    return {attention: PrefixTuning(length=length, prefix_projection=prefix_projection), head: Full()}
