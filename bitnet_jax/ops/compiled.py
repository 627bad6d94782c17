"""C++ compiled at first use: with the compiler that is there, for the jaxlib that runs.

A library built with newer headers would make XLA's whole CPU backend fail, which is why no binary
is installed with the package. It lies in a cache afterwards.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-w")


class Unavailable(Exception):
    """Why there is no library, as the end of a sentence."""


def _compiler() -> list[str]:
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    raise Unavailable("no C++ compiler was found (g++, clang++, c++ or $CXX)")


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bitnet_jax"


def _library_file(command: list[str], sources: tuple[Path, ...]) -> Path:
    """Everything that decides what the library holds is in its name, so none is ever stale."""
    include = Path(jax.ffi.include_dir())
    key = hashlib.sha256(" ".join((*command, version("jaxlib"), platform.machine())).encode())
    for file in (*sources, include / "xla" / "ffi" / "api" / "c_api.h"):
        key.update(file.read_bytes())
    return _cache() / f"{sources[0].stem}-{key.hexdigest()[:20]}.so"


def _compile(command: list[str], source: Path, file: Path) -> None:
    """Written beside its place and renamed: complete or absent, however many processes try."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        done = subprocess.run(
            [*command, str(source), "-o", str(made)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise Unavailable(f"{command[0]} failed ({first.strip()[:200]})")
        os.replace(made, file)


def opened(*names: str) -> ctypes.CDLL:
    """The library of C++ files beside this one, compiled if it was not yet.

    Args:
      names: the file to compile, then what it includes.

    Raises:
      Unavailable: if there is none, for whatever reason.
    """
    if os.environ.get("BITNET_JAX_NATIVE") == "0":
        raise Unavailable("BITNET_JAX_NATIVE=0 switches it off")
    sources = tuple(Path(__file__).with_name(name) for name in names)
    compiler, *own = _compiler()  # $CXX may bring flags; they come last, to win
    command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", *own]
    try:
        file = _library_file(command, sources)
        if not file.exists():
            _compile(command, sources[0], file)
        return ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{type(error).__name__}: {str(error)[:200]}") from error
