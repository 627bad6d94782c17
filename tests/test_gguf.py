"""GGUF in and out, against the gguf package; the real reader is in test_gguf_llamacpp."""

import json
import struct
import tracemalloc
from types import SimpleNamespace

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_jax import BitnetError, Policy, Scheme, Ternary, convert, dequantize
from bitnet_jax.convert import pack, ternarise
from bitnet_jax.half import exact_in_half
from bitnet_jax.interop import gguf
from bitnet_jax.interop.gguf.blocks import RANGES, decode, encode, size
from bitnet_jax.interop.gguf.container import TYPES, open_gguf
from bitnet_jax.interop.gguf.names import row_order
from bitnet_jax.interop.gguf.plan import Plan
from bitnet_jax.interop.gguf.rows import Rows, from_leaf, from_values, to_leaf
from bitnet_jax.interop.gguf.tokenizer import read, write
from bitnet_jax.leaf import PackedTernary, is_quantized
from bitnet_jax.models.decoder import DecoderConfig, rotary
from bitnet_jax.models.folder import ModelFolder
from bitnet_jax.packed import pack_weight, unpack_weight
from bitnet_jax.train.data import END
from bitnet_jax.train.text import byte_tokenizer

SMALL = DecoderConfig(vocab_size=40, width=64, layers=1, heads=2, kv_heads=1, hidden=96)


def tokenizer():
    """A byte-level BPE of 40 tokens at most."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=40, special_tokens=[END], show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat, 12 cats"], trainer)
    return made


def leaf(rng, features, out, scale="channel", group=0):
    """A random packed ternary matrix with scales that float16 holds exactly."""
    shape = {"tensor": (1, 1), "channel": (1, out)}.get(scale, (-(-features // (group or 1)), out))
    scales = np.float16(rng.uniform(0.01, 2, shape)).astype(np.float32)
    codes = rng.integers(-1, 2, (features, out)).astype(np.int8)
    return jax.jit(pack_weight)(Ternary(jnp.asarray(codes), jnp.asarray(scales), group))


def variables(config, make):
    """The variables of a decoder, each made from its path and shape."""
    start = lambda: config.build(None).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    named = lambda path, x: make(jax.tree_util.keystr(path), x.shape)
    return jax.tree_util.tree_map_with_path(named, jax.eval_shape(start))


def model(config, seed=0, scheme=Scheme("absmean", "channel"), floats=np.float16, **kind):
    """A model of random packed leaves, and floats of a type."""
    rng = np.random.default_rng(seed)

    def make(name, shape):
        if "kernel" in name and "layer" in name:
            return leaf(rng, *shape, **kind)
        return jnp.asarray(rng.normal(size=shape).astype(floats).astype(np.float32))

    return ModelFolder(config, scheme, variables(config, make), tokenizer())


def latent(seed=0):
    """Float weights of the small model, as they are trained."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape) if len(shape) > 1 else np.ones(shape)
    return variables(SMALL, lambda _, shape: jnp.asarray(draw(shape), jnp.float32))


def same(a, b):
    """Trees equal in every code, scale and float, whatever groups say the same."""
    flat = lambda tree: jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    assert [p for p, _ in flat(a)] == [p for p, _ in flat(b)]
    for (path, x), (_, y) in zip(flat(a), flat(b)):
        assert type(x).__name__ == type(y).__name__ or not is_quantized(x), path
        if is_quantized(x):
            x, y = (from_leaf(w, "embedding" in str(path)) for w in (x, y))
            np.testing.assert_array_equal(x.codes, y.codes)
            np.testing.assert_array_equal(x.per(1), y.per(1))
        else:
            np.testing.assert_array_equal(x, y)


@pytest.fixture
def small(tmp_path):
    """A small model and its file."""
    folder, path = model(SMALL), tmp_path / "m.gguf"
    gguf.save(folder, path)
    return folder, path


# Blocks


