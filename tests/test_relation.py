import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax import BitnetError, Scheme
from bitnet_jax.models.decoder import ACTIVATIONS, Decoder, DecoderConfig, max_logits
from bitnet_jax.train.distill import distillation
from bitnet_jax.train.loop import fit
from bitnet_jax.train.loss import next_token
from bitnet_jax.train.relation import relation, relation_divergence
from bitnet_jax.train.step import as_pytree, train_step

VOCAB = 8
ROWS = np.random.default_rng(0).integers(0, VOCAB, (3, 6)).astype(np.int32)


class Attention(nn.Module):
    """What a decoder's attention shows, without the attention; two key/value heads for four."""

    @nn.compact
    def __call__(self, x):
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            y = nn.Dense(heads * 3, use_bias=False, name=f"to_{name}")(x)
            if self.is_mutable_collection(ACTIVATIONS) and not self.is_initializing():
                self.sow(ACTIVATIONS, name, y.reshape(*x.shape[:2], heads, 3))
        return x


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(16)(jnp.tanh(Attention(name="attention")(x)))


class Net(nn.Module):
    """Compiled in no time, and shows what a `Decoder` does."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, 16)(tokens)
        for i in range(2):
            x = Layer(name=f"layer_{i}")(x)
        return nn.Dense(VOCAB)(x)


MODEL = Net()
STUDENT, TEACHER = (MODEL.init(jax.random.key(i), ROWS) for i in (1, 2))


def both(loss, params=STUDENT, rows=ROWS):
    """Value, metrics and gradient by the student's parameters."""
    f = jax.value_and_grad(lambda p: loss(MODEL, p, rows), has_aux=True)
    (value, metrics), grads = jax.jit(f)(params)
    return value, metrics, grads


def close(a, b, rtol=1e-5, atol=1e-7):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# The formula, in float64


def rows_of(x, splits, temperature):
    """Unit vectors, their lengths and their relations."""
    x = np.asarray(x, np.float64).reshape(*x.shape[:2], splits, -1).transpose(0, 2, 1, 3)
    length = np.sqrt((x**2).sum(-1, keepdims=True))
    a = x / length
    e = np.exp(a @ a.swapaxes(-1, -2) / temperature)
    return a, length, e / e.sum(-1, keepdims=True)


def written_out(teacher, student, splits, temperature):
    """The mean KL of one array's relations, and its gradient by the student's array."""
    *_, p = rows_of(teacher, splits, temperature)
    a, length, q = rows_of(student, splits, temperature)
    count = np.prod(p.shape[:-1])
    ds = (q - p) / temperature / count
    da = (ds + ds.swapaxes(-1, -2)) @ a
    dx = (da - a * (a * da).sum(-1, keepdims=True)) / length
    value = (p * (np.log(p) - np.log(q))).sum() / count
    return value, dx.transpose(0, 2, 1, 3).reshape(student.shape)


def states(seed, heads, kv_heads, features):
    rng = np.random.default_rng(seed)
    shapes = [(2, 5, n, features) for n in (heads, kv_heads, kv_heads)]
    return tuple(jnp.asarray(rng.standard_normal(s) * 3, jnp.float32) for s in shapes)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("student", [(4, 2, 6), (4, 4, 4), (2, 1, 4)], ids=str)
def test_value_and_gradient_are_the_formulas(student, splits, temperature):
    theirs, ours = states(0, 4, 2, 6), states(1, *student)
    f = lambda ours: relation_divergence(theirs, ours, splits, temperature)
    value, grads = jax.value_and_grad(f)(ours)
    each = [written_out(a, b, splits, temperature) for a, b in zip(theirs, ours)]
    assert float(value) == pytest.approx(np.mean([x[0] for x in each]), rel=1e-5)
    # Where each part is one feature the gradient is 0: what is left of relations that cancel, whose
    # size is 1 / temperature.
    rounding = 4 * np.finfo(np.float32).eps / min(temperature, 1)
    for got, (_, want) in zip(grads, each):
        limit = 1e-6 * abs(want).max() + rounding
        np.testing.assert_allclose(got, want / 3, atol=limit, rtol=1e-4)


def test_by_default_the_splits_are_the_teachers_key_value_heads():
    theirs, ours = states(0, 4, 2, 6), states(1, 4, 4, 3)
    assert relation_divergence(theirs, ours) == relation_divergence(theirs, ours, 2)
    assert relation_divergence(theirs, ours) != relation_divergence(theirs, ours, 4)


def test_only_relations_count_not_vectors_nor_their_lengths():
    theirs = states(0, 4, 2, 6)
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))[0]
    turned = tuple(7 * x @ turn.astype(np.float32) for x in theirs)
    assert abs(float(relation_divergence(theirs, turned, 2))) < 1e-6
    assert float(relation_divergence(theirs, states(1, 4, 2, 6), 2)) > 1e-2


