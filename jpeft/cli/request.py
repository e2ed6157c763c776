"""What `jpeft estimate` is asked, from words of the command line; plain data that another process can take."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jpeft.cli.rules import METHODS, places, to_methods, tokens_for
from jpeft.errors import ConfigError, nearest
from jpeft.interop.published import PUBLISHED, published
from jpeft.models.layers import REMAT
from jpeft.train import optimizer
from jpeft.train.estimate import ATTENTION, Job

AXES = ("data", "fsdp", "tensor", "expert", "sequence")
DTYPES = ("bfloat16", "float16", "float32")
_SHORT = {"bf16": "bfloat16", "f16": "float16", "fp16": "float16", "f32": "float32", "fp32": "float32"}
_FIELDS = {"r": "rank"}
_MOST = 4096  # simulated devices
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class Request:
    """Plain data, JSON both ways.

    Attributes:
        config: the model's `config.json`.
        where: where it is from.
        rules: pattern -> method and fields, as in a configuration file.
        mesh: axis -> devices.
        batch: sequences.
        length: tokens of each.
        dtype: of compute and of the frozen parameters.
        remat: what a layer keeps.
        optimizer: by name.
        attention: "scores" or "fused".
        memory: bytes for which the largest batch is looked for; None: `batch` is what is estimated.
    """

    config: Mapping[str, Any]
    where: str
    rules: Mapping[str, Mapping[str, Any]]
    mesh: Mapping[str, int]
    batch: int
    length: int
    dtype: str = "bfloat16"
    remat: str = "dots"
    optimizer: str = "adamw"
    attention: str = "scores"
    memory: float | None = None

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        count = 1
        for size in self.mesh.values():
            count *= size
        return count

    def job(self) -> Job:
        """Return the step to estimate.

        Raises:
            ModelConfigError, MethodConfigError, ConfigError, TrainConfigError: it is none.
        """
        from jpeft.interop.pretrained import family_of

        family = family_of(self.config, self.where)
        model = family.model(family.read(self.config, self.where, task=family.default), dtype=self.dtype,
                             remat=self.remat)
        methods = to_methods(self.rules)
        return Job(model.placed(places(methods)), methods, self.mesh, self.batch, self.length,
                   optimizer.Optimizer(self.optimizer, 1e-4, "constant"), self.attention, tokens_for(methods, False))


def model_config(text: str) -> tuple[dict[str, Any], str]:
    """Read the model of a request: a `config.json`, the folder that holds one, or `family:size`.

    Raises:
        ConfigError: there is no such file, or it is no JSON object.
        ModelConfigError: there is no such family or size.
    """
    path = Path(text)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--model {path} cannot be read ({error}); give a config.json") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"--model {path} holds no JSON object; give a config.json")
        return raw, str(path)
    if ":" not in text:
        known = [f"{family}:{size}" for family, sizes in PUBLISHED.items() for size in sizes]
        raise ConfigError(f"--model {text!r} is no file and no family:size ({nearest(text, known)})")
    return published(text), text


def mesh(text: str) -> dict[str, int]:
    """Read a mesh.

    Raises:
        ConfigError: an axis is unknown or named twice, or a size is no positive number.

    Example:
        >>> mesh("fsdp=4,tensor=2")
        {'fsdp': 4, 'tensor': 2}
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES:
            raise ConfigError(f"--mesh {text!r} has the axis {name!r}, none of {', '.join(AXES)} "
                              f"({nearest(name, AXES, 1)})")
        if name in found or not re.fullmatch(r"[1-9]\d*", size):
            raise ConfigError(f"--mesh {text!r} must give each axis once, with a number of devices, as fsdp=4,tensor=2")
        found[name] = int(size)
    devices = 1
    for count in found.values():
        devices *= count
    if devices > _MOST:
        raise ConfigError(f"--mesh {text!r} has {devices} devices, at most {_MOST} are simulated")
    return found


def rules(texts: list[str]) -> dict[str, dict[str, Any]]:
    """Read methods as `name:field=value,...`; `on=pattern` says on which leaves.

    Raises:
        ConfigError: there is no such method, or a part is no `field=value`.

    Example:
        >>> rules(["lora:r=16,on=attention"])
        {'attention': {'method': 'LoRA', 'rank': 16}}
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, _, rest = text.partition(":")
        plain = {known.lower(): known for known in METHODS}
        if name.lower() not in plain:
            raise ConfigError(f"--method {text!r}: there is no method {name!r} ({nearest(name.lower(), plain, 1)}); "
                              "`jpeft methods` lists them")
        method = plain[name.lower()]
        fields: dict[str, Any] = {"method": method}
        if method == "Full":
            fields["keep_base"] = False
        pattern = _usual(method)
        for part in filter(None, re.split(r",(?=\s*\w+=)", rest)):
            key, equal, value = part.strip().partition("=")
            if not equal:
                raise ConfigError(f"--method {text!r}: {part!r} is no field=value, as lora:r=16,alpha=32")
            if key == "on":
                pattern = value
            else:
                fields[_FIELDS.get(key, key)] = yaml.safe_load(value)
        if pattern in found:
            raise ConfigError(f"--method {text!r}: the leaves {pattern!r} have a method already; say others with "
                              "on=pattern")
        found[pattern] = fields
    return found


def _usual(method: str) -> str:
    """Return the leaves that a method usually rides on."""
    if method == "Full":
        return ".*"
    if method == "PrefixTuning":
        return r".*/(key|value)/kernel"
    if method == "LLaMAAdapter":
        return r".*/adapter_(prompt|gate)"
    if method in ("Pfeiffer", "AdapterPlus", "Compacter", "LoReFT", "DiReFT"):
        return r".*/down/kernel"
    if method == "Houlsby":
        return r".*/(out|down)/kernel"
    uses = METHODS[method].uses
    return next(pattern for use, pattern in (("linear", "all-linear"), ("embedding", "embedding"), ("scale", "norm"),
                                             ("bias", "bias")) if use in uses)


def choice(value: str, known: tuple[str, ...], option: str) -> str:
    """Return a value that must be one of some.

    Raises:
        ConfigError: it is none of them.
    """
    value = _SHORT.get(value, value)
    if value not in known:
        raise ConfigError(f"{option} {value!r} is none of {', '.join(known)} ({nearest(value, known, 1)})")
    return value


def memory(text: str) -> float:
    """Read a number of bytes.

    Raises:
        ConfigError: it is none.

    Example:
        >>> memory("80GB"), memory("1.5GiB")
        (80000000000.0, 1610612736.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in _UNITS or not float(found[1]):
        raise ConfigError(f"--memory {text!r} is no number of bytes, as 80GB or 80GiB")
    return float(found[1]) * _UNITS[found[2].upper()]


def checked(request: Request) -> Request:
    """Return a request whose parts are all possible, as far as can be said without compiling.

    Raises:
        ConfigError: one is not.
    """
    for name, value in (("--batch", request.batch), ("--seq", request.length)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be 1 or more")
    choice(request.remat, tuple(REMAT), "--remat")
    choice(request.attention, ATTENTION, "--attention")
    choice(request.optimizer, optimizer.NAMES, "--optimizer")
    choice(request.dtype, DTYPES, "--dtype")
    request.job()
    return request
