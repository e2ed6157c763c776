"""The tasks of a job, one module each; `base` is what a command asks of any of them."""

from __future__ import annotations

from collections.abc import Mapping

from jpeft.cli.config import JobConfig
from jpeft.cli.tasks.base import Task
from jpeft.cli.tasks.causal_lm import CausalLm
from jpeft.cli.tasks.classification import Classification
from jpeft.cli.tasks.embedding import Embedding
from jpeft.cli.tasks.preference import Preference
from jpeft.cli.tasks.seq2seq import Seq2Seq
from jpeft.cli.tasks.token_classification import TokenClassification

TASKS: Mapping[str, Task] = {
    "classification": Classification(), "token-classification": TokenClassification(), "embedding": Embedding(),
    "causal-lm": CausalLm(), "preference": Preference(), "seq2seq": Seq2Seq()}


def name(job: JobConfig) -> str:
    """Return the name of a job's task: `model.task`, or "preference" where the rows are preferences."""
    return "preference" if job.data.learns == "preference" else job.model.task


def of(job: JobConfig) -> Task:
    """Return the task of a job."""
    return TASKS[name(job)]
