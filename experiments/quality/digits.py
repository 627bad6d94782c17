"""A task that is no language: scikit-learn's digits with an MLP of the sandbox's shape."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from bitnet_jax import Policy, Scheme, ternarise
from bitnet_jax.calibrate import calibrate, latent_start
from bitnet_jax.models.mlp import MLP
from bitnet_jax.optim import adamw
from bitnet_jax.train.loop import fit

EPOCHS, BATCH = 3, 32


@dataclasses.dataclass(frozen=True)
class Digits:
    """Rows of 64 pixels in 0..1 and a label, in two parts drawn anew for each seed."""

    train: np.ndarray
    held_out: np.ndarray


def load(seed: int) -> Digits:
    """1,437 digits to train on and 360 to measure on."""
    found = load_digits()
    rows = np.concatenate([found.data / 16, found.target[:, None]], axis=1).astype(np.float32)
    rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    return Digits(rows[360:], rows[:360])


def loss(model, params, batch):
    """Cross entropy of the label in the last column."""
    labels = batch[:, -1].astype(jnp.int32)
    logits = model.apply(params, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), {}


def accuracy(scheme: Scheme | None, params, rows: np.ndarray) -> float:
    """Share of right labels."""
    logits = MLP(scheme=scheme).apply(params, rows[:, :-1])
    return float((np.asarray(logits).argmax(-1) == rows[:, -1]).mean())


def train(scheme: Scheme | None, params, rows: np.ndarray, epochs: int, rate: float, seed: int):
    """AdamW with a cosine to zero."""
    steps = len(rows) // BATCH * epochs
    schedule = optax.cosine_decay_schedule(rate, steps)
    return fit(
        MLP(scheme=scheme), params, adamw(schedule), rows,
        epochs=epochs, batch=BATCH, seed=seed, loss=loss, stage="digits",
    ).params  # fmt: skip


def run(seed: int, scheme: Scheme, rate: float = 2e-3) -> dict[str, float]:
    """Accuracy of the float MLP, of it continued, and of ternary ones before and after training."""
    data = load(seed)
    params = MLP(scheme=None).init(jax.random.key(seed), data.train[:1, :-1])
    params = train(None, params, data.train, 60, 3e-3, seed)
    inputs = [jnp.asarray(data.train[:, :-1])]
    converted = calibrate(params, MLP(scheme=scheme).apply, inputs, Policy(), scheme)
    start = latent_start(params, converted, scheme, keep=0.5)
    tuned = {
        "float": (None, params),
        "float, continued": (None, train(None, params, data.train, EPOCHS, 1e-3, seed)),
        "absmean, rounded": (Scheme(), ternarise(params)),
        "by data": (scheme, converted),
        "absmean STE": (Scheme(), train(Scheme(), params, data.train, EPOCHS, rate, seed)),
        "by data, tuned": (scheme, train(scheme, start, data.train, EPOCHS, rate, seed)),
    }
    return {name: accuracy(*x, data.held_out) for name, x in tuned.items()}


if __name__ == "__main__":
    for seed in range(5):
        print(seed, {k: round(v, 4) for k, v in run(seed, Scheme("twn", "channel")).items()})