@given(st.data())
def test_blocks_are_the_gguf_packages_and_come_back(data):
    kind = data.draw(st.sampled_from(["TQ1_0", "TQ2_0", "Q4_0", "Q8_0"]))
    block, rng = size(kind)[0], np.random.default_rng(data.draw(st.integers(0, 2**20)))
    rows, blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    low, high = {"Q4_0": (-8, 8), "Q8_0": (-127, 128)}.get(kind, (-1, 2))
    codes = rng.integers(low, high, (rows, blocks * block)).astype(np.int8)
    codes[:, ::block] = {"Q4_0": -8, "Q8_0": 127}.get(kind, 1)  # so that the quantiser sees scales
    scale = np.float16(rng.uniform(1e-3, 9, (rows, blocks))).astype(np.float32)
    if kind == "Q8_0":  # the quantiser divides by 127 and multiplies back: exact in powers of two
        scale = 2.0 ** rng.integers(-9, 3, (rows, blocks)).astype(np.float32)
    made = encode(codes, scale, kind)
    values = codes * np.repeat(scale, block, axis=1)
    np.testing.assert_array_equal(made, package.quantize(values, GgmlType[kind]))
    np.testing.assert_array_equal(package.dequantize(made, GgmlType[kind]), values)
    back, found = decode(made, kind)
    np.testing.assert_array_equal(back, codes)
    np.testing.assert_array_equal(found, scale)


def test_every_code_of_every_type_comes_back():
    for kind, (low, high) in RANGES.items():
        block = size(kind)[0]
        codes = np.resize(np.arange(low, high + 1), (3, 2 * block)).astype(np.int8)
        codes[1] = np.roll(codes[1], 1)
        back, _ = decode(encode(codes, np.ones((3, 2)), kind), kind)
        np.testing.assert_array_equal(back, codes)


def test_the_64_wide_block_as_ggml_common_h_has_it():
    codes = np.array([[-1, 0, 1, 2] * 16], np.int8)
    made = encode(codes, np.array([[1.0]]), "Q2_0")
    assert made.tolist() == [[0x00, 0x3C, *[0b11100100] * 16]]


def test_types_are_the_gguf_packages():
    for number, (name, block, width) in TYPES.items():
        if name != "Q2_0":
            assert GgmlType(number).name == name
            assert package.GGML_QUANT_SIZES[GgmlType(number)] == (block, width)


def test_a_scale_of_zero_takes_its_neighbours():
    codes = np.zeros((3, 64), np.int8)
    codes[0, :32], codes[1] = 1, -1
    zero = to_leaf(Rows(codes, np.array([[2, 0], [2, 2], [0, 0]], np.float32), 32), "ternary")
    assert zero.scale.tolist() == [[2.0]]
    other = to_leaf(Rows(codes, np.array([[2, 0], [3, 3], [0, 0]], np.float32), 32), "ternary")
    assert other.scale.tolist() == [[2.0, 3.0, 0.0]]


def test_values_become_codes_only_if_they_are():
    values = np.array([[0.5, 0, -0.5, 0.25, -0.25]], np.float32)
    assert from_values(values, 0) is None
    found = from_values(values, 3)
    assert (found.codes.tolist(), found.scale.tolist()) == ([[1, 0, -1, 1, -1]], [[0.5, 0.25]])


