"""Checkpoints read onto a mesh: each device its own part, equal to what one device reads, and who may lie where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from models import decoder_cases, encoder_cases, t5_cases
from support import quick_compile

import jpeft
from jpeft.core.paths import flatten
from jpeft.errors import ShardingError
from jpeft.interop import tensors as files
from jpeft.interop.assemble import assemble
from jpeft.interop.checkpoint import Row
from jpeft.interop.pretrained import FAMILIES, from_pretrained, save_pretrained
from jpeft.interop.tensors import Info
from jpeft.models.sharding import logical_axes, placements

ALL = [(module, case) for module in (decoder_cases, encoder_cases, t5_cases) for case in module.CASES]
FIRST = {case.config["model_type"]: (module, case) for module, case in reversed(ALL)}
LLAMA = next(case for case in decoder_cases.CASES if case.name == "llama-odd")


def mesh(**axes: int) -> Mesh:
    count = int(np.prod(list(axes.values())))
    return Mesh(np.array(jax.devices()[:count]).reshape(*axes.values()), tuple(axes),
                axis_types=(AxisType.Auto,) * len(axes))


def shapes_of(case: Any) -> Any:
    """The params of a case, by the tables alone."""
    family = FAMILIES[case.config["model_type"]]
    labels = {"labels": len(case.config.get("id2label", ())) or 3} if case.task.endswith("classification") else {}
    return family.model(family.read(case.config, case.name, task=case.task, **labels)).shapes()


# --- assembling ---

class Recorded:
    """Stored tensors in memory, and which rows were read of them."""

    where = "memory"

    def __init__(self, values: Mapping[str, np.ndarray], block: int = 3):
        self.values, self.block, self.rows = values, block, list[tuple[int, int]]()
        self.infos = {name: Info(v.dtype, v.shape) for name, v in values.items()}

    def read(self, name: str) -> np.ndarray:
        self.rows.append((0, len(self.values[name])))
        return self.values[name]

    def blocks(self, name: str, start: int, stop: int, step: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        self.rows.append((start, stop))
        size = max(self.block // step, 1) * step
        for first in range(start, stop, size):
            yield first, self.values[name][first:min(first + size, stop)].copy()


@pytest.mark.parametrize("layout", ["same", "flat", "in", "out", "rows", "columns"])
@pytest.mark.parametrize("rest", [(6,), (6, 4), (6, 4, 2), (4, 3, 2, 2)])
def test_parts_of_a_leaf_in_every_layout(layout: str, rest: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    leaf = rng.standard_normal((2, 3, *rest)).astype(np.float32)
    row = Row("w", "l.{}.e.{}.w", layout)
    stored = {name: np.ascontiguousarray(row.to_stored(leaf[index])) for index, name in row.names(leaf.shape)}
    boxes = [tuple((0, n) for n in leaf.shape)]
    for _ in range(6):
        ends = [sorted(rng.choice(n + 1, 2, replace=False).tolist()) for n in leaf.shape]
        boxes.append(tuple((a, b) for a, b in ends))
    found = assemble(Recorded(stored), row, {n: n for n in stored}, leaf.shape, np.dtype(np.float32), boxes)
    for one, array in zip(boxes, found, strict=True):
        np.testing.assert_array_equal(array, leaf[tuple(slice(a, b) for a, b in one)])


def test_only_what_is_wanted_is_read() -> None:
    leaf = np.arange(2 * 8 * 4 * 2, dtype=np.float32).reshape(2, 8, 4, 2)
    for layout, dim, rows in (("in", 2, (2, 6)), ("same", 1, (1, 3)), ("out", 3, (1, 2)), ("columns", 1, (4, 12))):
        row = Row("w", "l.{}.w", layout)
        stored = {name: np.ascontiguousarray(row.to_stored(leaf[index])) for index, name in row.names(leaf.shape)}
        held = Recorded(stored)
        ends = [(0, n) for n in leaf.shape]
        ends[0], ends[dim] = (1, 2), (1, 3) if dim < 3 else (1, 2)
        assemble(held, row, {n: n for n in stored}, leaf.shape, np.dtype(np.float32), [tuple(ends)])
        assert held.rows == [rows], layout


def test_blocks_of_a_file_are_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = np.arange(70, dtype=np.float32).reshape(10, 7)
    files.write(tmp_path, {"w": Info(value.dtype, value.shape)}, lambda name: value)
    monkeypatch.setattr(files, "_BLOCK", 100)
    found = list(files.Safetensors(tmp_path).blocks("w", 2, 9, 2))
    assert [first for first, _ in found] == [2, 4, 6, 8]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in found]), value[2:9])


# --- the tables ---

@pytest.mark.parametrize(("module", "case"), ALL, ids=lambda x: getattr(x, "name", ""))
def test_every_matrix_of_the_zoo_has_logical_axes(module: Any, case: Any) -> None:
    paths, leaves, _ = flatten(shapes_of(case))
    for path, leaf in zip(paths, leaves, strict=True):
        axes = logical_axes(path, leaf.shape)
        assert len(axes) == leaf.ndim
        named = {axis for axis in axes if axis not in (None, "layers")}
        if path.endswith(("/kernel", "/embedding")) and "coder/bias/" not in path:
            assert "embed" in named, path
            assert len(named) > 1 or path.split("/")[-2] in ("position", "token_type", "classifier", "pooler", "router")
        elif path.endswith("/scale"):
            assert not named, path


def test_heads_are_found_in_fused_kernels() -> None:
    assert logical_axes("layers/attention/qkv/kernel", (2, 8, 4, 3, 16)) == ("layers", "embed", "heads", None, None)
    assert logical_axes("layers/attention/qkv/kernel", (2, 8, 3, 4, 16)) == ("layers", "embed", None, "heads", None)
    assert logical_axes("layers/attention/qkv/kernel", (2, 8, 12, 16)) == ("layers", "embed", "heads", None)
    assert logical_axes("layers/moe/down/kernel", (2, 4, 20, 8)) == ("layers", "experts", "mlp", "embed")
    assert logical_axes("my/own/leaf", (2, 3)) == (None, None)


# --- reading ---

@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=pytest.mark.slow if i % 3 else ()) for i, kind in enumerate(sorted(FIRST))])
def test_a_mesh_holds_what_one_device_reads(kind: str, tmp_path: Path) -> None:
    module, case = FIRST[kind]
    folder = module.write(case, tmp_path)
    on = mesh(fsdp=2, tensor=2, expert=2)
    plain, wanted, _ = from_pretrained(folder)
    model, params, _ = from_pretrained(folder, mesh=on)
    assert model == plain
    where, notes = placements(plain.shapes(), on)
    assert set(model.notes) == {*plain.notes, *notes}
    paths, leaves, _ = flatten(params)
    for path, leaf, want in zip(paths, leaves, jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == where[path]
        np.testing.assert_array_equal(leaf, want, err_msg=path)
        assert {shard.data.shape for shard in leaf.addressable_shards} == {where[path].shard_shape(leaf.shape)}
    one = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards[:1])
    assert one < 0.6 * sum(leaf.nbytes for leaf in leaves)


def test_the_model_computes_the_same_on_a_mesh(tmp_path: Path) -> None:
    folder, batch = decoder_cases.write(LLAMA, tmp_path), decoder_cases.inputs(LLAMA)
    plain, wanted, _ = from_pretrained(folder)
    model, params, _ = from_pretrained(folder, mesh=mesh(fsdp=4, tensor=2))
    run = jax.jit(lambda p: model.apply(p, **batch).logits, compiler_options=quick_compile())
    np.testing.assert_allclose(run(params), jax.jit(lambda p: plain.apply(p, **batch).logits)(wanted), atol=2e-5)


def test_the_mesh_that_jax_makes_by_default(tmp_path: Path) -> None:
    """Its axes may be explicit, with which no Flax module can be traced: the params lie on it as if they were not."""
    folder, batch = decoder_cases.write(LLAMA, tmp_path), decoder_cases.inputs(LLAMA)
    on = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    model, params, _ = from_pretrained(folder, mesh=on)
    assert [note for note in model.notes if "explicit axes" in note]
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding == NamedSharding(mesh(fsdp=4, tensor=2), P(None, "fsdp", "tensor"))
    assert jax.eval_shape(lambda p: model.apply(p, **batch).logits, params).shape == (2, 8, 24)


def test_dtype_new_heads_and_rules(tmp_path: Path) -> None:
    folder = decoder_cases.write(LLAMA, tmp_path)
    rules = {r"layers/mlp/down/kernel": P(None, "tensor"), r"layers/mlp/.*": P("fsdp"),
             r"embed/.*": P(("fsdp", "tensor"))}
    on = mesh(fsdp=2, tensor=2)
    model, params, _ = from_pretrained(folder, "classification", 4, "bfloat16", mesh=on, shardings=rules)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    mlp = params["layers"]["mlp"]
    assert mlp["down"]["kernel"].sharding == NamedSharding(on, P(None, "tensor"))
    assert mlp["up"]["kernel"].sharding == mlp["up"]["bias"].sharding == NamedSharding(on, P("fsdp"))
    assert params["embed"]["embedding"].sharding == NamedSharding(on, P(("fsdp", "tensor")))
    assert params["classifier"]["kernel"].sharding == NamedSharding(on, P("fsdp"))
    plain = from_pretrained(folder, "classification", 4, "bfloat16")[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), params, plain))
    save_pretrained(tmp_path / "new", model, params)
    again = from_pretrained(tmp_path / "new")[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), again, plain))
    assert model.notes[0] == "new, with seed 0: classifier"


def test_dims_that_do_not_divide_are_whole_and_said(tmp_path: Path) -> None:
    folder = decoder_cases.write(LLAMA, tmp_path)  # 6 heads, 2 of keys, width 24, mlp 20, 24 words
    model, params, _ = from_pretrained(folder, mesh=mesh(tensor=4))
    attention = params["layers"]["attention"]
    assert attention["key"]["kernel"].sharding.spec == attention["query"]["kernel"].sharding.spec == P()
    assert params["layers"]["mlp"]["up"]["kernel"].sharding.spec == P(None, None, "tensor")
    said = [note for note in model.notes if "mesh" in note]
    assert said == [
        "the mesh axis tensor of 4 does not divide 2, that dim is not divided: layers/attention/key/bias, "
        "layers/attention/key/kernel, layers/attention/value/bias, layers/attention/value/kernel",
        "the mesh axis tensor of 4 does not divide 6, that dim is not divided: layers/attention/out/kernel, "
        "layers/attention/query/bias, layers/attention/query/kernel"]


def test_axes_that_no_table_knows_are_said(tmp_path: Path) -> None:
    folder = decoder_cases.write(LLAMA, tmp_path)
    model, params, _ = from_pretrained(folder, mesh=mesh(model=2, data=2))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    assert model.notes[0] == "no leaf is divided over the mesh axes model; the default divides over expert, fsdp, " \
        "tensor, other axes need rules"
    assert from_pretrained(folder, mesh=mesh(data=4))[0].notes == from_pretrained(folder)[0].notes
    rules = {r"layers/mlp/up/kernel": P(None, None, "model")}
    assert from_pretrained(folder, mesh=mesh(model=2), shardings=rules)[0].notes == from_pretrained(folder)[0].notes


@pytest.mark.parametrize(("given", "says"), [
    ({"mesh": 3}, "mesh is a int, must be a jax.sharding.Mesh"),
    ({"shardings": {"embed/.*": P()}}, "pass mesh too"),
    ({"mesh": mesh(fsdp=2), "put": lambda path, array: array}, "mesh and put both say where leaves live"),
    ({"mesh": mesh(fsdp=2), "shardings": {"embed/.*": P("tensr")}}, r"axis 'tensr', the mesh has .*nearest: 'fsdp'"),
    ({"mesh": mesh(fsdp=2), "shardings": {"embd/.*": P()}}, r"'embd/\.\*' matches no leaf \(nearest: 'embed/embed"),
    ({"mesh": mesh(fsdp=2), "shardings": {"embed/.*": P("fsdp", "fsdp")}}, "names a mesh axis twice"),
    ({"mesh": mesh(fsdp=2), "shardings": {"embed/.*": ("fsdp",)}}, "has a tuple, must be a jax.sharding.PartitionSpec"),
    ({"mesh": mesh(fsdp=2), "shardings": {"embed/(": P()}}, "is no regular expression"),
    ({"mesh": mesh(fsdp=2), "shardings": {"norm/scale": P(None, "fsdp")}}, r"2 entries, norm/scale has 1 dims \(24,\)"),
    ({"mesh": mesh(fsdp=2), "shardings": {".*": P(), "embed/.*": P("fsdp")}}, "earlier rules have taken"),
    ({"mesh": mesh(fsdp=2), "shardings": {"embed/.*": P(P.UNCONSTRAINED)}}, "has the entry .*must be mesh axes or"),
])
def test_what_a_mesh_refuses(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ShardingError, match=says) as caught:
        from_pretrained(decoder_cases.write(LLAMA, tmp_path), **given)
    assert "\n" not in str(caught.value)


def test_a_gguf_file_onto_a_mesh(tmp_path: Path) -> None:
    """Rows of q and k are put in order, experts lie in one tensor, the file is in parts: all of it in one model."""
    pytest.importorskip("gguf", reason="needs gguf, which reads the files")
    from interop.ggufs import write

    write(tmp_path / "m.gguf", "mixtral", encode="Q8_0", split_max_tensors=9)
    assert len(list(tmp_path.iterdir())) == 3
    wanted = from_pretrained(tmp_path)[1]
    _, params, _ = from_pretrained(tmp_path, mesh=mesh(fsdp=4, tensor=2))
    assert params["layers"]["moe"]["up"]["kernel"].sharding.spec == P(None, None, "fsdp", "tensor")
    for (path, leaf), want in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(leaf, want, err_msg=jax.tree_util.keystr(path))


# --- memory ---

WIDTH, INNER, LAYERS, WORDS, HEADS = 768, 3072, 8, 32000, 12
SCRIPT = """
import json, sys
import jax, numpy as np
from pathlib import Path
from parity.memory import Memory
from jpeft.interop.pretrained import from_pretrained
axes = json.loads(sys.argv[2])
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(*axes.values()), tuple(axes)) if axes else None
from_pretrained(sys.argv[3], mesh=mesh)  # imports, and what flax and jax keep of a first trace
memory = Memory()
_, params, _ = from_pretrained(sys.argv[1], mesh=mesh)
memory.stop()
held = [sum(s.data.nbytes for s in x.addressable_shards) for x in jax.tree.leaves(params)]
print(json.dumps({"growth": memory.growth, "model": sum(held), "leaf": max(x.nbytes for x in jax.tree.leaves(params))}))
"""


def large(kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a Llama of 124 (tied: 100) million parameters."""
    yield "model.embed_tokens.weight", (WORDS, WIDTH)
    if kind == "safetensors":
        yield "lm_head.weight", (WORDS, WIDTH)
    yield "model.norm.weight", (WIDTH,)
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        yield from ((f"{at}.self_attn.{x}_proj.weight", (WIDTH, WIDTH)) for x in "qkvo")
        yield from ((f"{at}.mlp.{x}_proj.weight", (INNER, WIDTH)) for x in ("gate", "up"))
        yield f"{at}.mlp.down_proj.weight", (WIDTH, INNER)
        yield from ((f"{at}.{x}_layernorm.weight", (WIDTH,)) for x in ("input", "post_attention"))


