import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from bitnet_jax import BitnetError
from bitnet_jax.train.agreement import agreement
from bitnet_jax.train.evaluate import evaluate
from bitnet_jax.train.text import byte_tokenizer, read_text

from .test_decoder import TWN, build


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_one_file_gives_its_end(tmp_path):
    lines = [f"line {i}\n" for i in range(100)]
    corpus = read_text(write(tmp_path / "a.txt", "".join(lines)))
    assert corpus.train[0] + corpus.held_out[0] == "".join(lines)
    assert corpus.held_out[0].startswith("line ") and 8 <= len(corpus.held_out[0].split()) / 2 <= 12


def test_a_line_without_end_is_cut_all_the_same(tmp_path):
    corpus = read_text(write(tmp_path / "a.txt", "x" * 1000))
    assert (len(corpus.train[0]), len(corpus.held_out[0])) == (900, 100)


def test_a_folder_gives_every_tenth_document(tmp_path):
    for i in range(20):
        write(tmp_path / f"sub{i % 2}" / f"{i:02}.md", f"document {i}")
    write(tmp_path / ".hidden" / "x.txt", "hidden")
    write(tmp_path / "picture.png", b"\x89PNG\r\n\x1a\n\0\xff")
    write(tmp_path / "again.txt", "document 3")
    corpus = read_text(tmp_path)
    everything = {f"document {i}" for i in range(20)}
    assert set(corpus.train) | set(corpus.held_out) == everything
    assert len(corpus.held_out) == 2 and not set(corpus.train) & set(corpus.held_out)


def test_jsonl_is_a_document_a_line(tmp_path):
    rows = "\n".join(json.dumps({"text": f"d{i}", "n": i}) for i in range(30))
    corpus = read_text(write(tmp_path / "a.jsonl", rows))
    assert corpus.held_out == ["d0", "d10", "d20"] and len(corpus.train) == 27


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", b"\xff\xfe\x00", "not text in UTF-8"),
        ("a.txt", b"a\0b", "not text in UTF-8"),
        ("a.txt", b"  \n", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"body": 1}', "line 2: expected a JSON object"),
        ("a.jsonl", b"[1]", "line 1: expected"),
    ],
)
def test_what_is_not_text(tmp_path, name, text, message):
    with pytest.raises(BitnetError, match=message):
        read_text(write(tmp_path / name, text))


def test_nothing_there(tmp_path):
    for path, message in ((tmp_path / "no", "no such file"), (tmp_path, "holds no text")):
        with pytest.raises(BitnetError, match=message):
            read_text(path)


def test_bytes_are_their_own_tokens():
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(0x250))) + "日本 \U0001f600"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_agreement_against_float64():
    (a, p), (b, q) = build(), build(TWN)
    data = np.random.default_rng(1).integers(0, 48, (5, 9))
    found = agreement(a, p, b, q, data, batch=2)
    x, y = (np.asarray(m.apply(v, data[:, :-1]), np.float64) for m, v in ((a, p), (b, q)))
    assert found["top1"] == pytest.approx((x.argmax(-1) == y.argmax(-1)).mean())
    log = lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True))
    kl = (np.exp(log(y)) * (log(y) - log(x))).sum(-1).mean()
    assert found["kl"] == pytest.approx(kl, rel=1e-4)
    assert agreement(a, p, a, p, data) == {"top1": 1.0, "kl": pytest.approx(0, abs=1e-6)}


def test_a_model_is_traced_once_for_all_its_figures():
    traced = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            traced.append(tokens.shape)
            return nn.Embed(48, 48)(tokens)

    data = np.random.default_rng(2).integers(0, 48, (5, 9))
    p, q = (Counted().init(jax.random.key(i), data[:, :-1]) for i in (0, 1))
    traced.clear()
    first, second = evaluate(Counted(), p, data, 2), evaluate(Counted(), q, data, 2)
    apart = agreement(Counted(), p, Counted(), q, data, 2)
    assert traced == [(2, 8)]
    assert first["loss"] != second["loss"] and apart["kl"] > 0