@given(st.data())
def test_a_matrix_of_any_shape_comes_back_code_for_code(data):
    features, out = data.draw(st.integers(1, 600)), data.draw(st.integers(1, 9))
    features = data.draw(st.sampled_from([features, 32 * (features // 32 + 1), 256, 512]))
    group = data.draw(st.sampled_from([0, 7, 32, 64, 96, 256]))
    groups = -(-features // group) if 0 < group < features else 1
    rng = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    codes = rng.integers(-1, 2, (features, out)).astype(np.int8)
    scale = rng.uniform(1e-3, 9, (groups, data.draw(st.sampled_from([1, out]))))
    weight = Ternary(codes, np.float16(scale).astype(np.float32), group if groups > 1 else 0)
    types = data.draw(st.sampled_from([("TQ1_0",), ("TQ2_0", "Q4_0"), ("Q2_0", "Q4_0"), ()]))
    holder = SimpleNamespace(config=None, scheme=None, params={"params": {}})
    plan = Plan(holder, "llama", types, "exact", data.draw(st.booleans()))
    tensor, *beside = plan.rows("blk.0.ffn_up.weight", lambda: weight, None, False)
    made, kind = tensor.make(), tensor.kind
    assert made.nbytes == tensor.nbytes and tensor.moved == 0
    block = size(kind)[0] if kind in RANGES else None
    # The first type of all that fit, and no other.
    fits = [t for t in types if features % size(t)[0] == 0 and weight.group % size(t)[0] == 0]
    assert kind == (fits[0] if fits else "F16")
    if block:
        rows = Rows(*decode(made, kind), block)
    else:
        rows = from_values(made.astype(np.float32), tensor.leaf[1])
    once = beside[0].make()[0] if beside else np.float32(1)
    wanted = from_leaf(weight)
    np.testing.assert_array_equal(rows.codes, wanted.codes)
    there = np.maximum.reduceat(
        np.abs(rows.codes), np.arange(0, features, rows.group or features), 1
    )
    found = rows.scale * once
    np.testing.assert_array_equal(found[there > 0], wanted.per(rows.group or features)[there > 0])
    if block:  # a block of zeros keeps its scale
        np.testing.assert_array_equal(found, wanted.per(block))


# Models


@settings(max_examples=5)
@given(
    st.sampled_from([24, 64, 192, 256]),
    st.sampled_from([40, 96, 320, 512]),
    st.sampled_from(["tensor", "channel", 24, 32, 64, 256]),
    st.sampled_from([("TQ2_0", "Q4_0"), ("TQ1_0",), ("Q2_0",), ("TQ1_0", "Q2_0", "Q4_0")]),
)
def test_a_model_comes_back_code_for_code(tmp_path_factory, width, hidden, scale, types):
    config = DecoderConfig(40, width=width, layers=1, heads=2, kv_heads=1, hidden=hidden)
    group = scale if isinstance(scale, int) else 0
    folder = model(config, scheme=Scheme("twn", scale), scale=scale, group=group)
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    report = gguf.save(folder, path, types=types)
    assert not [n for n in report.notes if "rounded to" in n]
    assert report.bytes == path.stat().st_size
    back = gguf.load(path)
    assert (back.config, back.scheme) == (config, folder.scheme)
    same(folder.params, back.params)
    again = path.with_name("again.gguf")
    gguf.save(back, again, types=types)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "config, arch",
    [
        ({"tied": False, "rope_scaling": (8.0, 1.0, 4.0, 8192)}, "llama"),
        ({"sub_norms": True}, "bitnet"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True, "head_size": 16}, "qwen3"),
    ],
)
def test_every_architecture_comes_back(tmp_path, config, arch):
    folder = model(DecoderConfig(**{**vars(SMALL), **config}), floats=np.float32)
    report = gguf.save(folder, tmp_path / "m.gguf")
    back = gguf.load(tmp_path / "m.gguf", max_length=9)
    assert report.form.startswith(arch) and back.config.max_length == 9
    assert vars(back.config) == {**vars(folder.config), "max_length": 9}
    same(folder.params, back.params)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_integer_leaves_come_back(tmp_path, format):
    config = DecoderConfig(**{**vars(SMALL), "tied": False})
    folder = model(config, floats=np.float32)
    rules = tuple((where, format) for where in ("embed", "head"))
    tree = convert(folder.params, Policy(rules)).tree
    halved = lambda w: w.astype(np.float16).astype(np.float32)
    tree = jax.tree.map(
        lambda x: (
            type(x)(x.codes, halved(x.scale), x.in_features, x.group) if is_quantized(x) else x
        ),
        tree,
        is_leaf=is_quantized,
    )
    folder = ModelFolder(config, folder.scheme, tree, folder.tokenizer)
    gguf.save(folder, tmp_path / "m.gguf")
    assert open_gguf(tmp_path / "m.gguf").tensors["output.weight"].kind == {
        "int8": "Q8_0",
        "int4": "Q4_0",
    }.get(format)
    same(folder.params, gguf.load(tmp_path / "m.gguf").params)


def test_latent_weights_go_as_the_network_runs_them(tmp_path):
    params = latent()
    scheme = Scheme("absmean", 32)
    folder = ModelFolder(SMALL, scheme, params, tokenizer())
    gguf.save(folder, tmp_path / "latent.gguf", floats="F16")
    packed = ModelFolder(SMALL, scheme, convert(params, scheme=scheme).tree, tokenizer())
    gguf.save(packed, tmp_path / "packed.gguf", floats="F16")
    one, other = ((tmp_path / f"{x}.gguf").read_bytes() for x in ("latent", "packed"))
    assert one == other


def test_scales_that_are_no_float16_are_said_or_go_beside(tmp_path):
    folder = model(SMALL, scale="tensor")
    third = jnp.float32(1 / 3)
    odd = jax.tree.map(
        lambda x: (
            PackedTernary(x.codes, x.scale * 0 + third, x.in_features) if is_quantized(x) else x
        ),
        folder.params,
        is_leaf=is_quantized,
    )
    odd = ModelFolder(SMALL, folder.scheme, odd, folder.tokenizer)
    report = gguf.save(odd, tmp_path / "m.gguf")
    assert [n for n in report.notes if "scales of 7 matrices rounded" in n and "e-04" in n]
    kernel = gguf.load(tmp_path / "m.gguf").params["params"]["layer_0"]["mlp"]["up"]["kernel"]
    assert kernel.scale.tolist() == [[float(np.float16(third))]]
    report = gguf.save(odd, tmp_path / "m.gguf", scale_tensors=True)
    assert not [n for n in report.notes if "rounded to" in n]
    same(odd.params, gguf.load(tmp_path / "m.gguf").params)


@pytest.mark.parametrize("kind, bits", [("F16", 11), ("BF16", 8)])
def test_floats_are_rounded_only_when_told(tmp_path, kind, bits):
    folder = ModelFolder(SMALL, None, latent(), tokenizer())
    report = gguf.save(folder, tmp_path / "m.gguf")
    assert "8 F32" in report.form and not report.notes
    report = gguf.save(folder, tmp_path / "m.gguf", floats=kind)
    assert f"8 {kind}" in report.form and "weights of 8 matrices rounded" in report.notes[0]
    for one, other in zip(jax.tree.leaves(folder.params), jax.tree.leaves(_load(tmp_path))):
        np.testing.assert_allclose(other, one, rtol=2.0**-bits, atol=1e-7)


def _load(tmp_path):
    return gguf.load(tmp_path / "m.gguf").params


def test_scales_outside_float16_go_as_values(tmp_path):
    folder = model(SMALL, scale="tensor")
    tiny = jax.tree.map(
        lambda x: PackedTernary(x.codes, x.scale * 1e-9, x.in_features) if is_quantized(x) else x,
        folder.params,
        is_leaf=is_quantized,
    )
    folder = ModelFolder(SMALL, folder.scheme, tiny, folder.tokenizer)
    report = gguf.save(folder, tmp_path / "m.gguf")
    assert "7 F32" in report.form
    same(tiny, gguf.load(tmp_path / "m.gguf").params)


def test_exporting_a_dequantised_model_shrinks_no_scale(tmp_path):
    """Its values go as floats, exactly, and the largest of them is the scale still."""
    folder, path = model(SMALL, scale="tensor"), tmp_path / "m.gguf"
    kernel = lambda f: f.params["params"]["layer_0"]["mlp"]["up"]["kernel"]
    values = jax.tree.map(
        lambda x: unpack_weight(x) if is_quantized(x) else x, folder.params, is_leaf=is_quantized
    )
    values = jax.tree.map(
        lambda x: dequantize(x) if is_quantized(x) else x, values, is_leaf=is_quantized
    )
    gguf.save(ModelFolder(SMALL, None, values, folder.tokenizer), path)
    back = gguf.load(path)
    assert back.scheme is None
    same(values, back.params)
    rows = from_leaf(kernel(folder))
    found = from_values(np.asarray(kernel(back)).T, 0)
    np.testing.assert_array_equal(found.codes, rows.codes)
    np.testing.assert_array_equal(found.scale, rows.scale)


def test_half_exact_scales_change_nothing(tmp_path):
    params = latent()
    scheme = Scheme("absmean", "channel")
    exact = exact_in_half(ternarise(params, Policy(), scheme), params)
    folder = ModelFolder(SMALL, scheme, pack(exact), tokenizer())
    report = gguf.save(folder, tmp_path / "m.gguf")
    assert not [n for n in report.notes if "rounded to" in n]


def test_rotated_halves_and_rotated_neighbours_see_the_same():
    rng = np.random.default_rng(0)
    x, at = rng.normal(size=(1, 5, 12)).astype(np.float32), jnp.arange(5)
    query, key = rng.normal(size=(2, 16, 12)).astype(np.float32)
    heads = lambda rows: (x @ rows.T).reshape(1, 5, 2, 8)
    scores = lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b)

    def neighbours(x):
        i = jnp.arange(x.shape[-1] // 2)
        angles = (at[:, None] * 100.0 ** (-2.0 * i / x.shape[-1]))[:, None, :]
        pair = (x[..., 0::2] + 1j * x[..., 1::2]) * jnp.exp(1j * angles)
        return jnp.stack([pair.real, pair.imag], -1).reshape(x.shape)

    order = row_order("attn_q", DecoderConfig(8, width=16, heads=2, kv_heads=2), "llama")
    theirs = scores(*(neighbours(heads(r[order])) for r in (query, key)))
    ours = scores(*(rotary(heads(r), at, 100.0) for r in (query, key)))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"activation": "relu2"}, "squared ReLU: stock llama.cpp .* activation='silu'"),
        ({"activation": "relu2", "sub_norms": True}, "patched=True"),
        ({"sub_norms": True, "tied": False}, "sub-norms with a head of its own"),
        ({"qk_norm": True, "qkv_bias": True}, "no such graph"),
        ({"qkv_bias": True, "rope_scaling": (8.0, 1.0, 4.0, 8192)}, "scaled positions"),
    ],
)
def test_what_no_stock_graph_computes_is_refused(tmp_path, config, message):
    config = DecoderConfig(**{**vars(SMALL), **config})
    with pytest.raises(BitnetError, match=message):
        gguf.save(ModelFolder(config, None, {"params": {}}, tokenizer()), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_squared_relu_for_a_patched_reader(tmp_path):
    config = DecoderConfig(**{**vars(SMALL), "activation": "relu2", "sub_norms": True})
    folder = model(config)
    gguf.save(folder, tmp_path / "m.gguf", patched=True)
    assert gguf.load(tmp_path / "m.gguf").config == config


# Tokenizers


WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = "The cat's 1234 mats, don't\n\n  sit: élan 日本 <|end|> x"


def byte_level(*before):
    """A byte-level BPE that splits text in steps."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    last = tokenizers.pre_tokenizers.ByteLevel(False, use_regex="Split" not in str(before))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*before, last])
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    return made


def sentencepiece():
    """A BPE as Llama 2's: spaces as a letter, unknown letters as bytes, a token in front."""
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    n = tokenizers.normalizers
    made.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    d = tokenizers.decoders
    made.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=tokens, show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    # As in Llama's own file: only three of them are special, bytes are plain tokens.
    spec = json.loads(made.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 1)]
    )
    return made


