"""Ternary products and a training step on an NVIDIA GPU: exactness, times, ceilings, in one run.

    python -m benchmarks.gpu --out benchmarks/results       # minutes; needs no network, no tyro
    python -m benchmarks.gpu --small                        # the same script anywhere, to try it

Prints and writes gpu.json and gpu.txt. Weights rotate over copies of several times the L2 cache.
"kernels" is the time CUPTI saw kernels of a product run on the GPU, the activations' reordering and
the last sum among them; "wall" is that of a program of many products divided by their number, so
that its launches count, which are what a product of one row takes most of.
"""

import argparse
import functools
import json
import statistics
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bitnet_jax import ops
from bitnet_jax.packed import pack_codes

START = time.perf_counter()
SMALL = "--small" in sys.argv
LINES: list[str] = []


def say(line: str = "") -> None:
    print(line, flush=True)
    LINES.append(line)


def versions() -> dict:
    found = {}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers",
                 "safetensors", "tyro"):  # fmt: skip
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "versions": found}


def wall(call, *arguments, repeats: int = 7) -> float:
    """Median seconds of a call, until its result is there."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(1 if SMALL else repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def kernels(call, *arguments) -> list[tuple[str, float]]:
    """(name, milliseconds) of each kernel of one call; empty where CUPTI does not tell."""
    try:
        from jax.experimental.mosaic.gpu import profiler

        return profiler.measure(call, aggregate=False)(*arguments)[1] or []
    except Exception as error:
        if not SMALL:
            say(f"  (no kernel times: {type(error).__name__}: {str(error)[:120]})")
        return []


def grouped(found: list[tuple[str, float]], most: int = 14) -> list[tuple[float, int, str]]:
    """(milliseconds, launches, name) by name, the longest first."""
    total = {}
    for name, ms in found:
        name = "_".join(part for part in name[:70].split("_") if not part.isdigit())
        seconds, count = total.get(name, (0.0, 0))
        total[name] = seconds + ms, count + 1
    return sorted(((ms, n, name) for name, (ms, n) in total.items()), reverse=True)[:most]


# --- ceilings


def on_gpu(call, *arguments) -> float:
    """Median seconds in kernels; the wall's where CUPTI does not tell."""
    seen = [sum(ms for _, ms in kernels(call, *arguments)) for _ in range(1 if SMALL else 3)]
    return statistics.median(seen) / 1e3 or wall(call, *arguments)


def ceilings() -> dict:
    """Copy and read bandwidth in GB/s, matrix peaks in tera-operations a second."""
    n = 1 << (20 if SMALL else 29)
    a = jnp.ones(n, jnp.float32)
    found = {"copy GB/s": 8 * n / on_gpu(jax.jit(lambda a: a + 1), a) / 1e9,
             "read GB/s": 4 * n / on_gpu(jax.jit(jnp.max), a) / 1e9}  # fmt: skip
    del a
    size = 256 if SMALL else 8192
    x = jax.random.randint(jax.random.key(0), (size, size), -127, 128, jnp.int8)
    for name, dtype, out in (("bf16", jnp.bfloat16, None), ("int8", jnp.int8, jnp.int32)):
        y = x.astype(dtype)
        dims = (((1,), (1,)), ((), ()))
        dot = functools.partial(lax.dot_general, dimension_numbers=dims, preferred_element_type=out)
        found[f"{name} {size}^3 Top/s"] = 2 * size**3 / on_gpu(jax.jit(dot), y, y) / 1e12
    return {name: round(value, 1) for name, value in found.items()}


# --- exactness


