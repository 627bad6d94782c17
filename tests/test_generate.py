"""Generation in batches of ragged prompts: what stands beside a row never changes its text."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitnet_jax
from bitnet_jax.models import generate as module
from bitnet_jax.models.decoder import Decoder, DecoderConfig, empty_cache
from bitnet_jax.models.generate import Sampling, bucket, generate, prepare, ragged, stream

CONFIG = DecoderConfig(vocab_size=96, width=64, layers=1, heads=4, kv_heads=2, hidden=96)
TWN = bitnet_jax.Scheme("twn", "channel")
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(0, 96, n).tolist() for n in (20, 3, 11, 16)]
STEPS = 6
DRAWN = Sampling(3.0, 60)


def build(kind, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    model = Decoder(config, None if kind == "float" else TWN)
    params = model.init(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))
    if kind == "packed":
        rules = (("embed|head", "int8"), ("kernel", "ternary"))
        params = bitnet_jax.convert(params, bitnet_jax.Policy(rules), TWN).tree
    return model, params


@pytest.fixture(scope="module")
def packed():
    return build("packed")


@pytest.mark.parametrize("kind", ["float", "packed"])
def test_a_row_is_what_its_prompt_gives_alone(kind):
    model, params = build(kind)
    tokens, lengths = ragged(PROMPTS)
    out = generate(model, params, tokens, STEPS, lengths=lengths)
    assert out.shape == (4, 20 + STEPS) and out.dtype == tokens.dtype
    for row, prompt in zip(out, PROMPTS):
        alone = generate(model, params, jnp.asarray([prompt]), STEPS)[0]
        np.testing.assert_array_equal(row[: len(alone)], alone)
        assert (row[len(alone) :] == 0).all()


def test_what_stands_behind_a_prompt_is_not_read(packed):
    tokens, lengths = ragged(PROMPTS)
    behind = jnp.where(jnp.arange(20) < lengths[:, None], tokens, 77)
    a, b = (generate(*packed, x, STEPS, lengths=lengths) for x in (tokens, behind))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("how", [Sampling(), DRAWN], ids=["greedy", "sampled"])
def test_rows_stream_as_they_are_generated(packed, how):
    tokens, lengths = ragged(PROMPTS)
    key = jax.random.key(5)
    out = generate(*packed, tokens, STEPS, key, how, lengths=lengths)
    streamed = jnp.stack(list(stream(*packed, tokens, STEPS, key, how, lengths=lengths)), 1)
    for row, new, length in zip(out, streamed, lengths):
        np.testing.assert_array_equal(row[length : length + STEPS], new)


def test_a_row_ends_at_the_stop_token(packed):
    tokens, lengths = ragged(PROMPTS)
    arguments = (*packed, tokens, STEPS, jax.random.key(7), DRAWN)
    free = jnp.stack(list(stream(*arguments, lengths=lengths)), 1)
    assert len({tuple(row) for row in free.tolist()}) == 4
    stop = int(free[1, 2])
    rows = [row[: row.index(stop) + 1] if stop in row else row for row in free.tolist()]
    stopped = [row + [stop] * (STEPS - len(row)) for row in rows]
    got = generate(*arguments, lengths=lengths, stop=stop)
    new = [row[n : n + STEPS].tolist() for row, n in zip(got, lengths)]
    assert len(rows[1]) < STEPS and new == stopped
    streamed = list(stream(*arguments, lengths=lengths, stop=stop))
    assert jnp.stack(streamed, 1).tolist() == [row[: len(streamed)] for row in stopped]


def test_all_rows_stopped_is_the_end(packed):
    prompt = jnp.asarray([PROMPTS[0]])
    first = int(generate(*packed, prompt, STEPS)[0, 20])
    assert generate(*packed, prompt, STEPS, stop=first)[0, 20:].tolist() == [first] * STEPS
    assert [t.tolist() for t in stream(*packed, prompt, STEPS, stop=first)] == [[first]]


def test_lengths_of_one_bucket_compile_once(packed):
    sizes = []
    for length in (17, 20, 24):
        prompt, lengths = jnp.ones((4, length), jnp.int32), jnp.array([1, 2, length, 3])
        generate(*packed, prompt, STEPS, lengths=lengths)
        list(stream(*packed, prompt, STEPS + 24 - length, lengths=lengths))
        compiled = (module._continued, module._first, module._next)
        sizes.append([function._cache_size() for function in compiled])
    assert sizes[0] == sizes[1] == sizes[2]


@given(st.integers(1, 10_000))
def test_buckets_are_few_and_close(length):
    padded = bucket(length)
    assert padded >= length and bucket(padded) == padded and bucket(length + 1) >= padded
    assert padded < (1.5 if length > 16 else 2) * length


def test_prepared_streams_do_not_compile(packed):
    tokens, lengths = ragged(PROMPTS[:3])
    prepare(*packed, tokens, STEPS, lengths=lengths)
    compiled, key = [], jax.random.key(0)
    listen = lambda event, *args, **kwargs: compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        list(stream(*packed, tokens, STEPS, key, lengths=lengths))
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [event for event in compiled if "backend_compile" in event]


def test_each_row_may_start_where_it_likes(packed):
    model, params = packed
    apply = jax.jit(model.apply)
    tokens = jnp.asarray(RANDOM.integers(0, 96, (2, 9)))
    whole = apply(params, tokens)
    _, cache = apply(params, tokens[:, :6], empty_cache(CONFIG, 2, 12), 0)
    # Row 0 goes on at token 6, row 1 reads its token 3 again.
    new = jnp.stack([tokens[0, 6:7], tokens[1, 3:4]])
    logits, cache = apply(params, new, cache, jnp.array([6, 3]))
    np.testing.assert_allclose(logits[0, 0], whole[0, 6], atol=2e-2 * float(whole.std()))
    np.testing.assert_allclose(logits[1, 0], whole[1, 3], atol=2e-2 * float(whole.std()))
    some = apply(params, tokens, at=jnp.array([8, 2]))
    np.testing.assert_allclose(some[:, 0], whole[jnp.arange(2), jnp.array([8, 2])], rtol=1e-5)


def produced(text: str, type_: str) -> set[str]:
    """Names of the HLO instructions whose result has this type."""
    return set(re.findall(rf"= {re.escape(type_)}\{{[^}}]*\}} ([\w-]+)\(", text))


@pytest.mark.parametrize("ragged_", [False, True])
def test_decoding_copies_neither_weights_nor_cache(packed, ragged_):
    """What a token costs is reading: no instruction makes an array as large as a packed weight,
    and the cache is written in its own memory."""
    model, params = packed
    cache = empty_cache(CONFIG, 2, 40)
    at = jnp.array([7, 9]) if ragged_ else jnp.int32(7)
    arguments = (model, params, jnp.zeros(2, jnp.int32), cache, at, jax.random.key(0))
    text = module._next.lower(*arguments, jnp.int32(1), Sampling()).compile().as_text()
    reads = {"parameter", "bitcast", "get-tuple-element", "tuple"}
    shapes = {x.shape for x in jax.tree.leaves(params) if x.dtype == jnp.uint8}
    assert (96, 64) in shapes and (16, 96) in shapes  # the head, a ternary matrix
    for shape in shapes:
        sizes = ",".join(map(str, shape))
        for kind in ("u8", "s8", "s32", "f32"):
            lead = {f"{kind}[{sizes}]", f"{kind}[1,{sizes}]", f"{kind}[1,1,{sizes}]"}
            for type_ in lead:
                assert produced(text, type_) <= reads, (type_, produced(text, type_))
    for type_ in ("f32[2,2,40,16]", "f32[2,2,16,40]", "f32[4,40,16]", "f32[4,16,40]"):
        assert not {op for op in produced(text, type_) if "copy" in op or "transpose" in op}
    donated = re.search(r"input_output_alias={(.*?)}, entry", text)
    assert donated and donated[1].count("may-alias") == len(jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3], "one for each"), ([3, 0], "empty"), ([3, 9], "up to 9"), ([3, 3, 3], "one for each")],
)
def test_lengths_that_do_not_fit(packed, lengths, message):
    prompt = jnp.zeros((2, 8), jnp.int32)
    for how in (generate, lambda *args, **kw: next(stream(*args, **kw))):
        with pytest.raises(ValueError, match=message):
            how(*packed, prompt, 3, lengths=jnp.array(lengths))
