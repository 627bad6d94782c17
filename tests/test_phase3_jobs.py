"""Phase 3 in, Phase 5 out, as typed: compress, its plan, the hand-off, continue; and bad input."""

import json
import os
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bitnet_jax import checkpoint, cli, handoff, is_quantized, phase5
from bitnet_jax.convert import dequantise
from bitnet_jax.interop import phase3
from bitnet_jax.models.folder import load_model
from bitnet_jax.train.loss import logits_of

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "phase3_tiny" / "model.safetensors"
MICRO = GOLDEN / "phase3_variants" / "micro.safetensors"
TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(40))


def run(*args) -> int:
    return cli.main([str(a) for a in args])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Phase 3's file, compressed as an owner would."""
    home = tmp_path_factory.mktemp("phase3")
    (home / "text.txt").write_text(TEXT)
    shutil.copy(TINY, home)
    # The same weights, thought over twice instead of eight times: the recursion is unrolled, and
    # compiling it is what takes the time. The golden data of the whole one is in test_phase3_model.
    told = json.loads(TINY.with_suffix(".json").read_text())
    told["config"]["trm_config"] |= {"T_max": 1, "micro_steps": 1, "step_weights": [0.5, 1.0]}
    (home / "model.json").write_text(json.dumps(told))
    (home / "merges.txt").write_text("a tokenizer's own file\n")
    args = ("--length", 32, "--batch", 8, "--epochs", 1, "--target-ratio", 4, "--latent")
    code = run(
        "compress", home / "model.safetensors", "--data", home / "text.txt", "--out", home / "out",
        *args, "--json", home / "result.json",
    )  # fmt: skip
    assert code == 0
    return home


def test_the_report_has_the_agreement_before_and_after(home):
    result = json.loads((home / "result.json").read_text())
    scores = result["scores"]
    assert scores["float"]["top1"] == 1 and scores["float"]["kl"] == pytest.approx(0, abs=1e-6)
    for key in ("converted", "fine_tuned", "packed"):
        assert 0 < scores[key]["top1"] <= 1 and scores[key]["kl"] > 0
    assert result["disagreement"] == pytest.approx(1 - scores["packed"]["top1"])
    assert scores["packed"]["kl"] < scores["rounded"]["kl"]
    assert result["packed_equals_memory"]
    assert "names the float model's token" in (home / "out/report.txt").read_text()


def test_the_plan_is_met_on_disk(home):
    result = json.loads((home / "result.json").read_text())
    assert result["ratio_on_disk"] >= 4
    formats = {x["format"] for x in result["conversion"]["leaves"]}
    assert formats & {"int8", "int4"} and "float32" in formats


def test_attention_of_the_refiner_is_quantised_and_the_memory_is_not(home):
    tree = load_model(home / "out/packed").params
    attention = tree["params"]["trm"]["refiner"]["feature_attn"]
    assert all(is_quantized(attention[p]["kernel"]) for p in ("query", "key", "value", "out"))
    memory = tree["buffers"]["backbone"]["ltm"]["memory_state"]
    np.testing.assert_array_equal(memory, load_file(TINY)["backbone.ltm.memory_state"])
    assert tree["params"]["act_head"]["w_halt"]["kernel"].dtype == jnp.float16


def test_handed_on_values_are_codes_times_scale(home):
    packed, _, _ = handoff.load(home / "out/phase5")
    values = dequantise(packed.params)
    half = checkpoint.load(home / "out/phase5/float16").tree
    assert jax.tree.structure(values) == jax.tree.structure(half)
    for x, y in zip(jax.tree.leaves(values), jax.tree.leaves(half)):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    kernel = half["params"]["backbone"]["layers_0"]["mlp"]["w_up"]["kernel"]
    assert kernel.dtype == jnp.float16


def test_the_torch_pair_is_the_same_network(home):
    packed, _, _ = handoff.load(home / "out/phase5")
    module, variables = phase3.load(home / "out/phase5/model")
    for x, y in zip(jax.tree.leaves(dequantise(packed.params)), jax.tree.leaves(variables)):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    modes = [(home / f"out/phase5/model{end}").stat().st_mode for end in (".json", ".safetensors")]
    assert modes[0] == modes[1]  # whoever may read one may read the other
    # A strict load_state_dict asks for the tied head by its own name too.
    tensors = load_file(home / "out/phase5/model.safetensors")
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["backbone.token_emb.weight"])
    assert set(tensors) == set(load_file(TINY)) | {"lm_head.weight"}
    told = json.loads((home / "out/phase5/model.json").read_text())
    assert set(told) == {
        "config", "metadata", "has_optimizer", "has_extra_tensors", "extra_tensor_keys"
    }  # fmt: skip
    source = json.loads(TINY.with_suffix(".json").read_text())
    assert told["config"]["titans_config"]["sw_window"] == 16
    assert told["config"]["specialization"] == source["config"]["specialization"]
    assert told["metadata"]["phase"] == 4
    assert module.config == phase3.read_phase3(home / "model.safetensors").config


