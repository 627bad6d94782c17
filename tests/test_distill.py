import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax import BitnetError
from bitnet_jax.train.distill import distillation
from bitnet_jax.train.loop import fit
from bitnet_jax.train.loss import next_token
from bitnet_jax.train.step import as_pytree, train_step

VOCAB = 8
MODEL = nn.Embed(VOCAB, VOCAB)  # its table is the logits: every gradient can be written down
ROWS = np.random.default_rng(0).integers(0, VOCAB, (3, 6)).astype(np.int32)


def table(seed, size=1.0):
    values = np.random.default_rng(seed).standard_normal((VOCAB, VOCAB)) * size
    return {"params": {"embedding": jnp.asarray(values, jnp.float32)}}


STUDENT, TEACHER = table(1), table(2, 2.0)


def both(loss, rows=ROWS, student=STUDENT):
    """Value, metrics, and gradient by the student's table."""
    f = jax.value_and_grad(lambda p: loss(MODEL, p, rows), has_aux=True)
    (value, metrics), grads = jax.jit(f)(student)
    return np.asarray(value), metrics, np.asarray(grads["params"]["embedding"])


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def written_out(temperature, mixing):
    """Value and gradient in float64, from the formula alone."""
    z, v = (
        np.asarray(x["params"]["embedding"], np.float64)[ROWS[:, :-1]] for x in (STUDENT, TEACHER)
    )
    q, p = softmax(z / temperature), softmax(v / temperature)
    kl = (p * (np.log(p) - np.log(q))).sum(-1).mean()
    right = np.eye(VOCAB)[ROWS[:, 1:]]
    entropy = -(right * np.log(softmax(z))).sum(-1).mean()
    count = ROWS[:, 1:].size
    dz = (1 - mixing) * (softmax(z) - right) + mixing * temperature * (q - p)
    grad = np.zeros((VOCAB, VOCAB))
    np.add.at(grad, ROWS[:, :-1], dz / count)
    return (1 - mixing) * entropy + mixing * temperature**2 * kl, grad, entropy, kl


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("mixing", [0.3, 1.0])
def test_value_and_gradient_are_the_formulas(temperature, mixing):
    value, metrics, grad = both(
        distillation(MODEL, TEACHER, temperature=temperature, mixing=mixing)
    )
    expected, expected_grad, entropy, kl = written_out(temperature, mixing)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-6, rtol=1e-5)
    assert float(metrics["cross_entropy"]) == pytest.approx(entropy, rel=1e-5)
    assert float(metrics["divergence"]) == pytest.approx(temperature**2 * kl, rel=1e-5)


def test_without_mixing_it_is_the_plain_loss_bit_for_bit():
    value, metrics, grad = both(distillation(MODEL, TEACHER, mixing=0.0))
    plain, plain_metrics, plain_grad = both(next_token)
    assert value.tobytes() == plain.tobytes() and grad.tobytes() == plain_grad.tobytes()
    assert metrics == plain_metrics


def test_with_the_teacher_alone_the_text_does_not_matter():
    loss = distillation(MODEL, TEACHER, mixing=1.0)
    other = ROWS.copy()
    other[:, -1] = (other[:, -1] + 1) % VOCAB  # only a target, never an input
    np.testing.assert_array_equal(both(loss)[2], both(loss, other)[2])
    assert (both(next_token)[2] != both(next_token, other)[2]).any()


def test_a_student_like_its_teacher_is_at_rest():
    value, _, grad = both(distillation(MODEL, TEACHER, mixing=1.0), student=TEACHER)
    assert abs(value) < 1e-6 and abs(grad).max() < 1e-6


def test_a_high_temperature_matches_logits():
    """For large T the gradient is that of the logits' squared distance (arXiv 1503.02531)."""
    *_, grad = both(distillation(MODEL, TEACHER, temperature=100.0, mixing=1.0))
    z, v = (
        np.asarray(x["params"]["embedding"], np.float64)[ROWS[:, :-1]] for x in (STUDENT, TEACHER)
    )
    centred = (z - z.mean(-1, keepdims=True)) - (v - v.mean(-1, keepdims=True))
    limit = np.zeros((VOCAB, VOCAB))
    np.add.at(limit, ROWS[:, :-1], centred / VOCAB / ROWS[:, 1:].size)
    np.testing.assert_allclose(grad, limit, atol=0.03 * abs(limit).max())


def test_no_gradient_reaches_the_teacher():
    loss = distillation(MODEL, TEACHER, mixing=0.5)
    grads = jax.grad(lambda loss: loss(MODEL, STUDENT, ROWS)[0])(loss)
    assert [x.shape for x in jax.tree.leaves(grads)] == [(VOCAB, VOCAB)]
    assert not any(x.any() for x in jax.tree.leaves(grads))


def test_the_teacher_is_an_argument_of_the_program_not_a_constant_in_it():
    optimizer = optax.sgd(1.0)
    state = optimizer.init(STUDENT)

    def program(loss):
        step = train_step(MODEL, optimizer)
        return step.lower(STUDENT, state, as_pytree(loss), ROWS).as_text()

    def closed_over(teacher):
        inner = distillation(MODEL, teacher)
        return lambda model, params, batch: inner(model, params, batch)

    assert program(distillation(MODEL, TEACHER)) == program(distillation(MODEL, table(3)))
    # What the line above would not allow:
    assert program(closed_over(TEACHER)) != program(closed_over(table(3)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_student_learns_its_teachers_distribution(accumulate):
    rows = np.random.default_rng(3).integers(0, VOCAB, (64, 9)).astype(np.int32)
    teacher = jax.tree.map(jnp.array, TEACHER)
    loss = distillation(MODEL, teacher, mixing=1.0)
    done = fit(
        MODEL, STUDENT, optax.adam(0.1), rows, epochs=15, batch=8, accumulate=accumulate, loss=loss
    )
    z, v = (np.asarray(x["params"]["embedding"]) for x in (done.params, TEACHER))
    np.testing.assert_allclose(softmax(z), softmax(v), atol=0.05)
    assert done.history[-1]["divergence"] < 0.01 * done.history[0]["divergence"]
    # The teacher was not donated, nor changed.
    jax.tree.map(np.testing.assert_array_equal, teacher, TEACHER)


@pytest.mark.parametrize(
    "options", [{"mixing": -0.1}, {"mixing": 1.1}, {"temperature": 0.0}, {"temperature": np.inf},
                {"mixing": np.nan}, {"temperature": np.nan}]
)  # fmt: skip
def test_impossible_settings_are_told(options):
    with pytest.raises(BitnetError, match=next(iter(options))):
        distillation(MODEL, TEACHER, **options)
