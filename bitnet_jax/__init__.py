"""1.58-bit (ternary) networks in JAX: train, convert, pack and run them."""

from .convert import Policy as Policy
from .convert import convert as convert
from .convert import dequantise as dequantise
from .convert import pack as pack
from .convert import ternarise as ternarise
from .convert import unpack as unpack
from .dot import dot_general as dot_general
from .dot import with_scheme as with_scheme
from .errors import BitnetError as BitnetError
from .linen import BitDense as BitDense
from .packed import PackedTernary as PackedTernary
from .packed import is_ternary as is_ternary
from .quantize import Scheme as Scheme
from .quantize import Ternary as Ternary
from .quantize import dequantize as dequantize
from .quantize import quantize_activations as quantize_activations
from .quantize import quantize_weights as quantize_weights
from .quantize import straight_through as straight_through
