"""Products of int8 activations and codes, in each form a graph can have."""

import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np

from ...leaf import Int4, Int8, Quantized, Ternary
from .blocks import Blocks, exact_blocks, group_blocks, pack_blocks
from .graph import Graph, onnx

_FLOAT, _UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
# accuracy_level of MatMulNBits: activations in float32, or rounded to int8 block by block.
_FLOAT_SUMS, _INT8_SUMS = 1, 4
_SMALLEST = 1e-5  # of a token's largest |x|, as in `bitnet_jax.quantize_activations`

Product = Callable[[Graph, str, str, Quantized], str]


def rounded(g: Graph, x: str) -> tuple[str, str]:
    """`bitnet_jax.quantize_activations` in the graph: codes, still float32, and a scale a token."""

    def make():
        normal, scale = _normal(g, x)
        return g.op("Clip", g.op("Round", normal), -128.0, 127.0), scale

    return g.once(("rounded", x), make)


def _normal(g: Graph, x: str) -> tuple[str, str]:
    """x * 127 / max |x| of each token, and max |x| / 127."""

    def make():
        largest = g.op("Max", g.op("ReduceMax", g.op("Abs", x), [-1], keepdims=1), _SMALLEST)
        return g.op("Mul", x, g.op("Div", 127.0, largest)), g.op("Div", largest, 127.0)

    return g.once(("normal", x), make)


def _blocks(g: Graph, x: str, path: str, leaf: Quantized, ternary_bits: int) -> str:
    """MatMulNBits: codes at their size in the file and in memory."""
    codes, token = rounded(g, x)
    blocks = blocks_of(leaf, path, ternary_bits)
    packed = g.constant(f"{path}/codes", pack_blocks(np.asarray(leaf.codes), blocks))
    out, scale = leaf.codes.shape[-1], np.asarray(leaf.scale)
    multiply = functools.partial(
        g.op, "MatMulNBits", N=out, bits=blocks.bits, block_size=blocks.size
    )
    if leaf.group:
        first = np.arange(blocks.count) * blocks.size // leaf.group
        scale = g.constant(f"{path}/scale", np.broadcast_to(scale[first].T, (out, blocks.count)))
        y = multiply(codes, packed, scale, K=blocks.inputs, accuracy_level=_FLOAT_SUMS)
        return g.op("Mul", y, token)
    codes = g.once(("held", codes, blocks), lambda: _with_127(g, codes, blocks))
    ones = g.constant(f"ones/{out}x{blocks.count}", np.ones((out, blocks.count), np.float32))
    wide = blocks.count * blocks.size
    y = multiply(codes, packed, ones, K=wide, accuracy_level=_INT8_SUMS)
    return g.op("Mul", g.op("Mul", y, g.constant(f"{path}/scale", scale)), token)


def blocks_of(leaf: Quantized, path: str, ternary_bits: int) -> Blocks:
    """How the forms of MatMulNBits cut a matrix."""
    bits = {Int8: 8, Int4: 4}.get(type(leaf), ternary_bits)
    if leaf.group:
        return group_blocks(leaf.in_features, bits, leaf.group, path)
    return exact_blocks(leaf.in_features, bits)


def _with_127(g: Graph, codes: str, blocks: Blocks) -> str:
    """Codes (b, l, in) cut as the matrix is, with a 127 in each block's free place."""
    missing = blocks.count * blocks.held - blocks.inputs
    y = g.op("Pad", codes, [0, 0, 0, 0, 0, missing]) if missing else codes
    y = g.op("Reshape", y, [0, 0, blocks.count, blocks.held])
    y = g.op("Pad", y, [0] * 7 + [blocks.size - blocks.held], 127.0)
    return g.op("Reshape", y, [0, 0, blocks.count * blocks.size])


def _integers(g: Graph, x: str, path: str, leaf: Quantized) -> str:
    """MatMulInteger: a byte a code, int32 sums, one for each group of inputs."""
    codes, token = rounded(g, x)
    codes = _by_group(g, codes, leaf)
    # uint8 activations have a fast product, int8 ones a slow one. With int8 weights it adds pairs
    # in 16 bits on CPUs without VNNI, which holds codes to 64; wider ones go as uint8 too.
    a = g.once(("uint8", codes), lambda: g.op("Cast", g.op("Add", codes, 128.0), to=_UINT8))
    w = _matrices(leaf)
    w = (w.astype(np.int16) + 128).astype(np.uint8) if isinstance(leaf, Int8) else w
    zero = np.array(128 if isinstance(leaf, Int8) else 0, w.dtype)
    sums = g.op("MatMulInteger", a, g.constant(f"{path}/codes", w), np.uint8(128), zero)
    return _scaled(g, g.op("Cast", sums, to=_FLOAT), token, path, leaf)


