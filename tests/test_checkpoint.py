import json
import os
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from orbax.checkpoint import v1 as ocp

from bitnet_jax import BitnetError, PackedTernary, Scheme, quantize_weights
from bitnet_jax.checkpoint import load, read_manifest, save, size_on_disk
from bitnet_jax.packed import pack_weight

from .battery import normal, run_python


def tree_of(seed=0):
    weight = quantize_weights(normal(seed, 6, 4), Scheme("twn", 4))
    stack = quantize_weights(normal(seed, 3, 5, 2), Scheme("absmean", "channel"))
    return {
        "params": {
            "packed": {"kernel": pack_weight(weight), "bias": normal(seed, 4)},
            "ternary": {"kernel": weight},
            "stacked": pack_weight(stack),
            "bf16": normal(seed, 3, 2).astype(jnp.bfloat16),
            "f16": normal(seed, 5).astype(jnp.float16),
        },
        "step": jnp.int32(7),
        "bytes": jnp.arange(5, dtype=jnp.uint8),
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "no": {"leaf": {"codes": normal(seed, 2), "scale": normal(seed, 3)}},
    }


def raw(x):
    x = np.asarray(x)
    return x.dtype.name, x.shape, x.tobytes()


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [raw(x) for x in jax.tree.leaves(a)] == [raw(x) for x in jax.tree.leaves(b)]


def files_in(path):
    return sorted(f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file())


def refused(path, capfd):
    """The one-line message of the refusal; nothing may be printed beside it."""
    capfd.readouterr()
    with pytest.raises(BitnetError) as error:
        load(path)
    assert capfd.readouterr() == ("", "")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    save(path, tree_of(), {"name": "toy"}, {"tokenizer.json": b"{}"})
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_round_trip_without_a_template(saved):
    got = load(saved)
    same(got.tree, tree_of())
    assert got.metadata == {"name": "toy"}
    assert got.files == {"tokenizer.json": b"{}"}
    leaf = got.tree["params"]["packed"]["kernel"]
    assert (leaf.in_features, leaf.group, leaf.shape) == (6, 4, (6, 4))
    assert type(got.tree["no"]["leaf"]) is dict


def test_nothing_beside_the_checkpoint(saved):
    assert [f.name for f in saved.parent.iterdir()] == ["model"]
    assert size_on_disk(saved) == sum((saved / f).stat().st_size for f in files_in(saved))


@pytest.mark.parametrize(
    "tree",
    [
        {"kernel": pack_weight(quantize_weights(jnp.eye(3)))},
        {"codes": quantize_weights(jnp.eye(3)), "scale": jnp.ones(2)},
        {"codes": jnp.ones(1), "scale": {"codes": jnp.ones(1), "scale": jnp.ones(2)}},
        {"scale": {"codes": pack_weight(quantize_weights(jnp.eye(2))), "scale": jnp.ones(2)}},
        {"kernel": quantize_weights(jnp.zeros((0, 4)))},
        {"empty": jnp.zeros((0,), jnp.int8)},
        {"params": {"a": jnp.ones(1)}, "b": jnp.ones(2)},
    ],
    ids=lambda t: "-".join(t),
)
def test_round_trip_of_odd_trees(tree, tmp_path):
    save(tmp_path / "model", tree)
    same(load(tmp_path / "model").tree, tree)


def test_special_values_keep_their_bits(tmp_path):
    x = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32).view(np.float32)
    save(tmp_path / "model", {"x": jnp.asarray(x)})
    same(load(tmp_path / "model").tree, {"x": x})


def test_boxes_are_removed(tmp_path):
    box = lambda a: nn.Partitioned(a, ("in", "out"))
    leaf = pack_weight(quantize_weights(normal(0, 8, 4)))
    boxed = PackedTernary(box(leaf.codes), box(leaf.scale), 8)
    save(tmp_path / "model", {"plain": box(jnp.ones((2, 2))), "packed": boxed, "whole": box(leaf)})
    same(load(tmp_path / "model").tree, {"plain": jnp.ones((2, 2)), "packed": leaf, "whole": leaf})


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted"])
def test_every_damaged_file_is_named(damage, saved, copy, capfd):
    for name in files_in(saved):
        file = copy / name
        data = bytearray(file.read_bytes())
        if damage == "deleted":
            file.unlink()
        elif not data:
            continue
        elif damage == "truncated":
            file.write_bytes(data[:-1])
        else:
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        message = refused(copy, capfd)
        assert name in message, message
        shutil.copy(saved / name, file)
    load(copy)


