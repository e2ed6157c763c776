"""What a language model writes to prompts: answers by greedy generation, how many are right, and some to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpeft.cli.sections import GenerateConfig
from jpeft.cli.tasks.base import Adapted, Apply, Loaded, Metrics
from jpeft.core import transform
from jpeft.errors import NotMergeable
from jpeft.interop.tokenizer import Tokenizer
from jpeft.serve.generate import Generation, Generator

Ids = Sequence[int]
FENCE = "~~~~"


class Question(NamedTuple):
    """A prompt and the right answer to it, as ids and as text."""

    prompt: list[int]
    answer: str


class Writing(NamedTuple):
    """A model that writes: its generator, the weights that it is called with, and what a reader must know of it."""

    generator: Generator
    weights: Any
    notes: tuple[str, ...] = ()


def plain(loaded: Loaded) -> Writing:
    """Return the model without an adapter."""
    return Writing(_generator(loaded), loaded.params)


def trained(adapted: Adapted, like: Writing | None = None) -> Writing:
    """Return the model with its adapter: merged, or adapted where a method cannot merge.

    Args:
        adapted: the model.
        like: the plain model, whose compiled programs serve the merged one too.
    """
    loaded = adapted.loaded
    try:
        params = transform.merge(adapted.plan, adapted.trainable, adapted.frozen)
    except NotMergeable as error:
        apply = transform.adapt(loaded.model.apply, adapted.plan)
        note = f"answers are written with the adapter beside the weights, not merged: {error}"
        return Writing(_generator(loaded, apply), (adapted.trainable, adapted.frozen), (note,))
    return Writing((like or plain(loaded)).generator, params)


def _generator(loaded: Loaded, apply: Apply | None = None) -> Generator:
    writer: Any = loaded.tokenizer
    return Generator(loaded.model, writer, apply=apply)


def answers(model: Writing, prompts: Sequence[Ids], config: GenerateConfig) -> list[Generation]:
    """Answer prompts greedily, those of like length together; the last batch is filled up with its first prompt."""
    found: dict[int, Generation] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = min(config.batch_size, len(prompts))
    for start in range(0, len(order), size):
        rows = order[start:start + size]
        batch = [prompts[i] for i in rows] + [prompts[rows[0]]] * (size - len(rows))
        wrote = model.generator(model.weights, batch, max_new_tokens=config.max_new_tokens, special=False)
        found.update(zip(rows, wrote, strict=False))
    return [found[i] for i in range(len(prompts))]


def right(wrote: Sequence[Generation], questions: Sequence[Question]) -> Metrics:
    """Return which share of the answers is the right one."""
    found = hits(wrote, questions)
    return {"exact_match": float(found.mean()), "answers": float(len(found))}


def hits(wrote: Sequence[Generation], questions: Sequence[Question]) -> np.ndarray:
    """Return which answers are the right ones, letter by letter but for spaces around them."""
    return np.array([one.text.strip() == question.answer.strip() for one, question in
                     zip(wrote, questions, strict=True)])


def most_frequent(known: Sequence[str], questions: Sequence[Question]) -> tuple[str, Metrics]:
    """Return the answer that is most frequent in `known`, and how often it is the right one."""
    answer = Counter(one.strip() for one in known).most_common(1)[0][0]
    hits = sum(answer == question.answer.strip() for question in questions)
    return answer, {"exact_match": hits / len(questions), "answers": float(len(questions))}


def decoded(tokenizer: Tokenizer, rows: Iterable[Any]) -> list[str]:
    """Return the texts of rows of ids of any lengths, without special tokens."""
    return tokenizer.decode(rows)


def samples(tokenizer: Tokenizer, questions: Sequence[Question], before: Sequence[Generation],
            after: Sequence[Generation], first: int, title: str) -> str:
    """Return Markdown that shows the first questions with the right answer and those before and after training."""
    parts = [f"# {title}\n"]
    for i, (question, old, new) in enumerate(list(zip(questions, before, after, strict=True))[:first], 1):
        prompt = tokenizer.decode([np.asarray(question.prompt)], special=True)[0]
        parts.append(f"## {i}\n")
        for name, text in (("Prompt", prompt), ("Right", question.answer), ("Before", old.text), ("After", new.text)):
            parts.append(f"{name}:\n\n{FENCE}\n{text.strip()}\n{FENCE}\n")
    return "\n".join(parts)


def shown(text: str) -> str:
    r"""Return a text on one line.

    Example:
        >>> print(shown(" To be,\nor not "))
        To be,\nor not
    """
    return text.strip().replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
