"""Methods against Hugging Face PEFT on torch: the same numbers give the same outputs."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, randomise

import jpeft

NEEDS = ("torch", "peft")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")]

Numbers = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Twin:
    """One method in both libraries.

    Attributes:
        name: the row's name.
        method: ours.
        config: name of the configuration class in peft.
        fields: its fields, `target_modules` aside; a function gets the module peft and makes the value.
        stored: from our theta, the values of peft's parameters and buffers by name.
        shape: `[in, out]` of the weight.
    """

    name: str
    method: jpeft.Method
    config: str
    fields: Mapping[str, Any]
    stored: Callable[[Numbers], Numbers]
    shape: tuple[int, int] = (8, 6)


def randlora(t: Numbers) -> Numbers:
    """There, column `k N + n` of the scaled A meets column `n r + k` of B; ours pairs equal (n, k)."""
    b = t["b0"]
    return {"randlora_lambda": t["lambda"].T, "randlora_gamma": t["gamma"], "randlora_A": t["a0"].T[:, None],
            "randlora_B": b.transpose(0, 2, 1).reshape(b.shape)}


TWINS = [
    Twin("vera", jpeft.VeRA(rank=5), "VeraConfig", {"r": 5},
         lambda t: {"vera_A": t["a0"].T, "vera_B": t["b0"].T, "vera_lambda_d": t["d"], "vera_lambda_b": t["b"]}),
    *(Twin(f"loha {r}", jpeft.LoHa(rank=r, alpha=5), "LoHaConfig", {"r": r, "alpha": 5},
           lambda t: {f"hada_w{i}_{x}": t[f"w{i}{y}"].T for i in (1, 2) for x, y in ("ab", "ba")}) for r in (1, 3)),
    Twin("hira", jpeft.HiRA(rank=3), "HiraConfig", {"r": 3}, lambda t: {"hira_A": t["a"].T, "hira_B": t["b"].T}),
    Twin("miss", jpeft.MiSS(rank=3), "MissConfig", {"r": 3}, lambda t: {"miss_block": t["block"]}),
    Twin("miss mini", jpeft.MiSS(rank=4, mini=2), "MissConfig", {"r": 4, "mini_r": 2, "init_weights": "mini"},
         lambda t: {"miss_block": t["block"]}),
    Twin("miss bat", jpeft.MiSS(rank=2, bat=True), "MissConfig", {"r": 2, "init_weights": "bat"},
         lambda t: {"miss_block": t["block"]}),
    Twin("delora", jpeft.DeLoRA(rank=3, init_weights="zero"), "DeloraConfig", {"r": 3},
         lambda t: {"delora_A": t["a"].T, "delora_B": t["b"].T, "delora_lambda": t["lambda"][None]}),
    *(Twin(f"randlora {n}", jpeft.RandLoRA(rank=3, randlora_alpha=4), "RandLoraConfig", {"r": 3, "randlora_alpha": 4},
           randlora, (8, n)) for n in (6, 12)),
    Twin("adalora", jpeft.AdaLoRA(init_r=3, target_r=2, alpha=4), "AdaLoraConfig",
         {"init_r": 3, "target_r": 2, "lora_alpha": 4, "total_step": 9},
         lambda t: {"lora_A": t["a"].T, "lora_E": t["e"][:, None], "lora_B": t["b"].T}),
    Twin("vblora", jpeft.VBLoRA(rank=2, num_vectors=7, vector_length=2, init_weights="plain"), "VBLoRAConfig",
         {"r": 2, "num_vectors": 7, "vector_length": 2, "topk": 2},
         lambda t: {"vblora_logits_A": t["la"], "vblora_logits_B": t["lb"].swapaxes(0, 1), "vector_bank": t["v"]}),
    Twin("kasa", jpeft.KaSA(rank=2, alpha=3), "LoraConfig",
         {"r": 2, "lora_alpha": 3, "kasa_config": lambda peft: peft.KasaConfig()},
         lambda t: {"lora_A.": t["a"].T, "lora_B.": t["b"].T, "lora_diag": t["d"]}),
    Twin("gralora", jpeft.GraLoRA(rank=4, alpha=3, hybrid_r=2), "GraloraConfig",
         {"r": 4, "alpha": 3, "gralora_k": 2, "hybrid_r": 2},
         lambda t: {"gralora_A.": t["a"], "gralora_B.": t["b"], "gralora_A_general": t["ga"].T,
                    "gralora_B_general": t["gb"].T}),
]


def theirs(twin: Twin, w: np.ndarray, numbers: Numbers, x: np.ndarray) -> np.ndarray:
    """Output of a linear layer of torch with the adapter of peft."""
    import peft
    import torch

    layer = torch.nn.ModuleDict({"only": torch.nn.Linear(*w.shape, bias=False)})
    layer.forward = lambda x: layer["only"](x)
    with torch.no_grad():
        layer["only"].weight.copy_(torch.tensor(w.T))
    fields = {k: v(peft) if callable(v) else v for k, v in twin.fields.items()}
    model = peft.get_peft_model(layer, getattr(peft, twin.config)(target_modules=["only"], **fields)).eval()
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in numbers.items():
            places = {id(held[n]): held[n] for n in held if name in n}
            assert len(places) == 1, (name, sorted(held))
            place = next(iter(places.values()))
            assert tuple(place.shape) == value.shape, name
            place.copy_(torch.tensor(np.array(value)))
        return model.base_model.model["only"](torch.tensor(x)).numpy()


@pytest.mark.parametrize("twin", TWINS, ids=lambda t: t.name)
def test_equal_outputs(twin: Twin) -> None:
    params = {"w": randomise(jnp.zeros(twin.shape), 1, 0.4)}
    x = randomise(jnp.zeros((5, twin.shape[0])), 2, 1.0)
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    plan = jpeft.plan(apply, params, (x,), {"w": twin.method})
    start, frozen = jpeft.init(plan, params, jax.random.key(0))
    spread = randomise(start, 3)
    ours = jpeft.adapt(apply, plan)(spread, frozen, x)
    assert float(jnp.max(jnp.abs(ours - x @ params["w"]))) > 1e-2
    numbers = {k: np.asarray(v) for k, v in {**frozen.theta.get("w", {}), **spread["w"]}.items()}
    want = theirs(twin, np.asarray(params["w"]), twin.stored(numbers), np.asarray(x))
    assert_close(ours, jnp.asarray(want), 1e-5)


def test_the_names_that_methods_have_there() -> None:
    import peft

    names = {m.peft_type for m in (getattr(jpeft.methods, n) for n in jpeft.methods.__all__) if m.peft_type}
    assert names <= set(peft.PeftType.__members__)


def test_activated_lora() -> None:
    """There, the adapter acts on so many of the last tokens of a row; here, behind so many of the first."""
    import peft
    import torch

    x = randomise(jnp.zeros((3, 5, 8)), 2, 1.0)
    params = {"w": randomise(jnp.zeros((8, 6)), 1, 0.4)}
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    plan = jpeft.plan(apply, params, (x,), {"w": jpeft.ALoRA(rank=2, alpha=6)}, tokens=jpeft.Tokens(ids=0))
    start, frozen = jpeft.init(plan, params, jax.random.key(0))
    spread = randomise(start, 3)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(np.array(params["w"]).T))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], alora_invocation_tokens=[1])
    layer = peft.inject_adapter_in_model(config, model)[0].eval()
    with torch.no_grad():
        for place, letter in ((layer.lora_A, "a"), (layer.lora_B, "b")):
            place["default"].weight.copy_(torch.tensor(np.array(spread["w"][letter]).T))
        want = layer(torch.tensor(np.array(x)), alora_offsets=[3, 5, None]).numpy()
    call = jpeft.Call(lengths=jnp.asarray([2, 0, 5]))
    ours = jpeft.adapt(apply, plan)(spread, frozen, x, peft=call)
    assert_close(ours, jnp.asarray(want), 1e-5)
    assert float(jnp.abs(ours - x @ params["w"]).max()) > 1e-2
