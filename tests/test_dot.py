import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

from bitnet_jax import Scheme, dot_general, quantize_activations, with_scheme
from bitnet_jax.dot import accumulate
from bitnet_jax.packed import pack_weight

from .battery import (
    RULES,
    SCALES,
    SCHEMES,
    golden,
    name_of,
    normal,
    pack,
    quantize,
    run_python,
    ste_activation,
    ste_matmul,
    ste_weight,
    unpack,
)

MATMUL = (((1,), (0,)), ((), ()))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def ours(x, w, scheme=Scheme()):
    return dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), scheme=scheme)


def close(a, b, tolerance=CLOSE):
    jax.tree.map(lambda a, b: assert_allclose(a, b, **tolerance), a, b)


def value_and_gradients(f, cotangent):
    """f(x, w) with the gradients of sum(f * cotangent)."""

    def g(x, w):
        y = f(x, w)
        return (y.astype(jnp.float32) * cotangent).sum(), y

    def run(x, w):
        (_, y), gradients = jax.value_and_grad(g, (0, 1), has_aux=True)(x, w)
        return y, *gradients

    return run


@pytest.mark.parametrize("prefix", ["bias", "nobias"])
def test_golden_layer(prefix):
    data = golden("bitlinear")
    x, w, cotangent = (data[f"{prefix}/{k}"] for k in ("x", "weight", "cotangent"))
    bias = data.get(f"{prefix}/bias", np.zeros(10, np.float32))

    def f(x, w, bias):
        return (ours(x, w.T, Scheme("threshold", "channel")) + bias) @ jnp.eye(10)

    y, vjp = jax.vjp(f, x, w, bias)
    dx, dw, db = vjp(jnp.asarray(cotangent))
    assert_allclose(y, data[f"{prefix}/y"], **CLOSE)
    assert_allclose(dx, data[f"{prefix}/grad_x"], **CLOSE)
    assert_allclose(dw, data[f"{prefix}/grad_weight"], **CLOSE)
    if prefix == "bias":
        assert_allclose(db, data["bias/grad_bias"], **CLOSE)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_gradients_are_the_straight_through_ones(scheme):
    x, w, g = normal(0, 6, 13), normal(1, 13, 5), normal(2, 6, 5)
    close(
        jax.jit(value_and_gradients(lambda x, w: ours(x, w, scheme), g))(x, w),
        jax.jit(value_and_gradients(lambda x, w: ste_matmul(x, w, scheme), g))(x, w),
    )


def test_eager_gradients():
    x, w, g = normal(0, 3, 6), normal(1, 6, 5), normal(2, 3, 5)
    close(
        value_and_gradients(ours, g)(x, w),
        value_and_gradients(lambda x, w: ste_matmul(x, w, Scheme()), g)(x, w),
    )


STEPS = {
    "vmap over x": (lambda f: jax.vmap(f, (0, None)), (3, 4, 8), (8, 6)),
    "vmap over both": (jax.vmap, (3, 4, 8), (3, 8, 6)),
    "vmap over w": (lambda f: jax.vmap(f, (None, 0)), (4, 8), (3, 8, 6)),
    "vmap over columns": (lambda f: jax.vmap(f, (1, 2), 1), (4, 3, 8), (8, 6, 3)),
    "checkpoint": (jax.checkpoint, (4, 8), (8, 6)),
    "scan over w": (
        lambda f: lambda x, w: lax.scan(lambda x, w: (jnp.tanh(f(x, w)), x), x, w),
        (4, 8),
        (3, 8, 8),
    ),
    "scan over checkpoint": (
        lambda f: lambda x, w: lax.scan(jax.checkpoint(lambda x, w: (f(x, w), x)), x, w),
        (4, 8),
        (3, 8, 8),
    ),
}


@pytest.mark.parametrize("scheme", [Scheme("twn", 3)], ids=name_of)
@pytest.mark.parametrize("step", STEPS)
def test_gradients_under_transformations(step, scheme):
    """Codes that flip between steps of a scan would show as gross differences: seeds avoid them."""
    transform, xs, ws = STEPS[step]
    x, w = normal(3, *xs), normal(4, *ws)

    def loss(f):
        def total(x, w):
            leaves = jax.tree.leaves(transform(f)(x, w))
            return sum((jnp.cos(y) * normal(5, *y.shape)).sum() for y in leaves)

        return jax.jit(jax.value_and_grad(total, (0, 1)))

    close(
        loss(lambda x, w: ours(x, w, scheme))(x, w),
        loss(lambda x, w: ste_matmul(x, w, scheme))(x, w),
        {"rtol": 1e-4, "atol": 1e-4},
    )


