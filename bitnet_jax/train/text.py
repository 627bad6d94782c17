"""The user's text: files and folders to documents, and a tokenizer for models without one."""

import json
from pathlib import Path

import tokenizers

from ..errors import BitnetError
from .data import Corpus

# With so many documents, whole ones are held out; with fewer, the end of each.
_MANY = 10


def read_text(path: Path) -> Corpus:
    """Text from a file or a folder, a tenth of it held out.

    A ``.jsonl`` file is a document a line, under its key ``text``; any other file is one document,
    in UTF-8. In a folder every readable text file counts, in the order of their names; hidden and
    binary files are left out. With ten documents or more every tenth is held out, otherwise the
    last tenth of each, cut at a line.

    Args:
      path: a file or a folder.

    Returns:
      `Corpus`.

    Raises:
      BitnetError: if there is nothing to read, or a file is not text.
    """
    if not path.exists():
        raise BitnetError(f"{path}: no such file or folder; give text to train and measure on")
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not _hidden(f, path))
        documents = [d for f in files for d in _documents(f, strict=False)]
    else:
        documents = _documents(path, strict=True)
    documents = list(dict.fromkeys(d for d in documents if d.strip()))
    if not documents:
        raise BitnetError(f"{path}: holds no text")
    if len(documents) >= _MANY:
        train = [d for i, d in enumerate(documents) if i % 10]
        return Corpus(train, documents[::10], str(path))
    cuts = [_cut(d) for d in documents]
    train = [d[:c] for d, c in zip(documents, cuts)]
    return Corpus(train, [d[c:] for d, c in zip(documents, cuts)], str(path))


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _cut(document: str) -> int:
    """Where the last tenth starts, moved back to the start of its line if that is near."""
    cut = len(document) * 9 // 10
    line = document.rfind("\n", 0, cut) + 1
    return line if line > cut * 9 // 10 else cut


def _documents(file: Path, strict: bool) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
        if "\0" in text:
            raise ValueError("a NUL character")
    except (ValueError, OSError) as e:
        if not strict:
            return []
        reason = e.strerror if isinstance(e, OSError) else "it is not text in UTF-8"
        raise BitnetError(f"{file}: cannot be read ({reason})") from e
    return _lines(file, text) if file.suffix == ".jsonl" else [text]


def _lines(file: Path, text: str) -> list[str]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            found += [json.loads(line)["text"]] if line.strip() else []
        except (ValueError, KeyError, TypeError) as e:
            raise BitnetError(
                f"{file}, line {number}: expected a JSON object with the key 'text'"
            ) from e
    return found


BYTES = 256


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer whose tokens are the 256 bytes, for models that read those.

    >>> tokenizer = byte_tokenizer()
    >>> tokenizer.encode("aé").ids, tokenizer.decode([97, 195, 169])
    ([97, 195, 169], 'aé')
    """
    # The byte-level alphabet shows printable bytes as themselves and moves the rest up from 256.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in shown]
    vocabulary = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(moved)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
