"""Labels, the optimizers as wholes, and one battery over all of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose
from optax.contrib import MuonDimensionNumbers

from bitnet_jax import BitDense, BitnetError, Scheme, checkpoint, quantize_activations
from bitnet_jax.models.decoder import Decoder, DecoderConfig
from bitnet_jax.optim import adamw, labels, mugrokfast

from .battery import normal
from .optim_battery import LAYERS, STACK, assert_trees_close, first, jitted, run, tree

MUGROKFAST = mugrokfast(1e-2, axes=LAYERS)  # shared, for the sake of its compiled step


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


@pytest.mark.parametrize("options", [{}, {"lamb": 1.0, "ste": True, "normuon": 0.95}])
def test_labels_look_through_flax_boxes(options):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    params = nn.Dense(32, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 16)))
    assert sorted(jax.tree.leaves(labels(params))) == ["muon", "plain"]
    optimizer = mugrokfast(1e-2, **options)
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


# What the filter touches


def moved(a, b):
    """Which leaves differ by more than rounding."""
    return jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()) > 1e-5, a, b)


@pytest.mark.parametrize("options", [{"filter": "ema"}, {"filter": "ma", "window": 2}])
@pytest.mark.parametrize("ste", [False, True])
def test_the_filter_touches_every_leaf_or_under_ste_the_ternary_kernels_only(options, ste):
    params, grads = tree(), [tree(1), tree(2)]
    filtered = mugrokfast(1e-2, axes=LAYERS, alpha=0.5, lamb=2.0, ste=ste, **options)
    a, b = run(MUGROKFAST, params, grads)[0], run(filtered, params, grads)[0]
    want = jax.tree.map(lambda label: label == "muon" or not ste, labels(params, LAYERS))
    assert moved(a[1], b[1]) == want


def test_ste_keeps_no_memory_of_what_it_does_not_filter():
    size = lambda **options: sum(
        x.size for x in jax.tree.leaves(mugrokfast(1e-2, axes=LAYERS, **options).init(tree()))
    )
    leaves = [x.size for x in jax.tree.leaves(tree())]
    assert size(lamb=1.0) == size() + sum(leaves) + 1  # and one count
    assert size(lamb=1.0, ste=True) == size() + 2 * 16 * 24 + 1


@pytest.mark.parametrize("off", [{}, {"filter": None, "lamb": 2.0}, {"filter": "ma", "lamb": 0}])
def test_the_filter_is_off_by_default_and_when_told(off):
    optimizer = mugrokfast(1e-2, axes=LAYERS, **off)
    updates, state, _ = run(optimizer, tree(), [tree(1), tree(2)])
    assert "Grokfast" not in str(jax.tree.structure(state))
    assert_trees_close(updates, run(MUGROKFAST, tree(), [tree(1), tree(2)])[0], 1e-6, 1e-7)


@pytest.mark.parametrize("name", ["median", "EMA"])
def test_an_unknown_filter_is_told_in_one_line(name):
    with pytest.raises(BitnetError, match=f"^filter '{name}': expected 'ema', 'ma' or None$"):
        mugrokfast(1e-2, filter=name)


def test_the_gradient_that_reaches_the_optimizer_is_that_of_the_latent_weights():
    # dw = q(x)^T g with g = dloss/dy: no derivative of rounding, no mask.
    layer, x, y = BitDense(24, use_bias=False), normal(0, 8, 16), normal(1, 8, 24)
    params = layer.init(jax.random.key(0), x)
    grads = jax.grad(lambda p: 0.5 * jnp.sum((layer.apply(p, x) - y) ** 2))(params)
    codes, scale = quantize_activations(x)
    want = (codes * scale).T @ (layer.apply(params, x) - y)
    assert_allclose(grads["params"]["kernel"], want, rtol=1e-5, atol=1e-5)
    # and the filter's memory after one step is exactly that, clipped by nothing
    optimizer = mugrokfast(1e-2, alpha=0.9, lamb=1.0, ste=True, clip=np.inf)
    _, state, _ = run(optimizer, params, [grads])
    (ema,) = (s.inner_state.ema for s in state if hasattr(s, "inner_state"))
    assert_allclose(ema["params"]["kernel"], want, rtol=1e-5, atol=1e-5)


# Rates and decays


def scaled_by_label(values, updates):
    return jax.tree.map(lambda n, u: values[n] * u, labels(tree(), LAYERS), updates)


@pytest.mark.parametrize(
    "rates, factors",
    [
        ({"adam_learning_rate": 3e-2}, {"muon": 1.0, "decay": 3.0, "plain": 3.0}),
        (
            {"learning_rate": {"muon": 2e-2, "decay": 5e-3, "plain": lambda step: 4e-2}},
            {"muon": 2.0, "decay": 0.5, "plain": 4.0},
        ),
    ],
)
def test_every_label_may_have_a_learning_rate(rates, factors):
    params, grads = tree(), tree(1)
    same = first(MUGROKFAST, params, grads)
    other = first(mugrokfast(**{"learning_rate": 1e-2, **rates}, axes=LAYERS), params, grads)
    assert_trees_close(other, scaled_by_label(factors, same), 1e-4, 1e-7)


@pytest.mark.parametrize(
    "decay, want",
    [
        (
            lambda step: 0.5 * step,
            [{"muon": 0.5 * s, "decay": 0.5 * s, "plain": 0} for s in (0, 1)],
        ),
        (
            {"muon": 0.3, "decay": lambda step: 1.0 - step, "plain": 0.2},
            [{"muon": 0.3, "decay": 1.0, "plain": 0.2}, {"muon": 0.3, "decay": 0, "plain": 0.2}],
        ),
    ],
    ids=["one schedule", "one a label"],
)
def test_every_label_may_have_a_decay_and_it_may_be_a_schedule(decay, want):
    params, zero = tree(), jax.tree.map(jnp.zeros_like, tree())
    optimizer = mugrokfast(1e-2, weight_decay=decay, axes=LAYERS)
    state = optimizer.init(params)
    for values in want:
        updates, state = jitted(optimizer)(zero, state, params)
        rates = {n: -1e-2 * x for n, x in values.items()}
        assert_trees_close(updates, scaled_by_label(rates, params), 1e-5, 1e-9)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_mapping_names_all_labels(name):
    with pytest.raises(BitnetError, match=f"^{name}: a mapping with muon, adam; it needs exactly"):
        mugrokfast(**{"learning_rate": 1e-2, name: {"muon": 1.0, "adam": 1.0}})


def test_adamw_takes_a_schedule_for_its_decay():
    zero = jax.tree.map(jnp.zeros_like, tree())
    updates = first(adamw(1e-2, weight_decay=lambda step: 0.5), tree(), zero)
    want = scaled_by_label({"muon": -5e-3, "decay": -5e-3, "plain": 0.0}, tree())
    assert_trees_close(updates, want, 1e-5, 1e-9)


# Every optimizer

MAKERS = {
    "mugrokfast": functools.partial(mugrokfast, axes=LAYERS),
    "ema": functools.partial(mugrokfast, axes=LAYERS, lamb=1.0),
    "ma-ste": functools.partial(mugrokfast, axes=LAYERS, filter="ma", lamb=1.0, window=2, ste=True),
    "normuon": functools.partial(
        mugrokfast, axes=LAYERS, normuon=0.95, coefficients="polar_express"
    ),
    "adamw": adamw,
}
SHARED = {name: make(1e-2) for name, make in MAKERS.items()} | {"mugrokfast": MUGROKFAST}
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


def test_momentum_and_average_may_be_kept_in_another_dtype():
    narrow = mugrokfast(1e-2, axes=LAYERS, lamb=1.0, mu_dtype=jnp.bfloat16, ema_dtype=jnp.float16)
    grads = [tree(1), tree(2)]
    updates, state, _ = run(narrow, tree(), grads)
    count = lambda dtype: sum(x.size for x in jax.tree.leaves(state) if x.dtype == dtype)
    size = sum(x.size for x in jax.tree.leaves(tree()))
    assert count(jnp.bfloat16) == count(jnp.float16) == size
    want, _, _ = run(SHARED["ema"], tree(), grads)
    assert_trees_close(updates, want, 0.1, 1e-3)
    assert moved(updates, want) != jax.tree.map(lambda _: False, updates)
    adam = adamw(1e-2, mu_dtype=jnp.bfloat16).init(tree())
    assert sum(x.size for x in jax.tree.leaves(adam) if x.dtype == jnp.bfloat16) == size


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
    assert max(jax.tree.leaves(distance)) < 0.1


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
