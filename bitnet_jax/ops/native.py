"""The CPU op in C++: packed codes read as they are stored, int8 in, int32 out, exact.

It is compiled at first use, never at import, with the compiler that is there and the headers of the
jaxlib that runs: a library built with newer headers would make XLA's whole CPU backend fail, which
is also why no binary is installed with the package. It lies in a cache afterwards. Without a
compiler there is no native op, `status` says so, and nothing else changes.

``python -m bitnet_jax.ops.native`` compiles it now, for an image or a cluster, and prints `status`.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cpp", "native_kernels.h"))
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-w")
_TARGET = "bitnet_packed_product"
LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class _Library:
    variants: tuple[str, ...]  # that run here and compute what they should, the best first
    status: str


class Unavailable(Exception):
    """Why there is no native op, as a sentence for `status`."""


def _compiler() -> list[str]:
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
            [*command, str(source), "-o", str(made)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise Unavailable(f"no native op: {command[0]} failed ({first.strip()[:200]})")
        os.replace(made, file)


def library_of(sources: tuple[Path, ...]) -> ctypes.CDLL:
    """The library of a source file and the headers of ours it includes, compiled if need be."""
    compiler, *own = _compiler()  # $CXX may bring flags; they come last, to win
    command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", *own]
    file = _library_file(command, sources)
    if not file.exists():
        _compile(command, sources[0], file)
    return ctypes.CDLL(str(file))


def _trusted(library) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(variants that are right on this CPU, variants that run here and are wrong)."""
    names, right, wrong = [], [], []
    while name := library.bitnet_variant(len(names)):
        names.append(name)
        found = library.bitnet_check(ctypes.c_char_p(name))
        if found >= 0:
            (right if found else wrong).append(name.decode())
    return tuple(right), tuple(wrong)


def _open() -> _Library:
    if os.environ.get("BITNET_JAX_NATIVE") == "0":
        raise Unavailable("no native op: BITNET_JAX_NATIVE=0 switches it off")
    library = library_of(_SOURCES)
    library.bitnet_variant.restype = ctypes.c_char_p
    right, wrong = _trusted(library)
    dropped = f"; left out, because its sums were wrong here: {', '.join(wrong)}" if wrong else ""
    if not right:
        raise Unavailable(f"no native op{dropped}")
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library[_TARGET]), platform="cpu")
    also = f" (also here: {', '.join(right[1:])})" if right[1:] else ""
    return _Library(right, f"native op, variant {right[0]}{also}{dropped}")


@functools.cache
def _loaded() -> _Library:
    try:
        return _open()
    except Unavailable as why:
        return _Library((), str(why))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return _Library((), f"no native op: {type(error).__name__}: {str(error)[:200]}")


def _library() -> _Library:
    with LOCK:  # one compilation, however many threads ask
        return _loaded()


def status() -> str:
    """One sentence: which variant of the native op is used here, or why there is none.

    Compiles the op if that was not done yet, which takes some seconds, once.
    """
    return _library().status


def variants() -> tuple[str, ...]:
    """Variants of the native op that run here, the best first; empty where there is none."""
    return _library().variants


def packed_product(
    x: jax.Array,
    codes: jax.Array,
    in_features: int,
    index: jax.Array | None = None,
    *,
    isa: str | None = None,
) -> jax.Array:
    """int8 activations times packed ternary codes, on the CPU, in C++; see `xla.packed_product`.

    out[b, m, n] = sum over k of x[b, m, k] * code[b, k, n]

    Args:
      x: int8 (*batch, rows, k).
      codes: uint8 (*batch, ceil(k / 4), n), as `bitnet_jax.packed.pack_codes` makes them; with an
        index (*batch, layers, ceil(k / 4), n).
      in_features: k.
      index: int32 (*batch), which layer of codes to multiply by: no slice of them is copied, as
        `jax.lax.scan` over stacked layers would.
      isa: a name out of `variants`, to force it.

    Returns:
      int32 (*batch, rows, n). Batch axes broadcast.

    Raises:
      RuntimeError: if there is no native op here, with `status` as the reason.

    >>> if variants():
    ...     print(packed_product(jnp.full((1, 3), 2, jnp.int8), jnp.array([[170]], jnp.uint8), 3))
    ... else:
    ...     print("[[6]]")
    [[6]]
    """
    library = _library()
    if not library.variants:
        raise RuntimeError(library.status)
    if isa is not None and isa not in library.variants:
        raise ValueError(f"no variant {isa!r} here, only {', '.join(library.variants)}")
    if index is None:
        codes, index = jnp.expand_dims(codes, -3), jnp.zeros((), jnp.int32)
    *_, rows, size = x.shape
    if size != in_features or codes.shape[-2] != -(-size // 4):
        raise ValueError(f"x {x.shape} and codes {codes.shape} do not fit {in_features} features")
    batch = np.broadcast_shapes(x.shape[:-2], codes.shape[:-3], index.shape)
    spread = lambda a, own: a.reshape((1,) * (len(batch) + own - a.ndim) + a.shape)
    operands = spread(x, 2), spread(codes, 3), spread(index.astype(jnp.int32), 0)
    # A sum of all three has what shard_map wants to know: along which mesh axes results differ.
    out = jax.eval_shape(
        lambda *a: (
            jnp.zeros((*batch, rows, codes.shape[-1]), jnp.int32)
            + sum(x.sum(dtype=jnp.int32) for x in a)
        ),
        *operands,
    )
    call = jax.ffi.ffi_call(_TARGET, out, vmap_method="expand_dims")
    return call(*operands, isa=isa or library.variants[0])


if __name__ == "__main__":
    print(status())
