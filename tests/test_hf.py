"""Hugging Face folders without transformers: layouts, names, identity, hostile files, the command.

tests/test_hf_live.py has transformers itself beside them.
"""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

from bitnet_jax import BitnetError, Scheme, cli, quantize_weights
from bitnet_jax.convert import dequantise
from bitnet_jax.interop import foreign, hf
from bitnet_jax.interop.hf.config import parse
from bitnet_jax.interop.hf.layout import bytes_from_hf, bytes_of, bytes_to_hf, exact_ternary
from bitnet_jax.interop.hf.names import slots
from bitnet_jax.interop.hf.weights import latent_of
from bitnet_jax.leaf import PackedTernary, is_quantized
from bitnet_jax.models.decoder import DecoderConfig
from bitnet_jax.models.folder import ModelFolder, load_model, save_model
from bitnet_jax.packed import pack_codes, pack_weight
from bitnet_jax.train.text import byte_tokenizer

CONFIG = DecoderConfig(260, 16, 2, 4, 2, 24, 64)


def packed_at_random(rng, size, out, scale):
    """A packed leaf, made without compiling anything; no scale stands for zeros alone."""
    codes, group = rng.integers(-1, 2, (size, out)).astype(np.int8), scale
    if isinstance(scale, str):
        group = 0
    codes[:: group or size] = 1
    groups = {"tensor": 1, "channel": 1}.get(scale) or -(-size // group)
    scales = rng.uniform(0.1, 2, (groups, 1 if scale == "tensor" else out)).astype(np.float32)
    return PackedTernary(jnp.array(bytes_of(codes)), jnp.array(scales), size, group)


def model(config=CONFIG, scheme=None, packed=True, seed=0, dtype=np.float32):
    """Random weights, ternary by the scheme."""
    rng, tree = np.random.default_rng(seed), {}
    for slot in slots(config):
        shape = slot.shape[::-1] if slot.leaf == "kernel" else slot.shape
        node = {slot.leaf: jnp.array(rng.normal(size=shape).astype(dtype).astype(np.float32))}
        if slot.kind == "projection" and scheme is not None and packed:
            integer = scheme.rule.startswith("int")
            node[slot.leaf] = (
                pack_weight(quantize_weights(node[slot.leaf], scheme)) if integer
                else packed_at_random(rng, *shape, scheme.scale)
            )  # fmt: skip
        if slot.bias:
            node["bias"] = jnp.array(rng.normal(size=slot.shape[:1]), jnp.float32)
        place = tree
        for key in slot.path:
            place = place.setdefault(key, {})
        place.update(node)
    return ModelFolder(config, scheme, {"params": tree}, byte_tokenizer())


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(assert_array_equal, a, b)


def folder_of(tmp_path, **more):
    hf.save(model(**more), tmp_path / "m")
    return tmp_path / "m"


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
    return folder


def refused(folder, match):
    with pytest.raises(BitnetError, match=match) as error:
        hf.load(folder)
    assert "\n" not in str(error.value)


# Layouts


@st.composite
def codes(draw, rows=st.integers(1, 7), size=st.integers(1, 18), by=4):
    shape = (by * draw(rows), draw(size))
    return np.random.default_rng(draw(st.integers(0, 99))).integers(-1, 2, shape).astype(np.int8)


@given(codes())
def test_bits_are_moved_between_the_layouts(c):
    rows = len(c) // 4
    theirs = sum((c[i * rows : (i + 1) * rows] + 1).astype(np.uint8) << (2 * i) for i in range(4))
    ours = bytes_of(c.T)
    assert_array_equal(bytes_from_hf(theirs), ours)
    assert_array_equal(bytes_to_hf(ours, c.shape[1]), theirs)


def test_bytes_are_those_of_the_packed_leaves():
    for size in (1, 4, 6, 11):
        c = np.random.default_rng(size).integers(-1, 2, (size, 8)).astype(np.int8)
        assert_array_equal(bytes_of(c), pack_codes(jnp.array(c)))


def test_two_bits_that_are_no_code():
    for byte in (3, 12, 48, 192, 255):
        with pytest.raises(BitnetError, match="no code"):
            bytes_from_hf(np.full((1, 3), byte, np.uint8))


@given(codes(by=1), st.sampled_from([0, 3, 4]), st.integers(0, 99), st.booleans())
def test_codes_and_scale_out_of_their_product(c, group, seed, tensor):
    c[c.sum(1) == 0, 0] = 1
    groups = -(-c.shape[0] // group) if group else 1
    shape = (1, 1) if tensor else (groups, c.shape[1])
    scale = np.random.default_rng(seed).uniform(0.1, 2, shape).astype(np.float32)
    times = lambda c, s, group: c * np.repeat(s, group or len(c), axis=0)[: len(c)]
    values = times(c, scale, 0 if tensor else group)
    found, scales = exact_ternary(values, group)
    assert_array_equal(found, c)
    assert_array_equal(times(found, scales, group if len(scales) > 1 else 0), values)


def test_values_that_are_no_product():
    assert exact_ternary(np.float32([[1, 2], [0.5, 2]])) is None
    assert exact_ternary(np.float32([[1], [1], [2], [3]]), 2) is None
    assert exact_ternary(np.zeros((2, 2), np.float32))[1].tolist() == [[0]]


@given(st.integers(0, 99), st.floats(0, 1), st.floats(1e-3, 10))
def test_latent_weights_for_codes(seed, density, scale):
    rng = np.random.default_rng(seed)
    c = (rng.choice([-1, 1], (12, 8)) * (rng.random((12, 8)) < density)).astype(np.int8)
    found = quantize_weights(jnp.array(latent_of(c, scale)))
    if c.any():
        assert_array_equal(found.codes, c)
        np.testing.assert_allclose(found.scale, scale, rtol=96 * 6e-8)  # a sum in float32


# There and back


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"sub_norms": True, "activation": "relu2", "tied": False},
        {"qkv_bias": True, "rope_base": 1e6},
        {"qk_norm": True, "head_size": 6, "rope_scaling": (8.0, 1.0, 4.0, 32.0)},
        {"qk_norm": True, "qkv_bias": True},
    ],
)
@pytest.mark.parametrize("scheme", [None, Scheme(), Scheme("twn", "channel"), Scheme("twn", 8)])
def test_import_of_export_is_the_identity(tmp_path, more, scheme):
    before = model(dataclasses.replace(CONFIG, **more), scheme)
    report = hf.save(before, tmp_path / "out", shard_bytes=3000)
    assert report.bytes == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert len({f.stat().st_mode for f in (tmp_path / "out").iterdir()}) == 1
    after = hf.load(tmp_path / "out")
    assert after.config == before.config
    assert (after.scheme is None) == (scheme is None)
    if scheme == Scheme() and before.config.qkv_bias:  # a bias divided by the scale and multiplied
        bias = lambda m: m.params["params"]["layer_0"]["attention"]["query"]["bias"]
        np.testing.assert_allclose(bias(after), bias(before), rtol=2e-7)
        return
    same(after.params, before.params)


