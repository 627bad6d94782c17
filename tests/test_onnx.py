"""ONNX files of ours against our own model, run by onnxruntime."""

import dataclasses
import functools
import json
import platform
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_jax import BitnetError, Policy, Scheme, cli, convert, quantize_weights
from bitnet_jax.interop.onnx import FORMS, codes_of, save
from bitnet_jax.interop.onnx.blocks import Blocks, exact_blocks, pack_blocks, unpack_blocks
from bitnet_jax.interop.onnx.graph import Graph, Value
from bitnet_jax.interop.onnx.products import PRODUCTS
from bitnet_jax.leaf import Int4, Int8, Packed, Ternary, is_quantized
from bitnet_jax.models.decoder import DecoderConfig
from bitnet_jax.models.folder import ModelFolder, PythonModule, save_model
from bitnet_jax.models.generate import generate
from bitnet_jax.models.phase3_config import Phase3Config
from bitnet_jax.packed import unpack_weight
from bitnet_jax.train import data

VOCAB = 300
LLAMA = DecoderConfig(vocab_size=VOCAB, width=64, layers=1, heads=4, kv_heads=2, hidden=96)
BITNET = dataclasses.replace(LLAMA, activation="relu2", sub_norms=True, rope_base=5e5)
QWEN = dataclasses.replace(
    LLAMA,
    layers=1,
    tied=False,
    head_size=32,
    qkv_bias=True,
    qk_norm=True,
    rope_scaling=(8.0, 1.0, 4.0, 40),
)
DEEP = dataclasses.replace(LLAMA, layers=2)
IDS = np.random.default_rng(0).integers(0, VOCAB, (3, 11))
TOKENIZER = data.train_tokenizer(["def f(x): return x\n"] * 9, VOCAB)


@functools.cache
def decoder(config=LLAMA, scheme=None, policy=None):
    """Random weights whose activations are not all small; packed where there is a policy."""
    shapes = jax.eval_shape(config.build(None).init, jax.random.key(0), IDS[:1])
    rng = np.random.default_rng(0)
    near = lambda path: float(path[-1].key == "scale")  # norms are about 1
    draw = lambda path, x: jnp.float32(near(path) + 0.2 * rng.standard_normal(x.shape))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    params = convert(params, policy, scheme=scheme).tree if policy else params
    return ModelFolder(config, scheme, params, TOKENIZER)


@functools.cache
def logits_of(*arguments):
    model = decoder(*arguments)
    return np.asarray(jax.jit(model.model.apply)(model.params, IDS))


def session(path):
    return onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])


def assert_ours(path, *arguments):
    """Logits within 1e-2 of ours, as the issue asks, and most tokens as near as float32 is.

    Integer sums are equal. What comes before an activation is rounded differs in float32's last
    digits, though, and where it lies between two codes the rounding may go the other way: that
    token, and those after it, are then off by about one code in 127 of one input.
    """
    ours, loaded = logits_of(*arguments), session(path)
    theirs = loaded.run(None, {"input_ids": IDS})[0]
    assert np.linalg.norm(theirs - ours) <= 1e-2 * np.linalg.norm(ours)
    near = np.abs(theirs - ours).max(-1) <= 1e-5 * np.abs(ours).max()
    assert near.mean() >= 0.75
    part = loaded.run(None, {"input_ids": IDS[:1, :4]})[0]  # any other batch and length
    assert np.linalg.norm(part - ours[:1, :4]) <= 1e-2 * np.linalg.norm(ours[:1, :4])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", ["tensor", "channel", 32, 64])
