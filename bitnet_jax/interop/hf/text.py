"""Tokenizers of Hugging Face's folders and the small files beside them: read and carried along."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from ...errors import BitnetError
from ...models.folder import TOKENIZER

GENERATION = "generation_config.json"
_CONFIG = "tokenizer_config.json"
_CARRIED = (_CONFIG, "special_tokens_map.json", GENERATION, "chat_template.jinja")
_LARGEST = 10_000_000
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder.

    Whether text begins with a special token is written in ``tokenizer.json``; where there is one,
    transformers ignores ``add_bos_token`` in the tokenizer's config, and so do we.

    Raises:
      BitnetError: if there is no ``tokenizer.json``, or it is damaged.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        raise BitnetError(
            f"{folder}: no {TOKENIZER} in it; write one with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained, or give --tokenizer FILE"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:
        raise BitnetError(f"{file}: is no tokenizer of the tokenizers library") from e


def carried(folder: Path, config: dict) -> dict[str, bytes]:
    """The small files beside the tokenizer, by name, and the special tokens' numbers.

    Where there is no ``generation_config.json``, one is made of what config.json says.
    """
    files = {
        name: (folder / name).read_bytes()
        for name in _CARRIED
        if (folder / name).is_file() and (folder / name).stat().st_size <= _LARGEST
    }
    ids = {name: config[name] for name in _IDS if config.get(name) is not None}
    if GENERATION not in files and ids:
        files[GENERATION] = (json.dumps(ids, indent=2) + "\n").encode()
    return files


def special_ids(files: Mapping[str, bytes], tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` for config.json, None if unknown.

    From the carried files; a tokenizer that came with none, and has one special token, ends
    documents with it.
    """
    if GENERATION in files:
        try:
            known = json.loads(files[GENERATION])
        except ValueError:
            known = {}
        return {name: known.get(name) for name in _IDS}
    added = tokenizer.get_added_tokens_decoder()
    special = [number for number, token in added.items() if token.special]
    return dict.fromkeys(_IDS) | {"eos_token_id": special[0] if len(special) == 1 else None}


def write_tokenizer(
    folder: Path, tokenizer: tokenizers.Tokenizer, files: Mapping[str, bytes], longest: int
) -> None:
    """``tokenizer.json`` and what goes with it, as transformers' fast tokenizers read it."""
    (folder / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    for name in _CARRIED:
        if name in files:
            (folder / name).write_bytes(files[name])
    ids = special_ids(files, tokenizer)
    if _CONFIG not in files:
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
        }
        for name in ("bos", "eos"):
            number = ids[f"{name}_token_id"]
            config[f"{name}_token"] = tokenizer.id_to_token(number) if number is not None else None
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if GENERATION not in files:
        known = {name: number for name, number in ids.items() if number is not None}
        (folder / GENERATION).write_text(json.dumps(known, indent=2) + "\n")
