"""jpeft: parameter-efficient fine-tuning for JAX, as pure transforms of any model's apply function.

Reading order: `core.method` (the protocol), `methods.lora` (a method), `core.ops` (what an adapted leaf is worth),
`core.interpret` (the walk over a jaxpr), `core.views`, `core.consume`, `core.structure` (its rules), `core.transform`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import jpeft.core.structure
import jpeft.core.views  # noqa: F401 - importing it registers its rules
from jpeft import optim
from jpeft.core.calibrate import Calibration
from jpeft.core.consume import multiply
from jpeft.core.explain import explain
from jpeft.core.frozen import Frozen
from jpeft.core.identity import fingerprint
from jpeft.core.interpret import register_rule
from jpeft.core.match import layers
from jpeft.core.method import Call, Identity, Method
from jpeft.core.partition import combine, mask, partition
from jpeft.core.plan import Plan
from jpeft.core.planning import plan
from jpeft.core.roles import inspect
from jpeft.core.sharding import divide_rows, shardings
from jpeft.core.site import Site
from jpeft.core.store import load, save
from jpeft.core.tokens import Tokens
from jpeft.core.transform import adapt, base, init, merge, merge_error, penalty
from jpeft.errors import NotMergeable
from jpeft.methods import *  # noqa: F403
from jpeft.methods import __all__ as _methods
from jpeft.methods.adalora_update import adalora_init, adalora_update

if TYPE_CHECKING:
    from jpeft.interop.nnx import from_nnx
    from jpeft.interop.prefix import adapt_prefix
    from jpeft.interop.pretrained import from_pretrained, save_pretrained
    from jpeft.models.sharding import base_shardings

__version__ = "0.1.0.dev0"

__all__ = [
    "Calibration", "Call", "Frozen", "Identity", "Method", "NotMergeable", "Plan", "Site", "Tokens", "adalora_init",
    "adalora_update", "adapt", "adapt_prefix", "base", "base_shardings", "combine", "divide_rows", "explain",
    "fingerprint", "from_nnx", "from_pretrained", "init", "inspect", "layers", "load", "mask", "merge", "merge_error",
    "multiply", "optim", "partition", "penalty", "plan", "register_rule", "save", "save_pretrained", "shardings",
    *_methods,
]

# What needs more than jax, optax and numpy is loaded when it is first asked for.
_LATE = {
    "adapt_prefix": "jpeft.interop.prefix",
    "base_shardings": "jpeft.models.sharding",
    "from_nnx": "jpeft.interop.nnx",
    "from_pretrained": "jpeft.interop.pretrained",
    "save_pretrained": "jpeft.interop.pretrained",
}


def __getattr__(name: str) -> Any:
    if name == "train":
        return importlib.import_module("jpeft.train")
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'jpeft' has no attribute {name!r}")
