"""1.58-bit (ternary) networks in JAX: train, convert, pack and run them."""

from . import nnx as nnx
from .convert import convert as convert
from .convert import dequantise as dequantise
from .convert import pack as pack
from .convert import ternarise as ternarise
from .convert import unpack as unpack
from .dot import dot_general as dot_general
from .dot import with_scheme as with_scheme
from .errors import BitnetError as BitnetError
from .leaf import PackedInt4 as PackedInt4
from .leaf import PackedInt8 as PackedInt8
from .leaf import PackedSparse as PackedSparse
from .leaf import PackedTernary as PackedTernary
from .leaf import Ternary as Ternary
from .leaf import is_quantized as is_quantized
from .linen import BitConv as BitConv
from .linen import BitDense as BitDense
from .linen import BitDenseGeneral as BitDenseGeneral
from .linen import BitEmbed as BitEmbed
from .nnx import BitLinear as BitLinear
from .policy import Policy as Policy
from .quantize import Scheme as Scheme
from .quantize import dequantize as dequantize
from .quantize import quantize_activations as quantize_activations
from .quantize import quantize_weights as quantize_weights
from .quantize import straight_through as straight_through
