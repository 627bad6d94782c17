"""PyTorch's own files, written by PyTorch here: needs torch installed.

Skipped without it, as most users test; .ci/run installs it and sets BITNET_TEST_TORCH, with which
its absence is an error.
"""

import os
import pickle
import sys
import zipfile

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bitnet_jax import BitnetError, cli
from bitnet_jax.interop.tensors import from_state_dict, read
from bitnet_jax.interop.torch import from_torch

if os.environ.get("BITNET_TEST_TORCH"):
    import torch
else:
    torch = pytest.importorskip("torch", reason="torch is not installed; .ci/run has it")


@pytest.fixture
def state():
    torch.manual_seed(0)
    table = torch.randn(7, 4)
    return {
        "embed.weight": table,
        "head.weight": table,  # shared
        "up.weight": torch.randn(4, 6).t(),  # strided
        "up.bias": torch.nn.Parameter(torch.randn(6)),
        "half.weight": torch.randn(3, 6).half(),
        "brain.weight": torch.randn(3, 6).bfloat16(),
        "double.weight": torch.randn(3, 6, dtype=torch.float64),
        "slice.weight": torch.randn(9, 6)[3:6],  # a part of a larger storage
        "steps": torch.arange(3),
    }


def same(found, state):
    for name, x in state.items():
        got = found.arrays[found.tied.get(name, name)]
        assert_array_equal(got.astype(np.float64), x.detach().double().numpy(), err_msg=name)
    assert found.tied == {"head.weight": "embed.weight"}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_a_saved_state_dict(state, tmp_path, suffix, new):
    path = tmp_path / f"x{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=new)
    same(read(path), state)
    same(from_state_dict(state), state)


def test_what_training_scripts_save(state, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer": {"lr": 0.1}}, path)
    found = read(path)
    same(found, state)
    assert set(found.ignored) == {"epoch", "optimizer"}


def test_into_a_tree(state, tmp_path):
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "x.pt")
    result = from_torch(tmp_path / "x.pt")
    params = result.tree["params"]
    assert "head" not in params and result.report.tied == {
        "module.head.weight": "module.embed.weight"
    }
    assert_array_equal(params["up"]["kernel"], state["up.weight"].numpy().T)
    assert_array_equal(params["brain"]["kernel"].T, state["brain.weight"].float().numpy())
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    assert result.tree["buffers"]["steps"].dtype == "int32"
    module = torch.nn.Sequential(torch.nn.Linear(2, 3))
    tree = from_torch(module).tree
    assert_array_equal(tree["params"]["0"]["bias"], module[0].bias.detach().numpy())


class Bomb:
    """Code in a pickle: loading it carelessly would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "old", "bare pickle", "hidden in a wrapper"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, form, capsys):
    mark, path = tmp_path / "executed", tmp_path / "bomb.pt"
    content = {"w": torch.ones(2), "bomb": Bomb(mark)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        content = {"model": content} if "hidden" in form else content
        torch.save(content, path, _use_new_zipfile_serialization=form != "old")
    with pytest.raises(BitnetError, match="refused, nothing was run") as error:
        from_torch(path)
    assert "\n" not in str(error.value) and not mark.exists()
    network = tmp_path / "net.py"
    network.write_text(
        "import flax.linen as nn\n"
        "class Net(nn.Module):\n"
        "    scheme: object = None\n"
        "    @nn.compact\n"
        "    def __call__(self, tokens):\n"
        "        return nn.Embed(256, 256)(tokens)\n"
    )
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    arguments = ["--data", str(tmp_path / "text.txt"), "--tokenizer", "bytes"]
    assert cli.main(["eval", str(path), "--module", f"{network}:Net", *arguments]) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "refused, nothing was run" in told[0] and not mark.exists()


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "other zip", "list"])
def test_files_that_are_no_weights(tmp_path, kind, state):
    path = tmp_path / "x.pt"
    torch.save(state, path)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a model")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.txt", "hello")
    else:
        torch.save([torch.ones(2)], path)
    with pytest.raises(BitnetError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_old_torch_and_compressed_files_are_refused(tmp_path, monkeypatch, state):
    torch.save(state, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as whole:
        names = {n: whole.read(n) for n in whole.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for name, data in names.items():
            small.writestr(name, data)
    with pytest.raises(BitnetError, match="a compressed zip, not a torch checkpoint"):
        read(tmp_path / "bomb.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(BitnetError, match="torch 2.5.1.cpu cannot read this safely"):
        read(tmp_path / "x.pt")


def test_damaged_files_give_tensors_or_one_line(tmp_path, state):
    path, random = tmp_path / "x.pt", np.random.default_rng(0)
    torch.save(state, path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for _ in range(60):
        data = whole.copy()
        at = random.integers(0, len(data), 8)
        data[at] = random.integers(0, 256, 8)
        path.write_bytes(data.tobytes())
        try:
            read(path)
        except BitnetError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 10


def test_a_tensor_without_plain_form():
    with pytest.raises(BitnetError, match="w is no plain tensor"):
        from_state_dict({"w": torch.eye(3).to_sparse()})


def test_without_torch_the_message_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_bytes(b"1")
    monkeypatch.setitem(sys.modules, "torch", None)  # what an import then finds
    with pytest.raises(BitnetError, match="`pip install torch`, or save it as .safetensors"):
        read(tmp_path / "x.pt")
