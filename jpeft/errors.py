"""One class per mistake. Each message is one line: what was found, what was expected, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JpeftError(Exception):
    """Base class of every error that jpeft raises on purpose."""


class PlanError(JpeftError, ValueError):
    """A plan cannot be made from these rules and this model."""


class NoMatchError(PlanError):
    """A rule or an exclusion matches no leaf (or only leaves that earlier rules have taken)."""


class UnusedLeafError(PlanError):
    """A rule targets a leaf that the model never reads."""


class WrongUseError(PlanError):
    """A method cannot ride on a leaf that the model uses in this way."""


class MethodConfigError(PlanError):
    """A field of a method has a value that the leaf or the method does not allow."""


class PathError(JpeftError, ValueError):
    """Two leaves have one path, a leaf is not an array, or a pytree is not the planned one."""


class UnsupportedUse(JpeftError, TypeError):
    """An operation of the model would need the whole adapted weight W + dW."""


class NotMergeable(JpeftError, TypeError):
    """A method has no equivalent plain parameters."""


class CallError(JpeftError, TypeError):
    """An adapted function was called with arguments that its plan cannot serve."""


class StoreError(JpeftError, ValueError):
    """Base class of the errors of `save` and `load`."""


class CorruptFileError(StoreError):
    """A file is missing, truncated or not what its header says."""


class MissingKeyError(StoreError):
    """The file lacks tensors that the plan names."""


class ExtraKeyError(StoreError):
    """The file holds tensors that the plan does not name."""


class WrongShapeError(StoreError):
    """A stored tensor has another shape than the plan says."""


class WrongDtypeError(StoreError):
    """A stored tensor has another dtype than the plan says."""


class WrongBaseError(StoreError):
    """The adapter was trained on other base parameters."""


class PartitionError(JpeftError, ValueError):
    """Two halves of a tree do not fit together."""


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """Return a hint that names the entries of `known` that are closest to `word`."""
    known = list(known)
    plain = word.replace("\\", "").replace(".*", "")
    hits = difflib.get_close_matches(plain, known, n=n, cutoff=0.0)
    return "nearest: " + ", ".join(repr(h) for h in hits) if hits else "there are none"


class SourceError(JpeftError, ValueError):
    """The place that a checkpoint or a data set should come from is misnamed, absent, or not what its sha256 says."""


class CheckpointError(JpeftError, ValueError):
    """The files of a model checkpoint are damaged, or their tensors are not those of the model."""


class ModelConfigError(JpeftError, ValueError):
    """A model's configuration says something that the code does not implement, or contradicts itself."""


class ModelInputError(JpeftError, ValueError):
    """A model was called with inputs that it has no parameters for."""