def test_tokenizer_files_are_carried_through(home):
    assert (home / "out/phase5/merges.txt").read_text() == "a tokenizer's own file\n"
    assert (home / "out/phase5/tokenizer.json").is_file()


def test_requantising_gives_the_same_codes(home):
    packed, latent, policy = handoff.load(home / "out/phase5")
    assert packed.scheme is not None
    assert phase5.same_codes(latent, packed.params, policy, packed.scheme)


def test_requantising_the_values_alone_gives_the_same_codes(home, tmp_path):
    """Without the latent weights those are made from codes and scale."""
    packed, _, policy = handoff.load(home / "out/phase5")
    handoff.write(tmp_path / "bare", packed, policy)
    again, latent, policy = handoff.load(tmp_path / "bare")
    assert again.scheme is not None
    assert phase5.same_codes(latent, again.params, policy, again.scheme)


def test_phase_5_trains_on_and_hands_on_again(home, tmp_path, capsys):
    out = tmp_path / "out"
    code = run(
        "continue", home / "out/phase5", "--data", home / "text.txt", "--out", out,
        "--length", 32, "--batch", 4, "--json", tmp_path / "j.json",
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "j.json").read_text())
    assert result["same_codes"] and result["steps"] > 5
    assert result["scores"]["packed"]["loss"] < result["scores"]["handed_over"]["loss"]
    packed, _, _ = handoff.load(out / "phase5")
    before, _, _ = handoff.load(home / "out/phase5")
    memory = lambda m: m.params["buffers"]["backbone"]["ltm"]["memory_state"]
    np.testing.assert_array_equal(memory(packed), memory(before))
    assert (
        load_file(out / "phase5/model.safetensors").keys()
        == load_file(home / "out/phase5/model.safetensors").keys()
    )


def test_a_damaged_hand_off_is_refused(home, tmp_path, capsys):
    folder = tmp_path / "phase5"
    shutil.copytree(home / "out/phase5", folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    args = ("--data", home / "text.txt", "--out", tmp_path / "o")
    assert run("continue", folder, *args) == 1
    assert "model.safetensors: missing or damaged" in capsys.readouterr().err
    assert run("continue", home / "out", *args) == 1
    assert "no phase5.json in it" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_training_that_leads_away_is_not_packed(home, tmp_path, capsys):
    args = ("--data", home / "text.txt", "--length", 32, "--epochs", 1, "--start", "rule")
    source = home / "model.safetensors"
    code = run("compress", source, *args, "--learning-rate", 0.05, "--out", tmp_path / "out")
    assert code == 0 and "led away from the float model" in capsys.readouterr().out
    result = json.loads((tmp_path / "out/report.json").read_text())
    scores = result["scores"]
    assert result["packed_is"] == "converted"
    assert scores["fine_tuned"]["kl"] > scores["converted"]["kl"]
    assert scores["packed"]["kl"] == pytest.approx(scores["converted"]["kl"], rel=0.1)


def test_eval_says_how_far_it_agrees(home, tmp_path, capsys):
    args = ("--data", home / "text.txt", "--length", 32, "--json", tmp_path / "j.json")
    assert run("eval", home / "out/packed", *args, "--against", home / "out/float32") == 0
    found = json.loads((tmp_path / "j.json").read_text())
    packed = json.loads((home / "result.json").read_text())["scores"]["packed"]
    assert found["accuracy"] == pytest.approx(packed["accuracy"])
    assert found["against"]["top1"] == pytest.approx(packed["top1"])
    assert run("generate", home / "out/packed", "--prompt", "10 bottles") == 1
    assert "looks both ways" in capsys.readouterr().err


@pytest.fixture
def pair(tmp_path):
    """A copy of the micro model that may be spoiled: its tensors, and a way to try it."""
    tensors = load_file(MICRO)
    shutil.copy(MICRO.with_suffix(".json"), tmp_path / "m.json")

    def attempt(capsys, **changed) -> str:
        save_file({**tensors, **changed}, tmp_path / "m.safetensors")
        assert run("compress", tmp_path / "m.safetensors", "--out", tmp_path / "out") == 1
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error
        return error

    return tensors, attempt, tmp_path


def test_a_wrong_prefix(pair, capsys):
    tensors, attempt, _ = pair
    for name in list(tensors):
        tensors[f"student.{name}"] = tensors.pop(name)
    assert "names begin with 'student.'" in attempt(capsys)


def test_a_missing_layer(pair, capsys):
    tensors, attempt, folder = pair
    for name in [n for n in tensors if ".layers.0." in n]:
        tensors[name.replace(".0.", ".2.", 1)] = tensors[name]
    (folder / "m.json").unlink()
    error = attempt(capsys)
    assert "backbone.layers.1." in error and "missing" in error
    del tensors["trm.refiner.mlp.2.bias"]


def test_a_missing_tensor(pair, capsys):
    tensors, attempt, _ = pair
    del tensors["trm.refiner.mlp.2.bias"]
    assert "trm.refiner.mlp.2.bias is missing" in attempt(capsys)


def test_an_extra_tensor(pair, capsys):
    _, attempt, _ = pair
    error = attempt(capsys, **{"backbone.layers.0.attention.w_x.weight": np.ones((2, 2), "f4")})
    assert "w_x.weight is of no part of the network" in error


def test_a_wrong_vocabulary(pair, capsys):
    _, attempt, folder = pair
    assert "wrong vocabulary" in attempt(capsys, **{"lm_head.weight": np.ones((9, 32), "f4")})
    told = json.loads((folder / "m.json").read_text())
    told["config"]["titans_config"]["vocab_size"] = 1000
    (folder / "m.json").write_text(json.dumps(told))
    assert "says vocab_size is 1000" in attempt(
        capsys, **{"lm_head.weight": np.ones((67, 32), "f4")}
    )


def test_text_of_another_vocabulary(home, tmp_path, capsys):
    from bitnet_jax.train.data import train_tokenizer

    train_tokenizer([TEXT], 300).save(str(tmp_path / "big.json"))
    args = ("--tokenizer", tmp_path / "big.json", "--data", home / "text.txt")
    assert run("compress", TINY, "--out", tmp_path / "o", *args, "--length", 16) == 1
    assert "the model knows 259" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


class _Code:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['BITNET_RAN']}",)


