"""Classification with test rows from a file of their own, and without rows that are there twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.tinyjob import Tiny

from jpeft.cli import build, config
from jpeft.errors import ColumnError, EmptyDataError
from jpeft.interop import tokenizer as tokenizers

TRAIN = [("a", "good film"), ("b", "bad film"), ("a", "fine plot"), ("b", "dull plot"), ("a", "good film"),
         ("b", "cold cast"), ("a", "warm cast"), ("b", "bad the a")]
TEST = [("a", "warm plot"), ("b", "bad film"), ("b", "dull cast"), ("a", "warm plot"), ("a", "good a"), ("b", "bad is")]


@pytest.fixture
def job(tiny: Tiny, tmp_path: Path) -> Path:
    for name, rows in (("train", TRAIN), ("test", TEST)):
        lines = ["label\ttext", "d\tstring", "class\t", *("\t".join(row) for row in rows)]
        (tmp_path / f"{name}.tab").write_text("\n".join(lines) + "\n")
    path = tmp_path / "job.yaml"
    path.write_text(f"""
model: {{source: {tiny.model}}}
data:
  source: {tmp_path / "train.tab"}
  test_source: {tmp_path / "test.tab"}
  unique: [text]
  classes: [a, b]
  test: 2
  validation: 2
  max_length: 8
rules: {{attention: {{method: LoRA}}}}
""")
    return path


def texts(job: Path, *settings: str) -> tuple[dict[str, list[str]], list[str]]:
    made = config.load(job, settings)
    tokenizer = tokenizers.read(Path(str(made.model.source)), 0, 32, True)
    assert tokenizer is not None
    data = build.load_data(made, tokenizer)
    said = {name: sorted(text[6:-6] for text in tokenizer.decode(part.ids)) for name, part in data.items()}
    return said, list(data["train"].notes)


def test_test_rows_are_of_the_other_file_and_no_row_is_there_twice(job: Path) -> None:
    found, notes = texts(job)
    assert sorted(found["train"] + found["validation"]) == sorted({text for _, text in TRAIN})
    assert len(found["validation"]) == 2
    assert set(found["test"]) <= {"warm plot", "dull cast", "good a", "bad is"}
    assert len(found["test"]) == 2
    assert notes == ["left out: 1 rows of train.tab equal an earlier one in text",
                     "left out: 1 rows of test.tab equal an earlier one in text",
                     "left out: 1 test rows equal another one in text"]
    assert texts(job, "seed=7") == (found, notes)


def test_duplicates_stay_where_they_are_not_asked_for(job: Path) -> None:
    found, notes = texts(job, "data.unique=[]")
    assert len(found["train"]) == len(TRAIN) - 2
    assert notes == []


def test_mistakes(job: Path) -> None:
    with pytest.raises(ColumnError, match="'txt'"):
        texts(job, "data.unique=[txt]")
    with pytest.raises(EmptyDataError, match="every row of train"):
        texts(job, f"data.test_source={job.parent / 'train.tab'}")
