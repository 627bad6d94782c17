"""Compute kernels, one file a target. An op knows arrays, never models, layers or schemes.

The ops for packed codes share one signature and one result, to the bit; `packed_product` picks one.
"""

from . import scaled as scaled
from .choose import OPS as OPS
from .choose import by_platform as by_platform
from .choose import choose as choose
from .choose import choose_dense as choose_dense
from .choose import packed_product as packed_product
from .xla import integer_product as integer_product
