"""Tokenizers in GGUF's metadata, of its two kinds: byte-level BPE and SentencePiece's.

llama.cpp has the rules that split text before BPE built in and knows them by name, so only the
splits named here can be carried, in either direction.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ...errors import BitnetError
from ...train.data import END

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"  # SentencePiece's
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name of each way to split text (llama-vocab.cpp): what `_steps` makes of it.
_SPLITS = {
    "gpt-2": (("ByteLevel", True),),
    "smollm": (("Digits",), ("ByteLevel", True)),
    "llama-bpe": (("Split", _WORDS % "{1,3}"), ("ByteLevel", False)),
    "qwen2": (("Split", _WORDS % ""), ("ByteLevel", False)),
}
_SAME = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}
# Ends of a text by name, where nothing else says which token it is.
_ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>")
# SentencePiece makes tokens of 16 letters unless told otherwise; cutting takes the square of this.
_LONGEST = 1000
# Where Hugging Face keeps what its tokenizer.json has no room for.
CONFIG, TEMPLATE, GENERATION = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
# llama.cpp refuses a tokenizer without merges, as one of bytes is: byte 255, which no UTF-8 has.
_NEVER = "ÿ ÿ"


def write(
    tokenizer: tokenizers.Tokenizer, entries: int, files: Mapping[str, bytes]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A tokenizer as GGUF's metadata, and what should be known about it.

    Args:
      tokenizer: byte-level BPE split as GPT-2, SmolLM, Llama 3 or Qwen 2, or SentencePiece's BPE
        as Llama 2 has it.
      entries: rows of the embedding table; llama.cpp wants a token for each.
      files: the model's, among them perhaps ``tokenizer_config.json``, which says what ends a text,
        and a chat's template.

    Raises:
      BitnetError: for another kind of tokenizer, or more tokens than ``entries``.
    """
    spec = json.loads(tokenizer.to_str())
    model = spec["model"]
    if model.get("type") != "BPE":
        raise BitnetError(
            f"tokenizer: {model.get('type')}; llama.cpp is given byte-level or SentencePiece BPE"
        )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if max(vocabulary.values(), default=-1) >= entries:
        raise BitnetError(
            f"tokenizer: token {max(vocabulary.values())} has no row in a table of {entries}"
        )
    words = [f"[PAD{i}]" for i in range(entries)]
    kinds = [UNUSED] * entries
    for word, i in vocabulary.items():
        words[i], kinds[i] = word, NORMAL
    for token in spec["added_tokens"]:
        kinds[token["id"]] = CONTROL if token["special"] else USER
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    fields: dict[str, Any] = {"tokens": words, "token_type": np.array(kinds, np.int32)}
    if model.get("byte_fallback"):
        fields |= _sentencepiece(spec, words, kinds, merges)
    else:
        fields |= {"model": "gpt2", "pre": _split_name(spec), "merges": merges or [_NEVER]}
    extra = _json(files.get(CONFIG, b""))
    one = tokenizer.encode("a")
    fields["add_bos_token"] = one.special_tokens_mask[:1] == [1]
    if fields["add_bos_token"]:
        fields["bos_token_id"] = one.ids[0]
    end = next((w for w in (_text(extra.get("eos_token")), *_ENDS) if w in vocabulary), None)
    if end is not None:
        fields["eos_token_id"] = vocabulary[end]
    template = files.get(TEMPLATE, b"").decode(errors="replace") or extra.get("chat_template")
    if isinstance(template, str):
        fields["chat_template"] = template
    missing = "the tokenizer has no token that ends a text; llama.cpp takes one of its own choice"
    named = {_key(name): value for name, value in fields.items()}
    return named, () if end is not None else (missing,)


def _key(name: str) -> str:
    return f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}"


def _json(config: bytes) -> dict:
    try:
        found = json.loads(config or b"{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BitnetError(f"{CONFIG}: not a JSON object; mend it or take it out")
    return found


def _text(token: Any) -> str:
    """A token as Hugging Face writes it: its text, or an object around that."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _steps(spec: dict | None) -> tuple[tuple, ...]:
    """A pre-tokenizer's JSON as a tuple of what it does."""
    if spec is None:
        return ()
    kind = spec["type"]
    if kind == "Sequence":
        return tuple(step for inner in spec["pretokenizers"] for step in _steps(inner))
    if kind == "ByteLevel" and not spec["add_prefix_space"]:
        return (("ByteLevel", spec["use_regex"]),)
    if kind == "Digits" and spec["individual_digits"]:
        return (("Digits",),)
    if kind == "Split" and spec["behavior"] == "Isolated" and not spec["invert"]:
        return (("Split", spec["pattern"].get("Regex")),)
    return ((kind, "with other settings"),)


def _split_name(spec: dict) -> str:
    steps = _steps(spec["pre_tokenizer"])
    for name, known in _SPLITS.items():
        if steps == known:
            return name
    raise BitnetError(
        f"tokenizer: splits text by {[s[0] for s in steps]} in a way that stock llama.cpp has no "
        f"name for; it is given those of {', '.join(_SPLITS)}"
    )


def _sentencepiece(spec: dict, words: list[str], kinds: list[int], merges: list[str]) -> dict:
    """The fields of a SentencePiece tokenizer; kinds of bytes and the unknown token are set."""
    for i, word in enumerate(words):
        if word == f"<0x{word[3:5]}>" and len(word) == 6:
            kinds[i] = BYTE
        elif word == spec["model"].get("unk_token"):
            kinds[i] = UNKNOWN
    rank = {pair.replace(" ", "", 1): i for i, pair in reversed(list(enumerate(merges)))}
    # llama.cpp joins the pair whose joined token scores highest: the earlier merge.
    scores = np.array([-float(rank.get(w, len(merges))) for w in words], np.float32)
    prefix = "Prepend" in json.dumps(spec["normalizer"])
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}


