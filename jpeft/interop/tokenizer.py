"""The tokenizer of a checkpoint folder, through the `tokenizers` package alone: no transformers, no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jpeft.errors import CheckpointError, ModelInputError
from jpeft.interop.chat import render, template_of
from jpeft.interop.tensors import read_json

if TYPE_CHECKING:
    import tokenizers

MAIN = "tokenizer.json"
FILES = (
    MAIN, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Texts to ids `[B, T]` under the names of `model.apply`'s arguments, and back.

    Attributes:
        raw: the tokenizer of the `tokenizers` package, with padding and truncation switched off.
        pad_id: id that fills short rows.
        max_length: the longest sequence that the model takes.
        token_types: whether the model has token types, so that a call returns them.
        special: ids by role ("pad_token", "cls_token", "mask_token", ...).
        files: the folder's tokenizer files as they are; `save` writes them back.
        template: the chat template, in Jinja; "": there is none.

    Example:
        >>> import tokenizers
        >>> raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2}, "[UNK]"))
        >>> raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> batch = Tokenizer(raw, 0, 8, False)(["good", "good film"])
        >>> batch["tokens"].tolist(), batch["attention_mask"].tolist()
        ([[2, 0], [2, 1]], [[1, 0], [1, 1]])
    """

    raw: tokenizers.Tokenizer
    pad_id: int
    max_length: int
    token_types: bool
    special: dict[str, int] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict, repr=False)
    template: str = dataclasses.field(default="", repr=False)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int | None = None,
               special: bool = True) -> list[tokenizers.Encoding]:
        """Tokenise without padding.

        Args:
            texts: sentences.
            pairs: second sentences, one for each.
            max_length: truncate to this many ids, special tokens included (a pair: the longer half first). None: never.
            special: add the special tokens ([CLS], [SEP], ...).

        Returns:
            Encodings of the `tokenizers` package: `.ids`, `.type_ids`, `.offsets`, `.overflowing` (what was cut off).

        Raises:
            ModelInputError: texts is one string, or pairs are not as many.
        """
        if isinstance(texts, str) or isinstance(pairs, str):
            raise ModelInputError("the tokenizer takes a list of texts, found one string; put it in a list")
        if pairs is not None and len(pairs) != len(texts):
            raise ModelInputError(f"{len(texts)} texts and {len(pairs)} pairs; give one pair for each text")
        inputs: list[Any] = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = self.raw.encode_batch(inputs, add_special_tokens=special)
        if max_length is None or all(len(one.ids) <= max_length for one in encoded):
            return list(encoded)
        short = self.raw.from_str(self.raw.to_str())
        short.enable_truncation(max_length)
        return list(short.encode_batch(inputs, add_special_tokens=special))

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int | None = None,
                 pad_to: int | None = None, padding_side: str = "right") -> dict[str, np.ndarray]:
        """Tokenise and pad: int32 `[B, T]` arrays `tokens`, `attention_mask` and, if the model has them, `token_types`.

        Args:
            texts: sentences.
            pairs: second sentences, one for each.
            max_length: truncate to this many ids; None: never.
            pad_to: T; None: the longest row.
            padding_side: "right" or "left".

        Raises:
            ModelInputError: a row is longer than `pad_to`, or an argument does not fit.
        """
        if padding_side not in ("right", "left"):
            raise ModelInputError(f"padding_side is {padding_side!r}, must be 'right' or 'left'")
        rows = self.encode(texts, pairs, max_length)
        longest = max((len(row.ids) for row in rows), default=0)
        width = longest if pad_to is None else pad_to
        if longest > width:
            raise ModelInputError(f"a text has {longest} tokens, more than pad_to={width}; pass max_length={width} too")
        out = {"tokens": np.full((len(rows), width), self.pad_id, np.int32),
               "attention_mask": np.zeros((len(rows), width), np.int32)}
        if self.token_types:
            out["token_types"] = np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            n = len(row.ids)
            where = slice(0, n) if padding_side == "right" else slice(width - n, width)
            out["tokens"][i, where], out["attention_mask"][i, where] = row.ids, 1
            if self.token_types:
                out["token_types"][i, where] = row.type_ids
        return out

    def decode(self, tokens: Any, special: bool = False) -> list[str]:
        """Turn ids `[B, T]`, or rows of any lengths, into texts; `special` keeps special tokens."""
        rows = [[int(i) for i in row] for row in tokens]
        return list(self.raw.decode_batch(rows, skip_special_tokens=not special))

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, *,
             default_system: bool = True, **variables: Any) -> str:
        """Write a conversation as the model's chat template says; encode the text with `special=False`.

        Args:
            messages: `{"role": "user" | "assistant" | "system" | ..., "content": text}`, in order.
            add_generation_prompt: end with the opening of the assistant's answer.
            default_system: keep the system prompt that the template writes of its own where `messages` have none.
            variables: what else the template reads ("tools", "enable_thinking", ...).

        Raises:
            ModelInputError: there is no template, the template refuses these messages, or jinja2 is missing.

        Example:
            >>> import tokenizers
            >>> raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, "[UNK]"))
            >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            >>> Tokenizer(raw, 0, 8, False, template=template).chat([{"role": "user", "content": "Hi"}])
            '<user>Hi'
        """
        names = {role: self.raw.id_to_token(number) for role, number in self.special.items()}
        return render(self.template, messages, {**names, **variables}, add_generation_prompt, default_system)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files to a folder."""
        for name, data in (self.files or {MAIN: self.raw.to_str(pretty=True).encode()}).items():
            (folder / name).write_bytes(data)


def read(folder: Path, pad_id: int, max_length: int, token_types: bool) -> Tokenizer | None:
    """Read the tokenizer of a checkpoint folder; None if it has no `tokenizer.json`.

    Args:
        folder: a checkpoint folder.
        pad_id: what the model's configuration says, for a tokenizer that does not say.
        max_length: the longest sequence that the model takes.
        token_types: whether the model has token types.

    Raises:
        CheckpointError: a file is damaged, or the `tokenizers` package is missing.
    """
    if not (folder / MAIN).is_file():
        return None
    try:
        import tokenizers
    except ImportError as error:
        raise CheckpointError("reading tokenizer.json needs tokenizers; pip install 'jpeft[models]'") from error
    kept = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    try:
        raw = tokenizers.Tokenizer.from_str(kept[MAIN].decode("utf-8"))
    except Exception as error:  # tokenizers raises the bare class
        raise CheckpointError(f"{folder / MAIN} is damaged: {error}; download it again") from error
    raw.no_padding()
    raw.no_truncation()
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said.update(read_json(folder / name) if name in kept else {})
    special: dict[str, int] = {}
    for role, token in said.items():
        content = token.get("content") if isinstance(token, dict) else token
        number = raw.token_to_id(content) if role.endswith("_token") and isinstance(content, str) else None
        if number is not None:
            special[role] = number
    if "pad_token" not in special and (padding := json.loads(kept[MAIN]).get("padding")):
        special["pad_token"] = int(padding["pad_id"])
    limit = said.get("model_max_length")
    limit = min(int(limit), max_length) if isinstance(limit, int | float) else max_length
    template = template_of(kept.get("chat_template.jinja"), said.get("chat_template"))
    return Tokenizer(raw, special.get("pad_token", pad_id), limit, token_types, special, kept, template)