def permuted(x, order, split):
    """(axes of the first group, ..., axes of the last) flattened group by group."""
    x, sizes, at = jnp.einsum(x, range(x.ndim), order), [], 0
    for n in split:
        sizes.append(int(np.prod(x.shape[at : at + n])))
        at += n
    return x.reshape(sizes)


def ste_dot_general(x, w, dims, scheme):
    """The straight-through form of any dimension numbers, by reshaping to matrices."""
    (xc, wc), (xb, wb) = dims
    xf = [i for i in range(x.ndim) if i not in (*xc, *xb)]
    wf = [i for i in range(w.ndim) if i not in (*wc, *wb)]
    shape = [x.shape[i] for i in (*xb, *xf)] + [w.shape[i] for i in wf]
    xm = permuted(x, [*xb, *xf, *xc], [len(xb), len(xf), len(xc)])
    wm = permuted(w, [*wb, *wc, *wf], [len(wb), len(wc), len(wf)])
    product = jnp.einsum("brk,bkn->brn", ste_activation(xm), ste_weight(wm, scheme))
    return product.reshape(shape)


@st.composite
def products(draw):
    """Random operands: batch, contracted and free axes in any order on both sides."""
    nb, nc = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    nx, nw = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    size = lambda n: draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    batch, contract = size(nb), size(nc)
    sides = []
    for free in (size(nx), size(nw)):
        sizes = batch + contract + free
        order = draw(st.permutations(range(len(sizes))))
        shape = [sizes[i] for i in order]
        sides.append((shape, [order.index(i) for i in range(nb + nc)]))
    (xs, xi), (ws, wi) = sides
    return xs, ws, ((xi[nb:], wi[nb:]), (xi[:nb], wi[:nb]))


@settings(max_examples=8)
@given(
    products(),
    st.sampled_from(SCHEMES),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
    st.integers(0, 10**6),
)
def test_any_dimension_numbers(case, scheme, dtype, seed):
    xs, ws, dims = case
    rng = np.random.default_rng(seed)
    x, w = (jnp.asarray(rng.standard_normal(s)).astype(dtype) for s in (xs, ws))
    shape = jax.eval_shape(lambda x, w: lax.dot_general(x, w, dims), x, w).shape
    g = jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype).astype(jnp.float32)

    def f(x, w):
        return dot_general(x, w, dims, scheme=scheme)

    def official(x, w):
        wide = x.astype(jnp.float32), w.astype(jnp.float32)
        return ste_dot_general(*wide, dims, scheme).astype(dtype)

    got = jax.jit(value_and_gradients(f, g))(x, w)
    want = jax.jit(value_and_gradients(official, g))(x, w)
    assert [a.dtype for a in got] == [dtype] * 3
    assert [a.shape for a in got] == [shape, tuple(xs), tuple(ws)]
    wide = lambda tree: [np.asarray(a, np.float32) for a in tree]
    tolerance = CLOSE if dtype == jnp.float32 else {"rtol": 3e-2, "atol": 3e-2}
    close(wide(got), wide(want), tolerance)


def integers(x, weight, batch):
    """Accumulators (*batch, groups, *rows, out) by int64 products, a group at a time."""
    x, codes = np.asarray(x, np.int64), np.asarray(weight.codes, np.int64)
    step = weight.group or max(x.shape[-1], 1)
    letters = "ab"[:batch]
    sums = [
        np.einsum(
            f"{letters}...k,{letters}kn->{letters}...n",
            x[..., i : i + step],
            codes[..., i : i + step, :],
        )
        for i in range(0, max(x.shape[-1], 1), step)
    ]
    return np.stack(sums, batch)