TOKENIZERS = {
    "gpt-2": byte_level,
    "smollm": lambda: byte_level(tokenizers.pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: byte_level(
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    ),
    "qwen2": lambda: byte_level(
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS.replace("{1,3}", "")), "isolated")
    ),
    "default": sentencepiece,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_come_back(name):
    made = TOKENIZERS[name]()
    config = b'{"eos_token": {"content": "<|end|>"}, "chat_template": "x"}'
    fields, _ = write(made, 400, {"tokenizer_config.json": config})
    assert fields["tokenizer.ggml.pre"] == name and len(fields["tokenizer.ggml.tokens"]) == 400
    back, files = read(fields)
    for text in (TEXT, "the mat", "", "a  b   c\t"):
        assert back.encode(text).ids == made.encode(text).ids
        assert back.decode(made.encode(text).ids) == made.decode(made.encode(text).ids)
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "x"
    end = json.loads(files["generation_config.json"])["eos_token_id"]
    assert made.id_to_token(end) == ("</s>" if name == "default" else END)
    assert back.get_vocab_size() == made.get_vocab_size()


def test_a_tokenizer_of_bytes_comes_back():
    """llama.cpp wants a merge; it is given one that is not ours."""
    made = byte_tokenizer()
    back, _ = read(write(made, 256, {})[0])
    assert back.encode(TEXT + "ÿé").ids == made.encode(TEXT + "ÿé").ids
    assert back.get_vocab() == made.get_vocab()


