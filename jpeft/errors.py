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


class ConfigError(JpeftError, ValueError):
    """A configuration file, or a value set on the command line, does not say what to run."""


class RunError(JpeftError, ValueError):
    """A run folder is there already, is not there, is incomplete, or belongs to another configuration."""


class DataError(JpeftError, ValueError):
    """Base class of the errors of data sets: reading, splitting, encoding, batching."""


class DataFileError(DataError):
    """A data file is absent, of a kind that is not read, or damaged."""


class ColumnError(DataError):
    """A table has no such column, or it holds something else than it is used for."""


class EmptyDataError(DataError):
    """There are no rows where rows are needed."""


class MissingValueError(DataError):
    """A row lacks its text or its label."""


class LabelError(DataError):
    """The classes are not a list of classes, or a label is none of them."""


class SplitError(DataError):
    """The rows cannot be divided in this way."""


class RowLengthError(DataError):
    """A row is longer than what it has to fit in, or a length limit leaves no room for a row."""


class BatchingError(DataError):
    """Batches cannot be made like this: a size, a bucket, a seed or a batch number is not one."""


class DataPositionError(DataError):
    """A position in the stream of batches belongs to other batches, or is none."""


class TrainConfigError(JpeftError, ValueError):
    """An argument of the optimiser, of the training loop or of its checkpoints has a value that makes no sense."""


class LossFunctionError(JpeftError, TypeError):
    """A loss function, or what it was given to train, is not what the training step can use."""


class NonFiniteLossError(JpeftError, ArithmeticError):
    """A loss, a gradient norm, an evaluation or a parameter is NaN or infinite."""


class BatchesError(JpeftError, ValueError):
    """Batches end before the training does, are empty, or cannot say where they stand."""


class CheckpointWriteError(JpeftError, OSError):
    """A training checkpoint cannot be written; those before are intact."""


class CheckpointOrderError(JpeftError, ValueError):
    """The folder of checkpoints holds steps of another run, or of a later part of this one."""


class CheckpointMismatchError(JpeftError, ValueError):
    """A training checkpoint was made by another configuration, or for other trainable parameters."""


class DamagedCheckpointsError(JpeftError, ValueError):
    """No training checkpoint of a folder can be read."""


class ReportError(JpeftError, ValueError):
    """A file of metrics or a summary is damaged, cannot be written, or holds nothing to show."""


class ShardingError(JpeftError, ValueError):
    """A mesh, or the rules that say where leaves lie on it, do not fit the model."""


class TemplateError(DataError):
    """A template or a pattern is none, or does not fit the rows that it is used on."""


class UncountedError(JpeftError, ValueError):
    """A compiled program holds something that may hide a product, or a loop whose trips are not known."""


class EstimateError(JpeftError, ValueError):
    """What is to be estimated is misnamed, contradicts itself, or cannot be compiled."""