def test_every_form_computes_what_our_model_does(tmp_path, form, scale):
    arguments = BITNET, Scheme("twn", scale), Policy()
    report = save(decoder(*arguments), tmp_path / "out", form)
    assert_ours(report.path, *arguments)
    assert_same_leaves(codes_of(report.path), decoder(*arguments).params)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "config, scheme, rules",
    [
        (QWEN, Scheme("absmean"), ()),  # biases, query and key norms, scaled positions, a head
        (LLAMA, Scheme("sherry", "channel"), (("embed", "int8"),)),
        (LLAMA, Scheme("int4", 32), (("embed", "int4"),)),
        (QWEN, Scheme("int8", "channel"), (("head", "int8"), ("embed", "ternary"))),
        (QWEN, Scheme("int8", 48), (("head", "int4"), ("embed", "bfloat16"))),
    ],
)
def test_every_format_of_a_leaf(tmp_path, form, config, scheme, rules):
    arguments = config, scheme, Policy((*rules, *Policy().rules))
    report = save(decoder(*arguments), tmp_path / "out", form)
    assert_ours(report.path, *arguments)
    assert_same_leaves(codes_of(report.path), decoder(*arguments).params)


def assert_same_leaves(found, params):
    flat = jax.tree_util.tree_leaves_with_path(params["params"], is_leaf=is_quantized)
    wanted = {
        "/".join(key.key for key in path): unpack_weight(leaf) if isinstance(leaf, Packed) else leaf
        for path, leaf in flat
        if is_quantized(leaf)
    }
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        assert_equal_leaf(found[name], leaf)


def assert_equal_leaf(a, b):
    assert (type(a), a.group, a.codes.dtype, a.scale.dtype) == (
        type(b), b.group, b.codes.dtype, b.scale.dtype,
    )  # fmt: skip
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.scale, b.scale)


def test_latent_and_float_models(tmp_path):
    latent = decoder(LLAMA, Scheme("absmean"))
    assert_ours(save(latent, tmp_path / "latent").path, LLAMA, Scheme("absmean"))
    kernel = latent.params["params"]["layer_0"]["mlp"]["down"]["kernel"]
    leaf = codes_of(tmp_path / "latent")["layer_0/mlp/down/kernel"]
    assert_equal_leaf(leaf, quantize_weights(kernel, Scheme("absmean")))
    report = save(decoder(LLAMA), tmp_path / "float")
    assert report.form == "float" and codes_of(report.path) == {}
    assert_ours(report.path, LLAMA)


@pytest.mark.parametrize("form", FORMS)
def test_greedy_generation_is_ours(tmp_path, form):
    model = decoder(DEEP, Scheme("twn", "channel"), Policy())
    path = save(model, tmp_path / "out", form).path
    loaded, tokens, prompt = session(path), IDS[:2, :5], jnp.asarray(IDS[:2, :5])
    for _ in range(12):
        logits = loaded.run(None, {"input_ids": tokens})[0]
        tokens = np.concatenate([tokens, logits[:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(tokens, generate(model.model, model.params, prompt, 12))


TEXTS = [IDS[0, :5].tolist(), IDS[1, :2].tolist(), IDS[2].tolist()]


def cached(path):
    """Token ids and mask to logits, with the cache kept from call to call."""
    loaded = session(path)
    shapes = {x.name: x.shape for x in loaded.get_inputs() if x.name.startswith("past_key_values.")}
    names, kept = [x.name for x in loaded.get_outputs()], {}

    def step(ids, mask):
        past = kept or {
            name: np.zeros((len(ids), heads, 0, size), np.float32)
            for name, (_, heads, _, size) in shapes.items()
        }
        found = loaded.run(None, {"input_ids": ids, "attention_mask": mask, **past})
        found = dict(zip(names, found))
        kept.update((name, found[name.replace("past_key_values", "present")]) for name in shapes)
        return found["logits"]

    return step


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [BITNET, QWEN])
def test_with_a_cache_any_cut_of_a_text_gives_its_logits(tmp_path, form, config):
    arguments = config, Scheme("twn", "channel"), Policy()
    step = cached(save(decoder(*arguments), tmp_path / "out", form, cache=True).path)
    cuts = ((0, 4), (4, 5), (5, 11))
    found = np.concatenate([step(IDS[:, a:b], np.ones((3, b), np.int64)) for a, b in cuts], axis=1)
    ours = logits_of(*arguments)
    assert np.linalg.norm(found - ours) <= 1e-2 * np.linalg.norm(ours)
    assert (np.abs(found - ours).max(-1) <= 1e-5 * np.abs(ours).max()).mean() >= 0.75


def test_texts_of_different_lengths_are_filled_up_on_the_left(tmp_path):
    """Each row computes what its text does alone, whatever stands where the mask is 0."""
    model = decoder(DEEP, Scheme("twn", "channel"), Policy())
    step = cached(save(model, tmp_path / "out", cache=True).path)
    longest = max(map(len, TEXTS))
    mask = np.array([[0] * (longest - len(text)) + [1] * len(text) for text in TEXTS])
    rows = np.array([[7] * (longest - len(text)) + text for text in TEXTS])
    logits = [step(rows, mask)]
    for _ in range(6):
        mask = np.pad(mask, [(0, 0), (0, 1)], constant_values=1)
        logits.append(step(logits[-1][:, -1:].argmax(-1), mask))
    found = np.concatenate([x[:, -1:].argmax(-1) for x in logits], axis=1)
    for text, row in zip(TEXTS, found):
        ours = generate(model.model, model.params, jnp.asarray([text]), 7)
        np.testing.assert_array_equal(row, ours[0, len(text) :])


needs_genai = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="there are no wheels"
)


def continued(path, prompts):
    """Prompts with up to 8 tokens more, the likeliest, by onnxruntime-genai's own loop."""
    import onnxruntime_genai as genai

    loaded = genai.Model(path)
    options = genai.GeneratorParams(loaded)
    most = prompts.shape[1] + 8
    options.set_search_options(max_length=most, batch_size=len(prompts), do_sample=False)
    generator = genai.Generator(loaded, options)
    generator.append_tokens(prompts.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(i)] for i in range(len(prompts))]


