"""Compute kernels, one file a target. An op knows arrays, never models, layers or schemes.

The ops for packed codes share one signature, `xla.packed_product`, and one result, to the bit:

    packed_product(x int8 (*batch, rows, k), codes uint8 (*batch, ceil(k / 4), n), in_features,
                   index=None) -> int32 (*batch, rows, n)
"""

from . import decode, native, xla
from .xla import integer_product as integer_product

PACKED_PRODUCTS = {
    "xla": xla.packed_product,  # unpacks first: any backend; many rows without a compiler
    "decode": decode.packed_product,  # plain JAX, one or two rows
    "native": native.packed_product,  # C++ on the CPU, any rows; where native.variants() is not ()
}
