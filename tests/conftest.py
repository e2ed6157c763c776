"""The setting of every test: eight simulated devices, and cheap compiles."""

from __future__ import annotations

import gc
import os
import signal
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

# Before JAX starts. A flag that the user has set stays as it is. These leave the optimised HLO alone and only save
# machine code generation, which is most of the suite's time; where speed is the subject, compile with
# `lowered.compile(compiler_options={"xla_backend_optimization_level": 3})`.
_FLAGS = {"--xla_force_host_platform_device_count": "8", "--xla_backend_optimization_level": "0",
          "--xla_llvm_disable_expensive_passes": "true", "--xla_cpu_parallel_codegen_split_count": "1"}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # the later ones do not know it and would abort
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
_user = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([_user, *(f"{k}={v}" for k, v in _FLAGS.items() if k not in _user)]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# A shell starts background jobs with Ctrl-C ignored; tests of Ctrl-C need it as it is in a terminal.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("cases", "collectives", "flops", "gallery", "layouts", "meshes", "support")

import jax  # noqa: E402

# Files whose slow rows are sweeps over methods, models and layouts: of these the check takes one third at a commit.
SWEEPS = {"test_laws.py", "test_cost.py", "test_gallery.py", "test_sharded.py", "methods", "models", "interop"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--third", type=int, help="of the slow sweeps, run the rows of one third: any number, modulo 3")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    third, folder = config.getoption("third"), Path(__file__).parent
    if third is None:
        return

    def other(item: pytest.Item) -> bool:
        """Rows are shared out by their names, so that all tests of a row come together."""
        path, row = item.path.relative_to(folder), item.name.partition("[")[2]
        sweep = path.parts[0] in SWEEPS or path.name in SWEEPS
        return bool(row) and sweep and "slow" in item.keywords and zlib.crc32(row.encode()) % 3 != third % 3

    left = [item for item in items if other(item)]
    items[:] = [item for item in items if not other(item)]
    config.hook.pytest_deselected(items=left)


@pytest.fixture(scope="module", autouse=True)
def _garbage_is_collected_once_a_module() -> Iterator[None]:
    """The heap of a process that traces all day is large: walking it at every turn is a tenth of the suite's time."""
    gc.disable()
    yield
    gc.collect()
    gc.freeze()  # what is still there is not walked again


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """Make implicit dtype promotion an error; for our own maths only, since optax and flax rely on promotion."""
    with jax.numpy_dtype_promotion("strict"):
        yield
