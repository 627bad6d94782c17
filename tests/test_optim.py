import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from optax.contrib import MuonDimensionNumbers, scale_by_muon
from optax.contrib._muon import orthogonalize_via_newton_schulz

from bitnet_jax import BitDense, BitnetError, Scheme, checkpoint
from bitnet_jax.models.decoder import Decoder, DecoderConfig
from bitnet_jax.optim import adamw, grokfast_ema, labels, mugrokfast

from .battery import normal

STACK = MuonDimensionNumbers(-2, -1)
LAYERS = {"^layers/": STACK}
MUGROKFAST = mugrokfast(1e-2, axes=LAYERS)  # shared, for the sake of its compiled step
STANDARD = (3.4445, -4.7750, 2.0315)


@functools.cache
def golden(name):
    with np.load(Path(__file__).parent / "golden" / "optim" / f"{name}.npz") as data:
        return dict(data)


def tree(seed=0, dtype=jnp.float32):
    """A tree with a leaf of every kind: an embedding, a head, stacked matrices and vectors."""
    x = functools.partial(normal, seed, dtype=dtype)
    return {
        "embed": {"embedding": x(40, 16)},
        "layers": {"up": {"kernel": x(2, 16, 24), "bias": x(2, 24)}, "norm": {"scale": x(2, 16)}},
        "head": {"kernel": x(16, 40)},
    }


@functools.cache
def jitted(optimizer):
    return jax.jit(optimizer.update)


def run(optimizer, params, grads):
    """All updates and the final state, the parameters moving with them."""
    state, updates = optimizer.init(params), []
    for g in grads:
        u, state = jitted(optimizer)(g, state, params)
        params = jax.tree.map(jnp.add, params, u)
        updates.append(u)
    return updates, state, params


def first(optimizer, params, grads):
    return run(optimizer, params, [grads])[0][0]


def assert_trees_close(a, b, rtol=1e-5, atol=1e-7):
    f32 = lambda x: np.asarray(x, np.float32)
    jax.tree.map(lambda x, y: assert_allclose(f32(x), f32(y), rtol, atol), a, b)


# Grokfast


@pytest.mark.parametrize("alpha, lamb", [(0.98, 2.0), (0.9, 0.5), (0.8, 5.0)])
def test_grokfast_equals_the_published_filter(alpha, lamb):
    data = golden("grokfast")
    want = lambda kind, i: {n: data[f"ema/alpha{alpha}_lamb{lamb}/{kind}_{n}"][i] for n in "wb"}
    filter = grokfast_ema(alpha, lamb)
    state = filter.init({n: jnp.zeros_like(data[f"grads/{n}"][0]) for n in "wb"})
    for i in range(6):
        out, state = filter.update({n: jnp.asarray(data[f"grads/{n}"][i]) for n in "wb"}, state)
        assert_trees_close(out, want("out", i), 1e-6, 1e-6)
        assert_trees_close(state.ema, want("ema", i), 1e-6, 1e-6)


def test_grokfast_keeps_its_average_in_another_dtype():
    filter, grads = grokfast_ema(0.5, 1.0, jnp.bfloat16), jnp.array([1.0, 3.0])
    state = filter.init(grads)
    assert state.ema.dtype == jnp.bfloat16
    out, state = filter.update(grads, state)
    assert out.dtype == jnp.float32 and state.ema.dtype == jnp.bfloat16
    assert_array_equal(out, 2 * grads)


def test_grokfast_is_off_by_default_and_reaches_every_leaf_when_asked():
    params, grads = tree(), [tree(1), tree(2)]
    updates, state, _ = run(MUGROKFAST, params, grads)
    assert "Grokfast" not in str(jax.tree.structure(state))
    filtered = run(mugrokfast(1e-2, axes=LAYERS, alpha=0.5, lamb=2.0), params, grads)[0]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), updates[1], filtered[1])
    assert min(jax.tree.leaves(moved)) > 1e-5


# Muon: what we rely on in optax, against the published code


@pytest.mark.parametrize("steps", [1, 5])
def test_newton_schulz_equals_the_published_one(steps):
    data, coeffs = golden("muon_newton_schulz"), jnp.array([STANDARD] * steps)
    inputs = {k.removeprefix("in/"): jnp.asarray(x) for k, x in data.items() if k[:3] == "in/"}
    one = lambda x: orthogonalize_via_newton_schulz(
        x, coeffs, steps, eps=1e-7, dimension_numbers=STACK
    )
    for name, got in jax.jit(lambda t: jax.tree.map(one, t))(inputs).items():
        assert_allclose(got, data[f"f64/steps{steps}/{name}"], rtol=0, atol=3e-5, err_msg=name)


