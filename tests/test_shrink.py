"""Weights alone: converted where they lie, without a second float copy."""

import contextlib

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import save_file

from bitnet_jax import Policy, Scheme, convert, dequantize, shrink
from bitnet_jax.checkpoint import load
from bitnet_jax.interop.torch import from_torch
from bitnet_jax.leaf import is_quantized
from bitnet_jax.packed import unpack_weight

LAYERS, SIZE = 8, 96


@pytest.fixture
def file(tmp_path):
    random = np.random.default_rng(0)
    state = {f"layers.{i}.up.weight": random.standard_normal((SIZE, SIZE)) for i in range(LAYERS)}
    state = {name: w.astype(ml_dtypes.bfloat16) for name, w in state.items()}
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_weights_stay_in_the_file(file):
    here, there = from_torch(file, dtype=None), from_torch(file, mapped=True)
    assert here.report == there.report
    for x, y in zip(jax.tree.leaves(here.tree), jax.tree.leaves(there.tree), strict=True):
        assert isinstance(y, np.ndarray) and not y.flags.owndata and not y.flags.writeable
        assert x.dtype == y.dtype
        assert_array_equal(x, y)


def test_no_second_float_copy(file, tmp_path, monkeypatch):
    params, live = from_torch(file, mapped=True).tree, []
    before = sum(x.nbytes for x in jax.live_arrays())

    @contextlib.contextmanager
    def counter(console, what, total):
        yield lambda: live.append(sum(x.nbytes for x in jax.live_arrays()) - before)

    monkeypatch.setattr(shrink, "counter", counter)
    result = shrink.run(params, tmp_path, Policy(), Scheme("twn", "channel"))
    leaf, packed = 4 * SIZE**2, SIZE**2 // 4 + 4 * SIZE
    assert len(live) == LAYERS and max(live) <= LAYERS * (packed + 4) + leaf < 2 * leaf
    assert result["bytes_on_disk"]["float32"] == LAYERS * leaf
    assert result["conversion"]["bytes_before"] == LAYERS * leaf


@pytest.mark.parametrize("scheme", [Scheme(), Scheme("twn", 32), Scheme("sherry", "channel")])
def test_scales_are_rounded_and_codes_are_not(file, tmp_path, scheme):
    params = from_torch(file, mapped=True).tree
    result = shrink.run(params, tmp_path, Policy(), scheme)
    made = jax.tree.leaves(load(tmp_path / "packed").tree, is_leaf=is_quantized)
    wanted = jax.tree.leaves(convert(params, scheme=scheme).tree, is_leaf=is_quantized)
    names = [x["path"] for x in result["conversion"]["leaves"]]
    assert len(names) == LAYERS
    for name, a, b, w in zip(names, made, wanted, jax.tree.leaves(params), strict=True):
        assert_array_equal(a.codes, b.codes)
        assert_allclose(a.scale, b.scale, rtol=2**-11)
        assert_array_equal(a.scale, a.scale.astype("float16"))
        values, w = (np.asarray(x, np.float64) for x in (dequantize(unpack_weight(a)), w))
        assert_allclose(result["errors"][name], ((w - values) ** 2).sum() / (w**2).sum(), rtol=1e-4)