@settings(max_examples=25)
@given(
    st.tuples(*(st.integers(1, 5),) * 4),
    st.sampled_from(["tensor", "channel", 4, 12]),
    st.sampled_from(["absmean", "twn"]),
)
def test_identity_over_shapes(tmp_path_factory, sizes, scale, rule):
    heads, width, hidden, keys = sizes
    keys = heads if heads % keys else keys
    config = DecoderConfig(260, 2 * width, 1, heads, keys, hidden, 8, head_size=2)
    if 2 * heads == 2 * width:
        config = dataclasses.replace(config, head_size=0)
    before = model(config, Scheme(rule, scale))
    out = tmp_path_factory.mktemp("shapes") / "out"
    hf.save(before, out)
    after = hf.load(out)
    assert after.config == config
    pairs = zip(
        jax.tree.leaves(before.params, is_leaf=is_quantized),
        jax.tree.leaves(after.params, is_leaf=is_quantized),
    )
    for a, b in pairs:
        assert is_quantized(a) == is_quantized(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
            assert_array_equal(x, y)


def test_float_models_in_bfloat16_stay_as_small(tmp_path):
    half = model(dtype=jnp.bfloat16)
    assert "bfloat16" in hf.save(half, tmp_path / "half").form
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {np.dtype(jnp.bfloat16)}
    same(hf.load(tmp_path / "half").params, half.params)
    assert "float32" in hf.save(model(), tmp_path / "whole").form
    rounded = hf.save(model(scheme=Scheme()), tmp_path / "rounded", dtype="bfloat16")
    assert "tensors rounded" in " ".join(rounded.notes)


def test_what_is_larger_says_why(tmp_path):
    packed = hf.save(model(scheme=Scheme()), tmp_path / "packed")
    assert "14 of 14 matrices packed" in packed.form
    finer = hf.save(model(scheme=Scheme("twn", "channel")), tmp_path / "finer")
    assert "0 of 14" in finer.form and finer.bytes > packed.bytes
    assert "--scale tensor" in " ".join(finer.notes)
    odd = model(dataclasses.replace(CONFIG, hidden=26), Scheme())
    told = hf.save(odd, tmp_path / "odd")
    assert "10 of 14" in told.form and "no multiple of 4" in " ".join(told.notes)
    same(hf.load(tmp_path / "odd").params, odd.params)
    hf.save(model(scheme=Scheme("int8", "channel")), tmp_path / "int8")
    refused(tmp_path / "int8", "only ternary ones are read")


def test_a_mixed_model_keeps_its_float_layers(tmp_path):
    whole, kept = model(scheme=Scheme()), "layer_1"
    params = whole.params["params"]
    mixed = {**params, kept: dequantise(params[kept])}
    before = dataclasses.replace(whole, scheme=None, params={"params": mixed})
    assert "7 of 14" in hf.save(before, tmp_path / "out").form
    after = hf.load(tmp_path / "out")
    assert after.scheme is None
    same(after.params, before.params)


# Scales never shrink


@pytest.mark.parametrize("scale", ["tensor", "channel", 8])
def test_a_dequantised_model_keeps_its_scales(tmp_path, scale):
    packed = model(scheme=Scheme("absmean", scale))
    values = dataclasses.replace(packed, params=dequantise(packed.params))
    told = hf.save(values, tmp_path / "out")
    assert "would shrink" in " ".join(told.notes)
    same(hf.load(tmp_path / "out").params, packed.params)
    # as a float model it is one
    hf.save(dataclasses.replace(values, scheme=None), tmp_path / "float")
    same(hf.load(tmp_path / "float").params, values.params)


def test_exporting_again_and_again_changes_nothing(tmp_path):
    packed, found = model(scheme=Scheme()), model(scheme=Scheme())
    for i in range(3):
        hf.save(found, tmp_path / f"latent{i}", latent=True)
        latent = hf.load(tmp_path / f"latent{i}")
        assert latent.scheme == Scheme()
        hf.save(latent, tmp_path / f"packed{i}")
        found = hf.load(tmp_path / f"packed{i}")
    for a, b in zip(
        jax.tree.leaves(packed.params, is_leaf=is_quantized),
        jax.tree.leaves(found.params, is_leaf=is_quantized),
    ):
        if is_quantized(a):
            assert_array_equal(a.codes, b.codes)
            np.testing.assert_allclose(a.scale, b.scale, rtol=1e-6)


def test_latent_weights(tmp_path):
    latent = model(scheme=Scheme(), packed=False)
    assert "online" in hf.save(latent, tmp_path / "online", latent=True).form
    back = hf.load(tmp_path / "online")
    assert back.scheme == Scheme()
    same(back.params, latent.params)
    told = hf.save(latent, tmp_path / "offline")
    assert "--latent" in " ".join(told.notes)
    packed = hf.load(tmp_path / "offline")
    wanted = pack_weight(
        quantize_weights(latent.params["params"]["layer_0"]["mlp"]["up"]["kernel"])
    )
    same(packed.params["params"]["layer_0"]["mlp"]["up"]["kernel"], wanted)
    for wrong in (model(), model(scheme=Scheme("twn", "channel")), model(None or CONFIG)):
        with pytest.raises(BitnetError, match="latent"):
            hf.save(wrong, tmp_path / "no", latent=True)
    with pytest.raises(BitnetError, match="one scale a matrix"):
        hf.save(model(scheme=Scheme("twn", "tensor"), packed=False), tmp_path / "no", latent=True)
    assert not (tmp_path / "no").exists()


# What others wrote


def test_bitlinear_stores_the_reciprocal(tmp_path):
    packed = model(scheme=Scheme())
    folder = folder_of(tmp_path, scheme=Scheme())
    file = folder / "model.safetensors"
    state = load_file(file)
    flipped = {k: 1 / x if k.endswith("weight_scale") else x for k, x in state.items()}
    save_file(flipped, file)
    config = json.loads((folder / "config.json").read_text())
    for quantised in (
        {"quant_method": "bitnet"},
        {"quant_method": "bitnet", "linear_class": "bitlinear"},
    ):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
        found = hf.load(folder).params["params"]["layer_1"]["attention"]["out"]["kernel"]
        ours = packed.params["params"]["layer_1"]["attention"]["out"]["kernel"]
        assert isinstance(found, PackedTernary)
        assert_array_equal(found.codes, ours.codes)
        np.testing.assert_allclose(found.scale, ours.scale, rtol=2e-7)


def test_the_old_names(tmp_path):
    config = dataclasses.replace(CONFIG, sub_norms=True)
    latent = model(config, Scheme(), packed=False)
    hf.save(latent, tmp_path / "m", latent=True)
    file = tmp_path / "m" / "model.safetensors"
    rename = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
    state = load_file(file)
    for new, old in rename.items():
        state = {k.replace(new, old): x for k, x in state.items()}
    save_file(state | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)}, file)
    old = {"model_type": "llama", "architectures": ["BitnetForCausalLM"], "weight_bits": 1}
    edit(tmp_path / "m", **old, input_bits=8, quantization_config="gone")
    found = hf.load(tmp_path / "m")
    assert (found.config, found.scheme) == (config, Scheme())
    same(found.params, latent.params)
    refused(edit(tmp_path / "m", input_bits=4), "input_bits")


