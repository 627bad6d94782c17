"""Text to batches of tokens: the embedded corpus, the tokenizer, the order of an epoch."""

import dataclasses
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers

from ..errors import BitnetError

END = "<|end|>"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text in two parts that share no file.

    Attributes:
      train, held_out: lists of documents.
      name: what the text is, for the report.
    """

    train: list[str]
    held_out: list[str]
    name: str


def standard_library(megabytes: float = 6.0) -> Corpus:
    """The Python standard library's own source on this disk: real text, on every machine.

    Files are taken in an order that depends on nothing but their names, each different text once;
    every tenth is held out.
    Its tests, vendored packages and code page tables are left out.

    Args:
      megabytes: stop after about so much text (1 MB = 10**6 bytes).

    Raises:
      BitnetError: if this Python comes without its library's source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    # Tests, vendored packages and idle; encodings is tables of code points, not text.
    skip = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings"}
    # Sorted by the reversed name, so that the files of one package are spread over the order.
    files = sorted(
        (p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)),
        key=lambda p: p.relative_to(root).as_posix()[::-1],
    )
    # A dict keeps each text once: the library holds identical files, and one of a pair may not
    # teach what the other one tests.
    unique: dict[str, None] = {}
    size = 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if text and text not in unique:
            unique[text] = None
            size += len(text)
        if size > megabytes * 1e6:
            break
    documents = list(unique)
    if size < 100_000:
        raise BitnetError(f"{root}: holds too little Python source; give a text of your own")
    held_out = documents[::10]
    train = [d for i, d in enumerate(documents) if i % 10]
    return Corpus(train, held_out, "the Python standard library's source")


def train_tokenizer(documents: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE with ``vocab_size`` tokens, trained on the documents.

    Any text can be encoded, and decoding gives it back exactly. Token 0 ends a document.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as one int32 array of tokens, each ended by the end token."""
    # The tokenizer's own threads would otherwise warn when the process forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    end = tokenizer.token_to_id(END)
    ids = [x.ids + ([] if end is None else [end]) for x in tokenizer.encode_batch(documents)]
    return np.concatenate([np.asarray(x, np.int32) for x in ids]) if ids else np.zeros(0, np.int32)


def windows(tokens: np.ndarray, length: int, what: str = "the text") -> np.ndarray:
    """Cut tokens into windows (n, length + 1), each starting on the last token of the one before.

    Raises:
      BitnetError: if there is not enough text for one.

    >>> windows(np.arange(7), 3).tolist()
    [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    count = (len(tokens) - 1) // length
    if count < 1:
        raise BitnetError(
            f"{what}: {len(tokens)} tokens are too few for one window of {length + 1}; "
            "give more text or a shorter length"
        )
    at = np.arange(count)[:, None] * length + np.arange(length + 1)
    return tokens[at]


def epochs(
    data: np.ndarray, batch: int, count: int, seed: int, start: int = 0
) -> Iterator[np.ndarray]:
    """Batches (batch, length + 1) of ``count`` epochs, each in a new order fixed by the seed.

    The last, incomplete batch of an epoch is dropped, and so are the first ``start`` batches: the
    order of an epoch depends on nothing but the seed and its number, so one can begin anywhere.

    Raises:
      BitnetError: if the data has fewer windows than one batch.
    """
    first, skipped = divmod(start, steps_per_epoch(data, batch))
    for epoch in range(first, count):
        order = np.random.default_rng((seed, epoch)).permutation(len(data))
        for i in range(skipped * batch, len(data) - batch + 1, batch):
            yield data[order[i : i + batch]]
        skipped = 0


def padded(data: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All windows in order as batches of one shape, and which of their rows are real.

    The last batch is filled up with zeros, so that a compiled program serves it too.

    >>> [(rows.tolist(), real.tolist()) for rows, real in padded(np.array([[1], [2], [3]]), 2)]
    [([[1], [2]], [True, True]), ([[3], [0]], [True, False])]
    """
    for i in range(0, len(data), batch):
        rows = data[i : i + batch]
        yield np.pad(rows, ((0, batch - len(rows)), (0, 0))), np.arange(batch) < len(rows)


def steps_per_epoch(data: np.ndarray, batch: int) -> int:
    """Number of whole batches in the data.

    Raises:
      BitnetError: if there is not one.
    """
    if len(data) < batch:
        raise BitnetError(
            f"the text makes {len(data)} windows of {data.shape[1]} tokens, fewer than one batch "
            f"of {batch}; give more text or a smaller batch"
        )
    return len(data) // batch
