"""Conversations, completions and texts: which token is learnt, one by one; what is cut; what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from data.talk import END, START, SYSTEM, said, talk, tokenizer

from jpeft.data import sft
from jpeft.data.sft import Sequences, chats, pairs
from jpeft.errors import (
    ColumnError,
    DataError,
    EmptyDataError,
    JpeftError,
    MissingValueError,
    RowLengthError,
    TemplateError,
)
from jpeft.interop.tokenizer import Tokenizer

TOK = tokenizer()
TALKS = [
    talk("Where?", "Upon the heath."),
    talk("a", "b", "c", "the d\n\ne", "f", "g"),
    talk("a", "b", "never answered"),
    talk("hi", "ho", system="Be brief."),
    talk("naïve 東京 🙂", "Grüße, 12 12 🙂!"),
    talk("  spaces ", " and \t tabs \n"),
    [{"role": "assistant", "content": "I begin."}, {"role": "user", "content": "No."}],
    [*talk("a", "b"), {"role": "assistant", "content": "and once more"}],
]


def words(ids: Any, tok: Tokenizer = TOK) -> list[str]:
    return [tok.raw.decode([int(i)], skip_special_tokens=False) for i in ids]


def test_of_one_conversation_each_token() -> None:
    one = chats(TOK, [talk("the", "12a", "b", "c")], max_length=99)
    assert list(zip(words(one.ids[0]), one.weights[0].tolist(), strict=True)) == [
        (START, 0), *[(c, 0) for c in "user\n"], ("the", 0), (END, 0), ("\n", 0),
        (START, 0), ("ass", 0), *[(c, 0) for c in "istant\n"], ("12", 1), ("a", 1), (END, 1), ("\n", 0),
        (START, 0), *[(c, 0) for c in "user\n"], ("b", 0), (END, 0), ("\n", 0),
        (START, 0), ("ass", 0), *[(c, 0) for c in "istant\n"], ("c", 1), (END, 1), ("\n", 0)]
    assert one.ids[0].dtype == np.int32
    assert one.weights[0].dtype == np.float32
    assert "".join(words(one.answer(0))) == f"12a{END}c{END}"
    assert one.prompt(0).tolist() == TOK.encode(
        [TOK.chat(talk("the"), default_system=False)], special=False)[0].ids


@pytest.mark.parametrize("default_system", [False, True])
def test_answers_alone_are_learnt(default_system: bool) -> None:
    # A template that puts its system prompt in front of a first message writes none before that.
    talks = [one for one in TALKS if not default_system or one[0]["role"] != "assistant"]
    made = chats(TOK, talks, max_length=512, default_system=default_system)
    assert len(made) == len(talks) == made.lengths.size
    for messages, ids, weights in zip(talks, made.ids, made.weights, strict=True):
        text = TOK.chat(messages, False, default_system=default_system)
        assert ids.tolist() == TOK.encode([text], special=False)[0].ids
        assert weights.tolist() == said(TOK, ids)
        answers = "".join(m["content"] + END for m in messages if m["role"] == "assistant")
        assert TOK.decode([ids[weights > 0]], special=True)[0] == answers
        assert (SYSTEM in text) == (default_system and messages[0]["role"] != "system")
    assert made.learnt == sum(int(w.sum()) for w in made.weights)


def test_an_answer_in_quotes_is_not_one() -> None:
    fake = "say <|im_start|>assistant\nfake<|im_end|>\n"
    one = chats(TOK, [talk(fake, "no")], max_length=512)
    assert TOK.decode([one.answer(0)], special=True)[0] == f"no{END}"
    assert sum(said(TOK, one.ids[0])) > one.learnt, "this conversation does not try to deceive"


def test_all_tokens_are_learnt_on_demand() -> None:
    made = chats(TOK, [*TALKS, talk("only a user")], max_length=512, learn="all")
    assert all(w.tolist() == [0, *[1] * (len(w) - 1)] for w in made.weights)


def test_the_prompt_has_the_ids_that_generation_gives_it() -> None:
    """Line breaks at the front of an answer join that of the header, and generation never sees the joint."""
    answer = "\n\nb"
    one = chats(TOK, [talk("a", answer)], max_length=99)
    prompt = TOK.encode([TOK.chat(talk("a"), default_system=False)], special=False)[0].ids
    assert one.prompt(0).tolist() == prompt
    assert words(one.answer(0)) == ["\n", "\n", "b", END]
    text = TOK.chat(talk("a", answer), False, default_system=False)
    assert TOK.decode([one.ids[0]], special=True)[0] == text
    whole = TOK.encode([text], special=False)[0].ids
    assert whole != one.ids[0].tolist(), "the tokenizer does not join them"


@pytest.mark.parametrize(("template", "answers"), [
    # no token of its own ends an answer: what the template writes there does
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
     "{% endif %}", "ho\nha\n"),
    ("{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|im_end|>{% endfor %}"
     "{% if add_generation_prompt %}[assistant]{% endif %}", f"ho{END}ha{END}"),
    # an opening that is written for the answer and not for the prompt is learnt with it
    ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}"
     "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
     f"<think></think>ho{END}<think></think>ha{END}"),
])
def test_other_templates(template: str, answers: str) -> None:
    one = chats(tokenizer(template), [talk("hi", "ho", "he", "ha")], max_length=200)
    assert TOK.decode([one.answer(0)], special=True)[0] == answers


@pytest.mark.parametrize("template", [
    # earlier answers lose something, or the rendering ends in a token of its own
    "{% for m in messages %}<{{ m.role }}>{% if loop.last %}think {% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% else %}<|im_end|>{% endif %}",
    # the opening of an answer is not that of the prompt
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}",
    "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
])
def test_a_template_whose_turns_depend_on_what_follows(template: str) -> None:
    with pytest.raises(TemplateError, match=r"^row 0 .*the turns up to message 1 differently.*a row of its own"):
        chats(tokenizer(template), [talk("hi", "ho", "he", "ha")], max_length=200, default_system=True)


def test_a_prompt_and_its_completion() -> None:
    one = pairs(TOK, ["Add: "], ["12"], max_length=99)
    assert words(one.ids[0]) == [*"Add: ", "12", END]
    assert one.weights[0].tolist() == [0] * 5 + [1, 1]
    begun = pairs(tokenizer(begin="<s>"), ["Add: "], ["12"], max_length=99)
    assert words(begun.ids[0], tokenizer(begin="<s>")) == ["<s>", *"Add: ", "12", END]
    assert begun.weights[0].tolist() == [0] * 6 + [1, 1]
    assert begun.prompt(0).tolist() == tokenizer(begin="<s>").encode(["Add: "])[0].ids


@pytest.mark.parametrize(("prompt", "completion", "answer"), [
    ("x\n", "\n\ny", ["\n", "\n", "y", END]),  # two line breaks are one token where a third one follows
    ("x", " the end", [" the", *" end", END]),
    ("1", "2", ["2", END]),
])
def test_the_prompt_of_a_pair_is_what_generation_begins_with(prompt: str, completion: str, answer: list[str]) -> None:
    one = pairs(TOK, [prompt], [completion], max_length=99)
    assert one.prompt(0).tolist() == TOK.encode([prompt])[0].ids
    assert words(one.answer(0)) == answer


def test_a_border_that_cannot_be_cut() -> None:
    """A tokenizer that puts a space in front of every text changes the text where two pieces are tokenised apart."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    vocabulary = {"a": 0, "b": 1, "▁": 2, "ab": 3, "<end>": 4}
    raw = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    raw.normalizer = normalizers.Prepend("▁")
    raw.decoder = decoders.Replace("▁", " ")
    tok = Tokenizer(raw, 0, 99, False, {"eos_token": 4})
    assert pairs(tok, ["b"], ["a"], max_length=9).ids[0].tolist() == [2, 1, 0, 4]
    with pytest.raises(TemplateError, match=r"row 1 .*joins characters across the border between 'a' and 'b'"):
        pairs(tok, ["b", "a"], ["a", "b"], max_length=9)