BASE = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 8,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0}
HEADS = {"num_key_value_heads": 3}
BITNET = {"quant_method": "bitnet"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not read; known: llama"),
        ({"model_type": None}, "no config of a transformers model"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": -8}, "hidden_size -8"),
        ({"num_attention_heads": True}, "num_attention_heads True"),
        (HEADS, "kv_heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": YARN}, "rope_type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
        (
            {"rope_parameters": {"full": {"rope_theta": 1.0}}},
            "one kind of positions for all layers",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window 16"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4}, "window 4"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_local_experts": 8}, "mixtures of experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq' is not read"),
        ({"quantization_config": [1]}, "is not read"),
        ({"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}}, "use_rms_norm"),
        ({"quantization_config": {"quant_method": "bitnet", "linear_class": "x"}}, "'x'"),
        ({"quantization_config": BITNET | {"modules_to_not_convert": ["a"]}}, "lacks lm_head"),
        ({"quantization_config": BITNET | {"modules_to_not_convert": ["(a+)+"]}}, "patterns"),
    ],
)
def test_what_a_config_asks_for_and_we_lack(tmp_path, changes, message):
    with pytest.raises(BitnetError, match=message) as error:
        parse(BASE | changes, tmp_path / "config.json")
    assert "config.json: " in str(error.value) and "\n" not in str(error.value)


def test_configs_of_two_generations():
    old, _ = parse(BASE | {"rope_theta": 5.0}, None)
    new, _ = parse(BASE | {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, None)
    assert old == new and old.rope_base == 5.0
    assert parse(BASE | {"model_type": "bitnet"}, None)[0].sub_norms
    assert parse(BASE | {"model_type": "qwen2"}, None)[0].qkv_bias
    wide, _ = parse(BASE | {"model_type": "mistral", "sliding_window": 99999}, None)
    assert wide.max_length == 32768


def test_tensors_that_do_not_fit(tmp_path):
    folder = folder_of(tmp_path)
    file = folder / "model.safetensors"
    state = load_file(file)
    norm = "model.norm.weight"
    for change, message in (
        ({"model.layers.0.mlp.up_proj.norm.weight": np.ones(2)}, "no place"),
        ({"model.layers.0.self_attn.o_proj.bias": np.ones(16)}, "no place"),
        ({norm: np.ones(3)}, r"shape \(3,\), the config asks for \(16,\)"),
        ({norm: np.ones(16, np.int8)}, "int8, expected float"),
    ):
        save_file(state | change, file)
        refused(folder, message)
    save_file({k: x for k, x in state.items() if k != norm}, file)
    refused(folder, "model.norm.weight is missing")
    save_file(state | {"model.layers.0.self_attn.o_proj.bias": np.zeros(16)}, file)
    hf.load(folder)  # a bias of zeros is none
    refused(edit(folder, vocab_size=10**15), "the config asks for")
    refused(edit(folder, vocab_size=260, num_hidden_layers=10**12), "layers.2.* is missing")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("weight_scale", np.float32([np.nan]), "nan is no scale"),
        ("weight_scale", np.ones(2, np.float32), "shape"),
        ("weight", np.full((4, 16), 255, np.uint8), "no code"),
        ("weight", np.ones((16, 16), np.int8), "int8, expected float"),
        ("weight", np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16), "only ternary"),
    ],
)
def test_packed_tensors_that_do_not_fit(tmp_path, name, value, message):
    folder = folder_of(tmp_path, scheme=Scheme())
    state = load_file(folder / "model.safetensors")
    state[f"model.layers.1.self_attn.q_proj.{name}"] = value
    save_file(state, folder / "model.safetensors")
    refused(folder, message)


