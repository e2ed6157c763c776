"""A small byte-level tokenizer with the template of ChatML, and what of its tokens an assistant says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jpeft.interop.tokenizer import Tokenizer

SYSTEM = "Answer in rhyme."
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
START, END = "<|im_start|>", "<|im_end|>"
MERGES = [("Ċ", "Ċ"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("a", "s"), ("as", "s"), (":", "Ċ")]

Talk = list[dict[str, Any]]


def tokenizer(template: str = CHATML, begin: str | None = None, **changes: Any) -> Tokenizer:
    """Return the tokenizer; `begin` is a token that it puts in front of a text."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    raw = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, MERGES))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([START, END, *([begin] if begin else [])])
    if begin:
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, raw.token_to_id(begin))])
    special = {"eos_token": raw.token_to_id(END), **({"bos_token": raw.token_to_id(begin)} if begin else {})}
    return dataclasses.replace(Tokenizer(raw, special["eos_token"], 512, False, special, template=template), **changes)


def said(tokenizer: Tokenizer, ids: Sequence[int]) -> list[float]:
    """Return 1 for each token between an assistant's header and the end token that follows, which is included.

    It reads the tokens alone, one after another, and knows nothing of templates.
    """
    words = [tokenizer.raw.decode([int(i)], skip_special_tokens=False) for i in ids]
    weights, header, speaking = [], "", False
    for word in words:
        weights.append(float(speaking))
        if word == START:
            header, speaking = START, False
        elif header:
            header += word
            if header.endswith("\n"):
                speaking, header = header == f"{START}assistant\n", ""
        elif word == END:
            speaking = False
    return weights


def talk(*turns: str, system: str | None = None) -> Talk:
    """Return a conversation in which user and assistant take turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