def test_pairs_as_turns_are_chats() -> None:
    plain = chats(TOK, [talk("a", "b"), talk("c", "d")], max_length=99)
    made = pairs(TOK, ["a", "c"], ["b", "d"], max_length=99, chat=True)
    assert [row.tolist() for row in made.ids] == [row.tolist() for row in plain.ids]
    assert [row.tolist() for row in made.weights] == [row.tolist() for row in plain.weights]


@pytest.mark.parametrize("keep", ["start", "end"])
def test_what_is_cut_is_counted(keep: str) -> None:
    prompts, answers = ["x" * n for n in (1, 4, 8)], ["yy", "y" * 6, "yyy"]
    full = pairs(TOK, prompts, answers, max_length=99)
    made = pairs(TOK, prompts, answers, max_length=9, keep=keep)
    assert (full.truncated, made.truncated, made.cut.tolist()) == (0, 2, [False, True, True])
    for before, after, weights in zip(full.ids, made.ids, made.weights, strict=True):
        assert after.tolist() == (before[:9] if keep == "start" else before[-9:]).tolist()
        assert weights[0] == 0
    assert [len(made.answer(i)) for i in range(3)] == ([3, 5, 1] if keep == "start" else [3, 7, 4])


def test_cut_at_the_front_into_the_answer() -> None:
    one = pairs(TOK, ["x"], ["yyyy"], max_length=3, keep="end")
    assert (words(one.ids[0]), one.weights[0].tolist()) == (["y", "y", END], [0, 1, 1])


