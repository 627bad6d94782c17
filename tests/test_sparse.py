"""3:4 sparse codes: the rule, the bytes, and everything a scheme goes through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet_jax
from bitnet_jax import BitDense, PackedSparse, Scheme, checkpoint, convert, quantize_weights
from bitnet_jax.packed import pack_weight, unpack_weight
from bitnet_jax.sparse import pack_fours


def by_hand(w, group):
    """Codes and scales of one matrix by loops, from the words of the rule."""
    size, out = w.shape
    codes = np.zeros((size, out))
    for o in range(out):
        for start in range(0, size, 4):
            four = list(range(start, min(start + 4, size)))
            # With inputs missing, a missing one is the 0.
            zero = min(four, key=lambda i: abs(w[i, o])) if len(four) == 4 else None
            for i in four:
                codes[i, o] = 0 if i == zero else (1 if w[i, o] >= 0 else -1)
    scale = [
        [np.abs(w[g : g + group, o][codes[g : g + group, o] != 0]).mean() for o in range(out)]
        for g in range(0, size, group)
    ]
    return codes, np.array(scale)


@pytest.mark.parametrize("size, out", [(4, 1), (5, 2), (6, 3), (32, 4), (47, 5)])
@pytest.mark.parametrize("scale", ["channel", 8])
def test_the_rule(size, out, scale):
    w = np.random.default_rng(size).standard_normal((size, out)).astype(np.float32)
    weight = quantize_weights(jnp.asarray(w), Scheme("sherry", scale))
    codes, scales = by_hand(w, scale if scale == 8 else size)
    np.testing.assert_array_equal(weight.codes, codes)
    np.testing.assert_allclose(weight.scale, scales, rtol=1e-6)


def test_equal_weights_still_have_one_zero_in_four():
    for w in (jnp.zeros((8, 3)), jnp.ones((8, 3))):
        codes = quantize_weights(w, Scheme("sherry", "channel")).codes
        assert ((codes.reshape(2, 4, 3) == 0).sum(1) == 1).all()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 3), max_size=1), st.integers(1, 70), st.integers(1, 4),
    st.integers(0, 2**16),
)  # fmt: skip
def test_bytes_and_back(lead, size, out, seed):
    w = np.random.default_rng(seed).standard_normal((*lead, size, out)).astype(np.float32)
    # Compiled as a whole: one operation after the other, every shape takes seconds.
    weight = jax.jit(quantize_weights, static_argnums=1)(w, Scheme("sherry", "channel"))
    leaf = jax.jit(pack_weight)(weight)
    assert isinstance(leaf, PackedSparse) and leaf.shape == weight.shape
    assert leaf.codes.shape == (*lead, 5 * -(-size // 32), out)
    again = jax.jit(unpack_weight)(leaf)
    np.testing.assert_array_equal(again.codes, weight.codes)
    assert type(again) is type(weight)


def test_the_bits_are_where_the_docstring_says():
    fours = jnp.asarray(np.array([[0, -1, 1, 1], [1, 1, 0, -1]]).reshape(8, 1), jnp.int8)
    values = [0 | 0b001 << 2, 2 | 0b100 << 2]  # position of the 0, then who is -1
    planes = [sum((v >> b & 1) << j for j, v in enumerate(values)) for b in range(5)]
    assert pack_fours(fours).ravel().tolist() == planes


def test_one_and_a_quarter_bits():
    leaf = pack_weight(quantize_weights(jnp.ones((64, 16)), Scheme("sherry", "tensor")))
    assert 8 * leaf.codes.nbytes == 1.25 * 64 * 16


def test_a_layer_trains_packs_and_comes_back(tmp_path):
    scheme = Scheme("sherry", "channel")
    layer, x = BitDense(8, scheme=scheme), jax.random.normal(jax.random.key(1), (4, 20))
    params = layer.init(jax.random.key(0), x)
    codes, scale = bitnet_jax.quantize_activations(x)
    grads = jax.grad(lambda p: layer.apply(p, x).sum())(params)["params"]["kernel"]
    np.testing.assert_allclose(grads, (codes * scale).T @ jnp.ones((4, 8)), rtol=1e-5)
    result = convert(params, scheme=scheme)
    leaf = next(x for x in result.report.leaves if x.path == "kernel")
    assert leaf.format == "sparse" and leaf.zeros == 20 // 4 * 8
    y = layer.apply(params, x)
    # Biases are kept in float16.
    params["params"]["bias"] = result.tree["params"]["bias"]
    checkpoint.save(tmp_path / "model", result.tree)
    again = checkpoint.load(tmp_path / "model").tree
    assert bool((layer.apply(again, x) == layer.apply(params, x)).all())
    assert y.shape == (4, 8)


def test_groups_are_whole_fours():
    for scale in (6, "row"):
        with pytest.raises(ValueError, match="multiple of 4"):
            Scheme("sherry", scale)
