"""Prefixes on models of the zoo: keys and values that go straight into attention, without padding the batch."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpeft.core.frozen import Frozen
from jpeft.core.method import Call, Method, Theta
from jpeft.core.plan import Entry, Plan
from jpeft.core.transform import adapt, check_theta
from jpeft.errors import PlanError
from jpeft.methods.chain import Chain
from jpeft.methods.prefix import PrefixTuning
from jpeft.models.decoder import Decoder
from jpeft.models.encoder import Encoder
from jpeft.models.t5 import T5

Pair = tuple[jax.Array, jax.Array]
PARTS = {"layers/attention": "", "encoder/layers/attention": "encoder", "decoder/layers/attention": "decoder",
         "decoder/layers/cross": "cross"}


class _Prefix(NamedTuple):
    """One leaf with a prefix: its entry, the method, the part of the model, and the letters of theta before it."""

    entry: Entry
    method: PrefixTuning
    part: str
    leaf: str
    before: str


def adapt_prefix(model: Any, plan: Plan) -> Callable[..., Any]:
    """Return what `jpeft.adapt(model.apply, plan)` returns, with every `PrefixTuning` as keys and values of attention.

    Outputs and gradients are the same; the batch is not padded, so that no layer computes anything for virtual tokens.
    A loss is too, if the first real token has no label: only the last virtual token, which has no output here, predicts
    it.
    The other methods of the plan are adapted as ever. The prefix does not enter the cache: decoding calls the function
    as it is, and `Call(continued=True)` is for prompts alone. In packed sequences, every segment sees the prefix.

    Args:
        model: a decoder, an encoder or a T5 of the zoo.
        plan: made for `model.apply`, with `PrefixTuning` on the kernels of keys and values of the same attention.

    Returns:
        `adapted(trainable, frozen, *inputs, peft=Call())`, for the trainable and frozen of the plan.

    Raises:
        PlanError: the plan has no prefix, has it on leaves that this model cannot take it for, or on keys without their
            values.
        CallError: (when called) as of `jpeft.adapt`.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> from jpeft.models.encoder import Encoder, EncoderConfig
        >>> model = Encoder(EncoderConfig(vocab_size=9, hidden_size=8, layers=2, heads=2, mlp_size=16, positions=9))
        >>> params, ids = model.init(jax.random.key(0)), jnp.ones((5, 4), jnp.int32)
        >>> rules = {".*/(key|value)/kernel": jpeft.PrefixTuning(length=3)}
        >>> plan = jpeft.plan(model.apply, params, (ids,), rules, tokens=jpeft.Tokens(ids=0))
        >>> trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
        >>> jpeft.adapt_prefix(model, plan)(trainable, frozen, ids).hidden.shape
        (5, 4, 8)
    """
    if not isinstance(model, Decoder | Encoder | T5):
        raise PlanError(f"adapt_prefix takes a model of the zoo, found a {type(model).__name__}; use "
                        "jpeft.adapt(apply, plan), which pads the batch")
    found = [p for p in map(_prefix_of, plan.entries) if p is not None]
    _check(model, found)
    ahead = found[0].method.length
    rest = dataclasses.replace(plan, entries=tuple(e for e in map(_without, plan.entries) if e is not None))
    inner, names = adapt(model.apply, rest), [*inspect.signature(model.apply).parameters]
    place = names.index("positions") - 1 if "positions" in names else -1

    def adapted(trainable: Any, frozen: Frozen, /, *args: Any, peft: Call = Call(), **kwargs: Any) -> Any:  # noqa: B008
        check_theta(plan, trainable, frozen, "adapted(trainable, frozen, *inputs)")
        if kwargs.get("positions") is not None:
            kwargs["positions"] = kwargs["positions"] + ahead
        elif 0 <= place < len(args) and args[place] is not None:
            args = (*args[:place], args[place] + ahead, *args[place + 1:])
        rows = {(p.part, p.leaf): _rows(p, {**frozen.theta.get(p.entry.path, {}), **trainable[p.entry.path]})
                for p in found}
        pairs = {part: _pair(model, part, rows) for part in {p.part for p in found}}
        own = [_trimmed(plan, theta) for theta in (trainable, frozen.theta)]
        return inner(own[0], Frozen(frozen.base, own[1]), *args, peft=peft, **kwargs,
                     prefix=pairs if isinstance(model, T5) else pairs[""])

    return adapted


def _last(method: Method) -> tuple[Method, str]:
    """The method that a leaf's prefix can be of, and what its letters begin with in theta."""
    if isinstance(method, Chain):
        return method.methods[-1], f"{len(method.methods) - 1}."
    return method, ""


