"""Every op for packed codes equals the int32 product, to the bit."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_jax import ops
from bitnet_jax.ops import build, native
from bitnet_jax.packed import pack_codes

from .battery import run_python, sums_in_turns

VARIANTS = native.variants()
OPS = {
    "xla": ops.xla.packed_product,
    "decode": ops.decode.packed_product,
    "xla-float8": ops.xla.packed_product_float8,
    "pallas-tpu": functools.partial(ops.pallas_tpu.packed_product, interpret=True),
    **{
        f"native-{isa}": lambda *args, isa=isa: native.packed_product(*args, isa=isa)
        for isa in VARIANTS
    },
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
needs_native = pytest.mark.skipif(not VARIANTS, reason=native.status())


def draw(seed, *shape, low=-128, high=128):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int8)


def packed(codes):
    """`pack_codes` in numpy: hypothesis brings a hundred shapes, and jax would compile each."""
    *lead, size, out = codes.shape
    pad = [(0, 0)] * len(lead) + [(0, -size % 4), (0, 0)]
    parts = (np.pad(codes, pad) + 1).astype(np.uint8).reshape(*lead, -1, 4, out)
    return (parts << np.array([[0], [2], [4], [6]], np.uint8)).sum(-2, dtype=np.uint8)


def product(x, codes):
    return x.astype(np.int32) @ codes.astype(np.int32)


def check(op, x, codes):
    out = jax.jit(op, static_argnums=2)(x, packed(codes), x.shape[-1])
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, product(x, codes))


def test_packed_here_is_pack_codes():
    codes = draw(0, 3, 13, 5, low=-1, high=2)
    np.testing.assert_array_equal(packed(codes), pack_codes(jnp.asarray(codes)))


@every_op
@pytest.mark.parametrize(
    "rows, k, n",
    [(1, 1, 1), (1, 530, 1), (1, 2, 70), (2, 31, 64), (3, 257, 129), (1, 0, 3), (0, 5, 3)],
)
def test_shapes(op, rows, k, n):
    check(op, draw(1, rows, k), draw(2, k, n, low=-1, high=2))


@pytest.mark.parametrize("isa", VARIANTS)
def test_no_inputs_are_zeros_whatever_was_multiplied_before(isa):
    """A thread keeps the room of its sums."""
    for k in (64, 0):
        check(OPS[f"native-{isa}"], draw(1, 128, k), draw(2, k, 96, low=-1, high=2))


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize(
    "rows, k, n", [(1, 1030, 300), (3, 997, 264), (8, 4101, 77), (1, 35, 8192), (2, 259, 9000)]
)
def test_what_threads_share(isa, rows, k, n):
    """Large enough for several: cut by inputs, or by outputs where there are very many."""
    x, codes = draw(1, rows, k), draw(2, k, n, low=-1, high=2)
    check(OPS[f"native-{isa}"], x, codes)
    stack = np.stack([codes, -codes])
    second = jax.jit(lambda x, codes, i: native.packed_product(x, codes, k, i, isa=isa))
    np.testing.assert_array_equal(second(x, packed(stack), 1), -product(x, codes))


@pytest.mark.parametrize("isa", VARIANTS)
@settings(max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 300), st.integers(1, 200), st.integers(0, 99),
    st.sampled_from([1, 8, 128]),
)  # fmt: skip
def test_any_shape(isa, rows, k, n, seed, size):
    x, codes = draw(seed, rows, k, low=-size, high=size), draw(seed, k, n, low=-1, high=2)
    out = native.packed_product(jnp.asarray(x), jnp.asarray(packed(codes)), k, isa=isa)
    np.testing.assert_array_equal(out, product(x, codes))


@every_op
@pytest.mark.parametrize("rows", [1, 17, 33])
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("code", [-1, 1])
def test_no_overflow(op, rows, value, code):
    """The largest sums there are, far beyond int16: k = 4,100 of one sign."""
    check(op, np.full((rows, 4100), value, np.int8), np.full((4100, 37), code, np.int8))


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize(
    "rows, k, n",
    [(1, 333, 5376), (1, 333, 5377), (3, 77, 5377), (1, 99, 20011), (7, 40, 20011), (1, 9, 131137)],
)
def test_few_rows_of_wide_matrices(isa, rows, k, n):
    codes = draw(1, k, n, low=-1, high=2)
    check(OPS[f"native-{isa}"], draw(0, rows, k), codes)
    check(OPS[f"native-{isa}"], np.full((rows, k), -128, np.int8), np.full_like(codes, -1))


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("rows", [17, 40, 128])
def test_sums_that_run_up_after_a_while(isa, rows):
    check(OPS[f"native-{isa}"], *sums_in_turns(rows, rows, 4100, 37))


def test_decode_reads_a_layer_where_it_lies():
    """Its partial sums take a quarter of a layer's bytes; a copy of the layer would take all."""
    x, codes = jnp.zeros((1, 1024), jnp.int8), jnp.zeros((3, 256, 512), jnp.uint8)
    run = jax.jit(lambda x, codes, i: OPS["decode"](x, codes, 1024, i))
    found = run.lower(x, codes, jnp.int32(1)).compile().memory_analysis()
    assert found.temp_size_in_bytes < codes[0].nbytes / 2


