"""C++ ops, compiled at first use, never at import, and kept in a cache.

The compiler is the one that is there, the headers those of the jaxlib that runs: a library built
with newer ones would make XLA's whole CPU backend fail, which is also why no binary is installed
with the package. Without a compiler there is no native op, and nothing else changes.
"""

import ctypes
import dataclasses
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
from jax.sharding import AxisType

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-w")
_SHARED = ("lookup.h", "tasks.h", "variants.h", "vectors.h")
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Library:
    """What is there of a native op: variants that run here and are right, the best first."""

    variants: tuple[str, ...]
    status: str

    def pick(self, isa: str | None = None) -> str:
        """The variant of that name, or the best.

        Raises:
          RuntimeError: if there is none at all, with `status` as the reason.
          ValueError: if there is none of that name.
        """
        if not self.variants:
            raise RuntimeError(self.status)
        if isa is not None and isa not in self.variants:
            raise ValueError(f"no variant {isa!r} here, only {', '.join(self.variants)}")
        return isa or self.variants[0]


class Unavailable(Exception):
    """Why there is no native op, as a sentence for `Library.status`."""


def compiler() -> list[str]:
    """The command of the C++ compiler, with the flags that $CXX may bring."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    raise Unavailable("no native op: no C++ compiler was found (g++, clang++, c++ or $CXX)")


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
            [*command, str(source), "-o", str(made)], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise Unavailable(f"no native op: {command[0]} failed ({first.strip()[:200]})")
        os.replace(made, file)


def trusted(library) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(variants that are right on this CPU, variants that run here and are wrong)."""
    names, right, wrong = [], [], []
    while name := library.bitnet_variant(len(names)):
        names.append(name)
        found = library.bitnet_check(ctypes.c_char_p(name))
        if found >= 0:
            (right if found else wrong).append(name.decode())
    return tuple(right), tuple(wrong)


def _open(sources: tuple[Path, ...], targets: tuple[str, ...]) -> Library:
    if os.environ.get("BITNET_JAX_NATIVE") == "0":
        raise Unavailable("no native op: BITNET_JAX_NATIVE=0 switches it off")
    first, *own = compiler()  # $CXX may bring flags; they come last, to win
    command = [first, *_FLAGS, f"-I{jax.ffi.include_dir()}", *own]
    file = _library_file(command, sources)
    if not file.exists():
        _compile(command, sources[0], file)
    library = ctypes.CDLL(str(file))
    library.bitnet_variant.restype = ctypes.c_char_p
    right, wrong = trusted(library)
    dropped = f"; left out, because its sums were wrong here: {', '.join(wrong)}" if wrong else ""
    if not right:
        raise Unavailable(f"no native op{dropped}")
    for target in targets:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(library[target]), platform="cpu")
    also = f" (also here: {', '.join(right[1:])})" if right[1:] else ""
    return Library(right, f"native op, variant {right[0]}{also}{dropped}")


def explicitly_sharded(x: jax.Array) -> bool:
    """Whether x's mesh has axes that are part of types: no op can say how its result lies there."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def opener(*names: str, targets: tuple[str, ...]) -> Callable[[], Library]:
    """A function that compiles a library and registers its ops, once, at its first call.

    Args:
      names: the source file to compile, and the files of its own it includes, beside this one. It
        defines `bitnet_variant` (i -> name, null after the last) and `bitnet_check` (name -> 1 if
        its results are right here, 0 if wrong, -1 if this CPU lacks it).
      targets: the FFI handlers it defines.
    """
    sources = tuple(Path(__file__).with_name(name) for name in (*names, *_SHARED))
    found: list[Library] = []

    def library() -> Library:
        with _LOCK:  # one compilation, however many threads ask
            if not found:
                try:
                    found.append(_open(sources, targets))
                except Unavailable as why:
                    found.append(Library((), str(why)))
                except (OSError, subprocess.SubprocessError, AttributeError) as error:
                    reason = f"{type(error).__name__}: {str(error)[:200]}"
                    found.append(Library((), f"no native op: {reason}"))
        return found[0]

    return library
