"""Methods against Hugging Face PEFT on torch, for the same values of the same parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import distance

import jpeft

torch = pytest.importorskip("torch", reason="needs torch, which the oracle runs on")
peft = pytest.importorskip("peft", reason="needs peft, the oracle")
pytestmark = pytest.mark.slow

I, O = 8, 6  # noqa: E741


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A configuration of PEFT, the method that it is here, and the parameters of one from the other's layer.

    Attributes:
        name: the row's name.
        config: PEFT's configuration, by class and fields.
        method: the method.
        theta: from PEFT's layer, the entries of theta, trainable and frozen.
    """

    name: str
    config: tuple[str, dict[str, Any]]
    method: jpeft.Method
    theta: Callable[[Any], dict[str, Any]]


def upper(skew: np.ndarray) -> np.ndarray:
    return skew[..., *np.triu_indices(skew.shape[-1], 1)]


def of(layer: Any, *names: str) -> list[np.ndarray]:
    """Entries of a layer's dictionaries for its one adapter."""
    return [getattr(layer, n)["default"].detach().numpy() for n in names]


def hra(layer: Any) -> dict[str, Any]:
    return {"u": of(layer, "hra_u")[0]}


def boft(layer: Any) -> dict[str, Any]:
    r, s = of(layer, "boft_R", "boft_s")
    return {"q": upper(np.swapaxes(r, -1, -2) - r) / 2, "s": s[:, 0]}


def road(layer: Any) -> dict[str, Any]:
    return dict(zip(("theta", "alpha"), of(layer, "road_theta", "road_alpha"), strict=True))


def c3a(layer: Any) -> dict[str, Any]:
    return {"w": of(layer, "c3a_kernel")[0]}


def shira(layer: Any) -> dict[str, Any]:
    v, places = of(layer, "shira_weight", "shira_indices")
    return {"v": v, "loc": places[::-1]}


def waveft(layer: Any) -> dict[str, Any]:
    c, places = of(layer, "waveft_spectrum", "waveft_indices")
    return {"c": c, "loc": places[::-1]}


def psoft(layer: Any) -> dict[str, Any]:
    a, b = of(layer, "_psoft_A_cache", "_psoft_B_cache")
    turn = layer.psoft_R["default"]
    return {"q": turn.weight.detach().numpy(), "a_magnitude": turn.vector_a.detach().numpy(),
            "b_magnitude": turn.vector_b.detach().numpy(), "a0": a.T, "b0": b.T * layer.scaling["default"]}


ROWS = [
    Row("hra", ("HRAConfig", {"r": 4}), jpeft.HRA(rank=4), hra),
    Row("boft", ("BOFTConfig", {"boft_block_size": 4}), jpeft.BOFT(block_size=4), boft),
    *(Row(v, ("RoadConfig", {"variant": v, "group_size": 2}), jpeft.RoAd(variant=v, group_size=2), road)
      for v in ("road_1", "road_2", "road_4")),
    Row("c3a", ("C3AConfig", {"block_size": 2}), jpeft.C3A(block_size=2), c3a),
    Row("shira", ("ShiraConfig", {"r": 2, "random_seed": 3}), jpeft.SHiRA(rank=2), shira),
    Row("waveft", ("WaveFTConfig", {"n_frequency": 30}), jpeft.WaveFT(n_frequency=30), waveft),
    Row("waveft without waves", ("WaveFTConfig", {"n_frequency": 9, "use_idwt": False}),
        jpeft.WaveFT(n_frequency=9, use_idwt=False), waveft),
    Row("psoft", ("PsoftConfig", {"r": 4}), jpeft.PSOFT(rank=4), psoft),
    Row("psoft with a series", ("PsoftConfig", {"r": 4, "use_cayley_neumann": True}),
        jpeft.PSOFT(rank=4, neumann=5), psoft),
]