@every_op
def test_jit_and_vmap(op):
    x, codes = draw(3, 5, 2, 45), draw(4, 5, 45, 21, low=-1, high=2)
    bytes_ = jnp.asarray(packed(codes))
    two = lambda x, codes: op(x, codes, 45)
    for axes in ((0, 0), (0, None), (None, 0)):
        rows = x if axes[0] == 0 else x[0]
        pick = slice(None) if axes[1] == 0 else 1
        out = jax.jit(jax.vmap(two, axes))(rows, bytes_[pick])
        np.testing.assert_array_equal(out, product(rows, codes[pick]))


@every_op
def test_nested_vmap(op):
    """x has the inner axis, codes the outer one: each is read where it lies."""
    x, codes = draw(5, 3, 1, 50), draw(6, 4, 50, 9, low=-1, high=2)
    inner = jax.vmap(lambda x, codes: op(x, codes, 50), (0, None))
    out = jax.jit(jax.vmap(inner, (None, 0)))(x, packed(codes))
    np.testing.assert_array_equal(out, product(x[None], codes[:, None]))


@every_op
def test_batch_axes(op):
    x, codes = draw(7, 2, 1, 3, 40), draw(8, 5, 40, 11, low=-1, high=2)
    out = jax.jit(op, static_argnums=2)(x, packed(codes), 40)
    np.testing.assert_array_equal(out, product(x, codes))


@every_op
def test_scan_over_layers(op):
    """The stack stays where it is; what moves is the index."""
    codes = draw(9, 4, 33, 33, low=-1, high=2)
    stack, start = jnp.asarray(packed(codes)), draw(10, 2, 33)

    def layer(x, index):
        return (op(x, stack, 33, index) >> 4).astype(jnp.int8), None

    out, _ = jax.jit(lambda x: jax.lax.scan(layer, x, jnp.arange(4)))(start)
    expected = start
    for matrix in codes:
        expected = (product(expected, matrix) >> 4).astype(np.int8)
    np.testing.assert_array_equal(out, expected)


@every_op
def test_one_index_for_each_of_a_batch(op):
    x, codes = draw(11, 3, 2, 20), draw(12, 4, 20, 6, low=-1, high=2)
    stack, index = jnp.asarray(packed(codes)), jnp.array([3, 0, 9])
    out = jax.jit(op, static_argnums=2)(x, stack, 20, index)
    # As everywhere in XLA an index past the end means the last.
    np.testing.assert_array_equal(out, product(x, codes[[3, 0, 3]]))


@every_op
def test_wrong_width(op):
    with pytest.raises(ValueError, match="features"):
        op(jnp.zeros((1, 8), jnp.int8), jnp.zeros((2, 3), jnp.uint8), 7)


def test_bit_planes_of_the_benchmark():
    """The peer that `decode` is measured against computes the same."""
    path = Path(__file__).parent.parent / "benchmarks" / "products.py"
    spec = importlib.util.spec_from_file_location("products", path)
    products = importlib.util.module_from_spec(spec)
    sys.modules["products"] = products
    spec.loader.exec_module(products)
    x, codes = draw(15, 1, 64), draw(16, 64, 10, low=-1, high=2)
    out = products.bit_planes(jnp.asarray(x), jnp.asarray(packed(codes)), 64)
    np.testing.assert_array_equal(out, product(x, codes))


@needs_native
def test_wrong_codes():
    with pytest.raises(ValueError, match="do not fit"):
        native.packed_product(jnp.zeros((1, 8), jnp.int8), jnp.zeros((3, 3), jnp.uint8), 8)


@needs_native
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("isa", VARIANTS)
def test_damaged_codes_read_nothing_outside(rows, isa):
    """The value 3 is no code; whatever its sums are, the other outputs keep theirs."""
    x, codes = draw(13, rows, 64), draw(14, 64, 8, low=-1, high=2)
    bytes_ = packed(codes)
    bytes_[:, 0] = 255
    out = native.packed_product(jnp.asarray(x), jnp.asarray(bytes_), 64, isa=isa)
    np.testing.assert_array_equal(out[:, 1:], product(x, codes)[:, 1:])