@pytest.mark.parametrize("name", ["square_24x24", "tall_48x16", "wide_16x48"])
def test_muon_without_nesterov_equals_the_published_update(name):
    # With Nesterov it does not on purpose: optax corrects the bias of momentum and gradient, each
    # by its own factor, so that the first steps mix the two in another ratio.
    data = golden("muon_update")
    grads, want = data[f"grads/{name}"], data[f"update/f32/plain/{name}"]
    muon = scale_by_muon(
        STANDARD, nesterov=False, eps=1e-7, weight_dimension_numbers=MuonDimensionNumbers()
    )
    shape_factor = max(1, grads.shape[1] / grads.shape[2]) ** 0.5
    updates, state, _ = run(muon, jnp.zeros_like(grads[0]), list(grads))
    assert_allclose(np.stack(updates) * shape_factor, want, rtol=0, atol=3e-5)
    assert_allclose(state.mu, data[f"momentum/f32/plain/{name}"][-1], rtol=1e-5, atol=1e-7)


# Muon: ours


def polar(g):
    u, _, v = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    return u @ v


def test_update_is_the_polar_factor_at_adams_size():
    shapes = {"wide": (16, 64), "tall": (64, 16), "uneven": (24, 40)}
    params, grads = (
        {n: {"kernel": normal(seed, *shape)} for n, shape in shapes.items()} for seed in (0, 1)
    )
    grads["uneven"]["kernel"] *= jnp.logspace(-3, 0, 24)[:, None]  # ill-conditioned
    updates = first(mugrokfast(1.0, weight_decay=0.0), params, grads)
    for n, shape in shapes.items():
        got, want = updates[n]["kernel"] / (-0.2 * max(shape) ** 0.5), polar(grads[n]["kernel"])
        # AOL rescales the rows before, so that it is the polar factor of a matrix close by.
        assert np.linalg.norm(got - want) < (0.3 if n == "uneven" else 0.1) * np.linalg.norm(want)
        sizes = np.linalg.svd(got, compute_uv=False)
        assert sizes.min() > 0.95 and sizes.max() < 1.05


@pytest.mark.parametrize("factor", [1e-7, 1e-4, 1e4])
def test_update_does_not_depend_on_the_gradients_size(factor):
    small = jax.tree.map(lambda g: g * factor, tree(1))
    got, want = (first(MUGROKFAST, tree(), g)["layers"]["up"]["kernel"] for g in (small, tree(1)))
    assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_axes_say_what_a_matrix_is():
    stack, heads = "layers/kernel", "query/kernel"

    def values(seed):
        x, y = normal(seed, 2, 16, 24), normal(seed, 16, 4, 8)
        parts = {"layers": x, "first": x[0], "second": x[1], "query": y, "flat": y.reshape(16, 32)}
        return {n: {"kernel": part} for n, part in parts.items()}

    optimizer = mugrokfast(1e-2, axes={stack: STACK, heads: MuonDimensionNumbers(0, (1, 2))})
    u = {n: x["kernel"] for n, x in first(optimizer, values(0), values(1)).items()}
    assert_allclose(u["layers"], jnp.stack([u["first"], u["second"]]), rtol=1e-4, atol=1e-6)
    assert_allclose(u["query"].reshape(16, 32), u["flat"], rtol=1e-4, atol=1e-6)


# Labels


def test_labels_of_the_decoder():
    config = DecoderConfig(vocab_size=64, width=32, layers=1, hidden=48, sub_norms=True, tied=False)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    found = labels(params)["params"]
    hidden = {"query", "key", "value", "out", "gate", "up", "down"}
    layer = found["layer_0"]
    assert {
        n for part in ("attention", "mlp") for n, x in layer[part].items() if "muon" in x.values()
    } == hidden
    assert found["embed"] == {"embedding": "decay"} and found["head"] == {"kernel": "decay"}
    assert (
        found["norm"] == layer["mlp_norm"] == layer["attention"]["sub_norm"] == {"scale": "plain"}
    )