def apply(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_same_output(row: Row) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(I, O, bias=False))
    w = model[0].weight.detach().numpy().T.copy()
    name, fields = row.config
    model = peft.inject_adapter_in_model(getattr(peft, name)(target_modules=["0"], **fields), model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    x = np.random.RandomState(0).standard_normal((5, I)).astype(np.float32)
    want = model(torch.tensor(x)).detach().numpy()
    params = {"w": jnp.asarray(w)}
    plan = jpeft.plan(apply, params, (x,), {"w": row.method})
    start, frozen = jpeft.init(plan, params, jax.random.key(0))
    values = {k: jnp.asarray(v) for k, v in row.theta(model[0]).items()}
    old = {**start["w"], **frozen.theta.get("w", {})}
    assert {k: v.shape for k, v in values.items()} == {k: old[k].shape for k in values}
    mine = {"w": {k: values[k] for k in start["w"]}}
    kept = {k: values.get(k, v) for k, v in frozen.theta.get("w", {}).items()}
    frozen = frozen._replace(theta={"w": kept} if kept else {})
    assert distance(jpeft.adapt(apply, plan)(mine, frozen, x), want) < 1e-5
    assert distance(x @ jpeft.merge(plan, mine, frozen)["w"], want) < 1e-5
    assert distance(x @ w, want) > 1e-2


def test_trainable_tokens() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4))
    table = jnp.asarray(model[0].weight.detach().numpy().copy())
    config = peft.TrainableTokensConfig(token_indices=[2, 7], target_modules=["0"])
    model = peft.inject_adapter_in_model(config, model)
    rows = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        rows.add_(torch.randn_like(rows))
    ids = np.asarray([[2, 3, 7], [0, 7, 8]])
    plan = jpeft.plan(lambda p, i: p["w"][i], {"w": table}, (ids,),
                      {"w": jpeft.TrainableTokens(token_indices=(2, 7))})
    _, frozen = jpeft.init(plan, {"w": table}, jax.random.key(0))
    theta = {"w": {"d": jnp.asarray(rows.detach().numpy()).reshape(2, 4) - table[jnp.asarray([2, 7])]}}
    mine = jpeft.adapt(lambda p, i: p["w"][i], plan)(theta, frozen, ids)
    assert distance(mine, model(torch.tensor(ids)).detach().numpy()) < 1e-5


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_prompt_encoder(encoder: str) -> None:
    torch.manual_seed(0)
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=4, num_layers=1,
                                      num_transformer_submodules=1, encoder_hidden_size=2,
                                      encoder_reparameterization_type=encoder)
    model = peft.PromptEncoder(config)
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    theta = {"e": state["embedding.weight"]}
    for i, at in enumerate((0, 2, 4) if encoder == "MLP" else (0, 2), 1):
        theta |= {f"w{i}": state[f"mlp_head.{at}.weight"].T, f"b{i}": state[f"mlp_head.{at}.bias"]}
    for i in range(2 if encoder == "LSTM" else 0):
        for way, end in (("forward", ""), ("backward", "_reverse")):
            x, h, b, c = (state[f"lstm_head.{k}_l{i}{end}"] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            theta |= {f"{way}_{i}_x": x.T, f"{way}_{i}_h": h.T, f"{way}_{i}_b": b + c}
    embed, ids = jnp.ones((9, 4)), jnp.zeros((1, 2), int)
    method = jpeft.PTuning(length=3, encoder=encoder, hidden_size=2)
    plan = jpeft.plan(lambda p, i: p["w"][i], {"w": embed}, (ids,), {"w": method}, tokens=jpeft.Tokens(ids=0))
    start, _ = jpeft.init(plan, {"w": embed}, jax.random.key(0))
    assert {k: v.shape for k, v in theta.items()} == {k: v.shape for k, v in start["w"].items()}
    mine = method.prompt(plan.entries[0].site, {k: jnp.asarray(v) for k, v in theta.items()})
    assert distance(mine, model(torch.arange(3)[None]).detach().numpy()[0]) < 1e-5