def _prefix_of(entry: Entry) -> _Prefix | None:
    method, before = _last(entry.method)
    if not isinstance(method, PrefixTuning):
        return None
    folder, _, leaf = entry.path.removesuffix("/kernel").rpartition("/")
    return _Prefix(entry, method, PARTS.get(folder, folder), leaf, before)


def _without(entry: Entry) -> Entry | None:
    """The entry without its prefix; prompts now come first."""
    if _prefix_of(entry) is None:
        return dataclasses.replace(entry, start=0)
    if not isinstance(entry.method, Chain):
        return None
    first = entry.method.methods[:-1]
    return dataclasses.replace(entry, method=Chain(first) if len(first) > 1 else first[0], start=0)


def _trimmed(plan: Plan, theta: Mapping[str, Theta]) -> dict[str, Theta]:
    """Theta of the entries without their prefixes."""
    result = {}
    for e in plan.entries:
        if e.path not in theta or _without(e) is None:
            continue
        letters = theta[e.path]
        if _prefix_of(e) is not None and isinstance(e.method, Chain):
            last = _last(e.method)[1]
            letters = {k: v for k, v in letters.items() if not k.startswith(last)}
            if len(e.method.methods) == 2:
                letters = {k.removeprefix("0."): v for k, v in letters.items()}
        if letters:
            result[e.path] = letters
    return result


def _check(model: Any, found: list[_Prefix]) -> None:
    if not found:
        raise PlanError("this plan has no PrefixTuning; use jpeft.adapt(apply, plan)")
    fused = isinstance(model, Decoder) and model.config.fused_qkv != "none"
    leaves = {"qkv"} if fused else {"key", "value"}
    parts = {"encoder", "decoder", "cross"} if isinstance(model, T5) else {""}
    for p in found:
        if type(p.method) is not PrefixTuning or p.part not in parts or p.leaf not in leaves or \
                not p.entry.path.endswith("/kernel") or (p.method.channels is not None and not fused):
            raise PlanError(f"{type(p.method).__name__} on {p.entry.path!r} is no plain prefix of this model's keys or "
                            f"values (the kernels {sorted(leaves)} of attention); use jpeft.adapt(apply, plan)")
    for part in {p.part for p in found}:
        have = {p.leaf for p in found if p.part == part}
        if have != leaves:
            raise PlanError(f"there is a prefix on {sorted(have)} of {part or 'attention'!r} and none on "
                            f"{sorted(leaves - have)}; put PrefixTuning on keys and values alike")
    have = {p.part for p in found}
    if isinstance(model, T5) and ("encoder" in have) != ("cross" in have):
        raise PlanError(f"there is a prefix on {sorted(have)}: padding would show the encoded virtual tokens to the "
                        "decoder; put PrefixTuning on the encoder and on the cross attention alike")
    if fused:
        c, ours = model.config, found[0].method.channels
        want = (c.heads * c.head_size, (c.heads + 2 * c.kv_heads) * c.head_size)
        if ours is not None and (c.fused_qkv == "heads" or ours[0] > want[0] or ours[1] < want[1]):
            raise PlanError(f"PrefixTuning(channels={ours}) on {found[0].entry.path!r} does not hold all keys and "
                            f"values; use channels={None if c.fused_qkv == 'heads' else want}")


def _rows(p: _Prefix, theta: Theta) -> jax.Array:
    """What the virtual tokens have in the place of the kernel's output, `[L, V, *out]`."""
    own = {k.removeprefix(p.before): v for k, v in theta.items() if k.startswith(p.before)}
    rows, site = p.method.prefix(p.entry.site, own), p.entry.site
    if p.method.channels is not None:
        start, stop = p.method.channels
        rows = jnp.pad(rows, ((0, 0), (0, 0), (start, site.out_size - stop)))
    return jnp.reshape(rows, (*site.stack_shape, p.method.length, *site.out_shape))


def _pair(model: Any, part: str, rows: Mapping[tuple[str, str], jax.Array]) -> Pair:
    """The key and the value of one attention, `[L, 1, V, K, d]`."""
    if (part, "qkv") not in rows:
        return rows[part, "key"][:, None], rows[part, "value"][:, None]
    c, whole = model.config, rows[part, "qkv"][:, None]
    if c.fused_qkv == "blocks":
        return whole[..., c.heads:c.heads + c.kv_heads, :], whole[..., c.heads + c.kv_heads:, :]
    if c.fused_qkv == "thirds":
        return whole[..., 1, :, :], whole[..., 2, :, :]
    return whole[..., 1, :], whole[..., 2, :]
