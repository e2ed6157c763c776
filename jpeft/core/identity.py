"""The base's identity: one short hash that tells whether an adapter belongs to these parameters."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import jax
import numpy as np

from jpeft.core.paths import flatten
from jpeft.errors import PathError

SAMPLES = 4096


def fingerprint(params: Any) -> str:
    """Return the sha256 (64 hex digits) that identifies base parameters, whatever container or device holds them.

    The digest is over these bytes, for every leaf in the order of its path (as Unicode code points):

    1. the header: JSON of `[path, shape, dtype]` with `,` as the separator, no spaces and non-ASCII characters
       escaped, in ASCII, followed by a newline. `path` is as in `jpeft.core.paths.flatten`, `shape` a list of ints,
       `dtype` the numpy or `ml_dtypes` name (`float32`, `bfloat16`, `int8`, `float8_e4m3fn`):
       `["layers/0/w",[2,3],"float32"]`;
    2. the data: the elements with index `k * (n - 1) // 4095` for `k = 0 .. 4095` of the leaf flattened in C order
       (all `n` elements in order if `n <= 4096`, no byte if `n = 0`), as raw little-endian bytes, one byte each for
       smaller types.

    A typed PRNG key counts as its `jax.random.key_data`, with the shape of that and the dtype name of the key
    (`key<fry>`). A Python number counts as its numpy scalar (`float64`, `int64`, `bool`).

    The samples are selected where the leaf lives, shard by shard; only they travel to the host.

    Args:
        params: a pytree of numpy or JAX arrays.

    Raises:
        PathError: a leaf is not an array, or two leaves have one path.

    Example:
        >>> import numpy as np
        >>> fingerprint({"w": np.arange(3.0)}) == fingerprint({"w": np.arange(3.0) + 1e-9})
        False
    """
    paths, leaves, _ = flatten(params)
    digest = hashlib.sha256()
    for path, leaf in sorted(zip(paths, leaves, strict=True), key=lambda item: item[0]):
        array, dtype = _array(path, leaf)
        header = json.dumps([path, list(array.shape), dtype], separators=(",", ":"))
        digest.update(header.encode("ascii") + b"\n" + _bytes(_samples(array)))
    return digest.hexdigest()


def _array(path: str, leaf: Any) -> tuple[np.ndarray | jax.Array, str]:
    if isinstance(leaf, jax.core.Tracer):
        raise PathError(f"the leaf {path!r} is traced and has no values yet; take the fingerprint outside of jit")
    if isinstance(leaf, jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key_data(leaf), str(leaf.dtype)
        return leaf, leaf.dtype.name
    array = leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf)
    if array.dtype.hasobject or array.dtype.kind in "USM":
        raise PathError(f"the leaf {path!r} is a {type(leaf).__name__}, not an array; keep only arrays in params")
    return array, array.dtype.name


def _bytes(samples: np.ndarray) -> bytes:
    order = samples.dtype.byteorder
    big = order == ">" or (order == "=" and sys.byteorder == "big")
    return (samples.byteswap() if big else samples).tobytes()


def _samples(array: np.ndarray | jax.Array) -> np.ndarray:
    """Return the elements that identify `array`, `[min(n, 4096)]`."""
    size = int(np.prod(array.shape, dtype=np.int64))
    flat = np.arange(size) if size <= SAMPLES else np.arange(SAMPLES) * (size - 1) // (SAMPLES - 1)
    if size == 0 or array.ndim == 0:
        return np.asarray(array).reshape(-1)
    index = np.unravel_index(flat, array.shape)
    return array[index] if isinstance(array, np.ndarray) else _gather(array, index)


def _gather(array: jax.Array, index: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return `array[index]` on the host, read from the shards that this process holds."""
    values = np.empty(index[0].shape, array.dtype)
    missing = np.ones(index[0].shape, bool)
    for shard in array.addressable_shards:
        inside, local = missing.copy(), []
        for i, dim, size in zip(index, shard.index, array.shape, strict=True):
            start, stop, _ = dim.indices(size)
            inside &= (start <= i) & (i < stop)
            local.append(np.clip(i - start, 0, stop - start - 1).astype(np.int32))
        if inside.any():
            values[inside] = _take(shard.data, tuple(local))[inside]
            missing &= ~inside
    return _gather_all_hosts(array, index) if missing.any() else values


def _take(shard: jax.Array, index: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return `shard[index]` on the host, of an array on one device, whatever mesh the caller has set."""
    if _on_host(shard):
        return np.asarray(shard)[index]
    with jax.set_mesh(jax.sharding.Mesh(np.array(list(shard.devices())), ("one",))):
        return np.asarray(shard[index])


def _gather_all_hosts(array: jax.Array, index: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return `array[index]` of an array of which other processes hold a part; every process must call this."""
    sharding = array.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        raise PathError(
            f"a leaf is spread over processes by a {type(sharding).__name__}; place it with a NamedSharding"
        )
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    local = tuple(i.astype(np.int32) for i in index)
    return np.asarray(jax.jit(lambda x: x.at[local].get(out_sharding=everywhere), out_shardings=everywhere)(array))


def _on_host(array: jax.Array) -> bool:
    """Tell whether the host reads `array` in place, so that numpy can index it without a copy."""
    return array.sharding.memory_kind not in (None, "device") or {d.platform for d in array.devices()} == {"cpu"}