def test_tokenizers_that_llama_cpp_has_no_name_for_are_refused(tmp_path):
    odd = tokenizer()
    odd.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    for made, message in ((odd, "no name for"), (words, "WordLevel"), (byte_level(), "no row in")):
        with pytest.raises(BitnetError, match=message):
            gguf.save(ModelFolder(SMALL, None, model(SMALL).params, made), tmp_path / "m.gguf")


# Damage


def test_a_file_cut_anywhere_is_refused(small):
    _, path = small
    data = path.read_bytes()
    for cut in [*range(0, 64, 7), *range(64, len(data) - 40, len(data) // 60)]:
        path.write_bytes(data[:cut])
        with pytest.raises(BitnetError):
            gguf.load(path)


def test_bytes_changed_anywhere_load_or_are_refused(small):
    _, path = small
    data, rng = path.read_bytes(), np.random.default_rng(0)
    header = max(1, data.index(b"token_embd.weight") + 600)
    for at in rng.integers(0, header, 150):
        changed = bytearray(data)
        changed[at] = rng.integers(256)
        path.write_bytes(changed)
        try:
            gguf.load(path)
        except BitnetError as e:
            assert str(path) in str(e) and "\n" not in str(e)


def patch(path, find, offset, format, *values):
    data = bytearray(path.read_bytes())
    struct.pack_into(format, data, data.index(find) + offset if find else offset, *values)
    path.write_bytes(data)


HUGE = 2**60
HOSTILE = {
    "file has room for": [
        (b"", 8, "<Q", HUGE),  # tensors
        (b"", 16, "<Q", HUGE),  # metadata
        (b"", 24, "<Q", HUGE),  # the first key's length
        (b"tokenizer.ggml.tokens", 21 + 8, "<Q", HUGE),  # strings of an array
        (b"tokenizer.ggml.token_type", 25 + 8, "<Q", HUGE),  # numbers of one
    ],
    "damaged|outside|does not fit|axes": [
        (b"token_embd.weight", 17, "<I", 2**31),  # axes
        (b"token_embd.weight", 17 + 4, "<Q", HUGE),  # features
        (b"token_embd.weight", 17 + 4 + 16 + 4, "<Q", HUGE),  # offset
        (b"token_embd.weight", 17 + 4 + 16 + 4, "<Q", 2**64 - 32),
        (b"tokenizer.ggml.tokens", 21, "<I", 99),  # type of a value
    ],
    "overlap": [(b"blk.0.attn_q.weight", 19 + 4 + 16 + 4, "<Q", 0)],
    "bitnet.cpp|I2_S": [(b"token_embd.weight", 17 + 4 + 16, "<I", 36)],
    "twice": [(b"blk.0.attn_k.weight", 11, "<c", b"q")],
    "makes no network": [
        (b"llama.block_count", 17 + 4, "<I", 0),
        (b"llama.attention.head_count\4", 26 + 4, "<I", 0),
        (b"llama.embedding_length", 22 + 4, "<I", 2**32 - 1),
    ],
    "holds no tensor": [(b"llama.block_count", 17 + 4, "<I", 2**30)],
    "expected|makes no": [(b"llama.attention.head_count\4", 26 + 4, "<I", 2**30)],
    "version": [(b"", 4, "<I", 1), (b"", 4, ">I", 3)],
    "not a GGUF": [(b"", 0, "<I", 7)],
}


@pytest.mark.parametrize(
    "message, change", [(m, c) for m, changes in HOSTILE.items() for c in changes]
)
def test_hostile_numbers_are_refused_without_taking_memory(small, message, change):
    _, path = small
    patch(path, *change)
    tracemalloc.start()
    try:
        with pytest.raises(BitnetError, match=message):
            gguf.load(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_no_file_is_there(tmp_path):
    with pytest.raises(BitnetError, match="no such file"):
        gguf.load(tmp_path / "none.gguf")


def test_a_failed_write_leaves_what_was_there(small, monkeypatch):
    folder, path = small
    before = path.read_bytes()
    monkeypatch.setattr(package.GGUFWriter, "write_tensor_data", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gguf.save(folder, path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_what_other_writers_leave_out_or_add(tmp_path):
    """Every type the gguf package can write, by its own quantisers, read as it reads them."""
    kinds = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    config = DecoderConfig(40, width=32, layers=1, heads=1, kv_heads=1, hidden=32)
    rng, writer = np.random.default_rng(0), package.GGUFWriter(tmp_path / "m.gguf", "llama")
    shape = {"context_length": 99, "embedding_length": 32, "block_count": 1}
    for name, value in (shape | {"feed_forward_length": 32, "attention.head_count": 1}).items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(65 + i) for i in range(40)])
    kernels = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    expected = {}
    for name, kind in zip((*(f"blk.0.{k}" for k in kernels), "token_embd"), kinds):
        rows = 40 if name == "token_embd" else 32
        data = package.quantize(rng.normal(size=(rows, 32)).astype("f4"), GgmlType[kind])
        writer.add_tensor(f"{name}.weight", data, raw_dtype=GgmlType[kind])
        expected[name] = package.dequantize(data, GgmlType[kind])
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf.load(tmp_path / "m.gguf")
    tree = found.params["params"]
    assert found.scheme is None and found.config.norm_eps == 1e-6
    assert found.config.kv_heads == config.kv_heads and found.config.rope_base == 10_000
    np.testing.assert_array_equal(tree["embed"]["embedding"], expected["token_embd"])
    np.testing.assert_array_equal(
        tree["layer_0"]["mlp"]["down"]["kernel"].T, expected["blk.0.ffn_down"]
    )
    order = row_order("attn_q", config, "llama")
    query = np.asarray(tree["layer_0"]["attention"]["query"]["kernel"]).T
    np.testing.assert_array_equal(query[order], expected["blk.0.attn_q"])
