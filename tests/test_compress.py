"""``compress``, ``eval`` and ``generate`` on a user's own model and text, as typed."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from bitnet_jax import checkpoint, cli
from bitnet_jax.models.decoder import DecoderConfig
from bitnet_jax.models.folder import ModelFolder, PythonModule, load_model, save_model
from bitnet_jax.optim import adamw
from bitnet_jax.train import loop
from bitnet_jax.train.data import windows
from bitnet_jax.train.loop import fit
from bitnet_jax.train.text import byte_tokenizer

NETWORK = '''
import flax.linen as nn
import bitnet_jax

class Net(nn.Module):
    """Predicts the next byte from this one and the one before."""
    scheme: bitnet_jax.Scheme | None = None

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, 16, name="embed")(tokens)
        before = nn.Embed(256, 16, name="embed_before")(tokens)
        x = x.at[:, 1:].add(before[:, :-1])
        x = x + nn.relu(bitnet_jax.BitDense(32, scheme=self.scheme, name="up")(x)) @ self.param(
            "mix", nn.initializers.lecun_normal(), (32, 16))
        x = x + nn.Dense(16, name="plain")(x)
        return nn.Dense(256, name="head")(x)

def wrong(scheme):
    return 3

def untakeable():
    return Net()
'''
TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(150))
CONFIG = DecoderConfig(vocab_size=256, width=32, layers=1, heads=2, kv_heads=1, hidden=32)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a decoder, a network of one's own, its weights, and text."""
    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text(TEXT)
    (home / "net.py").write_text(NETWORK)
    tokens = np.zeros((1, 8), np.int32)
    params = CONFIG.build(None).init(jax.random.key(0), tokens)
    text = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
    train = windows(text, 16)  # enough to guess some bytes right
    learn = lambda m, p: fit(m, p, adamw(1e-2), train, epochs=1, batch=8).params
    params = learn(CONFIG.build(None), params)
    save_model(home / "decoder", ModelFolder(CONFIG, None, params, byte_tokenizer()))
    net = PythonModule(f"{home / 'net.py'}:Net")
    module = net.build(None)
    checkpoint.save(home / "weights", learn(module, module.init(jax.random.key(0), tokens)))
    return home


@pytest.fixture(autouse=True)
def here(monkeypatch, home):
    monkeypatch.chdir(home)