@pytest.mark.parametrize("group", ["tensor", 5], ids=str)
@pytest.mark.parametrize(
    "xs, ws",
    [
        ((3, 13), (13, 5)),
        ((1, 7), (7, 3)),
        ((7,), (7, 3)),
        ((1, 1, 9), (9, 2)),
        ((2, 3, 11), (11, 1)),
        ((1, 1), (1, 1)),
        ((2, 1, 6), (2, 6, 3)),
        ((2, 6), (2, 6, 3)),
        ((2, 1, 2, 3, 6), (2, 1, 6, 3)),
        ((0, 6), (6, 3)),
    ],
    ids=str,
)
def test_accumulators_are_exact_on_every_path(xs, ws, group):
    batch = len(ws) - 2
    codes, _ = quantize_activations(normal(6, *xs) if 0 not in xs else jnp.zeros(xs))
    weight = quantize(normal(7, *ws), Scheme("absmean", group))
    product = jax.jit(accumulate, static_argnums=2)
    latent = product(codes, weight, batch)
    packed = product(codes, unpack(pack(weight)), batch)
    assert latent.dtype == jnp.int32
    assert_array_equal(latent, packed)
    assert_array_equal(latent, integers(codes, weight, batch))


@pytest.mark.parametrize("group", [1, 2, 13, 64])
def test_accumulators_of_any_group(group):
    codes, _ = quantize_activations(normal(6, 3, 13))
    weight = quantize(normal(7, 13, 5), Scheme("absmean", group))
    assert_array_equal(accumulate(codes, weight), integers(codes, weight, 0))


def test_accumulators_do_not_overflow():
    x = jnp.full((2, 70000), -128, jnp.int8)
    weight = quantize(jnp.ones((70000, 1)))
    assert accumulate(x, weight).ravel().tolist() == [-128 * 70000] * 2


@pytest.mark.parametrize("scheme", [Scheme(s, n) for s, n in zip(RULES, SCALES)], ids=name_of)
@pytest.mark.parametrize("rows", [(1,), (), (2, 3)], ids=str)
def test_packed_equals_latent(scheme, rows):
    """Accumulators are equal to the bit; of the scaling after them XLA may fuse (and so round) a
    multiply-add its own way in each program, once there are groups to sum."""
    x, w = normal(8, *rows, 13), normal(9, 13, 6)
    weight = quantize(w, scheme)
    f = jax.jit(lambda x, w: ours(x, w, scheme))
    latent, ternary, packed = f(x, w), f(x, weight), f(x, pack(weight))
    assert latent.shape == (*rows, 6)
    same = assert_array_equal if not weight.group else close
    same(latent, ternary)
    same(latent, packed)


@pytest.mark.parametrize("scheme", [Scheme("absmean", 4)], ids=name_of)
def test_packed_under_transformations(scheme):
    x, w = normal(10, 3, 4, 10), normal(11, 3, 10, 10)
    leaf = pack(quantize(w, scheme))
    one = [jax.tree.map(lambda a, i=i: a[i], leaf) for i in range(3)]
    each = jnp.stack([ours(x[i], one[i]) for i in range(3)])
    close(jax.jit(jax.vmap(ours))(x, leaf), each)
    batched = dot_general(x, leaf, (((2,), (1,)), ((0,), (0,))))
    close(batched, each)
    carried = x[0]
    for i in range(3):
        carried = ours(carried, one[i])
    scanned, _ = lax.scan(lambda c, leaf: (ours(c, leaf), None), x[0], leaf)
    assert_allclose(scanned, carried, **CLOSE)
    remat = jax.checkpoint(ours)(x[0], one[0])
    close(remat, each[0])
    abstract = jax.eval_shape(ours, x[0], one[0])
    assert abstract.shape == (4, 10) and abstract.dtype == jnp.float32


@pytest.mark.parametrize("scheme", SCHEMES[::5], ids=name_of)
def test_gradient_of_x_through_a_packed_leaf(scheme):
    x, w, g = normal(12, 4, 9), normal(13, 9, 5), normal(14, 4, 5)
    leaf = pack(quantize(w, scheme))
    got = jax.jit(jax.grad(lambda x, leaf: (ours(x, leaf) * g).sum()))(x, leaf)
    want = jax.grad(lambda x: (ste_matmul(x, w, scheme) * g).sum())(x)
    assert_allclose(got, want, **CLOSE)


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from bitnet_jax import Scheme, dot_general, quantize_weights
from bitnet_jax.leaf import PackedTernary
from bitnet_jax.packed import pack_weight

assert len(jax.devices()) == 4
mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.random.normal(jax.random.key(0), (8, 32))
w = jax.random.normal(jax.random.key(1), (32, 8))
leaf = pack_weight(quantize_weights(w, Scheme("twn", "channel")))
dims = (((1,), (0,)), ((), ()))
f = lambda x, leaf: dot_general(x, leaf, dims)
want = f(x, leaf)