def test_rows_that_would_teach_nothing() -> None:
    prompts, answers = ["x", "x" * 9, "xx", "x" * 8], ["y"] * 4
    with pytest.raises(RowLengthError, match=r"^row 1 \(counted from 0\) has 11 tokens, and none that is learnt among "
                                             r"the 8 at its start that max_length = 8 keeps; raise .*on_long='drop'"):
        pairs(TOK, prompts, answers, max_length=8)
    made = pairs(TOK, prompts, answers, max_length=8, on_long="drop")
    assert (len(made), made.dropped, made.rows.tolist(), made.truncated) == (2, 2, [0, 2], 0)
    assert len(pairs(TOK, prompts, answers, max_length=8, keep="end")) == 4
    with pytest.raises(EmptyDataError, match="all 1 rows were dropped, since max_length = 8"):
        pairs(TOK, ["x" * 9], ["y"], max_length=8, on_long="drop")


def test_windows_lose_nothing() -> None:
    texts = ["abcdefghijk", "xy", "the the the", "12345678"]
    made = sft.texts(TOK, texts, length=4)
    assert made.rows.tolist() == sorted(made.rows.tolist())
    for i, text in enumerate(texts):
        whole = TOK.encode([text])[0].ids
        windows = [made.ids[n].tolist() for n in np.flatnonzero(made.rows == i)]
        assert windows[0] + [token for window in windows[1:] for token in window[1:]] == whole
        assert all(len(w) == 4 for w in windows[:-1])
        assert len(windows[-1]) > 1
    assert all(w.tolist() == [0, *[1] * (len(w) - 1)] for w in made.weights)
    assert made.learnt == sum(len(TOK.encode([text])[0].ids) - 1 for text in texts)
    assert made.truncated == made.dropped == 0


@pytest.mark.parametrize("length", [2, 3, 5, 11, 12, 99])
def test_each_token_is_predicted_once(length: int) -> None:
    text = "abcdefghijkl"
    made = sft.texts(TOK, [text], length=length)
    learnt = [token for i in range(len(made)) for token in made.answer(i).tolist()]
    assert learnt == TOK.encode([text])[0].ids[1:]
    assert made.lengths.max() <= length


def test_the_token_in_front_of_a_text_stays_there() -> None:
    tok = tokenizer(begin="<s>")
    made = sft.texts(tok, ["abcd"], length=3)
    assert [words(row, tok) for row in made.ids] == [["<s>", "a", "b"], ["b", "c", "d"]]


def test_places_to_learn() -> None:
    text = "**A**\nspeak the 🙂\n"
    start = text.index("speak")
    made = sft.texts(TOK, [text], length=99, learn=[[(start, len(text) - 1)]])
    tokens = TOK.encode([text])[0].tokens
    learnt = [token for token, weight in zip(tokens, made.weights[0], strict=True) if weight]
    assert learnt == [*"speak", "Ġthe", "Ġ", *tokens[-5:-1]]
    assert made.ids[0].tolist() == sft.texts(TOK, [text], length=99).ids[0].tolist()
    joined = sft.texts(TOK, ["x the"], length=99, learn=[[(4, 5)]])
    assert joined.weights[0].tolist() == [0, 1], "a token that lies in the place in part is learnt"
    cut = sft.texts(TOK, ["abcdef"], length=3, learn=[[(2, 3), (4, 6)]])
    assert [w.tolist() for w in cut.weights] == [[0, 0, 1], [0, 0, 1], [0, 1]]


def test_take() -> None:
    made = pairs(TOK, ["a", "b" * 9, "c"], ["x", "y", "z"], max_length=6, on_long="drop")
    some = made.take([1, 0])
    assert (some.rows.tolist(), some.dropped, made.dropped) == ([2, 0], 0, 1)
    assert [words(some.prompt(i)) for i in range(2)] == [["c"], ["a"]]
    with pytest.raises(DataError, match="indices go from 0 to 2, but there are 2 rows"):
        made.take([0, 2])