def checks() -> dict:
    """Every op against the int32 product of numpy, on ragged shapes; batched, and over layers."""
    gpu = jax.default_backend() == "gpu"
    names = ["xla", "decode", *(["mosaic"] if gpu else [])]
    random = np.random.default_rng(0)
    draw = lambda low, high, *shape: random.integers(low, high, shape).astype(np.int8)
    shapes = [(1, 1, 16), (1, 530, 64), (3, 257, 144), (8, 4100, 48), (9, 1000, 4096),
              (40, 2048, 1024), (1, 5, 7), (2, 8191, 16)]  # fmt: skip
    done, wrong = 0, []

    def check(what, name, out, expected):
        nonlocal done
        done += 1
        if out.dtype != np.int32 or not np.array_equal(out, expected):
            bad = int((np.asarray(out) != expected).sum()) if out.shape == expected.shape else -1
            wrong.append(f"{name} {what}: {bad} of {expected.size} differ")

    def attempt(what, name, call, expected):
        try:
            check(what, name, np.asarray(call()), expected)
        except Exception as error:
            wrong.append(f"{name} {what}: {type(error).__name__}: {str(error)[:600]}")

    for m, k, n in shapes:
        x, codes = draw(-128, 128, m, k), draw(-1, 2, k, n)
        packed, expected = pack_codes(jnp.asarray(codes)), x.astype(np.int32) @ codes
        for name in names:
            if name != "decode" or m <= 3:
                op = jax.jit(functools.partial(ops.packed_product, in_features=k, op=name))
                attempt((m, k, n), name, functools.partial(op, x, packed), expected)
        if k < 300:  # as users call it
            chosen = jax.jit(lambda x, w, k=k: ops.packed_product(x, w, k))
            attempt((m, k, n), "chosen", functools.partial(chosen, x, packed), expected)
    for m, k, n in ((2, 5, 7), (17, 63, 35), (1, 33, 33), (4, 3, 8), (8, 30, 16), (40, 130, 64)):
        x, codes = draw(-128, 128, m, k), draw(-1, 2, k, n)
        expected = x.astype(np.int32) @ codes
        dense = jax.jit(ops.integer_product)
        attempt((m, k, n), "int8", functools.partial(dense, x, codes), expected)
    for m, k, n in () if not gpu else ((256, 128, 128), (1024, 640, 384), (8192, 2048, 5632)):
        x, codes = jnp.asarray(draw(-128, 128, m, k)), jnp.asarray(draw(-1, 2, k, n))
        keys = jax.random.split(jax.random.key(m))
        rows, columns = (
            jax.random.uniform(key, shape) for key, shape in zip(keys, ((m, 1), (1, n)))
        )
        for dtype in (jnp.bfloat16, jnp.float32):
            plain = lambda x, rows, codes, columns, dtype: (
                ops.integer_product(x, codes).astype(jnp.float32) * columns * rows
            ).astype(dtype)
            both = [jax.jit(f, static_argnums=4)(x, rows, codes, columns, dtype)
                    for f in (ops.scaled.scaled_product, plain)]  # fmt: skip
            done += 1
            if differ := int((both[0] != both[1]).sum()):
                wrong.append(f"scaled {(m, k, n)} {dtype.__name__}: {differ} differ")
    x, codes = draw(-128, 128, 5, 2, 3, 300), draw(-1, 2, 4, 300, 64)
    packed, index = pack_codes(jnp.asarray(codes)), jnp.array([3, 0, 9, 1, 2])
    picked = codes[[3, 0, 3, 1, 2]][:, None]
    expected = np.matmul(x.astype(np.int32), picked)
    for name in names:
        op = functools.partial(ops.packed_product, in_features=300, op=name)
        one = lambda x, i, op=op: op(x, packed, index=i)
        twice = jax.vmap(jax.vmap(one, (0, None)), (0, 0))
        attempt("vmap vmap, layers", name, lambda f=twice: jax.jit(f)(x, index), expected)
        layers = lambda x, op=op: lax.scan(
            lambda c, i: (c, op(c, packed, index=i)), x, jnp.arange(4)
        )
        expected_layers = np.matmul(x[0, 0].astype(np.int32), codes)
        attempt("scan over layers", name, lambda f=layers: jax.jit(f)(x[0, 0])[1], expected_layers)
    big = (1, 512, 1024) if SMALL else (3, 8192, 28672)
    m, k, n = big
    x, packed = draw(-128, 128, m, k), random_packed(k, n, 1)[0]
    several = [jax.jit(functools.partial(ops.packed_product, in_features=k, op=name))(x, packed)
               for name in names if name != "decode"]  # fmt: skip
    if len(several) == 2:
        check(big, "mosaic against xla", np.asarray(several[1]), np.asarray(several[0]))
    return {"comparisons": done, "wrong": wrong, "ops": names}


# --- products