def test_a_pickle_with_code_in_it_runs_nothing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setenv("BITNET_RAN", str(tmp_path / "ran"))
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"backbone.token_emb.weight": _Code()}))
    assert run("compress", tmp_path / "m.pt", "--out", tmp_path / "o") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "ran").exists() and not (tmp_path / "o").exists()


@pytest.mark.parametrize("given", ["n_heads", "n_heads=", "n_haeds=2", "n_heads=3", "d_model=5"])
def test_fields_that_are_wrong(given, tmp_path, capsys):
    assert run("compress", MICRO, "--out", tmp_path / "o", "--set", given) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_target_out_of_reach_says_what_is_in_reach(tmp_path, capsys):
    assert run("compress", TINY, "--out", tmp_path / "o", "--target-ratio", 50) == 1
    assert "the best is" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_weights_of_no_network_we_know_are_packed_and_verified(tmp_path, capsys):
    from .test_plan import bert

    save_file(
        {k: np.ascontiguousarray(v) for k, v in bert().items()}, tmp_path / "bert.safetensors"
    )
    args = ("--target-ratio", 3, "--json", tmp_path / "j.json")
    assert run("compress", tmp_path / "bert.safetensors", "--out", tmp_path / "o", *args) == 0
    result = json.loads((tmp_path / "j.json").read_text())
    assert result["ratio_on_disk"] >= 3 and result["packed_equals_memory"]
    assert result["bytes_on_disk"]["packed"] == checkpoint.size_on_disk(tmp_path / "o/packed")
    assert "all equal bit for bit" in capsys.readouterr().out.replace("\n", " ")
    tree = checkpoint.load(tmp_path / "o/packed").tree
    assert is_quantized(tree["params"]["pooler"]["dense"]["kernel"])
    assert run("inspect", tmp_path / "o/packed") == 0


def test_what_was_assumed_is_said(tmp_path, capsys):
    shutil.copy(TINY, tmp_path / "bare.safetensors")
    code = run("compress", tmp_path / "bare.safetensors", "--out", tmp_path / "o")
    told = capsys.readouterr().out.replace("\n", " ")
    assert code == 0
    assert "n_heads=1" in told and "sw_window=1024" in told and "memory_decay=0.99" in told


def test_packed_logits_are_near_the_float_ones(home):
    packed = load_model(home / "out/packed")
    module, variables = phase3.load(home / "model.safetensors")
    ids = np.frombuffer(TEXT[:24].encode(), np.uint8)[None].astype(np.int32)
    a, b = (
        logits_of(m.apply(p, ids)) for m, p in ((packed.model, packed.params), (module, variables))
    )
    assert float(jnp.corrcoef(a.ravel(), b.ravel())[0, 1]) > 0.8