def complaint(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("bitnet-jax: ")
    return lines[0]


SHORT = ["--data", "text.txt", "--length", "16", "--batch", "4"]


@pytest.fixture(scope="module")
def done(home, tmp_path_factory):
    """The decoder after ``compress``, with what was written to --json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        more = ["--out", "small", "--epochs", "1", "--json", "figures.json"]
        assert cli.main(["compress", "decoder", *SHORT, *more, "--embeddings", "int8"]) == 0
    return home / "small", json.loads((home / "figures.json").read_text())


RECIPES = (
    ["--scheme", "sherry", "--residual", "--sub-norms", "--schedule", "two-stage", "--warmup",
     "0.3"],
    ["--relation", "100", "--teacher", "source", "--learn-scales", "--dead-zone", "1e-3", "--start",
     "rule"],
)  # fmt: skip


@pytest.mark.parametrize("flags", RECIPES, ids=" ".join)
def test_recipes_are_flags(flags, tmp_path):
    out = tmp_path / "small"
    assert (
        cli.main(["compress", "decoder", *SHORT, *flags, "--epochs", "1", "--out", str(out)]) == 0
    )
    result = json.loads((out / "report.json").read_text())
    assert result["packed_equals_memory"] is True
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tuned = [x for x in steps if x["stage"] == "fine-tune ternary" and "loss" in x]
    assert {"flips", "zeros", "latent"} <= set(tuned[0])
    assert ("relation" in tuned[0]) == ("--relation" in flags)
    assert ("rounded" in result["scores"]) == ("--start" not in flags)
    formats = {x["format"] for x in result["conversion"]["leaves"]}
    assert ("sparse" if "sherry" in flags else "ternary") in formats
    assert any("sub_norm" in x["path"] for x in result["conversion"]["leaves"]) == (
        "--sub-norms" in flags
    )


def test_a_network_that_cannot_be_calibrated_goes_by_the_rule(tmp_path, capsys):
    refuse = """
        try:
            jax.lax.axis_index("streams")
        except NameError:
            pass
        else:
            raise ValueError("no maps over me")
        x = x + nn.Dense"""
    source = "import jax" + NETWORK.replace("\n        x = x + nn.Dense", refuse)
    (tmp_path / "net.py").write_text(source)
    own = ["--module", f"{tmp_path / 'net.py'}:Net", "--tokenizer", "bytes"]
    out = ["--out", str(tmp_path / "own"), "--epochs", "1", "--no-compare", "--teacher", "source"]
    assert cli.main(["compress", "weights", *SHORT, *own, *out]) == 0
    assert "converted by the rule alone: no maps over me" in capsys.readouterr().out


def test_compress_packs_what_eval_and_generate_read(done, capsys):
    out, figures = done
    assert set(figures["scores"]) >= {"float", "converted", "fine_tuned", "packed"}
    assert set(figures["alternatives"]) == {"int8", "int4"}
    formats = {x["path"]: x["format"] for x in figures["conversion"]["leaves"]}
    assert formats["embed/embedding"] == "int8" and formats["layer_0/mlp/up/kernel"] == "ternary"

    more = ["--against", "small/float32", "--json", "eval.json"]
    assert cli.main(["eval", "small/packed", *SHORT[:4], *more]) == 0
    found = json.loads((out.parent / "eval.json").read_text())
    assert found["loss"] == pytest.approx(figures["scores"]["packed"]["loss"])
    assert found["against"]["loss"] == pytest.approx(figures["scores"]["float"]["loss"])
    assert 0 <= found["against"]["top1"] <= 1 and found["against"]["kl"] > 0
    assert "same token" in capsys.readouterr().out


def test_generate_prints_as_it_writes(done, capsys):
    assert cli.main(["generate", "small/packed", "--prompt", "1 bottle", "--tokens", "9"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("1 bottle") and "9 tokens" in printed.err
    same = ["generate", "small/packed", "--prompt", "1 b", "--tokens", "5", "--json", "g.json"]
    texts = []
    for seed in ("1", "1", "2"):
        assert cli.main([*same, "--temperature", "1.5", "--seed", seed]) == 0
        texts.append(json.loads(Path("g.json").read_text())["text"])
        assert capsys.readouterr().out.rstrip("\n") == texts[-1].rstrip("\n�")
    assert texts[0] == texts[1] != texts[2]


def test_half_characters_are_not_printed(home, capsys):
    """A model that always says the first byte of a two byte character prints none of it."""
    folder = load_model(home / "decoder")
    table = np.zeros((256, 32), np.float32)
    table[0xC3] = 1
    params = jax.tree.map(lambda x: x, folder.params)
    params["params"]["embed"]["embedding"] = table
    save_model(home / "half", ModelFolder(CONFIG, None, params, byte_tokenizer()))
    arguments = ["--prompt", "é", "--tokens", "3", "--temperature", "0"]
    assert cli.main(["generate", "half", *arguments]) == 0
    assert "�" not in capsys.readouterr().out


def test_a_network_of_ones_own(home, capsys):
    own = ["--module", "net.py:Net", "--tokenizer", "bytes"]
    arguments = ["compress", "weights", *SHORT, *own, "--out", "own", "--epochs", "1"]
    assert cli.main([*arguments, "--scheme", "absmean", "--scale", "8", "--no-compare"]) == 0
    assert load_model(home / "own" / "packed", PythonModule("net.py:Net")).scheme.scale == 8
    conversion = json.loads(Path("own/report.json").read_text())["conversion"]
    assert conversion["unmatched"] == ["mix"]
    formats = {x["path"]: x["format"] for x in conversion["leaves"]}
    assert (formats["up/kernel"], formats["plain/kernel"]) == ("ternary", "float16")
    assert "kept in float16: plain/kernel" in capsys.readouterr().out
    assert cli.main(["eval", "own/packed", *SHORT[:4], "--module", "net.py:Net"]) == 0
    prompt = ["--prompt", "99", "--tokens", "4", "--module", "net.py:Net"]
    assert cli.main(["generate", "own/packed", *prompt]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "own/packed", *SHORT[:4]]) == 1
    assert "needs its network, --module net.py:Net" in complaint(capsys)


def test_max_loss_decides_the_exit_status(home, capsys):
    # Hardly fine-tuned, so that it has something to lose.
    arguments = ["compress", "decoder", *SHORT, "--epochs", "1", "--no-compare"]
    arguments += ["--learning-rate", "1e-9"]
    assert cli.main([*arguments, "--out", "loose", "--max-loss", "99"]) == 0
    capsys.readouterr()
    figures = json.loads((home / "loose" / "report.json").read_text())
    bound = figures["relative_accuracy_loss"] - 0.01
    assert cli.main([*arguments, "--out", "tight", "--max-loss", str(bound)]) == 1
    assert re.search(r"lost [\d.]+ % of the accuracy, --max-loss allows", complaint(capsys))
    assert (home / "tight" / "packed").is_dir()


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_an_interrupted_job_is_resumed_to_the_same_end(home, capsys, monkeypatch):
    arguments = ["compress", "decoder", *SHORT, "--accumulate", "2", "--epochs", "2"]
    assert cli.main([*arguments, "--out", "whole"]) == 0
    judged, calls = loop._judge, []

    def dies(*more):
        calls.append(1)
        if len(calls) == 3:  # after the first epoch of the second training
            raise Killed
        return judged(*more)

    monkeypatch.setattr(loop, "_judge", dies)
    with pytest.raises(Killed):
        cli.main([*arguments, "--out", "parts"])
    monkeypatch.undo()
    monkeypatch.chdir(home)
    capsys.readouterr()
    assert cli.main([*arguments, "--out", "parts"]) == 1
    assert "or --resume the job in it" in complaint(capsys)
    assert cli.main([*arguments, "--out", "parts", "--resume"]) == 0
    for name in ("packed", "latent/last"):
        a, b = (checkpoint.read_manifest(home / out / name)["crc32"] for out in ("whole", "parts"))
        assert a == b
    assert not (home / "parts" / "resume").exists()
    capsys.readouterr()
    assert cli.main([*arguments, "--out", "parts", "--resume"]) == 1
    assert "holds no job that was interrupted" in complaint(capsys)


def test_options_of_training(home):
    options = [
        "--tensorboard",
        "board",
        "--optimizer",
        "mugrokfast",
        "--distill",
        "0.5",
        "--patience",
        "1",
        "--dtype",
        "bfloat16",
        "--scheme",
        "int4",
    ]
    arguments = ["compress", "decoder", *SHORT, "--epochs", "1", "--no-compare"]
    assert cli.main([*arguments, *options, "--out", "options"]) == 0
    stored = load_model(home / "options" / "packed")
    assert stored.config.dtype == "bfloat16" and stored.scheme.rule == "int4"
    kernel = stored.params["params"]["layer_0"]["mlp"]["up"]["kernel"]
    assert type(kernel).__name__ == "PackedInt4" and kernel.group == 32
    report = json.loads((home / "options" / "report.json").read_text())
    assert report["alternatives"] == {}
    assert list((home / "board").glob("events*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["text.txt"], "text.txt: holds weights, but not which network"),
        (["weights"], "weights: holds weights, but not which network"),
        (["weights", "--module", "net.py:Net"], "no tokenizer.json in it; give --tokenizer"),
        (["weights", "--module", "net.py:Nut"], "net.py defines no Nut"),
        (["weights", "--module", "net.py"], "expected FILE.py:NAME"),
        (["weights", "--module", "nut.py:Net"], "there is no file nut.py"),
        (["decoder", "--tokenizer", "no.json"], "--tokenizer no.json: no such file"),
        (["decoder", "--tokenizer", "text.txt"], "text.txt: is no tokenizer"),
        (["decoder", "--data", "no.txt"], "no.txt: no such file or folder"),
        (["decoder", "--length", "100000"], "too few for one window"),
        (["decoder", "--batch", "100000"], "fewer than one batch"),
        (["decoder", "--batch", "0"], "--batch 0: must be 1 or more"),
        (["decoder", "--epochs", "-1"], "--epochs -1"),
        (["decoder", "--scale", "sideways"], "--scheme and --scale: scale 'sideways'"),
        (["decoder", "--distill", "2"], "--distill is a share of 0..1"),
        (["decoder", "--accumulate", "0"], "--accumulate 0: must be 1 or more"),
        (["decoder", "--resume"], "holds no job that was interrupted"),
        (["decoder", "--max-loss", "-1"], "--max-loss -1.0: give a share"),
        (["decoder", "--out", "text.txt"], "text.txt: exists already"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_compress_says_what_is_wrong(arguments, message, capsys, home):
    given = " ".join(arguments)
    extra = [] if "--data" in given else ["--data", "text.txt"]
    extra += [] if "--out" in given else ["--out", "never"]
    assert cli.main(["compress", *arguments, *extra]) == 1
    assert message in complaint(capsys)
    assert not (home / "never").exists() or not list((home / "never").iterdir())
    (home / "never").rmdir() if (home / "never").exists() else None


def test_modules_that_are_none(home, capsys):
    for name, message in (("wrong", "gave int"), ("untakeable", "must take the scheme")):
        arguments = ["weights", "--data", "text.txt", "--module", f"net.py:{name}"]
        assert cli.main(["eval", *arguments, "--tokenizer", "bytes"]) == 1
        assert message in complaint(capsys)
    (home / "broken.py").write_text("import nothing_of_that_name\n")
    assert cli.main(["eval", "weights", "--data", "text.txt", "--module", "broken.py:Net"]) == 1
    assert "broken.py fails: ModuleNotFoundError" in complaint(capsys)


def test_a_packed_model_is_not_compressed_again(done, capsys):
    assert cli.main(["compress", "small/packed", *SHORT, "--out", "again"]) == 1
    assert "ternary already" in complaint(capsys)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", ""], "--prompt: is empty"),
        (["--prompt", "x" * 600], "600 tokens, but the model has room for 512"),
        (["--prompt", "x", "--tokens", "0"], "--tokens 0"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature -1.0"),
        (["--prompt", "x", "--top-p", "2"], "--top_p 2.0"),
        (["--prompt", "x", "--stop", "never"], "--stop never: the tokenizer has no such token"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: cannot be read"),
        ([], "--prompt TEXT or --prompts FILE"),
    ],
)
def test_generate_says_what_is_wrong(arguments, message, capsys):
    assert cli.main(["generate", "decoder", *arguments]) == 1
    assert message in complaint(capsys)


def test_generate_continues_several_texts_at_once(home, capsys):
    (home / "prompts.txt").write_text("two\n\nthree words here\n")
    arguments = ["--tokens", "5", "--temperature", "0", "--json", "g.json"]
    several = ["--prompt", "one", "--prompt", "one", "--prompts", "prompts.txt"]
    assert cli.main(["generate", "decoder", *several, *arguments]) == 0
    printed, found = capsys.readouterr(), json.loads(Path("g.json").read_text())
    assert [x["prompt"] for x in found["texts"]] == ["one", "one", "two", "three words here"]
    assert all(x["text"] in printed.out and x["tokens"] == 5 for x in found["texts"])
    assert found["tokens"] == 20 and found["tokens_per_second"] > 0 and found["seconds"] > 0
    assert re.search(r"20 tokens in .* s: prefill .* tokens/s, decode .* tokens/s", printed.err)
    assert cli.main(["generate", "decoder", "--prompt", "two", *arguments]) == 0
    alone = json.loads(Path("g.json").read_text())
    assert alone["text"] == found["texts"][2]["text"] == alone["texts"][0]["text"]

    tokenizer = load_model(home / "decoder").tokenizer
    made = tokenizer.encode(alone["text"]).ids[3:]
    stop = ["--prompt", "two", *arguments, "--stop", tokenizer.id_to_token(made[0])]
    assert cli.main(["generate", "decoder", *stop]) == 0
    assert "1 tokens in" in capsys.readouterr().err


def test_generate_stops_where_the_model_ends(capsys):
    arguments = ["--prompt", "x" * 508, "--tokens", "50", "--temperature", "0"]
    assert cli.main(["generate", "decoder", *arguments]) == 0
    assert "4 tokens" in capsys.readouterr().err


def test_tokens_the_model_does_not_know(home, capsys):
    folder = load_model(home / "decoder")
    few = DecoderConfig(**{**vars(CONFIG), "vocab_size": 64})
    params = few.build(None).init(jax.random.key(0), np.zeros((1, 8), np.int32))
    save_model(home / "few", ModelFolder(few, None, params, folder.tokenizer))
    assert cli.main(["eval", "few", "--data", "text.txt"]) == 1
    assert "but the model knows 64" in complaint(capsys)
