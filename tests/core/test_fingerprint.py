"""The fingerprint of a base: what its docstring says, for every container, kind of change and place of an array."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jpeft import errors
from jpeft.core import identity
from jpeft.core.identity import fingerprint


def by_hand(leaves):
    """The fingerprint, written from its docstring."""
    digest = hashlib.sha256()
    for path, array in sorted(leaves.items()):
        shape = "[" + ",".join(map(str, array.shape)) + "]"
        digest.update(f'["{path}",{shape},"{array.dtype.name}"]\n'.encode())
        flat, n = np.ascontiguousarray(array).reshape(-1), array.size
        digest.update(
            b"".join(flat[k * (n - 1) // 4095].tobytes() for k in range(4096)) if n > 4096 else flat.tobytes()
        )
    return digest.hexdigest()


def leaves():
    rng = np.random.default_rng(0)
    big = rng.normal(size=(96, 128)).astype("float32")
    return {
        "a/w": big,
        "a-b": big[:64, :64].astype(jnp.bfloat16),
        "f8": big.astype(jnp.float8_e4m3fn),
        "i8": (100 * big).astype("int8"),
        "empty": np.zeros((0, 3), "float32"),
        "scalar": np.float32(3).reshape(()),
        "flags": big > 0,
        "4097": np.arange(4097, dtype="int32"),
    }


def test_fingerprint_is_what_its_docstring_says():
    flat = leaves()
    tree = {("a" if k == "a/w" else k): ({"w": v} if k == "a/w" else v) for k, v in flat.items()}
    expected = by_hand(flat)
    assert fingerprint(tree) == expected
    assert fingerprint(jax.tree.map(jnp.asarray, tree)) == expected
    assert fingerprint(jax.tree.map(lambda x: np.asfortranarray(x) if x.ndim > 1 else x, tree)) == expected
    swapped = {**tree, "4097": tree["4097"].astype(">i4")}
    assert fingerprint(swapped) == expected


def test_fingerprint_of_other_containers():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert fingerprint(state) == fingerprint(nnx.to_pure_dict(state)) == fingerprint(dict(nnx.to_pure_dict(state)))


def test_fingerprint_sees_every_kind_of_change():
    x = np.arange(12, dtype="float32")
    one = {"w": x}
    others = [
        {"v": x},
        {"w": x.reshape(3, 4)},
        {"w": x.astype("float16")},
        {"w": x + (x == 11)},
        {"w": x, "b": x},
        {"w": jax.random.key(0)},
        {"w": jax.random.key(1)},
        {"w": jax.random.key(0, impl="rbg")},
        {"w": jax.random.key_data(jax.random.key(0))},
        {"w": 1.0},
        {},
    ]
    assert len({fingerprint(t) for t in [one, *others]}) == 1 + len(others)


def test_fingerprint_errors():
    with pytest.raises(errors.PathError, match=r"'f' is a builtin.*not an array"):
        fingerprint({"f": abs})
    with pytest.raises(errors.PathError, match="'w' is a ShapeDtypeStruct"):
        fingerprint({"w": jax.ShapeDtypeStruct((3,), "float32")})
    with pytest.raises(errors.PathError, match="outside of jit"):
        jax.jit(fingerprint)({"w": jnp.ones(3)})


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_fingerprint_of_sharded_arrays(kind, on_host, monkeypatch):
    x = leaves()["a/w"]
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = [("x", "y"), (None, "y"), (("x", "y"),), ()]
    sharded = {str(s): jax.device_put(x, NamedSharding(mesh, PartitionSpec(*s))) for s in specs}
    expected = fingerprint({str(s): x for s in specs})
    if not on_host:
        monkeypatch.setattr(identity, "_on_host", lambda array: False)
    assert fingerprint(sharded) == expected
    with jax.set_mesh(mesh):
        assert fingerprint(sharded) == expected


def test_samples_that_other_processes_hold():
    x = leaves()["a/w"]
    mesh = jax.make_mesh((8,), ("x",))
    index = np.unravel_index(np.arange(4096) * (x.size - 1) // 4095, x.shape)
    array = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "x")))
    np.testing.assert_array_equal(identity._gather_all_hosts(array, index), x[index])