def make_large(kind: str, folder: Path) -> Path:
    rng = np.random.default_rng(0)
    if kind == "safetensors":
        infos = {name: Info(np.dtype(np.float32), shape) for name, shape in large(kind)}
        files.write(folder, infos, lambda name: rng.standard_normal(infos[name].shape, np.float32))
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH,
                  "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
                  "vocab_size": WORDS}
        (folder / "config.json").write_text(json.dumps(config))
        return folder
    gguf = pytest.importorskip("gguf", reason="needs gguf, which writes the file")
    from interop.ggufs import stored

    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    for key, value in {"context_length": 64, "block_count": LAYERS, "embedding_length": WIDTH,
                       "feed_forward_length": INNER, "attention.head_count": HEADS,
                       "attention.head_count_kv": HEADS}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, shape in large(kind):
        for new, array in stored("qwen2", {name: rng.standard_normal(shape, np.float32)}).items():
            code = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(new, gguf.quants.quantize(array, code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_loading_needs_no_more_than_the_model_and_one_leaf(kind: str, tmp_path: Path) -> None:
    """Resident memory of a fresh process: on one device, and divided over eight."""
    source = make_large(kind, tmp_path)
    root, small = Path(__file__).resolve().parents[2], decoder_cases.write(LLAMA, tmp_path / "small")
    for axes in ({}, {"fsdp": 4, "tensor": 2}):
        done = subprocess.run([sys.executable, "-c", SCRIPT, str(source), json.dumps(axes), str(small)], cwd=root,
                              text=True, capture_output=True, timeout=600, check=False,
                              env={**os.environ, "PYTHONPATH": f"{root}/tests:{root}"})
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        print(kind, axes, {name: f"{value / 2**20:.0f} MiB" for name, value in told.items()})
        if told["growth"] is None:
            pytest.skip("this system does not let a process forget its high-water mark")
        assert told["growth"] > 0.9 * told["model"] > 3.5e8
        assert told["growth"] <= told["model"] + told["leaf"]


def test_from_pretrained_is_that_of_the_package() -> None:
    assert jpeft.from_pretrained is from_pretrained
