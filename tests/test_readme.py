"""The README's Python blocks run as written, one after another."""

import re
import shutil
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suffix in ("safetensors", "json"):  # the pipeline's file the README speaks of
        file = README.parent / "tests/golden/phase3_tiny" / f"model.{suffix}"
        shutil.copy(file, tmp_path / f"phase3_final.{suffix}")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    scope: dict = {}
    for block in blocks:
        exec(block, scope)
    x, packed = scope["x"], scope["packed"]
    assert packed.report.unmatched == ()
    reloaded = scope["model"].apply(scope["tree"], x)
    assert (reloaded == scope["y"]).all()


def test_commands_are_the_two_a_newcomer_types():
    commands = re.findall(r"^pip install .*$", README.read_text(), re.MULTILINE)
    assert commands[:2] == ["pip install . && bitnet-jax demo", "pip install '.[test]' && pytest"]
