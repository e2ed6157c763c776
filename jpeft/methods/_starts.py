"""Where LoRA's factors start from: the weight, the inputs that it sees, or its gradient.

Matrices are `[*stack, in, out]`, factors A `[*stack, in, r]` and B `[*stack, r, out]`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods import _nf4
from jpeft.methods._lowrank import uniform

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "loftq", "loftq_iter_1", "eva",
         "corda", "corda_kpm", "lora_ga")
COUNTED = r"pissa_niter_\d+|loftq_iter_[1-9]\d*"
DATA = {"eva": "inputs", "corda": "inputs", "corda_kpm": "inputs", "lora_ga": "gradient"}
GAMMA = 16.0  # of LoRA-GA: the larger, the smaller the start
DAMPING = 0.01  # of CorDA: what is added to the second moments, relative to their mean

Pair = tuple[jax.Array, jax.Array]
_matmul = functools.partial(jnp.matmul, precision="highest")


def check(method: Any, site: Site) -> None:
    """Raise `MethodConfigError` unless a `LoRA` can start on a site as its `init_weights` says."""
    said, most = f"{type(method).__name__}(init_weights={method.init_weights!r})", min(site.in_size, site.out_size)
    if method.init_weights == "lora_ga" and 2 * method.width > most:
        raise MethodConfigError(f"{said} of rank {method.rank} needs 2 * rank singular vectors of the gradient of "
                                f"{site.path!r}, which has {most}; use a rank up to {most // 2}")
    if method.init_weights.startswith("loftq") and (isinstance(method.rank, tuple) or "float" not in site.dtype):
        found = f"has the ranks {method.rank}" if isinstance(method.rank, tuple) else f"is {site.dtype}"
        raise MethodConfigError(f"{said} quantises floating-point weights of all layers, and {site.path!r} {found}; "
                                "use one rank, or another init")
    if method.calibration and site.use != "linear":
        raise MethodConfigError(f"{said} starts from what a contraction weight sees, and the model uses {site.path!r} "
                                f"as {site.use}; use init_weights='kaiming'")


def random(init: str, key: jax.Array, site: Site, r: int) -> Pair:
    """One factor random, the other zero: B, or of an embedding A."""
    dtype, shape = site.theta_dtype, (*site.stack_shape, site.in_size, r)
    a, b = jnp.zeros(shape, dtype), jnp.zeros((*site.stack_shape, r, site.out_size), dtype)
    if site.use in ("embedding", "tied"):
        return a, jax.random.normal(key, b.shape, dtype)
    if init == "gaussian":
        return jax.random.normal(key, shape, dtype) / r, b
    if init == "orthogonal":
        return jax.random.orthogonal(key, max(site.in_size, r), site.stack_shape, dtype)[..., : site.in_size, :r], b
    return uniform(key, shape, site.in_size, dtype), b


def from_base(init: str, key: jax.Array, matrix: jax.Array, r: int, scale: jax.Array) -> Pair:
    """Factors with `scale A B` = the principal part of the weight (`pissa`) or a part of its QR (`olora`)."""
    if init == "olora":
        return olora(matrix, r)
    _, _, iterations = init.partition("_niter_")
    return pissa(key, matrix, r, scale, int(iterations) if iterations else None)


def pissa(key: jax.Array, matrix: jax.Array, r: int, scale: jax.Array, iterations: int | None) -> Pair:
    """The r leading singular triplets of the weight, exact or by `iterations` of a random projection."""
    if iterations is not None:
        return halves(*thin_svd(key, matrix, r, iterations), scale)
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return halves(u[..., :r], s[..., :r], vt[..., :r, :], scale)


def olora(matrix: jax.Array, r: int) -> Pair:
    """Columns of the QR decomposition of the transposed weight."""
    q, upper = jnp.linalg.qr(jnp.swapaxes(matrix, -1, -2))
    return jnp.swapaxes(upper[..., :r, :], -1, -2), jnp.swapaxes(q[..., :, :r], -1, -2)


def loftq(matrix: jax.Array, r: int, scale: jax.Array, rounds: int) -> tuple[jax.Array, ...]:
    """Alternate Q = the nearest 4-bit matrix to `W - s A B` and `s A B` = the principal part of `W - Q`.

    Returns:
        Q's codes and scales (see `_nf4`), A and B.
    """
    q = part = jnp.zeros_like(matrix)
    for _ in range(rounds):
        codes, largest = _nf4.quantise(_flat(matrix - part))
        q = unpack(codes, largest, matrix.shape)
        u, s, vt = jnp.linalg.svd(matrix - q, full_matrices=False)
        part = _matmul(u[..., :r] * s[..., None, :r], vt[..., :r, :])
    return codes, largest, *halves(u[..., :r], s[..., :r], vt[..., :r, :], scale)


def _flat(matrix: jax.Array) -> jax.Array:
    """The weights of one output after the other, as blocks of torch's `[out, in]` have them."""
    return jnp.reshape(jnp.swapaxes(matrix, -1, -2), (*matrix.shape[:-2], -1))


