import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax import BitDense, BitnetError, Policy, Scheme, convert, quantize_weights
from bitnet_jax.convert import attach, prequantize
from bitnet_jax.quantize import dequantize, round_activations
from bitnet_jax.recipe import (
    DeadZone,
    LearnedScales,
    Residual,
    WarmUp,
    apply,
    begin,
    finish,
)
from bitnet_jax.recipe.scales import elastic
from bitnet_jax.train.step import as_pytree, train_step
from bitnet_jax.train.watch import watch

TWN = Scheme("twn", "channel")
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 16))
G = jax.random.normal(jax.random.key(2), (6, 8))  # what the loss sends back
LAYER = BitDense(8, scheme=TWN, use_bias=False)
PARAMS = LAYER.init(KEY, X)
W = PARAMS["params"]["kernel"]
Q = dequantize(quantize_weights(W, TWN))
PARTS = [
    WarmUp(10, scheme=TWN),
    Residual(10),
    DeadZone(0.3, 10, scheme=TWN),
    LearnedScales(scheme=TWN),
]


def both(recipe, step, params=PARAMS, layer=LAYER):
    """Output, and gradients by the parameters, of sum(y G) with a recipe at a step."""

    def f(params, x):
        y = layer.apply(apply(recipe, params, jnp.asarray(step)), x)
        return jnp.sum(y * G), y

    (_, y), grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, X)
    return np.asarray(y), grads[0]["params"], np.asarray(grads[1])


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance * float(np.abs(b).max()), rtol=0)


@pytest.mark.parametrize("step", [0, 3, 9])
def test_warm_up_is_its_formula(step):
    a = step / 10
    w, x = (1 - a) * W + a * Q, (1 - a) * X + a * round_activations(X)
    y, grads, dx = both([PARTS[0]], step)
    close(y, x @ w)
    close(grads["kernel"], x.T @ G)  # straight through, at every strength
    close(dx, G @ w.T)


@pytest.mark.parametrize("step", [0, 1, 4, 9])
def test_residual_is_its_formula(step):
    t = step / 10
    e = t / 0.1 if t < 0.1 else (1 + np.cos(np.pi * (t - 0.1) / 0.9)) / 2
    x = round_activations(X)
    y, grads, dx = both([PARTS[1]], step)
    close(y, x @ Q + e * (X @ W))
    close(grads["kernel"], x.T @ G + e * X.T @ G)
    close(dx, G @ (Q + e * W).T)


@pytest.mark.parametrize("step", [0, 5])
def test_dead_zone_is_its_formula(step):
    e = 0.3 * (1 - step / 10)
    dead, x = Q == 0, round_activations(X)
    y, grads, dx = both([PARTS[2]], step)
    close(y, x @ Q + e * jnp.where(dead, W, 0).sum(0))
    close(grads["kernel"], x.T @ G + jnp.where(dead, e * G.sum(0), 0))
    close(dx, G @ Q.T)


def test_learned_scales_are_their_formula():
    params = begin([PARTS[3]], PARAMS)
    a = jnp.asarray(params["params"]["kernel_scale"]) * jnp.linspace(0.5, 1.5, 8)
    params = {"params": {**params["params"], "kernel_scale": a}}
    u = W / a
    codes = jnp.round(1.5 * jnp.clip(u, -0.99, 0.99))
    assert set(np.unique(codes)) == {-1, 0, 1}
    x, q = round_activations(X), codes * a / 1.5
    y, grads, dx = both([PARTS[3]], 0, params)
    close(y, x @ q)
    dq, inside = x.T @ G, jnp.abs(u) <= 0.99
    close(grads["kernel"], jnp.where(inside, dq, 0))
    slope = jnp.where(inside, q / a - u, jnp.sign(u))
    close(grads["kernel_scale"], (dq * slope).sum(0, keepdims=True) / (16 * 8) ** 0.5)
    close(dx, G @ q.T)


@pytest.mark.parametrize("shape, scale", [((12, 5), "tensor"), ((10, 5), 4), ((3, 10, 5), 4)])
def test_learned_scales_of_groups(shape, scale):
    w = jax.random.normal(KEY, shape)
    params = begin([LearnedScales(Policy((("kernel", "ternary-stack"),)), Scheme("twn", scale))],
                   {"kernel": w})  # fmt: skip
    a, group = params["kernel_scale"], scale if isinstance(scale, int) else 0
    each = jnp.repeat(a, group or shape[-2], axis=-2)[..., : shape[-2], :]
    close(elastic(w, a, group), jnp.round(1.5 * jnp.clip(w / each, -0.99, 0.99)) * each / 1.5)
    grads = jax.grad(lambda a: elastic(w, a, group).sum())(a)
    assert grads.shape == a.shape


