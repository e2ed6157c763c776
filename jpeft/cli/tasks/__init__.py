"""The tasks of a job, one module each; `base` is what a command asks of any of them."""

from __future__ import annotations

from collections.abc import Mapping

from jpeft.cli.config import JobConfig
from jpeft.cli.tasks.base import Task
from jpeft.cli.tasks.causal_lm import CausalLm
from jpeft.cli.tasks.classification import Classification
from jpeft.cli.tasks.seq2seq import Seq2Seq

TASKS: Mapping[str, Task] = {"classification": Classification(), "causal-lm": CausalLm(), "seq2seq": Seq2Seq()}


def of(job: JobConfig) -> Task:
    """Return the task of a job."""
    return TASKS[job.model.task]