# Hostile files


def raw(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def entry(name="a", start=0, end=4, shape="[1]", dtype="F32"):
    fields = f'"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]'
    return f'"{name}":{{{fields}}}'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        raw(b"{}", size=2**62),
        raw(b"{}", size=2**33),
        raw(b"[" * 100_000),
        raw(f"{{{entry()}}}".encode()),
        raw(f"{{{entry(end=8)}}}".encode(), bytes(8)),
        raw(f"{{{entry(start=4, end=8)}}}".encode(), bytes(8)),
        raw(f"{{{entry(start=-4)}}}".encode(), bytes(4)),
        raw(f"{{{entry(shape=f'[{2**62},4]')}}}".encode(), bytes(4)),
        raw(f"{{{entry()},{entry('b', 2, 6)}}}".encode(), bytes(6)),
        raw(f"{{{entry()},{entry()}}}".encode(), bytes(4)),
    ],
    ids=["empty", "huge", "4 GB", "deep", "no data", "too long", "hole", "negative", "product",
         "overlap", "twice"],
)  # fmt: skip
def test_hostile_headers(tmp_path, data):
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, "not safetensors, or damaged")


def test_truncated_anywhere(tmp_path):
    folder = folder_of(tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(folder, "not safetensors, or damaged")
    file.unlink()
    refused(folder, "holds no safetensors")


def test_hostile_indices(tmp_path):
    hf.save(model(), tmp_path / "m", shard_bytes=3000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    weights = good["weight_map"]
    first = next(iter(weights))
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    for shard in ("../secret.safetensors", "/etc/passwd", "a/b", "..", "..\\x", "a\0b"):
        index.write_text(json.dumps({"weight_map": weights | {first: shard}}))
        refused(tmp_path / "m", "not beside it|is missing")
    for text, message in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"weight_map": 3}', "no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' stands twice"),
        (json.dumps({"weight_map": weights | {"more": weights[first]}}), "more is in no shard"),
        (json.dumps({"weight_map": weights | {first: "gone.safetensors"}}), "gone.* is missing"),
    ):
        index.write_text(text)
        refused(tmp_path / "m", message)


