"""Which op multiplies: the one place that picks it, by platform and rows.

Packed codes (`choose`):

| platform | rows  | op     | why                                                              |
|----------|-------|--------|------------------------------------------------------------------|
| cpu      | any   | native | C++, reads 2 bits a weight; where a compiler is there            |
| cpu      | 1-8   | decode | plain JAX on packed bytes; without a compiler                    |
| cpu      | 9 ... | xla    | unpacks, then XLA's int8 product; without a compiler             |
| cuda     | 1-128 | mosaic | int8 tensor cores on packed bytes; one GPU, Hopper or later      |
| tpu      | any   | xla    | v7: bfloat16 times float8 (xla-float8), for it has no int8 units |
| other    | any   | xla    | more rows or several GPUs; TPUs before v7                        |

`pallas-tpu` is never picked: no TPU has run it.

8-bit codes, read in one of two layouts, have ops of their own with the same names: native for up to
16 rows on a CPU, without a compiler decode for one row of a table, xla for all else.

Codes of one byte, which training multiplies by, forward and for both gradients (`choose_dense`):

| platform            | op     | why                                                             |
|---------------------|--------|-----------------------------------------------------------------|
| cpu, matrix units   | xla    | its int8 product is 8 to 13 times its float32 one with AMX;     |
|                     |        | gradients in bfloat16 go there too                              |
| the same, float32   | native | gradients: no matrix units take them, so they are looked up     |
| cpu without         | native | C++, looks sums up; where a compiler is there, for shapes above |
|                     |        | a few rows; XLA's int8 is 1.2 to 1.7 times its float32 on VNNI  |
|                     |        | (Zen 4), no faster with AVX2                                    |
| any cpu, small      | xla    | also without a compiler, and all on ARM with a dot product      |
| other               | xla    | matrix units take int8                                          |

Every op gives the same int32 accumulators, to the bit, so the choice is never seen in a result;
gradients agree to float rounding.
`bitnet-jax doctor` prints what this machine has; benchmarks/products.py times the ops.
"""

import functools
import platform as machine
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax import lax

from . import decode, int8, mosaic, native, pallas_tpu, training, xla

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
# More rows than this unpack once rather than walk over the bytes again for each of them. (4096 x
# 4096 on AVX2: a row takes 1.0 ms, unpacking 13 and 0.5 a row; with AMX 0.7, unpacking for 8 8.5.)
_FEW = 8
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


# CPU flags of what multiplies int8 faster than sums are looked up, as Linux names them. VNNI alone
# is not among them: on Zen 4 the op in C++ took 0.6 to 0.8 of the time of XLA's int8 product. ARM's
# dot product is, for the op has no variant for ARM.
_MATRIX_UNITS = {"amx_int8", "asimddp", "i8mm"}
# Looking sums up costs 81 additions a table: below these sizes they are not worth it.
_DENSE = {"rows": 32, "inputs": 64, "outputs": 128}


@functools.cache
def matrix_units() -> bool:
    """Whether this CPU multiplies int8 much faster than float32, in XLA's hands, by its flags."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:  # not Linux: Apple's own CPUs have them
        return machine.machine() == "arm64"
    return not _MATRIX_UNITS.isdisjoint(words)


def choose_dense(
    platform: str, rows: int, inputs: int, outputs: int, dtype: jax.typing.DTypeLike = "int8"
) -> str:
    """``"native"`` or ``"xla"``, for rows times a matrix of one-byte ternary codes.

    Args:
      platform: as XLA names it.
      rows: that meet the matrix in a call.
      inputs, outputs: the matrix's sizes.
      dtype: of the rows: int8 of activations, a float of gradients.

    >>> choose_dense("cuda", 1024, 384, 384)
    'xla'
    """
    small = rows < _DENSE["rows"] or inputs < _DENSE["inputs"] or outputs < _DENSE["outputs"]
    if platform != "cpu" or small:
        return "xla"
    found = training.variants()
    # CPUs with AMX have these vectors too, and no matrix units for float32.
    looked_up = jax.numpy.dtype(dtype) == "float32" and found[:1] == ("avx512vnni",)
    if matrix_units() and not looked_up:
        return "xla"
    return "native" if found else "xla"


def by_platform(
    pick: Callable[[str], str], forms: Mapping[str, Callable], *operands: Any
) -> jax.Array:
    """``forms[pick(platform)](*operands)``, for the platform the program is compiled for.

    Args:
      pick: platform, ``"cpu"``, ``"cuda"``, ``"tpu"`` or ``"other"``, to a name of ``forms``.
      forms: what gives the same result in several ways.
      operands: arrays, or trees of them.

    >>> by_platform(lambda platform: "twice", {"twice": lambda x: 2 * x}, jax.numpy.ones(())).item()
    2.0
    """
    # No program for a GPU is traced where there is none: that takes longer than a small product's.
    there = {"cpu": True, "cuda": mosaic.available(), "tpu": _tpu_has_no_int8()}
    other = forms[pick("other")]
    own = {name: forms[pick(name)] for name, found in there.items() if found}
    own = {name: form for name, form in own.items() if form is not other}
    return lax.platform_dependent(*operands, **own, default=other) if own else other(*operands)


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
    forms = {
        name: functools.partial(
            lambda x, codes, run: run(x, codes, in_features, index), run=OPS[name]
        )
        for name in OPS
    }
    return by_platform(lambda platform: choose(platform, x.shape[-2]), forms, x, codes)


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
    forms = {name: functools.partial(run, table=table) for name, run in INT8_OPS.items()}
    return by_platform(lambda platform: choose_int8(platform, x.shape[0], table), forms, x, codes)