@pytest.mark.parametrize("part", PARTS[:3], ids=lambda p: type(p).__name__)
def test_at_its_end_a_part_is_gone_bit_for_bit(part):
    plain, with_part = both([], 0), both([part], 10)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(with_part), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.parametrize("part", PARTS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_part_trains_in_the_same_loop(part, accumulate):
    loss = as_pytree(lambda m, p, rows: (jnp.mean((m.apply(p, rows) - 1.0) ** 2), {}))
    optimizer = optax.adam(0.01)
    once = (lambda p: prequantize(p, Policy(), TWN)) if accumulate > 1 else None
    step = train_step(LAYER, optimizer, accumulate, once, [part], watch(scheme=TWN, recipe=[part]))
    params = begin([part], jax.tree.map(jnp.copy, PARAMS))
    state, losses = optimizer.init(params), []
    for at in range(12):
        params, state, metrics = step(params, state, loss, X, jnp.asarray(at))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert 0 < float(metrics["zeros"]) < 1
    assert jax.tree.structure(finish([part], params)) is not None
    packed = convert_finished([part], params)
    y = LAYER.apply(packed, X)
    assert bool(jnp.isfinite(y).all())
    # What is measured after training is what is packed.
    assert bool((y == LAYER.apply(finish([part], params), X)).all())


def convert_finished(recipe, params):
    return convert(finish(recipe, params), scheme=TWN).tree


def test_parts_compose_in_any_order():
    for recipe in (PARTS, PARTS[::-1]):
        params = begin(recipe, PARAMS)
        y, grads, _ = both(recipe, 5, params)
        assert np.isfinite(y).all()
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
        end = both(recipe, 10, params)[0]
        close(end, np.asarray(LAYER.apply(finish(recipe, params), X)), 1e-6)


def test_parts_take_weights_quantised_before():
    given = attach(PARAMS, prequantize(PARAMS, Policy(), TWN))
    for part in PARTS[:3]:
        a, b = (LAYER.apply(apply([part], x, jnp.asarray(4)), X) for x in (given, PARAMS))
        close(a, np.asarray(b), 1e-6)


def test_no_recipe_is_the_plain_training_bit_for_bit():
    loss = as_pytree(lambda m, p, rows: (jnp.mean(m.apply(p, rows) ** 2), {}))
    results = []
    for options in ({}, {"recipe": (), "watch": watch(scheme=TWN)}):
        step, params = train_step(LAYER, optax.sgd(0.1), **options), jax.tree.map(jnp.copy, PARAMS)
        results.append(step(params, optax.sgd(0.1).init(params), loss, X)[0]["params"]["kernel"])
    assert bool((results[0] == results[1]).all())


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda m, x, _: (m(x), None), variable_axes={"params": 0},
            split_rngs={"params": True}, length=2,
        )  # fmt: skip
        return body(BitDense(16, use_bias=False, scheme=TWN, name="layers"), x, None)[0]


@pytest.mark.parametrize("kind", [WarmUp, Residual, DeadZone])
def test_parts_work_under_scan(kind):
    policy = Policy((("kernel", "ternary-stack"),))
    options = {"policy": policy} | ({} if kind is Residual else {"scheme": TWN})
    part = DeadZone(0.3, 10, **options) if kind is DeadZone else kind(10, **options)
    params = Stack().init(KEY, X)
    y = Stack().apply(apply([part], params, jnp.asarray(4)), X)
    x = X
    for i in range(2):
        one = {"params": {"kernel": params["params"]["layers"]["kernel"][i]}}
        layer = BitDense(16, use_bias=False, scheme=TWN)
        plain = DeadZone(0.3, 10, scheme=TWN) if kind is DeadZone else (
            WarmUp(10, scheme=TWN) if kind is WarmUp else Residual(10))  # fmt: skip
        x = layer.apply(apply([plain], one, jnp.asarray(4)), x)
    close(y, np.asarray(x), 1e-4)


def test_the_dead_zone_folds_into_a_bias():
    layer = BitDense(8, scheme=TWN)
    params = layer.init(KEY, X)
    part = DeadZone(0.3, 10, fade=False, scheme=TWN)
    trained = layer.apply(apply([part], begin([part], params), jnp.asarray(10)), X)
    close(layer.apply(finish([part], params), X), np.asarray(trained))
    with pytest.raises(BitnetError, match="bias is missing"):
        begin([part], PARAMS)


def test_watch_counts_what_changed():
    codes = np.array([[1, 0, -1, 1], [0, 1, 1, -1]])
    old = {"kernel": jnp.asarray(codes, jnp.float32)}
    new = {"kernel": jnp.asarray(np.where(codes == 0, 1, codes), jnp.float32).at[0, 0].set(-1)}
    found = {k: float(v) for k, v in jax.jit(watch(scheme=Scheme("twn")))(old, new).items()}
    assert found == {"flips": 3 / 8, "zeros": 0.0, "latent": 1.0}