@needs_native
def test_unknown_variant():
    with pytest.raises(ValueError, match="no variant 'mmx'"):
        native.packed_product(
            jnp.zeros((1, 4), jnp.int8), jnp.zeros((1, 1), jnp.uint8), 4, isa="mmx"
        )


@needs_native
def test_sharded_over_two_devices():
    """Each device multiplies its own columns; in XLA's threads, side by side."""
    run_python(
        """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from bitnet_jax.ops import build, native
from bitnet_jax.packed import pack_codes
mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
random = np.random.default_rng(0)
for rows in (1, 40):
    x = random.integers(-128, 128, (rows, 70)).astype(np.int8)
    codes = random.integers(-1, 2, (70, 600)).astype(np.int8)
    product = jax.shard_map(
        lambda x, codes: native.packed_product(x, codes, 70),
        mesh=mesh, in_specs=(P(), P(None, "model")), out_specs=P(None, "model"))
    out = jax.jit(product)(x, pack_codes(jnp.asarray(codes)))
    np.testing.assert_array_equal(out, x.astype(np.int32) @ codes.astype(np.int32))
""",
        devices=2,
    )


COMPILER = next(filter(shutil.which, ("g++", "clang++", "c++")), "c++")
STATUS = "from bitnet_jax.ops import native; print(native.variants(), native.status())"


def start(tmp_path, code=STATUS, **env):
    own = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), "BITNET_JAX_NATIVE": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | own | env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "switch, said",
    [pytest.param("1", "native op, variant", marks=needs_native), ("0", "switches it off")],
)
def test_all_ops_are_compiled_at_once_for_an_image(switch, said):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "bitnet_jax.ops"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "BITNET_JAX_NATIVE": switch},
        capture_output=True, text=True,
    )  # fmt: skip
    names = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert not done.stderr and not done.returncode
    assert names == ["native", "int8", "quantise", "training", "attention"]
    assert done.stdout.count(said) == 5


@pytest.mark.parametrize(
    "env, reason",
    [
        ({"BITNET_JAX_NATIVE": "0"}, "switches it off"),
        ({"PATH": ""}, "no C++ compiler"),
        ({"CXX": "false"}, "false failed"),
        ({"CXX": "true"}, "no native op: FileNotFoundError"),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "no native op: "),
    ],
)
def test_without_the_op_there_is_a_reason(tmp_path, env, reason):
    code = f"""{STATUS}
import jax.numpy as jnp
from bitnet_jax.ops import xla
print(xla.packed_product(jnp.ones((1, 3), jnp.int8), jnp.full((1, 1), 170, jnp.uint8), 3))
"""
    out, err = start(tmp_path, code, **env).communicate()
    assert out.startswith("() no native op") and reason in out and out.endswith("[[3]]\n"), out
    assert err == ""


@needs_native
def test_two_processes_compile_at_once(tmp_path):
    both = [start(tmp_path, CXX=f"{COMPILER} -O1") for _ in range(2)]  # -O1: twice as quick
    said = [process.communicate() for process in both]
    assert said[0] == said[1] and said[0][0].startswith("('"), said
    files = os.listdir(tmp_path / "bitnet_jax")
    assert len(files) == 1 and files[0].endswith(".so"), files


def test_nothing_is_compiled_at_import(tmp_path):
    out, err = start(tmp_path, "import bitnet_jax.ops.native").communicate()
    assert (out, err) == ("", "") and not os.listdir(tmp_path)


def test_a_wrong_variant_is_left_out():
    class Broken:
        def bitnet_variant(self, i):
            return [b"avx512vnni", b"avx2", b"portable", None][i]

        def bitnet_check(self, name):
            return {b"avx512vnni": 0, b"avx2": -1, b"portable": 1}[name.value]

    assert build.trusted(Broken()) == (("portable",), ("avx512vnni",))


@pytest.mark.parametrize("op", ["pallas-tpu", "xla-float8"])
def test_ops_for_tpus_lower_for_one(op):
    shapes = jax.ShapeDtypeStruct((40, 1030), jnp.int8), jax.ShapeDtypeStruct((258, 300), jnp.uint8)
    call = jax.jit(lambda x, codes: ops.packed_product(x, codes, 1030, op=op))
    text = jax.export.export(call, platforms=["tpu"])(*shapes).mlir_module()
    assert ("tpu_custom_call" if op == "pallas-tpu" else "f8E4M3FN") in text


@pytest.mark.parametrize(("kind", "op"), [("TPU7x", "xla-float8"), ("TPU v6 lite", "xla")])
def test_the_generation_of_a_tpu_decides(kind, op, monkeypatch):
    class Device:
        device_kind = kind

    found = ops.choose.__globals__["_tpu_has_no_int8"].__wrapped__
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert found() == (op == "xla-float8")