rows = jax.shard_map(f, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
np.testing.assert_array_equal(jax.jit(rows)(x, leaf), want)
columns = jax.shard_map(f, mesh=mesh, in_specs=(P(), P(None, "d")), out_specs=P(None, "d"))
np.testing.assert_array_equal(jax.jit(columns)(x, leaf), want)

for spec in (P(None, "d"), P("d", None)):
    put = lambda a, s: jax.device_put(a, NamedSharding(mesh, s))
    shared = PackedTernary(put(leaf.codes, spec), put(leaf.scale, P(None, spec[1])), 32)
    np.testing.assert_array_equal(jax.jit(f)(x, shared), want)

explicit = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
with jax.set_mesh(explicit):
    out = jax.jit(lambda x, w: dot_general(x, w, dims, out_sharding=P("d", None)))(x, w)
    assert out.sharding.spec == P("d", None), out.sharding
np.testing.assert_allclose(out, dot_general(x, w, dims), rtol=1e-6)

print("ok")
"""


def test_sharded_over_four_devices():
    """By rows, by outputs, and by inputs, four to a byte; by hand and by the partitioner."""
    done = run_python(SHARDED, devices=4, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


@pytest.mark.parametrize("kind", ["latent", "packed"])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("w_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(kind, x_dtype, w_dtype):
    """The output has x's dtype, each gradient its own input's."""
    x, w = normal(15, 4, 8, dtype=x_dtype), normal(16, 8, 3, dtype=w_dtype)
    leaf = pack(quantize(w))
    if kind == "latent":
        y, vjp = jax.vjp(ours, x, w)
        dx, dw = vjp(jnp.ones_like(y))
        assert dw.dtype == w_dtype
    else:
        y, vjp = jax.vjp(lambda x: ours(x, leaf), x)
        (dx,) = vjp(jnp.ones_like(y))
    assert y.dtype == dx.dtype == x_dtype
    wide = ours(x.astype(jnp.float32), w.astype(jnp.float32))
    assert_array_equal(y, wide.astype(x_dtype))


@pytest.mark.parametrize("preferred", [jnp.float32, jnp.bfloat16])
def test_preferred_element_type(preferred):
    x, w = normal(17, 4, 8, dtype=jnp.bfloat16), normal(18, 8, 3)
    y, vjp = jax.vjp(lambda x, w: dot_general(x, w, MATMUL, None, preferred), x, w)
    dx, dw = vjp(jnp.ones_like(y))
    assert (y.dtype, dx.dtype, dw.dtype) == (preferred, x.dtype, w.dtype)


def test_no_gradient_reaches_scales_of_a_ternary_leaf():
    x, weight = normal(19, 2, 8), quantize(normal(20, 8, 3))
    f = lambda scale: ours(x, dataclasses.replace(weight, scale=scale)).sum()
    assert_array_equal(jax.grad(f)(weight.scale), jnp.zeros_like(weight.scale))


def test_with_scheme_is_one_object_for_a_scheme():
    assert with_scheme(Scheme("twn", 4)) is with_scheme(Scheme("twn", 4))
    assert with_scheme(Scheme("twn", 4)) is not with_scheme(Scheme("twn", 5))
    x, w = normal(21, 2, 8), normal(22, 8, 3)
    assert_array_equal(with_scheme(Scheme("twn", 4))(x, w, MATMUL), ours(x, w, Scheme("twn", 4)))


@pytest.mark.parametrize("convert", [pack_weight, lambda w: w], ids=["packed", "ternary"])
@pytest.mark.parametrize(
    "shape, dims",
    [
        ((8, 8), (((1,), (1,)), ((), ()))),
        ((8, 8), (((0, 1), (0, 1)), ((), ()))),
        ((8, 8, 8), (((1,), (1,)), ((), ()))),
        ((8, 8, 8), (((1,), (0,)), ((), ()))),
        ((8, 8, 8), (((0,), (1,)), ((1,), (2,)))),
    ],
    ids=str,
)
def test_wrong_contraction_of_a_ternary_leaf(convert, shape, dims):
    leaf = convert(quantize(jnp.ones(shape)))
    with pytest.raises(ValueError, match="contracts its axes"):
        dot_general(jnp.ones((8, 8)), leaf, dims)


def test_contracted_sizes_differ():
    x = jnp.ones((2, 7))
    for w in (jnp.ones((8, 3)), pack(quantize(jnp.ones((8, 3))))):
        with pytest.raises(ValueError, match="lhs contracts 7 features, rhs 8"):
            dot_general(x, w, MATMUL)
