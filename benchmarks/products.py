"""The product of int8 activations and packed codes beside its peers, in one run, interleaved.

    python -m benchmarks.products                                # one thread, CPU time
    python -m benchmarks.products --threads 2 --only matmul      # wall time, beside one thread's
    pip install xllamacpp                                        # to have llama.cpp among the peers

Weights rotate over copies of at least 512 MB (packed: 0.5 G parameters, 128 MB), so none is in the
cache ("cold"). One row's product takes little more time than Python needs to ask for it, so a call
makes `AT_ONCE` of them: packed codes lie in one array, layer by layer, and a scan goes through it.
The line "one a call" has what asking costs as well. The floor is the time in which
`products.c` reads the packed bytes once, on one core. Matrices of 384 inputs or outputs, which a
small model trains with, stay in the cache.
JSON, tables and a plot go to `--out`. Every figure is the median over the rounds, with the 10th and
90th percentiles beside it.
"""

import ctypes
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

SHAPES = ((1, 4096, 4096), (1, 2560, 6912), (1, 6912, 2560), (8, 4096, 4096),
          (128, 2560, 6912), (128, 4096, 4096), (512, 2560, 6912),
          (1024, 384, 384), (1024, 384, 1024), (1024, 1024, 384))  # fmt: skip
AT_ONCE = 16  # products of one row in a call
PLOTTED = ("XLA bfloat16 padded", "torch bfloat16", "llama.cpp Q4_0", "llama.cpp TQ1_0",
           "llama.cpp TQ2_0", "decode", "native")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Timed:
    call: Callable[[int], object]  # multiplies by the weights of set i
    sets: int
    products: int = 1  # in one call


@dataclasses.dataclass(frozen=True)
class Arguments:
    threads: int = 1
    rounds: int = 9
    only: str = ""  # rows whose name contains this
    out: Path = Path(__file__).parent / "results"


def name_of(rows: int, k: int, n: int) -> str:
    return f"matvec-{k}x{n}-cold" if rows == 1 else f"matmul-{rows}x{k}x{n}"


def settle(threads: int) -> None:
    """Keep to the last cores, and tell XLA and torch so. Before jax is imported."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    single = " --xla_cpu_multi_thread_eigen=false" if threads == 1 else ""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + single
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"


@functools.cache
def helpers() -> ctypes.CDLL | None:
    """products.c, compiled; None where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        return None
    file = Path(tempfile.mkdtemp()) / "products.so"
    source = Path(__file__).with_suffix(".c")
    flags = ["-O3", "-march=native", "-fPIC", "-shared", "-w"]
    subprocess.run([compiler, *flags, str(source), "-o", str(file)], check=True)
    return ctypes.CDLL(str(file))


