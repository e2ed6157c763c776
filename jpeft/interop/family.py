"""What reading and writing a checkpoint asks of a family of models, whatever it is."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jpeft.interop.checkpoint import Names
from jpeft.interop.tensors import Tensors
from jpeft.models.model import Model


class Family(abc.ABC):
    """One `model_type`, in tables.

    Attributes:
        model: the class of its models.
        tasks: what its models can be read for.
        default: the task of a checkpoint that names none.
        head_leaf: the leaf whose stored shape begins with the number of classes.
        fresh: top-level names of params that a checkpoint without a classifier lacks.
        saved: the tasks that the architecture of a checkpoint tells.
        rates: fields of its configuration that are dropout rates.
        classes: architecture that stands for each task.
    """

    model: ClassVar[type[Model]]
    tasks: ClassVar[tuple[str, ...]]
    default: ClassVar[str]
    head_leaf: ClassVar[str]
    fresh: ClassVar[tuple[str, ...]]
    saved: ClassVar[tuple[str, ...]]
    rates: ClassVar[tuple[str, ...]]
    classes: Mapping[str, str]

    @abc.abstractmethod
    def read(self, raw: Mapping[str, Any], where: str, **fields: Any) -> Any:
        """Return the model's configuration that a `config.json` describes; `fields` overrule it.

        Raises:
            ModelConfigError: keys that the code does not implement, or values of the wrong kind; all in one message.
        """

    @abc.abstractmethod
    def write(self, raw: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Return `raw` with those keys changed whose meaning is not what `config` says.

        Raises:
            ModelConfigError: models of this family cannot be like this.
        """

    @abc.abstractmethod
    def names(self, config: Any) -> Names:
        """Return the name table of a configuration."""

    def adjusted(self, config: Any, held: Mapping[str, Sequence[int]], tensors: Tensors) -> Any:
        """Return the configuration fitted to what a checkpoint holds.

        Args:
            config: what its `config.json` says.
            held: stored shapes of the leaves whose first tensor it has.
            tensors: its tensors.
        """
        return config

    def task_of(self, raw: Mapping[str, Any]) -> str | None:
        """Return the task that a checkpoint was saved for; None: it has the head of none of the tasks."""
        named = raw.get("architectures") or ()
        return next((task for task, name in self.classes.items() if name in named and task in self.saved), None)
