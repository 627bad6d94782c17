"""The CPU op in C++: packed codes read as they are stored, int8 in, int32 out, exact.

It is compiled at first use, see build.py. Without a compiler there is no native op, `status` says
so, and nothing else changes.

``python -m bitnet_jax.ops`` compiles it and the other ops now, for an image or a cluster.
"""

import jax
import jax.numpy as jnp
import numpy as np

from . import build

_TARGET = "bitnet_packed_product"
_library = build.opener("native.cpp", "native_kernels.h", "by_row.h", "amx.h", targets=(_TARGET,))


def status() -> str:
    """One sentence: which variant of the native op is used here, or why there is none.

    Compiles the op if that was not done yet, which takes some seconds, once.
    """
    return _library().status


def variants() -> tuple[str, ...]:
    """Variants of the native op that run here, the best first; empty where there is none."""
    return _library().variants


def packed_product(
    x: jax.Array,
    codes: jax.Array,
    in_features: int,
    index: jax.Array | None = None,
    *,
    isa: str | None = None,
) -> jax.Array:
    """int8 activations times packed ternary codes, on the CPU, in C++; see `xla.packed_product`.

    out[b, m, n] = sum over k of x[b, m, k] * code[b, k, n]

    Args:
      x: int8 (*batch, rows, k).
      codes: uint8 (*batch, ceil(k / 4), n), as `bitnet_jax.packed.pack_codes` makes them; with an
        index (*batch, layers, ceil(k / 4), n).
      in_features: k.
      index: int32 (*batch), which layer of codes to multiply by: no slice of them is copied, as
        `jax.lax.scan` over stacked layers would.
      isa: a name out of `variants`, to force it.

    Returns:
      int32 (*batch, rows, n). Batch axes broadcast.

    Raises:
      RuntimeError: if there is no native op here, with `status` as the reason.

    >>> if variants():
    ...     print(packed_product(jnp.full((1, 3), 2, jnp.int8), jnp.array([[170]], jnp.uint8), 3))
    ... else:
    ...     print("[[6]]")
    [[6]]
    """
    isa = _library().pick(isa)
    if index is None:
        codes, index = jnp.expand_dims(codes, -3), jnp.zeros((), jnp.int32)
    *_, rows, size = x.shape
    if size != in_features or codes.shape[-2] != -(-size // 4):
        raise ValueError(f"x {x.shape} and codes {codes.shape} do not fit {in_features} features")
    batch = np.broadcast_shapes(x.shape[:-2], codes.shape[:-3], index.shape)
    spread = lambda a, own: a.reshape((1,) * (len(batch) + own - a.ndim) + a.shape)
    operands = spread(x, 2), spread(codes, 3), spread(index.astype(jnp.int32), 0)
    # A sum of all three has what shard_map wants to know: along which mesh axes results differ.
    out = jax.eval_shape(
        lambda *a: (
            jnp.zeros((*batch, rows, codes.shape[-1]), jnp.int32)
            + sum(x.sum(dtype=jnp.int32) for x in a)
        ),
        *operands,
    )
    call = jax.ffi.ffi_call(_TARGET, out, vmap_method="expand_dims")
    return call(*operands, isa=isa)