def pointer(a: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


def jitted(product: Callable, x, copies: list, at_once: int = AT_ONCE) -> Timed:
    """A call multiplies by several copies, each of them an argument."""
    import jax

    several = min(at_once, len(copies)) if x.shape[0] == 1 else 1
    call = jax.jit(lambda xs, ws: [product(x, w) for x, w in zip(xs, ws)])
    xs = [x + (0 * i) for i in range(several)]
    sets = [copies[i : i + several] for i in range(0, len(copies) - several + 1, several)]
    jax.block_until_ready(call(xs, sets[0]))
    return Timed(lambda i: jax.block_until_ready(call(xs, sets[i])), len(sets), several)


def scanned(product: Callable, x, stacks: list) -> Timed:
    """A call multiplies by every layer of one stack."""
    import jax
    import jax.numpy as jnp

    layers = len(stacks[0])
    each = lambda stack: lambda _, at: (None, product(at[0], stack, at[1]))
    call = jax.jit(lambda xs, stack: jax.lax.scan(each(stack), None, (xs, jnp.arange(layers)))[1])
    xs = jnp.stack([x] * layers)
    jax.block_until_ready(call(xs, stacks[0]))
    return Timed(lambda i: jax.block_until_ready(call(xs, stacks[i])), len(stacks), layers)


def xla_peers(rows: int, k: int, n: int) -> dict[str, Timed]:
    """Dense products as XLA does them; from two rows up "padded" is the product itself."""
    import jax.numpy as jnp
    from jax import lax

    def dense(x, w, axis, out):
        padded = jnp.pad(x, ((0, int(rows == 1)), (0, 0)))
        dims = (((1,), (axis,)), ((), ()))
        return lax.dot_general(padded, w, dims, preferred_element_type=out)[:rows]

    def weights(shape, dtype):
        count = max(2, (512 << 20) // (k * n * np.dtype(dtype).itemsize)) if rows == 1 else 2
        count = -(-count // 4) * 4 if rows == 1 else count
        one = np.random.default_rng(0).integers(-1, 2, shape).astype(dtype)
        return [jnp.array(one, copy=True) for _ in range(count)]

    float32 = lambda axis: lambda x, w: lax.dot_general(x, w, (((1,), (axis,)), ((), ())))
    padded = lambda dtype: lambda x, w: dense(x, w, 1, dtype)
    x = np.random.default_rng(1).integers(-127, 128, (rows, k))
    ready = lambda dtype: jnp.asarray(x.astype(dtype))
    return {
        "XLA float32 (in, out)": jitted(float32(0), ready("f4"), weights((k, n), "f4")),
        "XLA float32 (out, in)": jitted(float32(1), ready("f4"), weights((n, k), "f4")),
        "XLA bfloat16 padded": jitted(
            padded(jnp.float32), ready(jnp.bfloat16), weights((n, k), jnp.bfloat16)
        ),
        "XLA int8 padded": jitted(padded(jnp.int32), ready("i1"), weights((n, k), "i1")),
    }


def bit_planes(x, codes, in_features: int):
    """The peer that wins where the CPU counts bits in vectors: two weight planes AND eight of x."""
    import jax.numpy as jnp
    from jax import lax

    words = lax.bitcast_convert_type(codes.reshape(-1, 4, codes.shape[1]).mT, jnp.uint32)
    low, high = words & 0x55555555, words >> 1 & 0x55555555
    spread = jnp.uint32(1) << jnp.arange(0, 32, 2, dtype=jnp.uint32)
    inputs = x.astype(jnp.uint8).astype(jnp.uint32).reshape(-1, 16)
    bits = [((inputs >> b & 1) * spread).sum(1, dtype=jnp.uint32)[:, None] for b in range(8)]
    bits = lax.optimization_barrier(bits)
    count = lambda a, b: lax.population_count(a & b).astype(jnp.int32)
    weigh = lambda b: -(1 << b) if b == 7 else 1 << b
    sums = sum((count(low, a) + 2 * count(high, a)) * weigh(b) for b, a in enumerate(bits))
    return sums.sum(0)[None] - x.astype(jnp.int32).sum()


def packed_products(rows: int, k: int, n: int) -> dict[str, Timed]:
    """The ops of the library, from the packed codes, and the floor of those bytes."""
    import jax.numpy as jnp

    from bitnet_jax import ops

    random = np.random.default_rng(2)
    codes = random.integers(0, 3, (k // 4, 4, n)).astype(np.uint8)
    one = (codes << np.array([[0], [2], [4], [6]], np.uint8)).sum(1, dtype=np.uint8)
    layers = AT_ONCE if rows == 1 else 1
    count = -(-(512 << 20) // (k * n * layers)) if rows == 1 else 2
    stacks = [jnp.array(np.stack([one] * layers)) for _ in range(count)]
    values = random.standard_normal((rows, k))  # quantised by each row's largest, as in a network
    x = jnp.asarray((values * 127 / abs(values).max(1, keepdims=True)).round().astype(np.int8))
    add = lambda op, **how: scanned(lambda x, w, i: op(x, w, k, i, **how), x, stacks)
    made = {"unpack": add(ops.xla.packed_product)}
    if rows == 1:
        copies = [layer for stack in stacks for layer in stack]
        made["decode"] = add(ops.decode.packed_product)
        made["bit planes"] = jitted(lambda x, w: bit_planes(x, w, k), x, copies)
    for isa in ops.native.variants():
        made[f"native {isa}"] = add(ops.native.packed_product, isa=isa)
    if rows == 1 and ops.native.variants():
        best = lambda x, w: ops.native.packed_product(x, w, k)
        made["native, one a call"] = jitted(best, x, copies, at_once=1)
    alone = len(os.sched_getaffinity(0)) == 1
    if rows == 1 and alone and (library := helpers()):
        views = [layer for stack in stacks for layer in np.asarray(stack)]
        read = library.read_all
        size = ctypes.c_size_t(one.nbytes)
        made["floor"] = Timed(lambda i: read(pointer(views[i]), size), len(views))
    return made


def torch_linear(rows: int, k: int, n: int) -> dict[str, Timed]:
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def timed(dtype) -> Timed:
        x, one = torch.ones(rows, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
        count = (512 << 20) // (one.itemsize * k * n) if rows == 1 else 2
        copies = [one.clone() for _ in range(count)]
        return Timed(lambda i: torch.nn.functional.linear(x, copies[i]), count)

    return {"torch float32": timed(torch.float32), "torch bfloat16": timed(torch.bfloat16)}


class _Pool(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("none", ctypes.c_bool))


@functools.cache
def ggml() -> ctypes.CDLL | None:
    """The library inside the package xllamacpp; None without it."""
    found = importlib.util.find_spec("xllamacpp")
    if not found or not found.submodule_search_locations:
        return None
    library = ctypes.CDLL(
        str(next(Path(found.submodule_search_locations[0]).glob("xllamacpp*.so")))
    )
    for name in ("init", "new_tensor_2d", "mul_mat", "new_graph", "get_data"):
        getattr(library, f"ggml_{name}").restype = ctypes.c_void_p
    library.ggml_nbytes.restype = ctypes.c_size_t
    library.ggml_cpu_init()
    return library


def llama_cpp(rows: int, k: int, n: int) -> dict[str, Timed]:
    """llama.cpp's products of its quantised weights, run as it runs them: float32 activations in,
    quantised by it, float32 out."""
    lib = ggml()
    if lib is None or k % 256:
        return {}
    some = np.random.default_rng(3).standard_normal((n, k)).astype(np.float32)
    at = ctypes.c_void_p
    several = AT_ONCE if rows == 1 else 1
    threads = len(os.sched_getaffinity(0))

    def timed(kind: int, bits: float) -> Timed:
        count = max(1, round((128 << 20) / (bits / 8 * k * n * several))) if rows == 1 else 1
        size = int(several * count * k * n * bits / 8) + (1 << 28)
        ctx = at(lib.ggml_init(_Pool(size, None, False)))
        two = lambda kind, *shape: at(
            lib.ggml_new_tensor_2d(ctx, kind, *(ctypes.c_int64(x) for x in shape))
        )
        x, graphs, first = two(0, k, rows), [], None
        ctypes.memmove(lib.ggml_get_data(x), pointer(some), 4 * k * rows)
        for _ in range(count):
            graph = at(lib.ggml_new_graph(ctx))
            for _ in range(several):
                weight = two(kind, k, n)
                data = at(lib.ggml_get_data(weight))
                if first is None:
                    lib.ggml_quantize_chunk(kind, pointer(some), data, ctypes.c_int64(0),
                                            ctypes.c_int64(n), ctypes.c_int64(k), None)  # fmt: skip
                    first = data
                else:
                    ctypes.memmove(data, first, lib.ggml_nbytes(weight))
                product = at(lib.ggml_mul_mat(ctx, weight, x))
                lib.ggml_build_forward_expand(graph, product)
            graphs.append(graph)
        call = lambda i: lib.ggml_graph_compute_with_ctx(ctx, graphs[i], threads)
        return Timed(call, count, several)

    return {  # the numbers of ggml_type
        "llama.cpp TQ2_0": timed(35, 2.0625),
        "llama.cpp TQ1_0": timed(34, 1.6875),
        "llama.cpp Q4_0": timed(2, 4.5),
    }


def measure(made: dict[str, Timed], rounds: int, clock: Callable[[], float]) -> dict[str, dict]:
    """Round robin: each round multiplies once by (up to) `AT_ONCE` of each peer's copies."""
    taken: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds):
        for name, timed in made.items():
            calls = min(timed.sets, AT_ONCE // timed.products)
            sets = [(turn * calls + i) % timed.sets for i in range(calls)]
            timed.call(sets[-1])  # what the one before left to do (its memory to free) is not ours
            time.sleep(0.005)
            start = clock()
            for i in sets:
                timed.call(i)
            taken[name].append((clock() - start) * 1e3 / calls / timed.products)
    spread = lambda t: statistics.quantiles(t, n=10, method="inclusive")
    return {
        name: {"ms": statistics.median(t), "low": spread(t)[0], "high": spread(t)[-1]}
        for name, t in taken.items()
    }


def row(shape: tuple[int, int, int], arguments: Arguments) -> dict:
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    makers = (xla_peers, torch_linear, llama_cpp, packed_products)
    made = {name: timed for maker in makers for name, timed in maker(*shape).items()}
    found = measure(made, arguments.rounds, clock)
    float32 = min(v["ms"] for name, v in found.items() if name.startswith("XLA float32"))
    for values in found.values():
        values["speedup_vs_float32"] = float32 / values["ms"]
    floor = found.pop("floor", None)
    best = next((name for name in found if name.startswith("native")), "decode")
    ours = found.get(best, found["unpack"])
    share = floor["ms"] / ours["ms"] if floor and shape[0] == 1 else None
    return {
        "name": name_of(*shape), "op": best, **ours, "floor_share": share,
        "floor": floor, "peers": found,
    }  # fmt: skip


def show(rows: list[dict], console: Console) -> None:
    for r in rows:
        share = f", {r['floor_share']:.0%} of the floor" if r["floor_share"] else ""
        if r.get("speedup_vs_one_thread"):
            share += f", {r['speedup_vs_one_thread']:.2f}x one thread"
        table = Table(title=f"{r['name']}: {r['op']} {r['ms']:.3f} ms{share} ({r['about']})")
        for column in ("", "ms", "10 % - 90 %", "x float32"):
            table.add_column(column, justify="left" if not column else "right")
        floor = {"floor (read once)": r["floor"]} if r["floor"] else {}
        for name, v in (r["peers"] | floor).items():
            spread = f"{v['low']:.3f} - {v['high']:.3f}"
            table.add_row(name, f"{v['ms']:.3f}", spread, f"{v['speedup_vs_float32']:.2f}")
        console.print(table)


def plot(rows: list[dict], about: str, file: Path) -> None:
    """How many times faster than XLA's float32 each product is, one group of bars a shape."""
    figure = matplotlib.figure.Figure(figsize=(12, 5), layout="constrained", dpi=110)
    axes = figure.subplots()
    width = 0.8 / len(PLOTTED)
    for i, name in enumerate(PLOTTED):
        of = lambda r: [v["speedup_vs_float32"] for peer, v in r["peers"].items() if name in peer]  # noqa: B023
        found = [max(of(r), default=0) for r in rows]
        axes.bar(np.arange(len(rows)) + i * width, found, width, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(np.arange(len(rows)) + 0.4 - width / 2, [r["name"] for r in rows],
                    rotation=20, ha="right")  # fmt: skip
    axes.set_ylabel("times faster than XLA float32")
    axes.set_title(about, fontsize=9)
    axes.legend()
    figure.savefig(file)


def main(arguments: Arguments) -> None:
    """Measure the rows asked for, and put them in the place of their older ones in the results."""
    settle(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    import jax

    from bitnet_jax.ops import native

    suffix = "" if arguments.threads == 1 else f"_{arguments.threads}threads"
    file = arguments.out / f"products{suffix}.json"
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = {old["name"]: old for old in known}
    clock = "CPU time" if arguments.threads == 1 else "wall time"
    for shape in SHAPES:
        if arguments.only in name_of(*shape):
            found = row(shape, arguments)
            found["about"] = (
                f"{arguments.threads} thread(s), {clock}, load {os.getloadavg()[0]:.1f}"
            )
            rows[found["name"]] = found
    one = arguments.out / "products.json"
    if suffix and one.exists():
        before = {r["name"]: r["ms"] for r in json.loads(one.read_text())["rows"]}
        for name, r in rows.items():
            r["speedup_vs_one_thread"] = before[name] / r["ms"] if name in before else None
    about = f"{platform.machine()}, jax {jax.__version__}; {native.status()}"
    ordered = [rows[name] for name in (name_of(*s) for s in SHAPES) if name in rows]
    file.write_text(json.dumps({"about": about, "rows": ordered}, indent=1) + "\n")
    with file.with_suffix(".txt").open("w") as text:
        for console in (Console(), Console(file=text, width=100)):
            console.print(about)
            show(ordered, console)
    plot(ordered, about, file.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