def _pairs(g: Graph, x: str, path: str, leaf: Quantized) -> str:
    """QuantizeLinear, DequantizeLinear: float products that runtimes turn into integer ones.

    The scale a token is taken out before, so that what is quantised has the constant scale 1.
    """
    normal, token = _normal(g, x)
    if isinstance(leaf, Int8):
        # onnxruntime's integer product of such a pair overflows on CPUs without VNNI.
        x = g.op("Mul", _quantized(g, normal), token)
        return g.op("MatMul", x, values(g, path, leaf))
    pair = _quantized(g, _by_group(g, normal, leaf))
    codes = g.constant(f"{path}/codes", _matrices(leaf))
    if leaf.group:  # sums group by group, as onnxruntime fuses blocked scales wrongly (1.32)
        y = g.op("MatMul", pair, g.op("DequantizeLinear", codes, 1.0))
        return _scaled(g, y, token, path, leaf)
    scale = np.asarray(leaf.scale)[0]
    scale = g.constant(f"{path}/scale", scale[0] if len(scale) == 1 else scale)
    weight = g.op("DequantizeLinear", codes, scale, axis=1)
    return g.op("Mul", g.op("MatMul", pair, weight), token)


def _quantized(g: Graph, x: str) -> str:
    """Rounded to int8, half to even and saturating, and back: a pair of scale 1.

    Each product has a pair of its own, because onnxruntime fuses none that several read. It would
    merge equal ones first; ``axis``, which says nothing where the scale is one number, makes the up
    to three that read the same x differ.
    """
    readers = g.once(("readers", x), list)
    axis, scale, zero = len(readers), np.float32(1), np.int8(0)
    codes = g.op("QuantizeLinear", x, scale, zero, axis=axis)
    readers.append(g.op("DequantizeLinear", codes, scale, zero, axis=axis))
    return readers[-1]


def _matrices(leaf: Quantized) -> np.ndarray:
    """Codes (in, out), or (groups, group, out) with zeros where inputs end."""
    codes = np.asarray(leaf.codes)
    if not leaf.group:
        return codes
    groups = len(np.asarray(leaf.scale))
    codes = np.pad(codes, [(0, groups * leaf.group - len(codes)), (0, 0)])
    return codes.reshape(groups, leaf.group, -1)


def _by_group(g: Graph, x: str, leaf: Quantized) -> str:
    """(b, l, in) as it is, or as (b, groups, l, group)."""
    if not leaf.group:
        return x
    groups = len(np.asarray(leaf.scale))
    missing = groups * leaf.group - leaf.in_features

    def make():
        y = g.op("Pad", x, [0, 0, 0, 0, 0, missing]) if missing else x
        y = g.op("Reshape", y, [0, 0, groups, leaf.group])
        return g.op("Transpose", y, perm=[0, 2, 1, 3])

    return g.once(("groups", x, groups, leaf.group), make)


def _scaled(g: Graph, sums: str, token: str, path: str, leaf: Quantized) -> str:
    """Scales after the sums, as in our own product."""
    scale = np.asarray(leaf.scale)
    if not leaf.group:
        return g.op("Mul", g.op("Mul", sums, g.constant(f"{path}/scale", scale)), token)
    y = g.op("Mul", sums, g.constant(f"{path}/scale", scale[:, None]))
    return g.op("Mul", g.op("ReduceSum", y, [1], keepdims=0), token)


def values(g: Graph, path: str, leaf: Quantized) -> str:
    """Codes times scale, (in, out): made once, when the runtime loads the file."""

    def make():
        codes, scale = _matrices(leaf), np.asarray(leaf.scale)
        narrow = isinstance(leaf, Ternary | Int4)
        stored = g.constant(f"{path}/codes", codes.astype(ml_dtypes.int4) if narrow else codes)
        factor = g.constant(f"{path}/scale", scale[:, None] if leaf.group else scale)
        y = g.op("Mul", g.op("Cast", stored, to=_FLOAT), factor)
        if not leaf.group:
            return y
        y = g.op("Reshape", y, [-1, codes.shape[-1]])
        longer = len(codes) * leaf.group > leaf.in_features
        return g.op("Slice", y, [0], [leaf.in_features], [0]) if longer else y

    return g.once(("values", path), make)


PRODUCTS: dict[str, Product] = {
    "2bit": functools.partial(_blocks, ternary_bits=2),
    "4bit": functools.partial(_blocks, ternary_bits=4),
    "int8": _integers,
    "qdq": _pairs,
}