@pytest.mark.parametrize(
    "path, shape, label",
    [
        ("up/kernel", (32, 48), "muon"),
        ("up/kernel", (32, 15), "decay"),
        ("kernel", (16, 16), "muon"),
        ("up/qkernel", (32, 32), "decay"),
        ("lm_head/kernel", (32, 32), "decay"),
        ("LMHead/head/kernel", (32, 32), "decay"),
        ("heads/kernel", (32, 32), "muon"),
        ("moe/router/kernel", (32, 32), "decay"),
        ("Patch_Embed/kernel", (32, 32), "decay"),
        ("ada_norm/kernel", (32, 32), "decay"),
        ("RMSNorm_0/scale", (32,), "plain"),
        ("layers/norm/scale", (4, 32), "plain"),
        ("layers/up/bias", (4, 32), "plain"),
        ("gain", (32,), "plain"),
        ("temperature", (), "plain"),
    ],
)
def test_label_by_path_and_shape(path, shape, label):
    params = jax.ShapeDtypeStruct(shape, jnp.float32)
    for key in reversed(path.split("/")):
        params = {key: params}
    assert jax.tree.leaves(labels(params)) == [label]
    assert jax.tree.leaves(labels({"params": params})) == [label]


def test_labels_look_through_flax_boxes():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    params = nn.Dense(32, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 16)))
    assert sorted(jax.tree.leaves(labels(params))) == ["muon", "plain"]
    optimizer = mugrokfast(1e-2)
    step = lambda p: optimizer.update(p, optimizer.init(p), p)[0]
    assert jax.tree.structure(jax.eval_shape(step, params)) == jax.tree.structure(params)


def test_kernels_of_many_axes_need_a_word():
    params = {"attention": {"query": {"kernel": jnp.ones((32, 4, 8))}}}
    with pytest.raises(BitnetError, match=r"attention/query/kernel: a kernel with 3 axes \(32, 4"):
        mugrokfast(1e-2).init(params)
    with pytest.raises(BitnetError, match="attention/query/kernel"):
        labels(params, {"key": STACK})
    assert jax.tree.leaves(labels(params, {"query": None})) == ["decay"]
    assert jax.tree.leaves(labels(params, {"query": STACK})) == ["decay"]  # 4 x 8 is too small
    assert jax.tree.leaves(labels(params, {"query": MuonDimensionNumbers(0, (1, 2))})) == ["muon"]
    adamw(1e-2).init(params)


# Both optimizers

SHARED = {"mugrokfast": MUGROKFAST, "adamw": adamw(1e-2)}
MAKERS = {"mugrokfast": functools.partial(mugrokfast, axes=LAYERS), "adamw": adamw}
shared = pytest.mark.parametrize("optimizer", SHARED.values(), ids=SHARED)
both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@shared
def test_jit_equals_eager(optimizer):
    params, grads = tree(), tree(1)
    eager, state = optimizer.update(grads, optimizer.init(params), params)
    updates, jitted_state, _ = run(optimizer, params, [grads])
    assert_trees_close(eager, updates[0], 1e-4, 1e-6)
    assert_trees_close(state, jitted_state, 1e-4, 1e-6)


@shared
def test_only_matrices_decay(optimizer):
    params = tree()
    updates = first(optimizer, params, jax.tree.map(jnp.zeros_like, params))
    rates = jax.tree.map(lambda x: 0.0 if x == "plain" else -1e-3, labels(params, LAYERS))
    assert_trees_close(updates, jax.tree.map(lambda r, p: r * p, rates, params), 1e-5, 0)


@both
def test_learning_rate_schedule(make):
    schedule = optax.piecewise_constant_schedule(1e-2, {1: 0.5, 2: 0.0})
    # The same gradient every time makes the same direction every time.
    start, half, none = run(make(schedule, weight_decay=0.0), tree(), [tree(1)] * 3)[0]
    assert_trees_close(half, jax.tree.map(lambda u: u / 2, start), 1e-3, 1e-5)
    assert not any(u.any() for u in jax.tree.leaves(none))


def test_adam_has_a_learning_rate_of_its_own():
    params, grads = tree(), tree(1)
    same = first(MUGROKFAST, params, grads)
    other = first(mugrokfast(1e-2, adam_learning_rate=3e-2, axes=LAYERS), params, grads)
    factors = jax.tree.map(lambda label: 1.0 if label == "muon" else 3.0, labels(params, LAYERS))
    assert_trees_close(other, jax.tree.map(lambda f, u: f * u, factors, same), 1e-4, 1e-7)


