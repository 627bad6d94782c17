"""What several test files share: the schemes, golden data, and the STE written out."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import Scheme, dequantize, quantize_activations, quantize_weights, straight_through
from bitnet_jax.packed import pack_weight, unpack_weight

SANDBOX = Path(__file__).parent / "golden" / "sandbox"
RULES = ("absmean", "threshold", "twn")
SCALES = ("tensor", "channel", 4, 5)
SCHEMES = tuple(Scheme(rule, scale) for rule in RULES for scale in SCALES)

quantize = jax.jit(quantize_weights, static_argnums=1)
pack = jax.jit(pack_weight)
unpack = jax.jit(unpack_weight)


def name_of(scheme):
    return f"{scheme.rule}-{scheme.scale}" if isinstance(scheme, Scheme) else None


@functools.cache
def golden(name):
    with np.load(SANDBOX / f"{name}.npz") as data:
        return dict(data)


def normal(seed, *shape, dtype=jnp.float32):
    """Standard normal values; from numpy, because jax compiles a sampler for each shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype))


def ste_weight(w, scheme):
    """w + stop_gradient(q(w) - w), the official straight-through weight."""
    return straight_through(w, dequantize(quantize_weights(w, scheme)))


def ste_activation(x):
    codes, scale = quantize_activations(x)
    return straight_through(x, codes * scale)


def ste_matmul(x, w, scheme):
    """(..., rows, in) @ (..., in, out), both sides quantised, by float products only."""
    return jnp.matmul(ste_activation(x), ste_weight(w, scheme), precision="highest")


def run_python(code, *args, devices=1, check=True):
    """Run ``code`` in a fresh process that sees ``devices`` CPU devices."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=env, check=check, capture_output=True, text=True)


def sums_in_turns(seed: int, rows: int, k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 x (rows, k) and codes (k, n) whose sums stay small for long, then run up or down.

    What adds up in int16 must see both: where nothing overflows yet, and where it is about to.
    """
    random = np.random.default_rng(seed)
    x = random.integers(-128, 128, (rows, k)).astype(np.int8)
    codes = random.integers(-1, 2, (k, n)).astype(np.int8)
    for start in range(400, k, 700):
        run = slice(start, start + int(random.integers(90, 300)))
        sign = random.choice([-1, 1], n)
        x[:, run], codes[run] = np.abs(x[:, run].astype(int)).clip(0, 127), sign
    return x, codes
