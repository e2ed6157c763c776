"""Conversations, prompts with completions, and plain text, as ids with a weight on every token that is to be learnt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jpeft.data.checks import check_limit, check_text, numbers
from jpeft.data.epochs import Encoded
from jpeft.data.turns import Message, Row, rendered, stops, tokenised
from jpeft.errors import ColumnError, DataError, EmptyDataError, MissingValueError, RowLengthError, TemplateError
from jpeft.interop.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences(Encoded):
    """Encoded sequences of a causal language model.

    Attributes:
        ids: token ids of each sequence, int32 `[n]`.
        weights: of each token, float32 `[n]`: how much it counts that this token is predicted from those before it; 0
            where it is given, and for token 0, which has none before it.
        cut: sequences that lost tokens to a length limit, bool `[N]`.
        pad_id: id that fills short rows.
        rows: the number of the row (conversation, pair, text) that each sequence is from, int64 `[N]`; None: its own.
        dropped: rows that are not here, since nothing of them would be learnt within the length limit.

    Example:
        >>> one = Sequences([np.array([5, 6, 7], np.int32)], [np.array([0, 0, 1], np.float32)], np.zeros(1, bool), 0)
        >>> len(one), one.learnt, one.prompt(0).tolist(), one.answer(0).tolist()
        (1, 1, [5, 6], [7])
    """

    ids: list[np.ndarray]
    weights: list[np.ndarray]
    cut: np.ndarray
    pad_id: int
    rows: np.ndarray = None  # type: ignore[assignment]
    dropped: int = 0

    def __post_init__(self) -> None:
        if self.rows is None:
            object.__setattr__(self, "rows", np.arange(len(self.ids), dtype=np.int64))
        sizes = [len(part) for part in (self.ids, self.weights, self.cut, self.rows)]
        if len(set(sizes)) > 1:
            raise DataError(f"ids, weights, cut, rows have lengths {sizes}; give each sequence one of each")
        for i, (ids, weights) in enumerate(zip(self.ids, self.weights, strict=True)):
            if len(ids) != len(weights) or not len(ids) or weights[0] != 0:
                raise DataError(f"sequence {i} has {len(ids)} ids and {len(weights)} weights; give each token one, and "
                                "token 0 the weight 0, since nothing stands before it")

    @property
    def texts(self) -> tuple[list[np.ndarray], ...]:
        return (self.ids,)

    @property
    def learnt(self) -> int:
        """Number of tokens that are learnt."""
        return sum(int((row > 0).sum()) for row in self.weights)

    def prompt(self, i: int) -> np.ndarray:
        """Return the ids of sequence `i` before the first one that is learnt: what generation begins with."""
        return self.ids[i][:self._first(i)]

    def answer(self, i: int) -> np.ndarray:
        """Return the ids of sequence `i` that are learnt."""
        return self.ids[i][self.weights[i] > 0]

    def take(self, indices: Sequence[int] | np.ndarray) -> Sequences:
        """Return some of the sequences, in the order of `indices`; nothing is dropped in these.

        Raises:
            DataError: an index is that of no sequence.
        """
        some = numbers(indices, len(self))
        return Sequences([self.ids[i] for i in some], [self.weights[i] for i in some], self.cut[some], self.pad_id,
                         self.rows[some])

    def _first(self, i: int) -> int:
        learnt = np.flatnonzero(self.weights[i] > 0)
        return int(learnt[0]) if len(learnt) else len(self.ids[i])


def chats(tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], *, max_length: int,
          learn: str = "assistant", default_system: bool = False, keep: str = "start",
          on_long: str = "error") -> Sequences:
    """Tokenise conversations as the model's chat template writes them.

    What is learnt of an answer is found by rendering: it is what the template adds to the turns before it, its opening
    included, up to the special token that ends it. So the tokens before an answer are those that generation begins
    with.

    Args:
        tokenizer: the model's, with a chat template.
        conversations: messages `{"role", "content"}` in order, for each conversation.
        max_length: longest sequence in tokens; longer ones are cut and counted.
        learn: "assistant": the assistant's answers, each with the token that ends it; "all": every token.
        default_system: keep the system prompt that the template writes of its own.
        keep: which part of a long sequence stays, its "start" or its "end".
        on_long: what happens to a row of which nothing would be learnt within `max_length`: "error", or "drop", which
            counts it.

    Raises:
        EmptyDataError: there is no conversation, or all were dropped.
        MissingValueError: a conversation has no message, no answer, or an empty one.
        ColumnError: a conversation is not a list of messages.
        TemplateError: the template refuses a conversation, or writes its turns differently when more of them follow.
        RowLengthError: a row's answers do not fit, or `max_length` does not make sense.
        DataError: `learn`, `keep` or `on_long` is not one of the words above.

    Example:
        >>> import tokenizers
        >>> raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "hi": 1, "ho": 2}, "[UNK]"))
        >>> raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> _ = raw.add_special_tokens(["<user>", "<assistant>", "<end>"])
        >>> template = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        ...             "{% if add_generation_prompt %}<assistant>{% endif %}")
        >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        >>> one = chats(Tokenizer(raw, 0, 8, False, template=template), [talk], max_length=8)
        >>> one.ids[0].tolist(), one.weights[0].tolist()
        ([3, 1, 5, 4, 2, 5], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    """
    _choose("learn", learn, ("assistant", "all"))
    if not len(conversations):
        raise EmptyDataError("there are no conversations to encode; read at least one row")
    special = stops(tokenizer)
    rows = [rendered(tokenizer, i, messages, special, learn == "all", default_system)
            for i, messages in enumerate(conversations)]
    return _sequences(tokenizer, tokenised(tokenizer, rows), max_length, keep, on_long)


def pairs(tokenizer: Tokenizer, prompts: Sequence[str], completions: Sequence[str], *, max_length: int,
          chat: bool = False, default_system: bool = False, keep: str = "start", on_long: str = "error") -> Sequences:
    """Tokenise prompts with the completions that are to be learnt, and the token that ends each.

    Args:
        tokenizer: the model's.
        prompts: one text per row.
        completions: one text per row. Without `chat` it follows the prompt as it is: begin it with the space that is
            to be between the two.
        max_length: as of `chats`, and so are `default_system`, `keep` and `on_long`.
        chat: write prompt and completion as a user's and an assistant's turn, through the chat template; otherwise the
            text is what is given, behind the tokens that the tokenizer puts in front, and before the end token.
        default_system: see `chats`.
        keep: see `chats`.
        on_long: see `chats`.

    Raises:
        EmptyDataError: there are no rows.
        MissingValueError: a prompt or a completion is missing or empty.
        ColumnError: one is not text, or there are more of the one than of the other.
        TemplateError: as of `chats`, or the tokenizer names no end token.
        RowLengthError: as of `chats`.

    Example:
        >>> import tokenizers
        >>> raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[END]": 0, "hi": 1, "ho": 2}, "[END]"))
        >>> raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> one = pairs(Tokenizer(raw, 0, 8, False, {"eos_token": 0}), ["hi"], [" ho"], max_length=8)
        >>> one.ids[0].tolist(), one.weights[0].tolist()
        ([1, 2, 0], [0.0, 1.0, 1.0])
    """
    if isinstance(prompts, str) or isinstance(completions, str) or len(prompts) != len(completions):
        raise ColumnError(f"there are {len(prompts)} prompts and {len(completions)} completions; pass a list of each, "
                          "one a row")
    for name, texts in (("prompt", prompts), ("completion", completions)):
        for i, text in enumerate(texts):
            check_text(i, text, name)
    if chat:
        turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                 for prompt, completion in zip(prompts, completions, strict=True)]
        return chats(tokenizer, turns, max_length=max_length, default_system=default_system, keep=keep, on_long=on_long)
    if not len(prompts):
        raise EmptyDataError("there are no prompts to encode; read at least one row")
    rows = [[(prompt, False), (completion, True)] for prompt, completion in zip(prompts, completions, strict=True)]
    end = (np.array([end_id(tokenizer)], np.int32), np.ones(1, np.float32))
    lead = opening(tokenizer)
    start = (lead, np.zeros(len(lead), np.float32))
    made = ((np.concatenate([start[0], ids, end[0]]), np.concatenate([start[1], weights, end[1]]))
            for ids, weights in tokenised(tokenizer, rows))
    return _sequences(tokenizer, made, max_length, keep, on_long)


def texts(tokenizer: Tokenizer, texts: Sequence[str], *, length: int,
          learn: Sequence[Sequence[tuple[int, int]]] | None = None) -> Sequences:
    """Cut texts into windows of at most `length` tokens, with nothing lost.

    A window begins with the last token of the one before it, so every token but a text's first is predicted once.

    Args:
        tokenizer: the model's; it puts around a text what it always does.
        texts: any lengths.
        length: tokens of a window.
        learn: places `(start, end)` in each text, in characters: a token that has no character there weighs nothing.
            None: all tokens count.

    Returns:
        The windows in order; `rows` says which text each is from.

    Raises:
        EmptyDataError: there are no texts, or `learn` leaves nothing to learn.
        MissingValueError: a text is missing, empty, or a single token.
        ColumnError: a text is no string, or `learn` is not one list of places for each text.
        RowLengthError: `length` is less than 2 or more than the model takes.

    Example:
        >>> import tokenizers
        >>> raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate("abcde")}, "a"))
        >>> raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> cut = globals()["texts"](Tokenizer(raw, 0, 8, False), ["a b c d e"], length=3, learn=[[(4, 7)]])
        >>> [row.tolist() for row in cut.ids], [row.tolist() for row in cut.weights]
        ([[0, 1, 2], [2, 3, 4]], [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    """
    if isinstance(texts, str):
        raise ColumnError("texts is one string, must be a list of texts; put it in a list")
    if not len(texts):
        raise EmptyDataError("there are no texts to encode; read at least one")
    length = check_limit(length, tokenizer.max_length, "length")
    if learn is not None and len(learn) != len(texts):
        raise ColumnError(f"there are {len(texts)} texts and {len(learn)} lists of places to learn; pass one for each")
    ids: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    rows: list[int] = []
    for i, text in enumerate(texts):
        check_text(i, text)
        encoded = tokenizer.encode([text])[0]
        whole = np.array(encoded.ids, np.int32)
        if len(whole) < 2:
            raise MissingValueError(f"row {i} (counted from 0, {text!r:.40}) has {len(whole)} tokens, so none to "
                                    "predict; leave it out, or join it to another")
        weight = np.ones(len(whole), np.float32) if learn is None else _inside(i, text, encoded.offsets, learn[i])
        for start in range(0, len(whole) - 1, length - 1):
            ids.append(whole[start:start + length])
            weights.append(weight[start:start + length].copy())
            weights[-1][0] = 0
            rows.append(i)
    made = Sequences(ids, weights, np.zeros(len(ids), bool), tokenizer.pad_id, np.array(rows, np.int64))
    if not made.learnt:
        raise EmptyDataError("the places to learn hold no token; check the pattern that finds them")
    return made


def end_id(tokenizer: Tokenizer) -> int:
    """Return the id that ends a text.

    Raises:
        TemplateError: the tokenizer names none.
    """
    if "eos_token" not in tokenizer.special:
        raise TemplateError(f"the tokenizer names no eos_token to end a completion with (it names "
                            f"{', '.join(tokenizer.special) or 'no special token'}); add it to tokenizer_config.json")
    return tokenizer.special["eos_token"]


def opening(tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids that the tokenizer puts in front of a text, such as a begin token, int32."""
    full, bare = (tokenizer.encode(["a"], special=special)[0].ids for special in (True, False))
    n = next((n for n in range(len(full)) if full[n:n + len(bare)] == bare), 0)
    return np.array(full[:n], np.int32)


def _choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DataError(f"{name} is {value!r}, must be one of {', '.join(map(repr, allowed))}")


def _sequences(tokenizer: Tokenizer, rows: Iterator[Row], max_length: int, keep: str, on_long: str) -> Sequences:
    """Fit rows into `max_length` tokens."""
    _choose("keep", keep, ("start", "end"))
    _choose("on_long", on_long, ("error", "drop"))
    max_length = check_limit(max_length, tokenizer.max_length)
    found: list[tuple[np.ndarray, np.ndarray, bool, int]] = []
    i = -1
    for i, (ids, weights) in enumerate(rows):
        if not len(ids):
            raise MissingValueError(f"row {i} (counted from 0) has no tokens: the tokenizer drops all its characters; "
                                    "leave the row out")
        size = len(ids)
        part = slice(0, max_length) if keep == "start" else slice(max(size - max_length, 0), size)
        ids, weights = ids[part], weights[part].copy()
        weights[0] = 0
        if weights.any():
            found.append((ids, weights, size > max_length, i))
        elif on_long == "error":
            raise RowLengthError(f"row {i} (counted from 0) has {size} tokens, and none that is learnt among the "
                                 f"{len(ids)} at its {keep} that max_length = {max_length} keeps; raise max_length, "
                                 f"keep its {'end' if keep == 'start' else 'start'}, or drop such rows "
                                 "(on_long='drop')")
    if not found:
        raise EmptyDataError(f"all {i + 1} rows were dropped, since max_length = {max_length} leaves nothing of them "
                             "to learn; raise it")
    ids_, weights_, cut, numbers_ = zip(*found, strict=True)
    return Sequences(list(ids_), list(weights_), np.array(cut, bool), tokenizer.pad_id,
                     np.array(numbers_, np.int64), i + 1 - len(found))


def _inside(i: int, text: str, offsets: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return 1 for each token that has a character inside one of the places, float32."""
    marked = np.zeros(len(text) + 1, np.int64)
    for start, end in places:
        if not 0 <= start <= end <= len(text):
            raise ColumnError(f"row {i} (counted from 0) has {len(text)} characters, but a place to learn goes from "
                              f"{start} to {end}; give places inside the text")
        marked[start:end] = 1
    before = np.concatenate([[0], np.cumsum(marked)])
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    return (before[ends] > before[starts]).astype(np.float32)