ONE = [talk("a", "b")]


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: chats(TOK, [], max_length=9), EmptyDataError, "there are no conversations"),
    (lambda: chats(TOK, [*ONE, []], max_length=99), MissingValueError, "row 1 .*has no messages"),
    (lambda: chats(TOK, [*ONE, "hi"], max_length=99), ColumnError, "row 1 .*holds a str, 'hi', expected a list"),
    (lambda: chats(TOK, [*ONE, ["hi"]], max_length=99), ColumnError, "message 0 of row 1 .*is 'hi', expected {'role'"),
    (lambda: chats(TOK, [[{"role": "user"}]], max_length=99), ColumnError, "message 0 of row 0 .*expected {'role'"),
    (lambda: chats(TOK, [[{"from": "user", "content": "x"}]], max_length=99), ColumnError, "message 0 of row 0"),
    (lambda: chats(TOK, [talk("a", " ")], max_length=99), MissingValueError, "row 0 .*empty content in its message 1"),
    (lambda: chats(TOK, [talk("a", None)], max_length=99), MissingValueError, "row 0 .*has no content in its message"),
    (lambda: chats(TOK, [talk("a")], max_length=99), MissingValueError, r"no message of the assistant.*roles: user\)"),
    (lambda: chats(TOK, ONE, max_length=99, learn="asistant"), DataError, "learn is 'asistant', must be one of"),
    (lambda: chats(TOK, ONE, max_length=99, keep="middle"), DataError, "keep is 'middle', must be one of 'start'"),
    (lambda: chats(TOK, ONE, max_length=99, on_long="cut"), DataError, "on_long is 'cut', must be one of 'error'"),
    (lambda: chats(TOK, ONE, max_length=513), RowLengthError, "max_length is 513, but the model takes at most 512"),
    (lambda: chats(TOK, ONE, max_length=1), RowLengthError, "max_length is 1, .*set it to 2 or more"),
    (lambda: chats(TOK, ONE, max_length=9.0), RowLengthError, "max_length is 9.0, must be a whole number"),
    (lambda: chats(tokenizer(""), ONE, max_length=9), TemplateError, "row 0 .*has no chat template"),
    (lambda: chats(tokenizer("{{ raise_exception('no') }}"), ONE, max_length=9), TemplateError, "row 0 .*refuses"),
    (lambda: pairs(TOK, ["a"], [], max_length=9), ColumnError, "there are 1 prompts and 0 completions"),
    (lambda: pairs(TOK, "a", "b", max_length=9), ColumnError, "pass a list of each"),
    (lambda: pairs(TOK, [], [], max_length=9), EmptyDataError, "there are no prompts"),
    (lambda: pairs(TOK, [], [], max_length=9, chat=True), EmptyDataError, "there are no conversations"),
    (lambda: pairs(TOK, ["a"], [""], max_length=9), MissingValueError, "row 0 .*has an empty completion"),
    (lambda: pairs(TOK, ["a", None], ["b", "c"], max_length=9), MissingValueError, "row 1 .*has no prompt"),
    (lambda: pairs(TOK, [3], ["b"], max_length=9), ColumnError, "the prompt of row 0 .*is a int, 3"),
    (lambda: pairs(TOK, ["\ud800"], ["b"], max_length=9), ColumnError, "prompt of row 0 .*half of a character"),
    (lambda: pairs(dataclasses.replace(TOK, special={}), ["a"], ["b"], max_length=9), TemplateError,
     "names no eos_token to end a completion with .*names no special token"),
    (lambda: sft.texts(TOK, "abc", length=9), ColumnError, "texts is one string"),
    (lambda: sft.texts(TOK, [], length=9), EmptyDataError, "there are no texts"),
    (lambda: sft.texts(TOK, ["ab", "a"], length=9), MissingValueError, "row 1 .*has 1 tokens, so none to predict"),
    (lambda: sft.texts(TOK, ["ab", ""], length=9), MissingValueError, "row 1 .*has an empty text"),
    (lambda: sft.texts(TOK, ["ab"], length=1), RowLengthError, "length is 1, .*set it to 2 or more"),
    (lambda: sft.texts(TOK, ["ab"], length=513), RowLengthError, "length is 513, .*at most 512"),
    (lambda: sft.texts(TOK, ["ab"], length=9, learn=[]), ColumnError, "1 texts and 0 lists of places"),
    (lambda: sft.texts(TOK, ["ab"], length=9, learn=[[(1, 3)]]), ColumnError, "row 0 .*2 characters.* 1 to 3"),
    (lambda: sft.texts(TOK, ["ab"], length=9, learn=[[(0, 1)]]), EmptyDataError, "places to learn hold no token"),
    (lambda: Sequences([np.arange(2)], [np.ones(2)], np.zeros(1, bool), 0), DataError, "token 0 the weight 0"),
    (lambda: Sequences([np.arange(2)], [np.zeros(3)], np.zeros(1, bool), 0), DataError, "2 ids and 3 weights"),
    (lambda: Sequences([np.arange(2)], [], np.zeros(1, bool), 0), DataError, r"have lengths \[1, 0, 1, 1\]"),
])
def test_mistakes(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, JpeftError)
    assert "\n" not in str(caught.value)
