"""Entities in tagged sentences, and how many of them are found."""

from __future__ import annotations

from collections.abc import Sequence

Entity = tuple[int, int, str]


def entities(tags: Sequence[str]) -> set[Entity]:
    """Return the entities of a sentence by its tags, `(first word, word behind the last, kind)`.

    Strictly BIO: an entity is a `B-X` and the `I-X` right behind it; an `I-X` that follows nothing of its kind is no
    entity, and `O` is none. A tag without such a prefix, as of a part of speech, is an entity of one word.

    Example:
        >>> sorted(entities(["B-LOC", "I-LOC", "O", "I-PER", "B-PER"]))
        [(0, 2, 'LOC'), (4, 5, 'PER')]
        >>> sorted(entities(["DET", "NOUN"]))
        [(0, 1, 'DET'), (1, 2, 'NOUN')]
    """
    found: set[Entity] = set()
    begun: tuple[int, str] | None = None
    for i, tag in enumerate([*tags, "O"]):
        if begun is not None and tag != f"I-{begun[1]}":
            found.add((begun[0], i, begun[1]))
            begun = None
        if tag.startswith("B-"):
            begun = (i, tag[2:])
        elif tag != "O" and not tag.startswith("I-"):
            found.add((i, i + 1, tag))
    return found


def f1(right: Sequence[Sequence[str]], given: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return precision, recall and F1 of the entities of all sentences together; an entity counts if all of it fits.

    Args:
        right: the tags that are right, for each sentence.
        given: the tags that were given.

    Returns:
        `{"f1", "precision", "recall", "entities"}`, the last being how many there are; a share of none is 0.

    Example:
        >>> f1([["B-LOC", "I-LOC", "B-PER"]], [["B-LOC", "I-LOC", "O"]])
        {'f1': 0.6666666666666666, 'precision': 1.0, 'recall': 0.5, 'entities': 2.0}
    """
    wanted = [entities(tags) for tags in right]
    found = [entities(tags) for tags in given]
    hits = sum(len(a & b) for a, b in zip(wanted, found, strict=True))
    there, said = sum(map(len, wanted)), sum(map(len, found))
    return {"f1": 2 * hits / max(there + said, 1), "precision": hits / max(said, 1), "recall": hits / max(there, 1),
            "entities": float(there)}
