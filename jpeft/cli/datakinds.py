"""The data section of a configuration: one class for each kind of rows, chosen by `model.task` and `data.format`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import pydantic
from pydantic import Field

from jpeft.cli.fields import Count, Section, Seed, Share
from jpeft.errors import ConfigError, nearest

Name = Literal["territories", "languages", "scripts", "currencies"]


class _Bucketed(Section):
    """How rows of unequal lengths become batches.

    Attributes:
        max_length: longer texts are truncated to this many tokens.
        buckets: lengths that batches are padded to; null: four of even steps up to `max_length`.
    """

    max_length: Count = 128
    buckets: list[int] | None = None

    @pydantic.model_validator(mode="after")
    def _rising(self) -> _Bucketed:
        widths, longest = self.buckets, self.max_length
        if widths is not None and (not widths or widths != sorted(set(widths)) or widths[0] < 1
                                   or widths[-1] != longest):
            raise ValueError(f"data.buckets = {widths} must rise to data.max_length = {longest}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """The buckets."""
        even = sorted({max(1, self.max_length * i // 4) for i in range(1, 5)})
        return tuple(self.buckets if self.buckets is not None else even)


class Rows(Section):
    """Where rows come from.

    Attributes:
        source: a file of rows: a path, or a source as of the model.
        sha256: of the wheel, for a `pypi:` source.
        seed: of the split. It is not the seed of the training, so that runs with other seeds see the same test.
        learns: which fields of the section `objective` these rows are for; see `jpeft.cli.sections.OBJECTIVES`.
    """

    learns: ClassVar[str] = ""

    source: str
    sha256: str | None = None
    seed: Seed = 0

    def gaps(self) -> dict[str, Any]:
        """Return the fields whose values follow from others."""
        widths = {"buckets": list(self.widths)} if isinstance(self, _Bucketed) else {}
        return {"source": absolute(self.source), **widths}


class _Shares(Rows):
    """Rows that are divided at random.

    Attributes:
        test: rows held out for the test: how many, or which share.
        validation: rows held out to choose the best step: how many, or which share of all.
    """

    test: Share
    validation: Share = 0.05


class _Split(_Shares):
    """Rows of a table, divided at random.

    Attributes:
        where: keep the rows in which these columns have these values.
    """

    where: dict[str, Any] = Field(default_factory=dict)


class DataConfig(_Split, _Bucketed):
    """Which rows, and how they become batches: texts and their classes.

    Attributes:
        source: a CSV, JSONL, Parquet or Orange file: a path, or a source as of the model.
        test_source: the same with the rows for the test, of which `test` are used; null: they are among the others.
        unique: columns: rows that equal an earlier one in all of them are dropped, and counted; test rows also where
            they equal one of the others.
        text: column of the texts.
        label: column of the labels: numbers, or names of classes.
        classes: names of the classes in the order of their numbers, or how many there are.
    """

    test_source: str | None = None
    unique: list[str] = Field(default_factory=list)
    text: str = "text"
    label: str = "label"
    classes: list[str] | int

    @pydantic.field_validator("classes")
    @classmethod
    def _several(cls, value: list[str] | int) -> list[str] | int:
        names = value if isinstance(value, list) else list(range(value))
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError("must be two or more different names, or a number from 2")
        return value

    def gaps(self) -> dict[str, Any]:
        apart = {} if self.test_source is None else {"test_source": absolute(self.test_source)}
        return {**super().gaps(), **apart}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; their numbers where they have none."""
        return tuple(self.classes) if isinstance(self.classes, list) else tuple(map(str, range(self.classes)))