@shared
def test_gradients_are_clipped_together(optimizer):
    params, grads = tree(), [tree(1), tree(2)]
    unit = [jax.tree.map(lambda x, n=optax.tree.norm(g): x / n, g) for g in grads]
    clipped = run(optimizer, params, [grads[0], jax.tree.map(lambda g: 1e3 * g, grads[1])])[0][1]
    assert_trees_close(clipped, run(optimizer, params, unit)[0][1], 1e-3, 1e-5)


def test_an_infinite_clip_is_none():
    grads = [tree(1), jax.tree.map(lambda g: 1e3 * g, tree(1))]
    bias = run(adamw(1e-2, clip=np.inf), tree(), grads)[0][1]["layers"]["up"]["bias"]
    momentum = (0.9 * 0.1 + 0.1 * 1e3) / (1 - 0.9**2)  # Adam's step 2, the gradient 1 then 1e3
    square = (0.95 * 0.05 + 0.05 * 1e6) / (1 - 0.95**2)
    assert_allclose(jnp.abs(bias), 1e-2 * momentum / square**0.5, rtol=1e-4)


@shared
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_parameters_are_updated_in_float32(optimizer, dtype):
    params, grads = tree(0, dtype), jax.tree.map(lambda g: g / 64, tree(1, dtype))
    wide = lambda t: jax.tree.map(lambda x: x.astype(jnp.float32), t)
    updates, state, _ = run(optimizer, params, [grads])
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"int32", "float32"}
    want = first(optimizer, wide(params), wide(grads))
    assert_trees_close(updates[0], want, float(jnp.finfo(dtype).eps), 1e-6)


@shared
def test_state_is_plain_and_survives_a_checkpoint(optimizer, tmp_path):
    _, state, params = run(optimizer, tree(), [tree(1)])
    shapes = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)
    assert shapes(state) == shapes(jax.eval_shape(optimizer.init, params))
    leaves, structure = jax.tree.flatten(state)
    checkpoint.save(tmp_path / "state", {str(i): x for i, x in enumerate(leaves)})
    loaded = checkpoint.load(tmp_path / "state").tree
    state_again = jax.tree.unflatten(structure, [loaded[str(i)] for i in range(len(leaves))])
    step = jitted(optimizer)
    assert_trees_close(step(tree(2), state_again, params), step(tree(2), state, params), 0, 0)


@both
def test_a_quadratic_converges(make):
    target, start = tree(1), tree(2)
    loss = lambda p: optax.tree.norm(optax.tree.sub(p, target), squared=True)
    rate = optax.cosine_decay_schedule(0.4, 200)
    optimizer = make(rate, weight_decay=0.0)

    def step(carry, _):
        p, s = carry
        updates, s = optimizer.update(jax.grad(loss)(p), s, p)
        return (optax.apply_updates(p, updates), s), None

    end, _ = jax.jit(lambda c: jax.lax.scan(step, c, length=200))((start, optimizer.init(start)))
    distance = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), end[0], target)
    assert max(jax.tree.leaves(distance)) < 0.05


@both
def test_a_ternary_network_learns(make):
    class Model(nn.Module):
        scheme: Scheme = Scheme()

        @nn.compact
        def __call__(self, x):
            y = nn.relu(BitDense(64, scheme=self.scheme)(x))
            return BitDense(32, scheme=self.scheme)(nn.RMSNorm()(y))

    x, teacher, model = normal(0, 256, 32), Model(), Model()
    y = teacher.apply(teacher.init(jax.random.key(1), x), x)
    params = model.init(jax.random.key(2), x)
    loss = lambda p: jnp.mean((model.apply(p, x) - y) ** 2)
    optimizer = make(optax.cosine_decay_schedule(1e-2, 150), weight_decay=0.0)

    def step(carry, _):
        p, s = carry
        value, grads = jax.value_and_grad(loss)(p)
        updates, s = optimizer.update(grads, s, p)
        return (optax.apply_updates(p, updates), s), value

    _, losses = jax.jit(lambda c: jax.lax.scan(step, c, length=150))(
        (params, optimizer.init(params))
    )
    assert losses[-1] < 0.5 * losses[0]
