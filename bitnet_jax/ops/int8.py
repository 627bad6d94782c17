"""The CPU op for 8-bit codes in C++: few rows, each byte of the weight read once; see build.py.

XLA converts the whole weight to int32 for one row, and its int8 product takes signed codes only, so
that a packed weight is first copied. In decoding that is most of the time of an output head.
"""

import jax
import jax.numpy as jnp

from . import build, xla

_TARGET = "bitnet_int8_product"
_library = build.opener("int8.cpp", targets=(_TARGET,))


def status() -> str:
    """One sentence: which variant of the op is used here, or why there is none."""
    return _library().status


def variants() -> tuple[str, ...]:
    """Variants of the op that run here, the best first; empty where there is none."""
    return _library().variants


def int8_product(
    x: jax.Array, codes: jax.Array, table: bool = False, *, isa: str | None = None
) -> jax.Array:
    """int8 activations times packed 8-bit codes, on the CPU, in C++; see `xla.int8_product`.

    out[m, n] = sum over k of x[m, k] * (code[k, n] - 128), or code[n, k] of a table

    Args:
      x: int8 (rows, k).
      codes: uint8 (k, n), or (n, k) for a table, values from 1 to 255.
      table: whether the codes lie (n, k).
      isa: a name out of `variants`, to force it.

    Returns:
      int32 (rows, n). Under vmap one matrix after another is multiplied.

    Raises:
      RuntimeError: if there is no such op here, with `status` as the reason.
    """
    isa = _library().pick(isa)
    # The reference has what shard_map wants to know: along which mesh axes results differ.
    out = jax.eval_shape(lambda x, codes: xla.int8_product(x, codes, table), x, codes)
    call = jax.ffi.ffi_call(_TARGET, out, vmap_method="sequential")
    return jnp.asarray(call(x, codes, isa=isa, table=table))
