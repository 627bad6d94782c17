"""Which op multiplies packed codes: the one place that picks it, by platform and rows.

| platform | rows  | op     | why                                                              |
|----------|-------|--------|------------------------------------------------------------------|
| cpu      | any   | native | C++, reads 2 bits a weight; where a compiler is there            |
| cpu      | 1, 2  | decode | plain JAX on packed bytes; without a compiler                    |
| cpu      | 3 ... | xla    | unpacks, then XLA's int8 product; without a compiler             |
| cuda     | 1-128 | mosaic | int8 tensor cores on packed bytes; one GPU, Hopper or later      |
| tpu      | any   | xla    | v7: bfloat16 times float8 (xla-float8), for it has no int8 units |
| other    | any   | xla    | more rows or several GPUs; TPUs before v7                        |

`pallas-tpu` is never picked: no TPU has run it.

8-bit codes, read in one of two layouts, have ops of their own with the same names: native for up to
16 rows on a CPU, without a compiler decode for one row of a table, xla for all else.

Every op gives the same int32 accumulators, to the bit, so the choice is never seen in a result.
`bitnet-jax doctor` prints what this machine has; benchmarks/products.py times the ops.
"""

import functools

import jax
from jax import lax

from . import decode, int8, mosaic, native, pallas_tpu, xla

OPS = {
    "xla": xla.packed_product,
    "decode": decode.packed_product,
    "native": native.packed_product,
    "mosaic": mosaic.packed_product,
    "xla-float8": xla.packed_product_float8,
    "pallas-tpu": pallas_tpu.packed_product,
}
INT8_OPS = {
    "xla": xla.int8_product,
    "decode": decode.int8_table,
    "native": int8.int8_product,
}
# More rows than this unpack once rather than walk over the bytes again for each of them.
_FEW = 2
# More rows than this share XLA's signed copy of an 8-bit weight.
_FEW_INT8 = 16
_FEW_ON_GPU = 128


@functools.cache
def _tpu_has_no_int8() -> bool:
    """Whether this process has TPUs of v7 (Ironwood) or later."""
    return any(d.device_kind.startswith(("TPU7", "TPU8")) for d in jax.devices())


def choose(platform: str, rows: int) -> str:
    """The name of the op for so many rows of activations, out of `OPS`.

    Args:
      platform: as XLA names it: ``"cpu"``, ``"cuda"``, ``"tpu"``, ...
      rows: that meet one matrix in a call.

    >>> choose("tpu", 1)
    'xla'
    """
    if platform == "cuda":
        return "mosaic" if rows <= _FEW_ON_GPU and mosaic.available() else "xla"
    if platform == "tpu" and _tpu_has_no_int8():
        return "xla-float8"
    if platform != "cpu":
        return "xla"
    if native.variants():
        return "native"
    return "decode" if rows <= _FEW else "xla"


def packed_product(
    x: jax.Array,
    codes: jax.Array,
    in_features: int,
    index: jax.Array | None = None,
    *,
    op: str | None = None,
) -> jax.Array:
    """int8 activations times packed ternary codes, by the op that suits where it runs.

    out[b, m, n] = sum over k of x[b, m, k] * code[b, k, n]

    The platform is the one the program is compiled for, not the one Python runs on.

    Args:
      x: int8 (*batch, rows, k).
      codes: uint8 (*batch, ceil(k / 4), n), as `bitnet_jax.packed.pack_codes` makes them; with an
        index (*batch, layers, ceil(k / 4), n).
      in_features: k.
      index: int32 (*batch), which layer of codes to multiply by.
      op: a name out of `OPS`, to override the choice.

    Returns:
      int32 (*batch, rows, n). Batch axes broadcast.

    Raises:
      ValueError: for an op that does not exist, or shapes that do not fit.

    >>> import jax.numpy as jnp
    >>> x, codes = jnp.full((1, 3), 2, jnp.int8), jnp.array([[170]], jnp.uint8)
    >>> [packed_product(x, codes, 3, op=op).tolist() for op in (None, "xla", "decode")]
    [[[6]], [[6]], [[6]]]
    """
    if op is not None:
        if op not in OPS:
            raise ValueError(f"op {op!r}: expected one of {', '.join(OPS)}")
        return OPS[op](x, codes, in_features, index)
    run = lambda platform: functools.partial(
        lambda x, codes, name: OPS[name](x, codes, in_features, index),
        name=choose(platform, x.shape[-2]),
    )
    # No program for a GPU is traced where there is none: that takes longer than a small product's.
    own = {"cuda": run("cuda")} if mosaic.available() else {}
    own |= {"tpu": run("tpu")} if _tpu_has_no_int8() else {}
    return lax.platform_dependent(x, codes, cpu=run("cpu"), **own, default=run("other"))


def choose_int8(platform: str, rows: int, table: bool) -> str:
    """The name of the op for 8-bit codes, so many rows and that layout, out of `INT8_OPS`.

    >>> choose_int8("cuda", 1, True), choose_int8("cpu", 1000, True)
    ('xla', 'xla')
    """
    if platform == "cpu" and rows <= _FEW_INT8 and int8.variants():
        return "native"
    return "decode" if platform == "cpu" and rows == 1 and table else "xla"


def int8_product(x: jax.Array, codes: jax.Array, table: bool = False) -> jax.Array:
    """int8 activations times packed 8-bit codes, by the op that suits where it runs.

    out[m, n] = sum over k of x[m, k] * (code[k, n] - 128), or code[n, k] of a table

    Args:
      x: int8 (rows, k).
      codes: uint8 (k, n), or (n, k) for a table; values from 1 to 255.
      table: whether the codes lie (n, k).

    Returns:
      int32 (rows, n).

    >>> import jax.numpy as jnp
    >>> int8_product(jnp.full((1, 2), 2, jnp.int8), jnp.array([[129, 131]], jnp.uint8), True)
    Array([[8]], dtype=int32)
    """
    run = lambda platform: functools.partial(
        lambda x, codes, name: INT8_OPS[name](x, codes, table),
        name=choose_int8(platform, x.shape[0], table),
    )
    return lax.platform_dependent(x, codes, cpu=run("cpu"), default=run("other"))