def random_packed(k: int, n: int, count: int) -> list[jax.Array]:
    @jax.jit
    def one(key):
        codes = jax.random.randint(key, (4, k // 4, n), 0, 3, jnp.uint8)
        return sum(codes[j] << np.uint8(2 * j) for j in range(4))

    return [one(jax.random.key(i)) for i in range(count)]


def many(product, x, weights):
    """A program that multiplies once by each of the weights; (call, arguments).

    Once: several x that meet one weight would be merged into one product.
    """
    call = jax.jit(lambda x, weights: [product(x, w) for w in weights])
    return call, (x, weights)


def products(ceiling: dict) -> list[dict]:
    shapes = [(1, 8192, 28672), (1, 4096, 4096), (1, 4096, 14336),
              (16, 4096, 14336), (128, 4096, 14336), (256, 4096, 14336),
              (2048, 4096, 14336)]  # fmt: skip
    if SMALL:
        shapes = [(1, 64, 128), (16, 64, 128)]
    gpu = jax.default_backend() == "gpu"
    rows, kept = [], {}
    for m, k, n in shapes:
        copies = 2 if SMALL else max(3, min(32, (130 << 20) // (k * n // 4)))
        if (k, n) not in kept:
            kept.clear()
            draw = jax.jit(lambda key, k=k, n=n: jax.random.randint(key, (k, n), -1, 2, jnp.int8))
            codes = [draw(jax.random.key(i)) for i in range(2 if SMALL else max(2, copies // 4))]
            wide = codes[: max(2, len(codes) // 2)]
            kept[k, n] = random_packed(k, n, copies), codes, [c.astype(jnp.bfloat16) for c in wide]
        packed, codes, wide = kept[k, n]
        x = jax.random.randint(jax.random.key(1), (m, k), -100, 100, jnp.int8)
        op = lambda name, **how: lambda x, w: ops.OPS[name](x, w, k, **how)  # noqa: B023
        peers = {"bf16": (lambda x, w: jnp.dot(x, w), x.astype(jnp.bfloat16), wide),
                 "int8 kept": (ops.integer_product, x, codes),
                 "unpack, int8": (op("xla"), x, packed)}  # fmt: skip
        if m == 1 and n < 5000:
            peers["decode"] = op("decode"), x, packed
        if gpu and m <= 256:
            peers["mosaic"] = op("mosaic"), x, packed
        if gpu and m == 1 and n != 14336:
            for blocks in (132, 528):
                peers[f"mosaic, {blocks} blocks"] = op("mosaic", blocks=blocks), x, packed
        row = {"rows": m, "k": k, "n": n, "wall us": {}, "kernels us": {}, "alone us": {}}
        for name, (product, y, weights) in peers.items():
            try:
                call, arguments = many(product, y, weights)
                several = lambda: [call(*arguments) for _ in range(8)][-1]  # noqa: B023
                count = len(weights)
                row["wall us"][name] = 1e6 * wall(several, repeats=5) / count / 8
                seen = kernels(call, *arguments)
                row["kernels us"][name] = 1e3 * sum(ms for _, ms in seen) / count
                ours = [ms for kernel, ms in seen if "packed_ternary" in kernel]
                if ours:
                    row["alone us"][name] = 1e3 * sum(ours) / count
            except Exception as error:
                say(f"  {name} {m}x{k}x{n}: {type(error).__name__}: {str(error)[:300]}")
        row["floor us"] = k * n / 4 / ceiling["read GB/s"] / 1e3
        row["speedup_vs_bf16"] = {
            name: row["kernels us"]["bf16"] / us for name, us in row["kernels us"].items() if us
        }
        rows.append(row)
        for what in ("kernels us", "alone us", "wall us"):
            show = ", ".join(f"{name} {us:.1f}" for name, us in row[what].items() if us)
            say(f"{m:5d} x {k} x {n} {what}: {show}")
        say(f"{'':8}packed bytes read once: {row['floor us']:.1f} us")
    return rows


# --- training


def linear() -> list[dict]:
    """One layer's forward and backward pass, microseconds in kernels: 8192 tokens, bfloat16."""
    from bitnet_jax import Scheme, dot_general

    found = []
    dims = (((1,), (0,)), ((), ()))
    for m, k, n in [(64, 128, 256)] if SMALL else [(8192, 2048, 5632), (8192, 5632, 2048)]:
        key = jax.random.key(0)
        x, g = (jax.random.normal(key, (m, size), jnp.bfloat16) for size in (k, n))
        w = jax.random.normal(key, (k, n), jnp.float32)
        row = {"tokens": m, "in": k, "out": n}
        for name, scheme in (("bf16", None), ("ternary", Scheme())):
            forward = lambda x, w, scheme=scheme: dot_general(x, w, dims, scheme=scheme)
            both = lambda x, w, g, forward=forward: (
                lambda y, back: (y, back(g)))(*jax.vjp(forward, x, w))  # fmt: skip
            row[f"{name} forward us"] = 1e6 * on_gpu(jax.jit(forward), x, w)
            row[f"{name} forward and backward us"] = 1e6 * on_gpu(jax.jit(both), x, w, g)
        say(json.dumps(row))
        found.append(row)
    return found


def training() -> dict:
    """A step of a decoder of 1B widths, AdamW, 8 x 1024 tokens, bfloat16 activations."""
    import optax

    from bitnet_jax import Scheme
    from bitnet_jax.models.decoder import DecoderConfig

    config = DecoderConfig(
        vocab_size=32768, width=2048, layers=4, heads=32, kv_heads=8, hidden=5632, max_length=1024,
        dtype="bfloat16",
    )  # fmt: skip
    batch = (8, 1025)
    if SMALL:
        config, batch = DecoderConfig(vocab_size=256, layers=1, dtype="bfloat16"), (2, 17)
    tokens = jax.random.randint(jax.random.key(0), batch, 0, config.vocab_size)
    optimizer = optax.adamw(1e-4)
    found = {
        "config": str(config),
        "tokens": [batch[0], batch[1] - 1],
        "seconds": {},
        "kernels": {},
    }
    for name, scheme in (("bfloat16", None), ("ternary", Scheme())):
        model = config.build(scheme)

        def objective(params, tokens, model=model):
            logits = model.apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        def step(state, tokens, objective=objective):
            params, moments = state
            loss, grads = jax.value_and_grad(objective)(params, tokens)
            updates, moments = optimizer.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), loss

        params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :-1])
        found["parameters"] = sum(x.size for x in jax.tree.leaves(params))
        state = params, jax.jit(optimizer.init)(params)
        call = jax.jit(step)
        start = time.perf_counter()
        jax.block_until_ready(call(state, tokens))
        compiled = time.perf_counter() - start
        found["seconds"][name] = wall(call, state, tokens, repeats=9)
        seen = grouped(kernels(call, state, tokens), 40)
        found["kernels"][name] = seen
        loss = float(call(state, tokens)[1])
        ms = 1e3 * found["seconds"][name]
        say(f"{name}: {ms:.1f} ms a step, loss {loss:.4f}, compiled in {compiled:.0f} s")
        for ms, count, kernel in seen[:9]:
            say(f"  {ms:8.3f} ms in {count:4d}  {kernel}")
        del state, params
    found["speedup of ternary"] = found["seconds"]["bfloat16"] / found["seconds"]["ternary"]
    millions = found["parameters"] / 1e6
    say(f"ternary beside bfloat16: {found['speedup of ternary']:.3f}x, {millions:.0f} M parameters")

    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--only", default="ceilings,checks,products,training,linear")
    arguments.add_argument("--small", action="store_true")
    asked = arguments.parse_args()
    result = versions()
    say(json.dumps(result))
    parts = {"ceilings": ceilings, "checks": checks,
             "products": lambda: products(result.get("ceilings", {"read GB/s": 4600.0})),
             "linear": linear, "training": training}  # fmt: skip
    for name in asked.only.split(","):
        say(f"\n== {name} (at {time.perf_counter() - START:.0f} s)")
        try:
            result[name] = parts[name]()
            if name in ("ceilings", "checks"):
                say(json.dumps(result[name], indent=1))
        except Exception:
            say(traceback.format_exc()[-1500:])
        if asked.out:
            asked.out.mkdir(exist_ok=True, parents=True)
            (asked.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
            (asked.out / "gpu.txt").write_text("\n".join(LINES) + "\n")
    say(f"\n{time.perf_counter() - START:.0f} s in all")


if __name__ == "__main__":
    main()
