"""Folders of Hugging Face's, made and read by transformers itself: needs torch and transformers.

Skipped without them, as most users test; .ci/run installs both and sets BITNET_TEST_TORCH, with
which their absence is an error.
"""

import json
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers.processors import TemplateProcessing

import bitnet_jax
from bitnet_jax import BitnetError, Scheme, convert
from bitnet_jax.interop import hf
from bitnet_jax.interop.hf.names import slots
from bitnet_jax.models.decoder import DecoderConfig
from bitnet_jax.models.folder import ModelFolder
from bitnet_jax.policy import DEFAULT_RULES, Policy
from bitnet_jax.train.text import byte_tokenizer

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # its own code, run as it is written
if os.environ.get("BITNET_TEST_TORCH"):
    import torch
    import transformers
else:
    torch = pytest.importorskip("torch", reason="torch is not installed; .ci/run has it")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own, on import
    from safetensors.torch import save_file
    from transformers.integrations.bitnet import pack_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))
SHORT = np.random.default_rng(0).integers(0, 96, (32, 6))
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 7,
    "initializer_range": 0.2,
}


def load_theirs(folder):
    """Whatever it was stored in, computed in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    ).eval()


def theirs(folder, tokens=TOKENS):
    with torch.no_grad():
        return load_theirs(folder)(torch.from_numpy(tokens)).logits.double().numpy()


def ours(model, tokens=TOKENS):
    return np.asarray(model.model.apply(model.params, jnp.asarray(tokens)), np.float64)


ROUNDING = 2e-5  # of float32 over these layers, as a share of the logits' spread


def close(a, b):
    """Equal within float32 rounding."""
    assert b.std() > 0.05, "logits that say nothing"
    np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING * b.std())


def close_but_for_ties(a, b):
    """Equal within float32 rounding in all texts but few.

    Activations are rounded to int8. One that lies on the half between two codes, within float32's
    rounding, may fall to either side in two programs that add in another order, about one of
    100,000; from there on that text differs by a code's worth. `test_every_product` has no ties.
    """
    assert b.std() > 0.05, "logits that say nothing"
    worst = np.abs(a - b).max((1, 2)) / b.std()
    assert (worst < ROUNDING).mean() >= 0.8, worst
    assert worst.max() < 0.3, worst


def float_model(name, **more):
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(name, **SMALL | more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms of ones would hide where they stand, biases of zeros themselves
        for key, p in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                p.copy_(torch.rand_like(p) + 0.5)
    return model


def with_tokenizer(folder):
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def packed_folder(folder, linear_class, mode="offline", name="bitnet", dtype=torch.float32):
    """A BitNet folder as transformers stores it, packed by its own function."""
    model, state = float_model(name, tie_word_embeddings=True), {}
    for key, w in model.state_dict().items():
        if key.endswith("_proj.weight") and mode == "offline":
            scale = 1 / w.float().abs().mean().clamp(min=1e-5)
            state[key] = pack_weights((w * scale).round().clamp(-1, 1))
            stored = scale if linear_class == "bitlinear" else 1 / scale
            state[key + "_scale"] = stored.reshape(1).to(dtype)
        elif key != "lm_head.weight":
            state[key] = w
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {
        "quantization_config": {
            "quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode,
        }
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return with_tokenizer(folder)


BITNETS = [("bitlinear", "offline"), ("autobitlinear", "offline"), ("autobitlinear", "online")]


@pytest.mark.parametrize("linear_class, mode", BITNETS)
@pytest.mark.parametrize("name", ["bitnet", "llama", "qwen2"])
def test_bitnets_of_transformers(tmp_path, linear_class, mode, name):
    folder = packed_folder(tmp_path / "in", linear_class, mode, name)
    expected = theirs(folder, SHORT)
    model = hf.load(folder)
    close_but_for_ties(ours(model, SHORT), expected)
    # and back: the same logits there, the same bytes in the file
    report = hf.save(model, tmp_path / "out", latent=mode == "online")
    assert f"autobitlinear {mode}" in report.form
    close_but_for_ties(theirs(tmp_path / "out", SHORT), expected)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key, x in before.items():
        if key.endswith("_scale") and linear_class == "bitlinear":
            np.testing.assert_allclose(after[key], 1 / x, rtol=1e-7)
        elif key.endswith("bias") and mode == "offline":  # theirs is multiplied by the scale
            scale = 1 if linear_class == "autobitlinear" else after[key[:-4] + "weight_scale"]
            np.testing.assert_allclose(after[key] * scale, x, rtol=3e-7)
        else:
            np.testing.assert_array_equal(after[key], x, err_msg=key)


@pytest.mark.parametrize("linear_class, mode", BITNETS)
def test_every_product(tmp_path, linear_class, mode):
    """Each projection alone, on what it is given inside transformers: the same int8 codes."""
    folder = packed_folder(tmp_path / "in", linear_class, mode)
    model, there, seen = hf.load(folder), load_theirs(folder), {}
    for name, module in there.named_modules():
        if name.endswith("_proj"):
            keep = lambda _, given, result, name=name: seen.update({name: (given[0], result)})
            module.register_forward_hook(keep)
    with torch.no_grad():
        there(torch.from_numpy(TOKENS))
    projections = [s for s in slots(model.config) if s.kind == "projection"]
    assert len(seen) == len(projections) == 14
    for slot in projections:
        given, result = (x.numpy() for x in seen[slot.module])
        layer = bitnet_jax.BitDense(slot.shape[0], use_bias=False, scheme=model.scheme)
        kernel = model.params["params"][slot.path[0]][slot.path[1]][slot.path[2]]
        close(np.asarray(layer.apply({"params": kernel}, given)), result)


FLOATS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 24}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            },
            "attention_bias": False,
        },
    ),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen3", {"head_dim": 16}),
    ("bitnet", {"tie_word_embeddings": True}),
]  # fmt: skip


@pytest.mark.parametrize("name, more", FLOATS, ids=[f"{n}{i}" for i, (n, _) in enumerate(FLOATS)])
def test_float_models(tmp_path, name, more):
    dtype = "bfloat16" if name in ("qwen2", "bitnet") else "float32"
    there = float_model(name, **more)
    there.to(getattr(torch, dtype)).save_pretrained(tmp_path / "in", max_shard_size="80KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    with_tokenizer(tmp_path / "in")
    model = hf.load(tmp_path / "in")
    expected = theirs(tmp_path / "in")
    close(ours(model), expected)
    report = hf.save(model, tmp_path / "out", shard_bytes=100_000)
    assert report.form.startswith(f"float weights in {dtype}") and not report.notes
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    close(theirs(tmp_path / "out"), expected)
    again = hf.load(tmp_path / "out")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def decoder(scheme, **more):
    """A model of our own with weights that say something."""
    config = DecoderConfig(96, 64, 2, 4, 2, 96, 64, **more)
    params = config.build(None).init(jax.random.key(0), jnp.asarray(TOKENS))
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)
    # Tables of float16 have values whose int8 codes are ties.
    policy = Policy(tuple((p, f if f == "ternary" else "float32") for p, f in DEFAULT_RULES))
    packed = params if scheme is None else convert(params, policy, scheme).tree
    return ModelFolder(config, scheme, packed, byte_tokenizer())


@pytest.mark.parametrize(
    "scheme, more",
    [
        (Scheme(), {}),
        (Scheme(), {"sub_norms": True, "activation": "relu2"}),
        (Scheme("twn", "tensor"), {"sub_norms": True, "qkv_bias": True, "tied": False}),
        (Scheme("absmean", "channel"), {"qk_norm": True, "qkv_bias": True}),
        (Scheme("twn", 16), {"qkv_bias": True}),
        (Scheme("sherry", "channel"), {"activation": "relu2"}),
        (Scheme("int8", "channel"), {}),
        (Scheme("int4", 32), {}),
    ],
)
def test_models_of_our_own(tmp_path, scheme, more):
    model = decoder(scheme, **more)
    report = hf.save(model, tmp_path / "out")
    packs = scheme.scale == "tensor"
    assert f"{14 if packs else 0} of 14" in report.form
    assert any("larger" in n or "unpacked" in n for n in report.notes) != packs
    close_but_for_ties(theirs(tmp_path / "out", SHORT), ours(model, SHORT))
    if scheme.rule in ("int8", "int4"):
        with pytest.raises(BitnetError, match="only ternary ones are read"):
            hf.load(tmp_path / "out")
        return
    again = hf.load(tmp_path / "out")
    assert again.config == model.config
    close_but_for_ties(ours(again, SHORT), ours(model, SHORT))


def test_codes_become_latent_weights_that_are_quantised_to_them(tmp_path):
    model = decoder(Scheme())
    assert "made of codes" in " ".join(hf.save(model, tmp_path / "out", latent=True).notes)
    close_but_for_ties(theirs(tmp_path / "out", SHORT), ours(model, SHORT))
    there = load_theirs(tmp_path / "out").train()
    tokens = torch.from_numpy(TOKENS)
    there(tokens, labels=tokens).loss.backward()  # trains on
    grads = [p.grad for n, p in there.named_parameters() if n.endswith("q_proj.weight")]
    assert len(grads) == 2 and all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("begin", [False, True])
def test_the_tokenizer_is_read_there(tmp_path, begin):
    model, text = decoder(None), "Once upon a time\n"
    if begin:
        model.tokenizer.add_special_tokens(["<s>"])
        first = ("<s>", model.tokenizer.token_to_id("<s>"))
        template = TemplateProcessing(single="<s> $A", special_tokens=[first])
        model.tokenizer.post_processor = template
    hf.save(model, tmp_path / "out")
    config = tmp_path / "out" / "tokenizer_config.json"
    # with a tokenizer.json this says nothing, there as here
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_bos_token": not begin}))
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = hf.load(tmp_path / "out").tokenizer.encode(text).ids
    assert there(text)["input_ids"] == ours == model.tokenizer.encode(text).ids
    assert len(ours) == len(text) + begin
    assert there.decode(ours, skip_special_tokens=True) == text
