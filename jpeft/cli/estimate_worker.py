"""The process that compiles for `jpeft estimate`: a request on standard input, an answer on standard output."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from jpeft.cli.request import Request
from jpeft.errors import JpeftError
from jpeft.train.estimate import estimate, search


def answer(data: dict[str, Any]) -> dict[str, Any]:
    """Answer a request: the fields of `Estimate`, the batch, and how many programs were compiled."""
    request = Request(**data)
    try:
        job = request.job()
        if request.memory is None:
            found, compiled = estimate(job), 1
        else:
            job, found, compiled = search(job, request.memory)
    except JpeftError as error:
        return {"error": str(error), "kind": type(error).__name__}
    return {**dataclasses.asdict(found), "moved": [one._asdict() for one in found.moved], "batch": job.batch,
            "compiled": compiled, "total": found.total, "sent": found.sent}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))), flush=True)
