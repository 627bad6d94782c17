"""A model of two billion parameters converted leaf by leaf: peak memory beside one float copy.

    python -m benchmarks.two_billion --out benchmarks/results/two_billion

Writes a safetensors file of bfloat16 (4 GB, and half as much free disk again is needed) in a
temporary folder and runs what `bitnet-jax compress FILE --out DIR` runs without --data. Weights
stay in the file: the pages of it that were touched lie in the kernel's cache and count as file
memory, which the kernel takes back when it needs it; what the process itself holds is the rest.
"""

import json
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from bitnet_jax.bench.timing import keep

_POOL = 1 << 22


def shapes(layers: int, width: int, hidden: int, vocabulary: int) -> dict[str, tuple[int, int]]:
    """Names and shapes as PyTorch has them, (out, in)."""
    found = {"embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        found |= {f"layers.{i}.{n}.weight": (width, width) for n in ("q", "k", "v", "o")}
        found |= {f"layers.{i}.{n}.weight": (hidden, width) for n in ("gate", "up")}
        found[f"layers.{i}.down.weight"] = (width, hidden)
    return found


def write(file: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Normal values, drawn once and turned a little further for every tensor."""
    pool = np.random.default_rng(0).standard_normal(_POOL, dtype=np.float32) * 0.02
    pool = pool.astype(ml_dtypes.bfloat16)
    header, at = {}, 0
    for name, (out, size) in sizes.items():
        end = at + 2 * out * size
        header[name] = {"dtype": "BF16", "shape": [out, size], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for i, (out, size) in enumerate(sizes.values()):
            turned, left = np.roll(pool, 9973 * i), out * size
            while left:
                f.write(turned[:left].tobytes())
                left -= min(left, _POOL)


class Memory:
    """The most this process held, looked at fifty times a second: its own, and with the file's."""

    def __init__(self):
        self.own = self.all = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            found = {k: v for k, _, v in (x.partition(":") for x in lines)}
            size = lambda name: 1024 * int(found[name].split()[0])  # noqa: B023
            self.own = max(self.own, size("RssAnon") + size("RssShmem"))
            self.all = max(self.all, size("VmRSS"))
            time.sleep(0.02)


def table(result: dict) -> Table:
    found = Table(title=f"{result['parameters']:,} parameters, {result['scheme']}")
    found.add_column("")
    found.add_column("GB", justify="right")
    for name, size in result["gigabytes"].items():
        found.add_row(name, f"{size:.2f}")
    return found


def main(
    out: Path | None = None,
    layers: int = 24,
    width: int = 2560,
    hidden: int = 6912,
    vocabulary: int = 32000,
    folder: Path | None = None,
) -> None:
    """Convert and print.

    Args:
      out: also write the figures to OUT.json and the table to OUT.txt.
      layers, width, hidden, vocabulary: of the model.
      folder: where the temporary files go.
    """
    from bitnet_jax import Scheme, compress

    console, sizes = Console(), shapes(layers, width, hidden, vocabulary)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        file = Path(temporary) / "model.safetensors"
        with console.status("writing the file", spinner="line"):
            write(file, sizes)
        made, memory, began = Path(temporary) / "out", Memory(), time.perf_counter()
        made.mkdir()
        start = memory.own
        source, scheme = compress.load_weights(file), Scheme("twn", "channel")
        policy = compress.make_policy("float16")
        done = compress.pack_only(source, made, policy, scheme, file, console)
        seconds = time.perf_counter() - began
    parameters = done["parameters"]
    gigabytes = {
        "one float32 copy": 4 * parameters / 1e9,
        "the file, bfloat16": 2 * parameters / 1e9,
        "packed, on disk": done["bytes_on_disk"]["packed"] / 1e9,
        "before the conversion, own memory": start / 1e9,
        "peak, own memory": memory.own / 1e9,
        "peak, with the file's pages": memory.all / 1e9,
    }
    result = {"parameters": parameters, "scheme": "twn, a scale a channel", "seconds": seconds}
    result |= {"conversion_seconds": done["seconds"]["conversion"], "gigabytes": gigabytes}
    console.print(table(result))
    console.print(f"{seconds:.0f} s in all, {result['conversion_seconds']:.0f} s of conversion")
    keep(out, result, table(result))


if __name__ == "__main__":
    tyro.cli(main)