@needs_genai
@pytest.mark.parametrize("config", [DEEP, BITNET, QWEN])
def test_onnxruntime_genai_generates_from_the_folder(tmp_path, config):
    import onnxruntime_genai as genai

    model, path = decoder(config, Scheme("twn", "channel"), Policy()), str(tmp_path / "out")
    save_model(tmp_path / "model", model)
    export = ["export", str(tmp_path / "model"), "--to", "onnx", "--cache", "--out", path]
    assert cli.main(export) == 0
    assert (
        continued(path, IDS[:2, :5])
        == generate(model.model, model.params, jnp.asarray(IDS[:2, :5]), 8).tolist()
    )
    tokenizer = genai.Tokenizer(genai.Model(path))
    assert tokenizer.encode("def f(x)").tolist() == TOKENIZER.encode("def f(x)").ids


@needs_genai
def test_a_text_ends_where_the_model_says_and_nowhere_else(tmp_path):
    model = decoder(DEEP, Scheme("twn", "channel"), Policy())
    ours = np.asarray(generate(model.model, model.params, jnp.asarray(IDS[:1, :5]), 8))[0].tolist()
    for end, length in ((None, 13), (ours[7], 5 + ours[5:].index(ours[7]))):
        ids = {} if end is None else {"eos_token_id": end}
        files = {"generation_config.json": json.dumps(ids).encode()}
        path = save(dataclasses.replace(model, files=files), tmp_path / f"{end}", cache=True).path
        assert continued(str(path), IDS[:1, :5]) == [ours[:length]]
        told = json.loads((path / "genai_config.json").read_text())["model"]
        assert told.get("eos_token_id") == end  # 0, say, would be a word


# Bits a weight: of a code, an eighth more of it for the free places of blocks, and an eighth of a
# bit for scales. What is the same for all layers of a shape, and the nodes, is 80 kB at most.
@pytest.mark.parametrize(
    "form, bits", [("2bit", 2.375), ("4bit", 4.625), ("int8", 8.125), ("qdq", 8.125)]
)
def test_the_file_is_small(tmp_path, form, bits):
    config = DecoderConfig(VOCAB, width=256, layers=1, heads=4, kv_heads=2, hidden=1024)
    model = decoder(config, Scheme("twn", "channel"), Policy())
    report = save(model, tmp_path / "out", form)
    tree = model.params["params"]
    weights = sum(leaf.codes.size for leaf in codes_of(report.path).values())
    file = (report.path / "model.onnx").stat().st_size
    other = tree["embed"]["embedding"].nbytes + 2 * 3 * 256
    assert weights * int(bits) / 8 < file - other <= weights * bits / 8 + 80_000
    assert report.bytes == sum(path.stat().st_size for path in report.path.iterdir())