def read(fields: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, bytes]]:
    """The tokenizer in a GGUF file's metadata, and the small files Hugging Face keeps beside it.

    Raises:
      BitnetError: if there is none, or it is damaged or of a kind not known here.
    """

    def get(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    words, model = get("tokens"), get("model")
    if not isinstance(words, list) or len(set(words)) < len(words):
        raise BitnetError("its tokenizer: no tokens, or one twice")
    kinds = np.asarray(get("token_type", [NORMAL] * len(words)))
    if kinds.shape != (len(words),):
        raise BitnetError(f"its tokenizer: {len(words)} tokens, but {kinds.size} types of them")
    vocabulary = {w: i for i, (w, kind) in enumerate(zip(words, kinds)) if kind != UNUSED}
    try:
        if model == "gpt2":
            tokenizer = _byte_level(vocabulary, list(get("merges", [])), str(get("pre", "")))
        elif model == "llama":
            tokenizer = _llama(
                vocabulary, kinds, words, get("scores"), get("add_space_prefix", True)
            )
        else:
            raise BitnetError(
                f"its tokenizer: of kind {model!r}; expected 'gpt2' (byte-level BPE) or 'llama'"
            )
        for kind in (CONTROL, USER):
            found = [words[i] for i in np.flatnonzero(kinds == kind)]
            added = [
                tokenizers.AddedToken(w, normalized=False, special=kind == CONTROL) for w in found
            ]
            (tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens)(added)
        named = {n: _named(words, get(f"{n}_token_id")) for n in ("bos", "eos", "unknown")}
        starts = get("add_bos_token", model == "llama" or get("pre") in ("llama-bpe", "llama3"))
        if starts and named["bos"]:
            pair = (named["bos"], vocabulary[named["bos"]])
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[pair[0], "$A"], pair=[pair[0], "$A", "$B"], special_tokens=[pair]
            )
    except BitnetError:
        raise
    except Exception as e:  # what a damaged vocabulary makes the tokenizers package raise
        line = (str(e).splitlines() or [type(e).__name__])[0][:160]
        raise BitnetError(f"its tokenizer: damaged ({line})") from e
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    config |= {f"{n}_token".replace("unknown", "unk"): w for n, w in named.items() if w}
    ids = {f"{n}_token_id": vocabulary[w] for n, w in named.items() if w in vocabulary}
    ids.pop("unknown_token_id", None)
    if isinstance(fields.get("tokenizer.chat_template"), str):
        config["chat_template"] = fields["tokenizer.chat_template"]
    write = lambda x: (json.dumps(x, indent=2) + "\n").encode()
    return tokenizer, {CONFIG: write(config), GENERATION: write(ids)}


def _named(words: list[str], i: Any) -> str | None:
    return words[i] if isinstance(i, int) and 0 <= i < len(words) else None


def _byte_level(vocabulary: dict[str, int], merges: list[str], pre: str) -> tokenizers.Tokenizer:
    pre = _SAME.get(pre, pre)
    if pre not in _SPLITS:
        raise BitnetError(
            f"its tokenizer: splits text as {pre!r}; expected one of {', '.join(_SPLITS)}"
        )
    pairs = [(a, b) for a, b in (m.split(" ", 1) for m in merges if m != _NEVER)]
    # Llama 3 takes a word that is a token as it is, without looking for merges that make it.
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe")
    )
    make = {
        "Digits": lambda: pre_tokenizers.Digits(individual_digits=True),
        "Split": lambda pattern: pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(False, use_regex=regex),
    }
    steps = [make[step[0]](*step[1:]) for step in _SPLITS[pre]]
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _llama(
    vocabulary: dict[str, int], kinds: np.ndarray, words: list[str], scores: Any, prefix: Any
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE by merges: every way to cut a token in two, best scores first."""
    if not isinstance(scores, np.ndarray) or scores.shape != kinds.shape:
        raise BitnetError("its tokenizer: a SentencePiece one without a score for each token")
    joined = [i for i in np.argsort(-scores, kind="stable") if kinds[i] == NORMAL]
    pieces = {w for w, i in vocabulary.items() if kinds[i] in (NORMAL, USER)}
    pairs = []
    for i in joined:
        word = words[i]
        if len(word) > _LONGEST:
            raise BitnetError(f"its tokenizer: a token of {len(word)} letters")
        cuts = [(word[:c], word[c:]) for c in range(1, len(word))]
        cuts = [(a, b) for a, b in cuts if a in pieces and b in pieces]
        pairs += sorted(cuts, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    unknown = next((words[i] for i in np.flatnonzero(kinds == UNKNOWN)), None)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    start = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
