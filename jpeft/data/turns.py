"""A row's text in pieces, given and learnt, and its ids such that what is given has the ids that it has alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.data.checks import check_text
from jpeft.errors import ColumnError, MissingValueError, ModelInputError, TemplateError
from jpeft.interop.tokenizer import Tokenizer

Message = Mapping[str, Any]
Piece = tuple[str, bool]  # a stretch of a row's text, and whether it is learnt
Row = tuple[np.ndarray, np.ndarray]  # ids and weights
_CHUNK = 1024  # rows tokenised at a time: the encodings that the tokenizer returns are far larger than the ids


def stops(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the special tokens, one of which may end an answer."""
    return tuple(token.content for token in tokenizer.raw.get_added_tokens_decoder().values() if token.special)


def rendered(tokenizer: Tokenizer, i: int, messages: Sequence[Message], special: tuple[str, ...], everything: bool,
             default_system: bool) -> list[Piece]:
    """Return the text of a conversation in pieces, of which the assistant's answers are learnt.

    Args:
        tokenizer: the model's, with a chat template.
        i: the number of the row, counted from 0.
        messages: the conversation.
        special: what `stops` returned.
        everything: all of it is learnt.
        default_system: keep the system prompt that the template writes of its own.

    Raises:
        ColumnError: it is not a list of messages.
        MissingValueError: it has no message, no answer, or an empty one.
        TemplateError: the template refuses it, or writes its turns differently when more of them follow.
    """
    _check(i, messages, answered=not everything)

    def text(count: int, prompt: bool) -> str:
        try:
            return tokenizer.chat(messages[:count], prompt, default_system=default_system)
        except ModelInputError as error:
            raise TemplateError(f"row {i} (counted from 0): {error}") from error

    full = text(len(messages), False)
    if everything:
        return [(full, True)]
    pieces: list[Piece] = []
    at = 0
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text(k, True), text(k + 1, False) if k + 1 < len(messages) else full
        if not (len(before) >= at and len(after) > len(before) and full.startswith(after) and after.startswith(before)):
            raise TemplateError(f"row {i} (counted from 0): the chat template writes the turns up to message {k} "
                                "differently when it is rendered with what follows, so what the assistant says cannot "
                                "be told apart; give each answer a row of its own, or learn='all'")
        bare = after.rstrip()
        # What stands behind the token that ends an answer is never generated.
        stop = len(bare) if bare.endswith(special) and len(bare) > len(before) else len(after)
        pieces += [(full[at:len(before)], False), (full[len(before):stop], True)]
        at = stop
    return [*pieces, (full[at:], False)]


def tokenised(tokenizer: Tokenizer, rows: Sequence[list[Piece]]) -> Iterator[Row]:
    """Yield ids and weights of each row: up to each learnt piece, the ids are those of that text alone."""
    for start in range(0, len(rows), _CHUNK):
        some = [[piece for piece in row if piece[0]] for row in rows[start:start + _CHUNK]]
        sofar = [list(itertools.accumulate(text for text, _ in row)) for row in some]
        flat = iter(tokenizer.encode([text for row in sofar for text in row], special=False))
        for i, (row, texts) in enumerate(zip(some, sofar, strict=True), start):
            prefixes = [next(flat).ids for _ in texts]
            full = prefixes[-1]
            if all(full[:len(ids)] == ids for ids in prefixes):
                ends = [len(ids) for ids in prefixes]
            else:
                parts = [one.ids for one in tokenizer.encode([text for text, _ in row], special=False)]
                ends = list(itertools.accumulate(len(ids) for ids in parts))
                apart = [token for ids in parts for token in ids]
                if tokenizer.decode([apart], special=True) != tokenizer.decode([full], special=True):
                    border = next(n for n, ids in enumerate(prefixes) if full[:len(ids)] != ids)
                    raise TemplateError(f"row {i} (counted from 0): the tokenizer joins characters across the border "
                                        f"between {row[border][0][-20:]!r} and {row[border + 1][0][:20]!r}, and apart "
                                        "they are another text; move a space or a line break to the other side")
                full = apart
            weights = np.zeros(len(full), np.float32)
            for begin, end, (_, learnt) in zip([0, *ends], ends, row, strict=False):
                weights[begin:end] = learnt
            yield np.array(full, np.int32), weights


def _check(i: int, messages: Any, answered: bool) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ColumnError(f"row {i} (counted from 0) holds a {type(messages).__name__}, {messages!r:.60}, expected a "
                          "list of messages {'role': ..., 'content': ...}")
    if not messages:
        raise MissingValueError(f"row {i} (counted from 0) has no messages; leave the row out")
    for k, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ColumnError(f"message {k} of row {i} (counted from 0) is {message!r:.80}, expected "
                              "{'role': 'user', 'content': 'text'}")
        check_text(i, message["content"], f"content in its message {k}")
    if answered and not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise MissingValueError(f"row {i} (counted from 0) has no message of the assistant to learn (its roles: "
                                f"{roles}); name that role 'assistant', or leave the row out")
