"""What the sections of a configuration are made of: a strict base class and the kinds of numbers."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import BaseModel, Field

Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of a configuration: no unknown key, no value of another kind, no change."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


def share(value: int | float) -> int | float:
    """Check a number of rows, or a share of them."""
    if not (value >= 1 if isinstance(value, int) else 0 < value < 1):
        raise ValueError("must be a number of rows (1, 2, ...) or a share between 0 and 1")
    return value


Share = Annotated[int | float, pydantic.AfterValidator(share)]
