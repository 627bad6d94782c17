"""The GPU ops: each lane computed in numpy, kernels lowered for CUDA, run where there is a GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.export import DisabledSafetyCheck, export

from bitnet_jax import dot_general, ops, quantize_weights
from bitnet_jax.ops import mosaic
from bitnet_jax.packed import pack_weight

from .test_ops import check, draw, packed, product

GPU = any(device.platform == "gpu" for device in jax.devices())


class Warps:
    """`bitnet_jax.ops.lane.Lane` for all lanes of all blocks at once: arrays (blocks, 4, 32)."""

    def __init__(self, x, codes, out):
        self.x, self.codes, self.out = x, codes, out
        self.lane, self.warp = np.arange(32), np.arange(4)[:, None]

    constant = staticmethod(np.int32)
    add, mul, and_ = (staticmethod(f) for f in (np.add, np.multiply, np.bitwise_and))
    min, div, rem = (staticmethod(f) for f in (np.minimum, np.floor_divide, np.remainder))
    less, shift_signed = staticmethod(np.less), staticmethod(np.right_shift)

    @staticmethod
    def shift(a, by):
        return (np.asarray(a, np.int32).view(np.uint32) >> np.uint32(by)).view(np.int32)

    @staticmethod
    def loop(turns, carry, body):
        for i in range(turns):
            carry = body(i, carry)
        return carry

    @staticmethod
    def prmt(a, b, pick):
        either = np.concatenate([_bytes(a), _bytes(b)], -1)
        return _word(either[..., [pick >> 4 * i & 7 for i in range(4)]])

    def _every(self, *values):
        return np.broadcast_arrays(*values, np.zeros((1, 4, 32), int))[:-1]

    def mma(self, c, a, b):
        """Figures of the PTX manual, section "Matrix fragments for mma.m16n8k32"."""
        a = [_bytes(v).reshape(*v.shape[:-1], 8, 16) for v in self._every(*a)]
        b = [_bytes(v).reshape(*v.shape[:-1], 8, 16) for v in self._every(*b)]
        a = np.concatenate([np.concatenate(a[::2], -1), np.concatenate(a[1::2], -1)], -2)
        out = a.astype(np.int32) @ np.concatenate(b, -1).swapaxes(-1, -2).astype(np.int32)
        near, far = (half.reshape(*half.shape[:-2], 32, 2) for half in np.split(out, 2, -2))
        found = near[..., 0], near[..., 1], far[..., 0], far[..., 1]
        return [x + y for x, y in zip(c, found)]

    def load(self, array, line, stride, offset, words):
        at = (line * stride + offset).astype(np.int64)
        assert (at % (4 * words) == 0).all(), "not aligned"
        assert (at >= 0).all() and (at + 4 * words <= array.nbytes).all(), "outside the array"
        return [array.reshape(-1).view(np.int32)[at // 4 + i] for i in range(words)]

    def store(self, array, line, stride, offset, values, where):
        at, where = np.broadcast_arrays(line * stride + offset, where)
        for i, value in enumerate(values):
            value = np.broadcast_to(value, at.shape)
            array.reshape(-1)[at[where] // 4 + i] = value[where]

    @staticmethod
    def add_warps(lists):
        """Warp w gets the w-th fourth of each list."""
        sums = [np.stack(values).sum(-2) for values in lists]  # (values, blocks, 32)
        parts = [s.reshape(4, -1, *s.shape[1:]).transpose(1, 2, 0, 3) for s in sums]
        return [list(part) for part in parts]


def _bytes(word):
    return np.ascontiguousarray(word, np.int32)[..., None].view(np.int8)


def _word(bytes_):
    return np.ascontiguousarray(bytes_).view(np.int32)[..., 0]


def in_numpy(x, codes, **how):
    """What `mosaic.packed_product` gives, lane by lane."""
    p = mosaic.plan(len(x), *codes.shape, **how)
    pad = np.pad(x, ((0, 0), (0, 4 * p.padded_lines - x.shape[1])))
    out = np.full((p.splits, p.tokens, p.outputs), 1 << 20, np.int32)
    machine = Warps(np.asarray(mosaic.planes(pad, p)), codes, out)
    mosaic.multiply(machine, p, np.arange(p.blocks)[:, None, None])
    return out.sum(0) - x.sum(1, keepdims=True, dtype=np.int32)


@settings(max_examples=15)
@given(
    st.integers(1, 40), st.integers(1, 2000), st.integers(1, 70), st.integers(1, 60),
    st.integers(0, 99),
)  # fmt: skip
@example(1, 4100, 64, 1, 0)  # one block, several steps
@example(16, 1024, 33, 999, 0)
def test_every_lane(rows, k, fours, blocks, seed):
    x, codes = draw(seed, rows, k), draw(seed, k, 4 * fours, low=-1, high=2)
    np.testing.assert_array_equal(in_numpy(x, packed(codes), blocks=blocks), product(x, codes))


@pytest.mark.parametrize("value, code", [(-128, 1), (127, -1)])
def test_largest_sums(value, code):
    x, codes = np.full((2, 9000), value, np.int8), np.full((9000, 16), code, np.int8)
    np.testing.assert_array_equal(in_numpy(x, packed(codes)), product(x, codes))


def test_plan():
    assert mosaic.plan(1, 64, 129) is None  # no words
    assert [mosaic.plan(1, 64, n).width for n in (4096, 24, 12)] == [16, 8, 4]
    assert [mosaic.plan(m, 64, 4096).heights for m in (1, 8, 9, 16, 17)] == [1, 1, 1, 1, 2]
    for p in (mosaic.plan(1, 2048, 28672), mosaic.plan(3, 1000, 4096), mosaic.plan(1, 1, 16)):
        assert p.lines <= p.padded_lines < p.lines + 128 * p.steps * 2


def lowered(f, *shapes):
    """The program for CUDA, made without one."""
    kernel = DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    return export(jax.jit(f), platforms=["cuda"], disabled_checks=[kernel])(*shapes).mlir_module()


def shaped(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("rows, k, n", [(1, 4096, 256), (16, 100, 24), (40, 33, 12)])
def test_lowers_for_cuda(rows, k, n):
    f = lambda x, codes: ops.packed_product(x, codes, k, op="mosaic")
    text = lowered(f, shaped(jnp.int8, rows, k), shaped(jnp.uint8, -(-k // 4), n))
    assert "mosaic_gpu_v2" in text


def test_lowers_batched_and_over_layers():
    product = lambda x, codes, index: mosaic.packed_product(x, codes, 40, index)
    arguments = (shaped(jnp.int8, 5, 2, 40), shaped(jnp.uint8, 3, 10, 16), shaped(jnp.int32, 5))
    text = lowered(jax.vmap(product, (0, None, 0)), *arguments)
    assert text.count("call @mosaic_gpu_v2") == 1 and "vector<4xi32>" not in text


def test_what_it_does_not_take_is_unpacked():
    f = lambda x, codes: mosaic.packed_product(x, codes, 5)
    text = lowered(f, shaped(jnp.int8, 1, 5), shaped(jnp.uint8, 2, 7))
    assert "mosaic_gpu" not in text and "dot_general" in text


def test_scaled_product_fits():
    fits = lambda *a, dtype=jnp.bfloat16: ops.scaled.fits(*a, dtype)
    assert fits(256, 128, 128) and fits(256, 128, 128, dtype=jnp.dtype("float32"))
    assert not any(map(fits, (128, 256, 256, 0), (128, 64, 128, 128), (128, 128, 64, 128)))
    assert not fits(256, 128, 128, dtype=jnp.float16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scaled_product_lowers_for_cuda(dtype):
    f = lambda *a: ops.scaled.scaled_product(*a, dtype)
    scales = shaped(jnp.float32, 512, 1), shaped(jnp.float32, 1, 1)
    text = lowered(f, shaped(jnp.int8, 512, 256), scales[0], shaped(jnp.int8, 256, 384), scales[1])
    assert "mosaic_gpu_v2" in text


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(mosaic, "available", lambda: True)


@pytest.mark.parametrize("packed_", [False, True])
def test_a_step_takes_the_kernels(as_on_a_gpu, packed_):
    """Many rows of latent or packed weights, under vmap, remat and grad; no kernel on the CPU."""
    dims = (((1,), (0,)), ((), ()))

    def loss(w, x):
        w = pack_weight(quantize_weights(w)) if packed_ else w
        y = jax.checkpoint(lambda x, w: dot_general(x, w, dims))(x, w)
        return (y.astype(jnp.float32) ** 2).sum()

    step = jax.vmap(jax.grad(loss, 1), (None, 0))
    text = lowered(step, shaped(jnp.float32, 128, 128), shaped(jnp.bfloat16, 2, 256, 128))
    assert "mosaic_gpu_v2" in text
    here = jax.jit(step).lower(jnp.ones((128, 128)), jnp.ones((2, 256, 128), jnp.bfloat16))
    assert "mosaic_gpu" not in here.as_text()


def test_few_rows_take_the_op(as_on_a_gpu):
    f = lambda x, codes: ops.packed_product(x, codes, 64)
    codes = shaped(jnp.uint8, 16, 32)
    assert "mosaic_gpu_v2" in lowered(f, shaped(jnp.int8, 2, 64), codes)
    assert "mosaic_gpu" not in lowered(f, shaped(jnp.int8, 200, 64), codes)


@pytest.mark.parametrize("size", [1, 5, 33, 63, 64])
def test_inputs_in_whole_words(size):
    """XLA's int8 products on GPUs are wrong without (see `xla._whole`); here they stay right."""
    x, codes = draw(1, 3, 2, size), draw(2, 3, size, 7, low=-1, high=2)
    f = jax.jit(lambda x, codes: ops.integer_product(x, codes, 1))
    np.testing.assert_array_equal(f(x, codes), product(x, codes))
    (found,) = re.findall(r"dot_general .*tensor<3x2x(\d+)xi8>", f.lower(x, codes).as_text())
    assert int(found) == (size if size % 4 == 0 else -(-size // 32) * 32)


@pytest.mark.skipif(not GPU, reason="no GPU here")
@pytest.mark.parametrize("rows, k, n", [(1, 530, 64), (9, 4100, 272), (40, 999, 16)])
def test_on_the_gpu(rows, k, n):
    check(mosaic.packed_product, draw(1, rows, k), draw(2, k, n, low=-1, high=2))


@pytest.mark.skipif(not GPU, reason="no GPU here")
def test_scaled_product_on_the_gpu():
    x, codes = jnp.asarray(draw(1, 512, 256)), jnp.asarray(draw(2, 256, 384, low=-1, high=2))
    rows, columns = jax.random.uniform(jax.random.key(0), (512, 1)), jnp.full((1, 384), 0.3)
    out = ops.scaled.scaled_product(x, rows, codes, columns, jnp.bfloat16)
    expected = ops.integer_product(x, codes).astype(jnp.float32) * columns * rows
    np.testing.assert_array_equal(out, expected.astype(jnp.bfloat16))