@pytest.mark.parametrize("bit", range(8))
def test_no_flipped_bit_of_the_manifest_is_missed(bit, saved, copy, capfd):
    data = (saved / "manifest.json").read_bytes()
    for at in range(bit, len(data), 37):
        (copy / "manifest.json").write_bytes(
            data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
        )
        message = refused(copy, capfd)
        assert "manifest.json" in message or "version" in message


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{}", b'{"version": 1}', b"\xff\xfe", b"3"])
def test_a_manifest_that_is_none(text, copy, capfd):
    (copy / "manifest.json").write_bytes(text)
    assert "manifest.json: damaged" in refused(copy, capfd)


def forge(path, change):
    """Alter the manifest and make its own checksums right again."""
    ours = read_manifest(path)
    change(ours)
    for name in ours["files"]:
        ours["files"][name] = zlib.crc32((path / name).read_bytes())
    text = lambda d: json.dumps(d, sort_keys=True, separators=(",", ":"))
    ours["self"] = zlib.crc32(text(ours).encode())
    (path / "manifest.json").write_text(text(ours))


def test_a_leaf_that_is_not_the_one_saved_is_named(copy, capfd):
    def change(ours):
        ours["crc32"]["packed/kernel/codes"] ^= 1

    forge(copy, change)
    assert "leaf packed/kernel/codes is damaged (checksum" in refused(copy, capfd)


def test_a_leaf_that_is_missing_is_named(copy, capfd):
    forge(copy, lambda ours: ours["crc32"].update({"gone/kernel": 1}))
    assert "leaf gone/kernel is missing" in refused(copy, capfd)


def test_weights_of_another_checkpoint_are_noticed(copy, tmp_path, capfd):
    save(tmp_path / "other", tree_of(1))
    shutil.rmtree(copy / "weights")
    shutil.copytree(tmp_path / "other" / "weights", copy / "weights")
    files = lambda ours: ours.update(files={n: 0 for n in files_in(copy) if n != "manifest.json"})
    forge(copy, files)
    assert "is damaged" in refused(copy, capfd)


def test_another_version_is_refused(copy, capfd):
    forge(copy, lambda ours: ours.update(version=2))
    assert "format version 2, this bitnet-jax reads 1; upgrade it" in refused(copy, capfd)


def test_not_a_checkpoint(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert "file: no such folder" in refused(tmp_path / "file", capfd)
    assert "none: no such folder" in refused(tmp_path / "none", capfd)
    assert "folder: not a bitnet-jax checkpoint" in refused(tmp_path / "folder", capfd)


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("a/b/model", {"x": jnp.ones(2)})
    same(load("a/../a/b/model").tree, {"x": jnp.ones(2)})
    assert read_manifest("a/b/model")["version"] == 1


def test_existing_paths_are_refused_unless_overwritten(tmp_path):
    save(tmp_path / "model", {"x": jnp.zeros(2)}, files={"old.txt": b"old"})
    with pytest.raises(BitnetError, match="exists already"):
        save(tmp_path / "model", {"x": jnp.ones(2)})
    same(load(tmp_path / "model").tree, {"x": jnp.zeros(2)})
    save(tmp_path / "model", {"x": jnp.ones(2)}, overwrite=True)
    same(load(tmp_path / "model").tree, {"x": jnp.ones(2)})
    assert load(tmp_path / "model").files == {}
    assert os.listdir(tmp_path) == ["model"]


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "new"])
@pytest.mark.parametrize("where", ["weights", "manifest", "rename"])
def test_a_save_that_fails_leaves_what_was(where, old, tmp_path, monkeypatch):
    path = tmp_path / "model"
    if old:
        save(path, tree_of())
    if where == "weights":
        monkeypatch.setattr(ocp, "save", full)
    elif where == "manifest":
        monkeypatch.setattr("pathlib.Path.write_text", full)
    else:
        rename = os.rename
        into_place = lambda a, b: ".saving-" in str(a) and str(b) == str(path)
        monkeypatch.setattr(os, "rename", lambda a, b: full() if into_place(a, b) else rename(a, b))
    with pytest.raises(BitnetError, match=r"could not be saved \(.*No space left") as error:
        save(path, tree_of(1), overwrite=True)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["model"] if old else [])
    if old:
        same(load(path).tree, tree_of())


FULL_DISK = """
import resource, sys
import jax.numpy as jnp
from bitnet_jax import BitnetError
from bitnet_jax.checkpoint import save
save(sys.argv[1], {"x": jnp.zeros(2)})
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    import numpy as np
    x = np.random.default_rng(0).standard_normal(100_000, np.float32)
    save(sys.argv[1], {"x": jnp.asarray(x)}, overwrite=True)
except BitnetError as e:
    print(e)
"""


def test_files_that_cannot_be_written_whole(tmp_path):
    done = run_python(FULL_DISK, tmp_path / "model", 50_000)
    assert "could not be saved" in done.stdout, done
    assert done.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == ["model"]
    same(load(tmp_path / "model").tree, {"x": jnp.zeros(2)})


