"""A `config.json` against a table of what its keys mean: a key that the code does not implement is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jpeft.errors import ModelConfigError, nearest

# Where a file comes from, how its author ran it, how text was generated: nothing that a forward pass computes.
METADATA = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_name_or_path", "_num_labels",
    "architectures", "attn_implementation", "bos_token_id", "cls_token_id", "dtype", "eos_token_id",
    "finetuning_task", "gradient_checkpointing", "id2label", "initializer_factor", "keys_to_ignore_at_inference",
    "label2id", "mask_token_id", "model_type", "num_labels", "output_attentions", "output_hidden_states",
    "output_past", "problem_type", "return_dict", "sep_token_id", "task_specific_params", "tf_legacy_loss",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16", "use_cache",
    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "prefix", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip

# Changes what a model computes; fine at the value that means "off".
OFF: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
}


class Key(NamedTuple):
    """What a key of `config.json` means.

    Attributes:
        field: the field of the model's configuration.
        default: what transformers takes when the key is absent.
        optional: whether the key may be null although its default is not.
    """

    field: str
    default: Any
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class ConfigTable:
    """How one family writes its configuration.

    Attributes:
        keys: keys that are read.
        fixed: keys that change what the model computes, with the values that the code implements.
        harmless: keys that change nothing that the code computes, beside `METADATA`.
        constants: fields that the family has without a key.
        fallbacks: fields that take the value of another where theirs is None.
    """

    keys: Mapping[str, Key]
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fallbacks: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the fields of the model's configuration.

        Raises:
            ModelConfigError: keys that the code does not implement, or values of the wrong kind; all in one message.
        """
        fixed = {**OFF, **self.fixed}
        known = {*self.keys, *fixed, *self.harmless, *METADATA}
        lines = []
        for name, value in raw.items():
            if name not in known:
                lines.append(f"{name} = {value!r} is not implemented ({nearest(name, known, 1)})")
            elif name in fixed and not any(_same(value, allowed) for allowed in fixed[name]):
                lines.append(f"{name} = {value!r} is not implemented, only {' or '.join(map(repr, fixed[name]))}")
            elif name in self.keys and not _fits(value, self.keys[name]):
                lines.append(f"{name} = {value!r} must be like {self.keys[name].default!r}")
        if lines:
            raise ModelConfigError(f"{where}: {'; '.join(lines)}")
        return self._fields(raw)

    def _fields(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        fields = {**self.constants, **{key.field: raw.get(name, key.default) for name, key in self.keys.items()}}
        return {f: fields[self.fallbacks[f]] if v is None and f in self.fallbacks else v for f, v in fields.items()}

    def write(self, raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return `raw` with the keys changed whose meaning is not what `fields` says."""
        old = self._fields(raw)
        changed = {name: fields[key.field] for name, key in self.keys.items()
                   if name not in raw or old[key.field] != fields[key.field]}
        return {**raw, **changed}


def _same(value: Any, allowed: Any) -> bool:
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _fits(value: Any, key: Key) -> bool:
    default = key.default
    if value is None:
        return default is None or key.optional
    if default is None:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, type(default)) and not isinstance(value, bool)


def labels(raw: Mapping[str, Any]) -> int | None:
    """Return the number of classes that a `config.json` names, or None.

    Example:
        >>> labels({"id2label": {"0": "no", "1": "yes"}}), labels({})
        (2, None)
    """
    named = raw.get("id2label")
    if isinstance(named, dict) and named:
        return len(named)
    count = raw.get("num_labels", raw.get("_num_labels"))
    return count if isinstance(count, int) else None