def test_a_vector_of_zeros_has_a_finite_gradient():
    theirs, ours = states(0, 2, 2, 4), tuple(x.at[0, 1].set(0) for x in states(1, 2, 2, 4))
    for grad in jax.grad(lambda x: relation_divergence(theirs, x))(ours):
        assert np.isfinite(grad).all()


# The loss


def shown(params, layer, rows=ROWS):
    tree = MODEL.apply(params, rows[:, :-1], mutable=[ACTIVATIONS])[1][ACTIVATIONS]
    return tuple(tree[f"layer_{layer}"]["attention"][name][0] for name in "qkv")


INNER = {
    "next token": next_token,
    "distillation": distillation(MODEL, TEACHER, mixing=0.7),
    "of another teacher": distillation(MODEL, STUDENT, mixing=0.7),
    "relation": relation(next_token, MODEL, TEACHER, layer=0, weight=2.0),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_the_loss_is_inners_and_the_weighted_term(inner):
    def term(p):
        return relation_divergence(shown(TEACHER, 1), shown(p, 1), 1, 0.5)

    loss = relation(inner, MODEL, TEACHER, layer=1, weight=30.0, splits=1, temperature=0.5)
    value, metrics, grads = both(loss)
    plain, plain_metrics, plain_grads = both(inner)
    extra, extra_grads = jax.value_and_grad(term)(STUDENT)
    assert extra > 1e-3
    close(value, plain + 30 * extra)
    close(grads, jax.tree.map(lambda a, b: a + 30 * b, plain_grads, extra_grads), 1e-4, 1e-6)
    close(metrics, {**plain_metrics, "relation": extra})


def test_without_weight_it_is_the_inner_loss_itself():
    inner = INNER["distillation"]
    assert relation(inner, MODEL, TEACHER, layer=1, weight=0.0) is inner
    assert relation(next_token, MODEL, TEACHER, layer=99, weight=0) is next_token


def test_a_student_like_its_teacher_is_at_rest():
    inner = distillation(MODEL, TEACHER, mixing=1.0)
    value, _, grads = both(relation(inner, MODEL, TEACHER, layer=1, weight=1.0), TEACHER)
    assert abs(value) < 1e-6
    assert max(abs(g).max() for g in jax.tree.leaves(grads)) < 1e-6


def test_no_gradient_reaches_the_teacher_and_it_is_there_once():
    loss = relation(INNER["distillation"], MODEL, TEACHER, layer=1, weight=9.0)
    grads = jax.grad(lambda loss: loss(MODEL, STUDENT, ROWS)[0])(loss)
    assert not any(x.any() for x in jax.tree.leaves(grads))
    assert len(jax.tree.leaves(loss)) == len(jax.tree.leaves(TEACHER))
    other = relation(INNER["of another teacher"], MODEL, TEACHER, layer=1, weight=9.0)
    assert len(jax.tree.leaves(other)) == 2 * len(jax.tree.leaves(TEACHER))


def test_the_teacher_is_an_argument_of_the_program_not_a_constant_in_it():
    optimizer = optax.sgd(1.0)
    step, state = train_step(MODEL, optimizer), optimizer.init(STUDENT)

    def program(teacher):
        loss = relation(next_token, MODEL, teacher, layer=1, weight=9.0)
        return step.lower(STUDENT, state, as_pytree(loss), ROWS).as_text()

    assert program(TEACHER) == program(jax.tree.map(lambda x: x + 1, TEACHER))


def products(loss):
    """Matrix products in the compiled gradient."""
    f = jax.jit(lambda loss, p: jax.grad(lambda p: loss(MODEL, p, ROWS)[0])(p))
    return f.lower(as_pytree(loss), STUDENT).compile().as_text().count(" dot(")


def test_student_and_teacher_run_once_for_both_terms():
    inner = INNER["distillation"]
    # For each of Q, K, V: the projection of both and its two products backward; as many of A A^T.
    term = 3 * (4 + 4)
    both_terms = products(relation(inner, MODEL, TEACHER, layer=1, weight=9.0))
    assert both_terms == products(inner) + term
    copied = distillation(MODEL, jax.tree.map(jnp.array, TEACHER), mixing=0.7)
    assert products(relation(copied, MODEL, TEACHER, layer=1, weight=9.0)) > both_terms


def test_an_inner_loss_may_apply_the_student_as_it_likes():
    def never(model, params, batch):
        return jnp.zeros(()), {}

    def options(model, params, batch):
        return model.apply(params, batch[:, :-1], mutable=["intermediates"])[0].mean(), {}

    def moved(model, params, batch):
        return model.apply(jax.tree.map(lambda x: x + 1, params), batch[:, :-1]).mean(), {}

    def unseen(model, params, batch):
        return model.clone().apply(params, batch[:, :-1]).mean(), {}

    def more(model, params, batch):
        one, two = (model.apply(params, x) for x in (batch[:, :-1], batch[:, 1:]))
        return (one - two).mean(), {}

    def reversed_(model, params, batch):
        return model.apply(params, batch[:, :-1][:, ::-1]).mean(), {}

    far = lambda x: relation(x, MODEL, TEACHER, layer=1, weight=1.0)(MODEL, STUDENT, ROWS)[1]
    usual = far(next_token)["relation"]
    for inner in (never, options, moved, unseen, more):
        close(far(inner)["relation"], usual)
    # Relations of tokens in another order are the same rows in another order.
    close(far(reversed_)["relation"], usual)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_student_learns_its_teachers_relations(accumulate):
    rows = np.random.default_rng(3).integers(0, VOCAB, (32, 9)).astype(np.int32)
    inner = distillation(MODEL, TEACHER, mixing=1.0)
    loss = relation(inner, MODEL, TEACHER, layer=1, weight=10.0)
    done = fit(
        MODEL, STUDENT, optax.adam(0.02), rows, epochs=12, batch=8, accumulate=accumulate, loss=loss
    )
    first, last = done.history[0], done.history[-1]
    assert last["relation"] < 0.1 * first["relation"]
    assert last["divergence"] < 0.1 * first["divergence"]


# The decoder

CONFIG = DecoderConfig(vocab_size=VOCAB, width=32, layers=2, heads=4, kv_heads=2, hidden=48)


@pytest.mark.parametrize("remat", [False, True])
def test_a_decoder_shows_its_projections_to_who_asks(remat):
    model = Decoder(dataclasses.replace(CONFIG, remat=remat, sub_norms=True))
    params = model.init(jax.random.key(0), ROWS)
    assert list(params) == ["params"]
    logits, extra = model.apply(params, ROWS, mutable=[ACTIVATIONS])
    assert list(extra) == [ACTIVATIONS]
    np.testing.assert_array_equal(logits, model.apply(params, ROWS))
    first = extra[ACTIVATIONS]["layer_0"]
    shapes = {name: x[0].shape for name, x in first["attention"].items()}
    assert shapes == {"q": (3, 6, 4, 8), "k": (3, 6, 2, 8), "v": (3, 6, 2, 8), "mixed": (3, 6, 32)}
    assert first["mlp"]["mixed"][0].shape == (3, 6, 48)
    # By hand: the projections see the normalised embedding.
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    x = p["embed"]["embedding"][ROWS]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
    for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
        y = first["attention"][short][0]
        want = x @ p["layer_0"]["attention"][name]["kernel"]
        np.testing.assert_allclose(y.reshape(3, 6, -1), want, rtol=1e-4, atol=1e-5)


def test_who_asks_for_intermediates_gets_what_he_got():
    model = Decoder(CONFIG)
    params = model.init(jax.random.key(0), ROWS)
    _, extra = model.apply(params, ROWS, mutable=["intermediates"])
    assert list(extra) == ["intermediates"]
    assert list(max_logits(extra)) == ["layer_0/attention", "layer_1/attention"]


def test_a_ternary_decoder_learns_from_its_float_self():
    params = Decoder(CONFIG).init(jax.random.key(0), ROWS)
    loss = relation(next_token, Decoder(CONFIG), params, layer=1, weight=1.0)
    student = Decoder(CONFIG, Scheme("twn", "channel"))
    f = jax.jit(jax.value_and_grad(lambda p: loss(student, p, ROWS), has_aux=True))
    (_, metrics), grads = f(params)
    assert 0 < float(metrics["relation"]) < 1
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


# Mistakes


@pytest.mark.parametrize(
    "wrong", [{"layer": -1}, {"weight": -1.0}, {"weight": np.nan}, {"weight": np.inf},
              {"splits": 0}, {"temperature": 0.0}, {"temperature": np.nan}]
)  # fmt: skip
def test_impossible_settings_are_told(wrong):
    with pytest.raises(BitnetError, match=f"relation: {next(iter(wrong))}"):
        relation(next_token, MODEL, TEACHER, **{"layer": 0, "weight": 1.0, **wrong})


def test_splits_that_do_not_divide_are_told():
    loss = relation(next_token, MODEL, TEACHER, layer=0, weight=1.0, splits=4)
    with pytest.raises(BitnetError, match="splits 4 does not divide 2 heads of 3 features"):
        loss(MODEL, STUDENT, ROWS)


@pytest.mark.parametrize("model, count", [(MODEL, 2), (nn.Embed(VOCAB, VOCAB), 0)])
def test_a_layer_that_is_not_shown_is_told(model, count):
    params = model.init(jax.random.key(0), ROWS)
    loss = relation(next_token, model, params, layer=7, weight=1.0)
    with pytest.raises(BitnetError, match=f"teacher shows no .* of layer 7; it shows {count} lay"):
        loss(model, params, ROWS)