def unpack(codes: jax.Array, largest: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The quantised matrix `[*stack, in, out]` of this shape."""
    flat = _nf4.dequantise(codes, largest, shape[-2] * shape[-1])
    return jnp.swapaxes(jnp.reshape(flat, (*shape[:-2], shape[-1], shape[-2])), -1, -2)


def eva(moments: jax.Array, r: int) -> jax.Array:
    """A: the r principal directions of the inputs, from the sum of `x^T x`."""
    return jnp.linalg.eigh(moments)[1][..., ::-1][..., :r]


def corda(moments: jax.Array, matrix: jax.Array, r: int, scale: jax.Array, least: bool) -> Pair:
    """The r first (or last) terms of `C^-1 svd(C W)`, C being the second moments of the inputs."""
    dtype, n = matrix.dtype, moments.shape[-1]
    size = jnp.trace(moments, axis1=-2, axis2=-1)[..., None, None] / n
    moments = moments + (DAMPING * size + jnp.finfo(dtype).tiny) * jnp.eye(n, dtype=dtype)
    u, s, vt = jnp.linalg.svd(_matmul(moments, matrix), full_matrices=False)
    part = slice(-r, None) if least else slice(r)
    return halves(jnp.linalg.solve(moments, u[..., part]), s[..., part], vt[..., part, :], scale)


def lora_ga(key: jax.Array, gradient: jax.Array, r: int) -> Pair:
    """A from the r first singular vectors of the gradient, B from the r next, both of one size."""
    u, _, vt = thin_svd(key, gradient, 2 * r, 4)
    size = gradient.shape[-1] ** 0.25 / GAMMA**0.5
    return size * u[..., :r], size * vt[..., r:, :]


def thin_svd(key: jax.Array, matrix: jax.Array, rank: int, iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the leading `rank` singular triplets of `[*stack, m, n]` by a random projection (Halko et al., 0909.4061).

    Ten more directions than wanted are followed through `iterations` subspace iterations; the work is a few products
    with the matrix, where the exact decomposition takes several times its smaller side.
    """
    width = min(rank + 10, *matrix.shape[-2:])
    back = jnp.swapaxes(matrix, -1, -2)
    start = jax.random.normal(key, (matrix.shape[-1], width), jnp.float32).astype(matrix.dtype)
    q = jnp.linalg.qr(_matmul(matrix, start))[0]
    for _ in range(iterations):
        q = jnp.linalg.qr(_matmul(matrix, jnp.linalg.qr(_matmul(back, q))[0]))[0]
    u, s, vt = jnp.linalg.svd(_matmul(jnp.swapaxes(q, -1, -2), matrix), full_matrices=False)
    return _matmul(q, u[..., :rank]), s[..., :rank], vt[..., :rank, :]


def halves(u: jax.Array, s: jax.Array, vt: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return A and B with `scale A B = u diag(s) vt`, the root of s in each."""
    root = jnp.sqrt(s / (scale[..., None] if scale.ndim else scale))
    return u * root[..., None, :], root[..., :, None] * vt