def test_damaged_configs_and_tokenizers(tmp_path):
    folder = folder_of(tmp_path)
    good = (folder / "config.json").read_text()
    for text in ("", "{", "[" * 100_000, '{"a": 1, "a": 2}', "\xff"):
        (folder / "config.json").write_text(text, encoding="latin-1")
        refused(folder, "not JSON")
    (folder / "config.json").write_text(good)
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "is no tokenizer")
    (folder / "tokenizer.json").unlink()
    refused(folder, "no tokenizer.json in it")
    assert hf.load(folder, tokenizer=byte_tokenizer()).config == CONFIG
    refused(tmp_path / "nothing", "no such folder")


# Tokenizers and the command


def llama_like():
    """A tokenizer whose text begins with a special token."""
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found.add_special_tokens(["<s>", "</s>"])
    template = tokenizers.processors.TemplateProcessing
    found.post_processor = template(single="<s> $A", special_tokens=[("<s>", 0)])
    return found


def test_special_tokens_go_along(tmp_path):
    source = dataclasses.replace(model(), tokenizer=llama_like())
    hf.save(source, tmp_path / "m")
    folder = edit(tmp_path / "m", bos_token_id=0, eos_token_id=[1, 2])
    (folder / "generation_config.json").unlink()
    named = {"bos_token": {"content": "<s>"}, "chat_template": "x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    found = hf.load(folder)
    assert found.tokenizer.encode("a b").ids == [0, 2, 3]
    # through our own folder and out again
    save_model(tmp_path / "ours", found)
    kept = load_model(tmp_path / "ours")
    assert kept.files == found.files and len(kept.files) == 2
    hf.save(kept, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, [1, 2])
    read = lambda name: json.loads((tmp_path / "out" / name).read_text())
    assert read("tokenizer_config.json") == named
    assert read("generation_config.json") == {"bos_token_id": 0, "eos_token_id": [1, 2]}
    assert hf.load(tmp_path / "out").tokenizer.encode("a b").ids == [0, 2, 3]


def complaint(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("bitnet-jax: "), lines
    return lines[0]


def test_export_and_every_command_that_reads(tmp_path, capsys):
    save_model(tmp_path / "ours", model(scheme=Scheme()))
    out, told = tmp_path / "hf", tmp_path / "told.json"
    export = ["export", str(tmp_path / "ours"), "--to", "hf", "--out", str(out)]
    assert cli.main([*export, "--json", str(told)]) == 0
    assert json.loads(told.read_text())["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    assert "14 of 14 matrices packed" in capsys.readouterr().out
    assert cli.main(export) == 1
    assert "exists already" in complaint(capsys)
    assert cli.main(["inspect", str(out), "--json", str(told)]) == 0
    found = json.loads(told.read_text())
    assert found["version"] == "Hugging Face"
    assert sum(x["format"] == "ternary" for x in found["leaves"]) == 14
    assert "keeps no checksums" in capsys.readouterr().out
    assert cli.main(["generate", str(out), "--prompt", "ab", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("ab")
    assert cli.main(["compress", str(out), "--out", str(tmp_path / "again")]) == 1
    assert "ternary already" in complaint(capsys)


def test_compress_takes_a_float_folder(tmp_path):
    folder = folder_of(tmp_path)
    assert cli.main(["compress", str(folder), "--out", str(tmp_path / "small")]) == 0
    small = load_model(tmp_path / "small" / "packed")
    assert small.config == CONFIG and small.files.keys() >= {"tokenizer_config.json"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--to", "gguf", "--latent"], "--latent is for --to hf"),
        (["--to", "hf", "--form", "qdq"], "--form is for --to onnx"),
        (["--to", "gguf", "--cache"], "--cache is for --to onnx"),
        (["--to", "hf", "--latent"], "no latent weights"),
    ],
)
def test_export_says_what_is_wrong(tmp_path, capsys, arguments, message):
    save_model(tmp_path / "m", model())
    assert cli.main(["export", str(tmp_path / "m"), *arguments, "--out", str(tmp_path / "x")]) == 1
    assert message in complaint(capsys)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    def absent(*_):
        raise ImportError("No module named 'onnx'", name="onnx")

    monkeypatch.setattr(foreign.importlib, "import_module", absent)
    with pytest.raises(BitnetError, match=r"pip install 'bitnet-jax\[onnx\]'"):
        foreign.format_module("onnx")
    (tmp_path / "x.onnx").write_bytes(b"1")
    with pytest.raises(BitnetError, match="ONNX"):
        foreign.load(tmp_path / "x.onnx")
    assert foreign.kind_of(tmp_path / "x.onnx") == "onnx" and foreign.kind_of(tmp_path) is None