KILLED = """
import os, signal, sys, threading, time
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp
from bitnet_jax import checkpoint

path = sys.argv[1]
count, targets = 0, {"weights": (ocp, "save"), "rename": (os, "rename")}


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(name, at, after):
    module, attribute = targets[name]
    real = getattr(module, attribute)

    def wrapper(*a, **k):
        global count
        # Orbax renames too, inside the hidden folder.
        count += name == "weights" or ".replaced-" in str(a[1]) or str(a[1]).endswith("/model")
        if count == at and not after:
            die()
        real(*a, **k)
        if count == at:
            die()

    setattr(module, attribute, wrapper)


x = jnp.arange(50_000.0)
for name, at, after in (
    ("weights", 1, False),
    ("weights", 1, True),
    ("rename", 1, False),
    ("rename", 1, True),
    ("rename", 2, True),
    *(("timer", ms, False) for ms in (2, 5, 8, 12, 16, 20, 25, 30)),
):
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        continue
    to = f"{path}/{name}-{at}-{after}/model"
    checkpoint.save(to, {"old": x})
    if name == "timer":
        threading.Timer(at / 1000, die).start()
    else:
        arm(name, at, after)
    checkpoint.save(to, {"new": x}, overwrite=True)
    os._exit(0)
"""


def test_a_killed_save_leaves_the_old_or_the_new(tmp_path):
    """Killed at each step of the swap and at some times of the writing."""
    done = run_python(KILLED, tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    seen = {}
    for folder in sorted(tmp_path.iterdir()):
        seen[folder.name] = next(iter(load(folder / "model").tree))
        save(folder / "model", {"next": jnp.ones(2)}, overwrite=True)
        assert os.listdir(folder) == ["model"]
        same(load(folder / "model").tree, {"next": jnp.ones(2)})
    assert len(seen) == 13
    for name, left in seen.items():
        if not name.startswith("timer"):
            assert left == ("new" if name == "rename-2-True" else "old"), name


def test_an_old_one_set_aside_by_a_kill_is_not_overwritten_unasked(tmp_path):
    save(tmp_path / "model", {"x": jnp.ones(2)})
    os.rename(tmp_path / "model", tmp_path / ".model.replaced-1")
    same(load(tmp_path / "model").tree, {"x": jnp.ones(2)})
    with pytest.raises(BitnetError, match="exists already"):
        save(tmp_path / "model", {"y": jnp.ones(2)})
    same(load(tmp_path / "model").tree, {"x": jnp.ones(2)})
    assert os.listdir(tmp_path) == ["model"]


def test_only_leftovers_of_ours_are_cleared(tmp_path):
    others = [".model.cache-1", ".model.v2.saving-1", ".model.saving-notes", "model.saving-1"]
    for name in [*others, ".model.saving-1"]:
        (tmp_path / name).mkdir()
    save(tmp_path / "model", {"x": jnp.ones(2)})
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "model"])


SHARDED = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from bitnet_jax import quantize_weights
from bitnet_jax.checkpoint import load, save
from bitnet_jax.leaf import PackedTernary
from bitnet_jax.packed import pack_weight

mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
leaf = pack_weight(quantize_weights(jnp.arange(128.0).reshape(32, 4) - 64))
tree = {
    "kernel": PackedTernary(put(leaf.codes, "d"), put(leaf.scale), 32),
    "rows": put(jnp.arange(8.0), "d"),
}
save(sys.argv[1], tree)
assert {len(x.devices()) for x in jax.tree.leaves(load(sys.argv[1]).tree)} == {1}
"""


def test_saved_from_four_devices_loads_on_one(tmp_path):
    done = run_python(SHARDED, tmp_path / "model", devices=4, check=False)
    assert done.returncode == 0, done.stderr
    leaf = pack_weight(quantize_weights(jnp.arange(128.0).reshape(32, 4) - 64))
    same(load(tmp_path / "model").tree, {"kernel": leaf, "rows": jnp.arange(8.0)})


@pytest.mark.parametrize(
    ("tree", "files", "message"),
    [
        ({}, {}, "nothing to save"),
        ({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, {}, "same path"),
        ({"a": jnp.ones(2)}, {"manifest.json": b""}, "manifest.json"),
        ({"a": jnp.ones(2)}, {"../up": b""}, "up"),
    ],
)
def test_what_could_not_be_read_back_is_refused(tmp_path, tree, files, message):
    with pytest.raises(BitnetError, match=message):
        save(tmp_path / "x", tree, files=files)
    assert not list(tmp_path.iterdir())


def test_overwrite_spares_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(BitnetError, match="no checkpoint"):
        save(tmp_path / "mine", {"a": jnp.ones(2)}, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