def test_the_folder_and_its_report(tmp_path):
    model = decoder(LLAMA, Scheme("twn", 32), Policy())
    model = dataclasses.replace(model, files={"generation_config.json": b"{}"})
    report = save(model, tmp_path / "out")
    assert (report.target, report.path) == ("onnx", tmp_path / "out")
    assert "2 bits" in report.form and "4bit is faster" in report.notes[0]
    names = sorted(path.name for path in report.path.iterdir())
    assert names == [
        "generation_config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (report.path / "tokenizer.json").read_text() == TOKENIZER.to_str()
    half = dataclasses.replace(model, config=dataclasses.replace(LLAMA, dtype="bfloat16"))
    assert "bfloat16" in save(half, tmp_path / "half", "int8").notes[0]


def test_weights_beside_the_graph(tmp_path):
    model = decoder(LLAMA, Scheme("twn", "channel"), Policy())
    report = save(model, tmp_path / "out", external_above=10_000)
    assert (report.path / "model.onnx.data").stat().st_size > report.bytes / 3
    assert_ours(report.path, LLAMA, Scheme("twn", "channel"), Policy())
    assert_same_leaves(codes_of(report.path), model.params)
    graph = onnx.load_model(report.path / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../stolen" if entry.key == "location" else entry.value
    (report.path / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(BitnetError, match="stolen"):
        codes_of(report.path)


SIZES = st.integers(1, 300)
KINDS = st.sampled_from([(Ternary, 1), (Int8, 127), (Int4, 7)])
GROUPS = st.sampled_from([0, 16, 32, 48, 64, 128])


@given(SIZES, st.integers(1, 40), KINDS, GROUPS, st.booleans(), st.sampled_from(FORMS))
@settings(max_examples=60)
def test_products_of_any_shape_are_exact(size, out, kind, group, wide, form):
    """One product in onnxruntime beside integer sums in NumPy's float64."""
    rng, (leaf, most) = np.random.default_rng(size + out), kind
    codes = rng.integers(-most, most + 1, (size, out)).astype(np.int8)
    scale = rng.uniform(0.1, 2, (-(-size // group) if group else 1, out if wide else 1))
    leaf = leaf(codes, np.float32(scale), group)
    x = rng.standard_normal((1, 3, size)).astype(np.float32)
    found = product(form, leaf, x)
    largest = np.abs(x).max(-1, keepdims=True)
    q = np.round(x * (np.float32(127) / largest)).astype(np.float64)
    token = (largest / np.float32(127)).astype(np.float64)
    values = codes * leaf.scale.astype(np.float64)[np.arange(size) // (group or size)]
    most = (np.abs(q) @ np.abs(values) * token).max()
    np.testing.assert_allclose(found, q @ values * token, rtol=2e-6, atol=2e-6 * most)


def product(form, leaf, x):
    """x times a leaf, computed by onnxruntime in a graph of this product alone."""
    g = Graph()
    y = PRODUCTS[form](g, "x", "kernel", leaf)
    shape = lambda size: ("batch", "length", size)
    made = Value(shape(leaf.codes.shape[1]), made=y)
    model = g.model({"x": Value(shape(x.shape[-1]))}, {"y": made}, {})
    cpu = ["CPUExecutionProvider"]
    loaded = onnxruntime.InferenceSession(model.SerializeToString(), providers=cpu)
    return loaded.run(None, {"x": x})[0]


@given(SIZES, st.integers(1, 20), st.sampled_from([2, 4, 8]), st.integers(0, 9))
def test_blocks_come_back(size, out, bits, seed):
    most = {2: 1, 4: 7, 8: 127}[bits]
    codes = np.random.default_rng(seed).integers(-most, most + 1, (size, out)).astype(np.int8)
    for blocks in (exact_blocks(size, bits), Blocks(size, bits, 16, 16)):
        packed = pack_blocks(codes, blocks)
        assert packed.shape == (out, blocks.count, blocks.size * bits // 8)
        np.testing.assert_array_equal(unpack_blocks(packed, blocks), codes)


def test_what_cannot_be_exported_is_said(tmp_path):
    model = decoder(LLAMA, Scheme("twn", 20), Policy())
    with pytest.raises(BitnetError, match="groups of 20 .* form='int8'"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    save(model, tmp_path / "out", "int8")
    with pytest.raises(BitnetError, match="exists already"):
        save(model, tmp_path / "out", "int8")
    with pytest.raises(BitnetError, match="2bit, 4bit, int8, qdq"):
        save(model, tmp_path / "other", "3bit")
    for config in (PythonModule("net.py:Net"), Phase3Config(vocab_size=8)):
        with pytest.raises(BitnetError, match="only a decoder"):
            save(dataclasses.replace(model, config=config), tmp_path / "other")
    bare = {"params": {k: v for k, v in model.params["params"].items() if k != "norm"}}
    with pytest.raises(BitnetError, match="norm/scale"):
        save(dataclasses.replace(model, params=bare), tmp_path / "other", "int8")


def damaged(path, change):
    """The file with its description changed by a function of plain data."""
    model = onnx.load_model(path)
    about = json.loads(model.metadata_props[0].value)
    change(about)
    model.metadata_props[0].value = json.dumps(about)
    return model.SerializeToString()


def test_damaged_and_foreign_files_are_told(tmp_path):
    file = save(decoder(LLAMA, Scheme("twn", 32), Policy()), tmp_path / "out").path / "model.onnx"
    whole, name = file.read_bytes(), "layer_0/mlp/up/kernel"

    def expect(content, match):
        file.write_bytes(content)
        with pytest.raises(BitnetError, match=match) as caught:
            codes_of(file)
        assert "\n" not in str(caught.value)

    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        expect(whole[:length], "damaged|not written by")
    expect(b"\x89PNG" * 100, "damaged|not written by")
    at = whole.rindex(f"{name}/codes".encode())  # nodes, which name it too, come first
    flipped = bytearray(whole)
    codes = np.asarray(codes_of_bytes(file, whole)[name].codes)
    start = whole.index(pack_blocks(codes, Blocks(64, 2, 32, 32)).tobytes())
    flipped[start] ^= 4
    expect(bytes(flipped), f"{name} is not what was written")
    expect(whole[:at] + b"X" + whole[at + 1 :], f"{name} cannot be read")
    leaf = lambda about: about["leaves"][name]
    for change in (
        lambda about: leaf(about).update(shape=[10**9, 10**9]),
        lambda about: leaf(about).update(scale=[10**12, 1]),
        lambda about: leaf(about).update(shape="no"),
        lambda about: leaf(about)["blocks"].update(held=0),
        lambda about: leaf(about)["blocks"].update(bits=0),
        lambda about: leaf(about)["blocks"].update(size=10**9),
        lambda about: leaf(about).update(kind="Float"),
        lambda about: about["leaves"].update({name: 3}),
    ):
        file.write_bytes(whole)
        expect(damaged(file, change), f"{name} cannot be read")
    file.write_bytes(whole)
    expect(damaged(file, lambda about: about.update(leaves=1)), "description")
    file.write_bytes(whole)
    expect(damaged(file, lambda about: about.update(version=2)), "version 2")
    foreign = onnx.load_model_from_string(whole)
    del foreign.metadata_props[:]
    expect(foreign.SerializeToString(), "not written by bitnet-jax")
    with pytest.raises(BitnetError, match="no such file"):
        codes_of(tmp_path / "nowhere")


def codes_of_bytes(file, content):
    file.write_bytes(content)
    return codes_of(file)