class _Tags(_Shares, _Bucketed):
    """Sentences of words with a tag each.

    Attributes:
        labels: names of the tags in the order of their numbers, as `[O, B-PER, I-PER]`.
    """

    labels: list[str]

    @pydantic.field_validator("labels")
    @classmethod
    def _several(cls, value: list[str]) -> list[str]:
        if len(value) < 2 or len(set(value)) != len(value):
            raise ValueError("must be two or more different names")
        if alone := [name for name in value if name.startswith("I-") and f"B-{name[2:]}" not in value]:
            raise ValueError(f"has {alone[0]} and no B-{alone[0][2:]}, with which such an entity would begin; add it")
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes of a token."""
        return tuple(self.labels)


class TagRows(_Tags):
    """The same in a table.

    Attributes:
        source: a JSONL or Parquet file, whose values can be lists: a path, or a source as of the model.
        format: `rows`.
        tokens: column of the words: lists of strings.
        tags: column of the tags: lists of names or numbers.
    """

    format: Literal["rows"]
    tokens: str = "tokens"
    tags: str = "tags"


class TagText(_Tags):
    """The same in a text file of one word a line, sentences apart by blank lines, as of the CoNLL tasks.

    Attributes:
        format: `conll`.
        token: column of the words, counted from 0; from -1 backwards.
        tag: column of the tags.
    """

    format: Literal["conll"]
    token: int = 0
    tag: int = -1


class _Packed(Section):
    """How sequences of a causal language model become rows.

    Attributes:
        max_length: tokens of a packed row, and of the longest sequence; longer ones are truncated, and counted.
        keep: which end of a sequence that is too long stays.
        on_long: what happens to a sequence of whose answer nothing would be left.
        default_system: keep the system prompt that the chat template writes of its own.
    """

    max_length: Count = 256
    keep: Literal["start", "end"] = "end"
    on_long: Literal["error", "drop"] = "error"
    default_system: bool = False


class ChatData(_Split, _Packed):
    """Conversations, written as the model's chat template says.

    Attributes:
        format: `chat`.
        messages: column of the conversations: lists of `{role, content}`.
        learn: whether the assistant's answers are learnt, or everything.
    """

    format: Literal["chat"]
    messages: str = "messages"
    learn: Literal["assistant", "all"] = "assistant"


class Templates(_Split):
    """Texts made of the columns of a table.

    Attributes:
        names: column -> names that stand for the numbers 0, 1, ... in it.
        match: column -> regular expression: rows whose whole value it does not match are dropped, and counted; where it
            has a group, the value becomes what that holds.
        unique: columns: rows that equal an earlier one in all of them are dropped, and counted.
    """

    names: dict[str, list[str]] = Field(default_factory=dict)
    match: dict[str, str] = Field(default_factory=dict)
    unique: list[str] = Field(default_factory=list)


class _Pairs(Templates):
    """Prompts and what should follow them.

    Attributes:
        prompt: template over columns, as `{question}`.
        completion: template of what is to be learnt.
    """

    prompt: str = "{prompt}"
    completion: str = "{completion}"


class PairsData(_Pairs, _Packed):
    """Prompts and completions for a causal language model.

    Attributes:
        format: `pairs`.
        chat: write prompt and completion as a user's and an assistant's turn of the model's chat template; otherwise
            they are plain text, and an end token follows.
    """

    format: Literal["pairs"]
    chat: bool = False


class PreferenceData(Templates, _Packed):
    """Prompts with a chosen and a rejected answer.

    Attributes:
        format: `preference`.
        prompt: template over columns, as `{question}`.
        chosen: template of the better answer.
        rejected: template of the other one.
        chat: as of `PairsData`.
    """

    learns: ClassVar[str] = "preference"

    format: Literal["preference"]
    prompt: str = "{prompt}"
    chosen: str = "{chosen}"
    rejected: str = "{rejected}"
    chat: bool = False


class EmbeddingData(Templates, _Bucketed):
    """Texts that belong together.

    Attributes:
        source: a CSV, JSONL or Parquet file: a path, or a source as of the model.
        anchor: template over columns, as `{question}`.
        positive: template of the text that should be near.
        negative: template of one that is alike and should not be near; null: the other rows' positives are enough.
        score: column that says how alike anchor and positive are, for the rank correlation; null: there is none.
        min_score: from which score on a row is a pair that is learnt, and that has to be found.
    """

    learns: ClassVar[str] = "contrastive"

    anchor: str = "{anchor}"
    positive: str = "{positive}"
    negative: str | None = None
    score: str | None = None
    min_score: float | None = None

    @pydantic.model_validator(mode="after")
    def _both(self) -> EmbeddingData:
        if (self.score is None) != (self.min_score is None):
            raise ValueError("data.score and data.min_score belong together: a row of a low score is no pair; set "
                             "both, or neither")
        return self


class TextData(Rows):
    """Plain texts, cut into windows.

    Attributes:
        source: a folder of texts (`.md` and `.txt` files at any depth), or one file.
        format: `text`.
        test: names (without suffix) of the files that are held out for the test.
        validation: the same, to choose the best step.
        max_length: tokens of a window.
        test_windows: how many windows of the test files are used, evenly spaced; null: all.
        validation_windows: the same of the validation files.
        dialogue: regular expression whose first group (or all of it) is what is spoken, `^` and `$` being the borders
            of lines. Perplexity is reported for these tokens alone too. null: it is not.
    """

    format: Literal["text"]
    test: list[str] = Field(min_length=1)
    validation: list[str] = Field(min_length=1)
    max_length: Count = 256
    test_windows: Count | None = None
    validation_windows: Count | None = None
    dialogue: str | None = None


class TargetsData(_Pairs, _Bucketed):
    """Inputs and outputs of an encoder-decoder.

    Attributes:
        format: `pairs`.
    """

    format: Literal["pairs"]


class NamesData(Rows, _Bucketed):
    """Names of territories, languages, scripts and currencies in two languages, from the files of the babel package.

    Attributes:
        source: the folder `locale-data`.
        format: `names`.
        read: code of the language that is read, or several.
        write: code of the language that is written.
        kinds: which names.
        test: share of the names held out for the test: by name, whatever the languages.
        validation: share held out to choose the best step.
    """

    format: Literal["names"]
    read: str | list[str]
    write: str
    kinds: list[Name] = Field(default_factory=lambda: list(get_args(Name)), min_length=1)
    test: Annotated[float, Field(gt=0, lt=1)] = 0.15
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.05


CLASSIFICATION = "classification"
WRITE = ("causal-lm", "seq2seq")
KINDS: Mapping[str, Mapping[str, type[Rows]]] = {
    CLASSIFICATION: {"": DataConfig},
    "token-classification": {"rows": TagRows, "conll": TagText},
    "embedding": {"": EmbeddingData},
    "causal-lm": {"chat": ChatData, "pairs": PairsData, "text": TextData, "preference": PreferenceData},
    "seq2seq": {"pairs": TargetsData, "names": NamesData},
}


def kind(data: Mapping[str, Any]) -> type[Rows]:
    """Return the class of the data section of a configuration.

    Args:
        data: the whole configuration, unchecked.

    Raises:
        ConfigError: there is no such task, or it has other formats.

    Example:
        >>> kind({"model": {"task": "causal-lm"}, "data": {"format": "text"}}).__name__
        'TextData'
    """
    model, rows = data.get("model"), data.get("data")
    task = model.get("task", CLASSIFICATION) if isinstance(model, Mapping) else CLASSIFICATION
    if not isinstance(task, str) or task not in KINDS:
        raise ConfigError(f"model.task = {task!r} is none of {', '.join(KINDS)} ({nearest(str(task), KINDS, 1)})")
    formats = KINDS[task]
    if not isinstance(rows, Mapping):
        return next(iter(formats.values()))
    if "" in formats:
        if "format" in rows:
            having = [name for name, others in KINDS.items() if rows["format"] in others] or KINDS
            raise ConfigError(f"data.format = {rows['format']!r} is for the tasks {', '.join(having)}; set model.task "
                              "to one of them, or drop it")
        return formats[""]
    known = f"a {task} job has one of {', '.join(formats)}"
    if "format" not in rows:
        raise ConfigError(f"'data.format' is missing; {known}")
    if rows["format"] not in formats:
        raise ConfigError(f"data.format = {rows['format']!r} is unknown; {known} "
                          f"({nearest(str(rows['format']), formats, 1)})")
    return formats[rows["format"]]


def absolute(source: str) -> str:
    """Return a path from the root; other sources are left as they are."""
    return source if re.match(r"[a-z][a-z0-9+.-]+:", source) else str(Path(source).expanduser().absolute())
