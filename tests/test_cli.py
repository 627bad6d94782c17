"""The command as a user types it: outcomes, exit statuses, and one line for every mistake."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import bitnet_jax
from bitnet_jax import checkpoint, cli, demo, sandbox
from bitnet_jax.ops import OPS, choose

from .test_phase4 import TINY


@pytest.fixture
def tiny_demo(monkeypatch, tmp_path):
    run = demo.run
    monkeypatch.setattr(demo, "run", lambda out, **kw: run(out, TINY, **kw))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def packed(tmp_path):
    weights = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    tree = bitnet_jax.convert({"up": {"kernel": weights, "bias": np.ones(32, np.float32)}}).tree
    checkpoint.save(tmp_path / "model", tree, {"note": "a test"})
    return tmp_path / "model"


def complaint(capsys) -> str:
    """What went to stderr, which must be one line."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("bitnet-jax: ")
    return lines[0]


def test_demo_writes_model_report_and_json(tiny_demo, tmp_path, capsys):
    assert cli.main(["demo", "--out", "model", "--json", "figures.json"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"relative_accuracy_loss", "ratio_on_disk"} <= set(figures)
    assert (tmp_path / "model" / "packed" / "manifest.json").is_file()
    printed = capsys.readouterr().out
    assert "x smaller, everything counted" in printed and "Packed model" in printed
    assert cli.main(["inspect", "model/packed"]) == 0


def test_demo_takes_a_free_folder_by_itself(tiny_demo, tmp_path):
    (tmp_path / "bitnet-demo").mkdir()
    assert cli.main(["demo", "--epochs", "1"]) == 0
    assert (tmp_path / "bitnet-demo-2" / "packed").is_dir()
    assert not list((tmp_path / "bitnet-demo").iterdir())


def test_an_existing_folder_is_refused_and_left_alone(tiny_demo, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert cli.main(["demo", "--out", "mine"]) == 1
    assert "mine: exists already" in complaint(capsys)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_json_file_that_cannot_be_written_is_told_before_the_work(tiny_demo, tmp_path, capsys):
    assert cli.main(["demo", "--out", "model", "--json", "no/such/folder/x.json"]) == 1
    assert "no/such/folder/x.json" in complaint(capsys)
    assert not (tmp_path / "model").exists()


def test_no_epochs_is_a_mistake(tiny_demo, capsys):
    assert cli.main(["demo", "--epochs", "0"]) == 1
    assert "--epochs 0" in complaint(capsys)


def test_sandbox_reports_and_exits_by_its_checks(tmp_path, monkeypatch, capsys):
    target = tmp_path / "sandbox.json"
    result = sandbox.run()
    monkeypatch.setattr(sandbox, "run", lambda: result)
    assert cli.main(["sandbox", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())
    assert len(figures["checks"]) == 6
    assert all(check["passed"] for check in figures["checks"].values())
    assert "6 of 6 checks passed" in capsys.readouterr().out
    monkeypatch.setattr(sandbox, "run", lambda: result | {"passed": 5})
    assert cli.main(["sandbox"]) == 1


def test_inspect_counts_what_is_there(packed, tmp_path, capsys):
    target = tmp_path / "found.json"
    assert cli.main(["inspect", str(packed), "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    kernel = next(x for x in found["leaves"] if x["path"] == "up/kernel")
    assert kernel["minus"] + kernel["zeros"] + kernel["plus"] == 64 * 32
    assert kernel["bytes"] == 64 * 32 // 4 + 4
    assert found["parameters"] == 64 * 32 + 32
    assert found["bytes_on_disk"] == checkpoint.size_on_disk(packed)
    printed = capsys.readouterr().out
    assert "note: a test" in printed and "All checksums hold" in printed


def test_inspect_finds_one_flipped_bit_in_any_file(packed, capsys):
    for file in sorted(p for p in packed.rglob("*") if p.is_file() and p.stat().st_size):
        whole = file.read_bytes()
        middle = len(whole) // 2
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        assert cli.main(["inspect", str(packed)]) == 1
        assert file.name in complaint(capsys)
        file.write_bytes(whole)
    assert cli.main(["inspect", str(packed)]) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such folder"),
        (lambda p: p.write_text("hello"), "no such folder"),
        (lambda p: p.mkdir(), "not a bitnet-jax checkpoint"),
    ],
)
def test_inspect_says_what_is_no_checkpoint(tmp_path, capsys, make, message):
    make(tmp_path / "thing")
    assert cli.main(["inspect", str(tmp_path / "thing")]) == 1
    line = complaint(capsys)
    assert message in line and "thing" in line


def test_inspect_points_at_the_checkpoints_inside_a_folder(packed, capsys):
    assert cli.main(["inspect", str(packed.parent)]) == 1
    assert complaint(capsys).endswith("inside it these are: model")


TINY_DEMO = """
import sys, {imports}
from bitnet_jax import cli, demo
from tests.test_phase4 import TINY
run = demo.run
demo.run = lambda out, **kw: run(out, TINY, **kw)
{before}
sys.exit(cli.main(["demo", "--out", sys.argv[1]]))
"""


def python(code: str, *args: str) -> subprocess.Popen:
    root = os.path.dirname(os.path.dirname(__file__))
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


def test_a_full_disk_ends_with_one_line(tmp_path):
    """A limit on file size stands for a full disk: writes fail the same way, as root too."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))"
    code = TINY_DEMO.format(imports="resource", before=limit)
    process = python(code, str(tmp_path / "out"))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("bitnet-jax: "), err
    assert re.search("disk space", lines[0])
    assert not (tmp_path / "out" / "packed").exists()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_stop_in_the_middle_leaves_only_whole_checkpoints(tmp_path, sign):
    longer = "import dataclasses; TINY = dataclasses.replace(TINY, float_steps=300)"
    # A shell's background jobs are started deaf to Ctrl-C, and so are their children.
    hearing = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = TINY_DEMO.format(imports="signal", before=f"{hearing}; {longer}")
    process = python(code, str(tmp_path / "out"))
    log = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    # Python loses a Ctrl-C that lands in a callback of the garbage collector; one presses it again.
    while process.poll() is None:
        process.send_signal(sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)
    _, err = process.communicate()
    assert process.returncode == (130 if sign == signal.SIGINT else -sign), err
    if sign == signal.SIGINT:
        assert "Traceback" not in err and "stopped" in err
    for folder in ("packed", "float32", "latent/last", "latent/best"):
        if (tmp_path / "out" / folder).exists():
            checkpoint.load(tmp_path / "out" / folder)


def test_doctor_says_what_multiplies_here(tmp_path, capsys):
    assert cli.main(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    found, told = json.loads((tmp_path / "d.json").read_text()), capsys.readouterr().out
    assert found["native"].split(",")[0] in told
    assert {x["op"] for x in found["choices"]} <= set(OPS)
    assert all(x["op"] == choose(found["platform"], x["rows"]) for x in found["choices"])
