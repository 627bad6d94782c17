"""The Phase 3 network and its import against the reference's own outputs, in every form on disk."""

import functools
import json
import logging
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from bitnet_jax import BitnetError, Policy, Scheme, convert
from bitnet_jax.interop import phase3
from bitnet_jax.interop.phase3_keys import state_dict
from bitnet_jax.models import quiet_star, trm
from bitnet_jax.models.titans import attend, recurrence
from bitnet_jax.train import recursion

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = GOLDEN / "phase3_variants"
QUIET = GOLDEN / "phase3_quietstar_tiny"
FILES = {
    "tiny": (GOLDEN / "phase3_tiny/model.safetensors", GOLDEN / "phase3_tiny/golden.npz"),
    "small": (GOLDEN / "phase3_small/model.safetensors", GOLDEN / "phase3_small/golden.npz"),
    "micro": (VARIANTS / "micro.safetensors", VARIANTS / "micro_golden.npz"),
}
OUTPUTS = {"y_history": "all_y", "z_history": "all_z", "memory_state_out": "memory_state"}
OUTPUTS |= {"loss_gate_with_labels": "loss_gate"}


@functools.cache
def model(name: str):
    """(module, variables, golden arrays) of a checkpoint."""
    file, golden = FILES[name]
    return *phase3.load(file), dict(np.load(golden))


@functools.cache
def call(module, **static):
    return jax.jit(functools.partial(module.apply, **static))


def near(found, wanted: np.ndarray, logits: np.ndarray, what: str = "") -> None:
    """Within 1e-4 of the logits' spread."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * logits.std(), err_msg=what)


@pytest.mark.parametrize("name", FILES)
def test_every_golden_array(name):
    module, variables, g = model(name)
    run = call(module, return_all_steps=True, mutable=("activations",))
    out, shown = run(variables, g["input_ids"], g["memory_state_in"], labels=g["labels"])
    inside = {k: v[0] for k, v in shown["activations"]["backbone"].items()}
    found = {**out, **inside}
    elsewhere = ("input_ids", "labels", "memory_state_in", "mask_", "grad_", "logits_", "_call2")
    checked = 0
    for key, wanted in g.items():
        if any(part in key for part in elsewhere) or key.endswith("b1_t7"):
            continue
        near(found[OUTPUTS.get(key, key)], wanted, g["logits"], key)
        checked += 1
    assert checked >= 15 + len([k for k in g if k.startswith("layer")])


def test_memory_masks_and_lengths():
    module, variables, g = model("tiny")
    run, ids = call(module), g["input_ids"]
    first = run(variables, ids)  # from the memory of the checkpoint
    second = run(variables, ids, first["memory_state"])
    near(second["logits"], g["logits_call2"], g["logits"])
    near(second["memory_state"], g["memory_state_out_call2"], g["logits"])
    zero = jnp.zeros_like(first["memory_state"])
    near(run(variables, ids, zero)["logits"], g["logits_zero_memory"], g["logits"])
    only = {"params": variables["params"]}
    near(run(only, ids)["logits"], g["logits_zero_memory"], g["logits"])
    for mask, wanted in (("mask_causal", "logits_causal"), ("mask_rows", "logits_mask_rows")):
        near(run(variables, ids, None, g[mask])["logits"], g[wanted], g["logits"], mask)
    short = run(variables, ids[:1, :7])
    near(short["logits"], g["logits_b1_t7"], g["logits"])
    near(short["memory_state"], g["memory_state_out_b1_t7"], g["logits"])


def gradient(module, variables, g, of="loss"):
    def value(params):
        out = module.apply({**variables, "params": params}, g["input_ids"], labels=g["labels"])
        return jnp.sum(out[of] ** 2) if of == "logits" else out[of]

    return jax.jit(jax.grad(value))(variables["params"])


def test_gradients():
    module, variables, g = model("tiny")
    found = state_dict({"params": gradient(module, variables, g)})
    norms = [k.removeprefix("grad_norm/") for k in g if k.startswith("grad_norm/")]
    assert len(norms) > 45
    for name in norms:
        size = float(g[f"grad_norm/{name}"])
        assert np.linalg.norm(found[name]) == pytest.approx(size, rel=1e-4, abs=1e-7), name
        head = g[f"grad_head/{name}"]
        near = 1e-4 * max(np.abs(head).max(), 1e-6)
        np.testing.assert_allclose(found[name].ravel()[:128], head, atol=near, err_msg=name)
    for name in (k.removeprefix("grad_none/") for k in g if k.startswith("grad_none/")):
        assert name not in found or not found[name].any(), name


def test_detached_steps_train_no_backbone_through_the_logits():
    module, variables, g = model("micro")
    free = recursion.attached(module.config).build(None)
    detached = gradient(module, variables, g, "logits")["backbone"]["layers_0"]
    attached = gradient(free, variables, g, "logits")["backbone"]["layers_0"]
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(detached))
    assert all(np.asarray(x).any() for x in jax.tree.leaves(attached))


def test_ternary_and_packed_are_the_same_network():
    module, variables, g = model("micro")
    scheme = Scheme("twn", "channel")
    ternary = module.config.build(scheme)
    rules = ((r"^buffers/", "float32"), (r"w_halt/", "float32"), ("kernel$", "ternary"))
    packed = convert(variables, Policy(rules), scheme).tree
    a, b = (call(ternary)(tree, g["input_ids"])["logits"] for tree in (variables, packed))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - g["logits"]).max() > 0.01  # it is not the float network


def test_the_recursion_is_traced_once():
    """Two loops, one in the other; Flax would trace the inner body four times."""
    module, variables, g = model("tiny")
    calls = []

    def count(run, args, kwargs, context):
        calls.extend([context.method_name] * isinstance(context.module, trm.Refiner))
        return run(*args, **kwargs)

    with nn.intercept_methods(count):
        jax.eval_shape(module.apply, variables, g["input_ids"])
    assert calls.count("__call__") == 1


def test_the_recurrence_is_the_loop():
    random = np.random.default_rng(0)
    x, state = random.normal(size=(2, 37, 5)), random.normal(size=(1, 1, 5))
    found, s = recurrence(jnp.asarray(x), jnp.asarray(state), 0.9), state[:, 0]
    for t in range(37):
        s = 0.9 * s + 0.1 * x[:, t]
        np.testing.assert_allclose(found[:, t], s, atol=1e-6)


def test_a_query_that_sees_no_key_gives_zero():
    x = jax.random.normal(jax.random.key(0), (1, 3, 8))
    seen = jnp.array([[True, True, True], [False, False, False], [True, False, True]])
    y = attend(x, x, x, seen[None, None], 2)
    assert not y[0, 1].any() and y[0, 0].all()


def test_vmap_over_memories():
    module, variables, g = model("micro")
    memories = jnp.stack([g["memory_state_in"], 2 * g["memory_state_in"]])
    each = jax.vmap(lambda m: module.apply(variables, g["input_ids"], m)["logits"])
    found = jax.jit(each)(memories)
    near(found[0], g["logits"], g["logits"])
    near(found[1], call(module)(variables, g["input_ids"], memories[1])["logits"], g["logits"])


FORMS = sorted(
    f.name for f in VARIANTS.iterdir()
    if f.name.startswith("micro") and f.suffix in (".safetensors", ".pt", ".pth", ".json")
    and ".optimizer." not in f.name
)  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_on_disk(name):
    if name.endswith((".pt", ".pth")):
        pytest.importorskip("torch")
    module, variables = phase3.load(VARIANTS / name, n_heads=2, sw_window=8)
    kind = next((k for k in ("_fp16", "_bf16") if k in name), "")
    g = np.load(VARIANTS / f"micro{kind}_golden.npz")
    out = call(module)(variables, g["input_ids"], g["memory_state_in"])
    near(out["logits"], g["logits"], g["logits"])
    near(out["halt_probs"], g["halt_probs"], g["logits"])
    memory = variables["buffers"]["backbone"]["ltm"]["memory_state"]
    if name != "micro_named_parameters.pt":  # holds no buffers
        near(memory, g["memory_state_in"], g["logits"])


def test_tokens_that_grew_the_vocabulary():
    architecture = VARIANTS / "step1_baked_architecture.json"
    module, variables = phase3.load(VARIANTS / "step1_baked", architecture)
    g = np.load(VARIANTS / "step1_baked_golden.npz")
    assert module.config.vocab_size == 75 and not module.config.tied
    out = call(module)(variables, g["input_ids"], g["memory_state_in"])
    near(out["logits"], g["logits"], g["logits"])
    near(out["last_hidden_state"], g["last_hidden_state"], g["logits"])


@pytest.mark.parametrize("name", ["model.safetensors", "model_all_keys.safetensors"])
def test_quiet_star(name):
    module, variables = phase3.load(QUIET / name, QUIET / "architecture.json")
    g = np.load(QUIET / "golden.npz")
    out = call(module)(variables, g["input_ids"], g["memory_state_in"], labels=g["labels"])
    for key in ("logits", "last_hidden_state", "halt_probs", "halting_steps"):
        near(out[key], g[key], g["logits"], key)
    near(out["memory_state"], g["memory_state_out"], g["logits"])
    assert float(out["loss"]) == pytest.approx(float(g["loss_shifted"]), abs=1e-5)
    hidden, thoughts = g["comp_base_hidden"], g["comp_thought_hidden"]
    for with_logits, suffix in ((True, ""), (False, "_no_logits")):
        score = functools.partial(module.apply, with_logits=with_logits, method="score")
        scores = jax.jit(score)(variables, hidden, thoughts)
        for key, found in scores.items():
            wanted = g.get(f"coh_{key}{suffix}", g[f"coh_{key}"])
            np.testing.assert_allclose(found, wanted, atol=1e-6, err_msg=key)
    mixed = module.apply(variables, hidden, thoughts.mean(2), g["coh_composite"], method="mix")
    np.testing.assert_allclose(mixed, g["mixing_out"], atol=1e-5)


def test_quiet_star_decides_where_to_think():
    g = np.load(QUIET / "golden.npz")
    p = quiet_star.nucleus(g["nucleus_logits"])
    np.testing.assert_allclose(p, g["nucleus_probs_top_p_0.9"], atol=1e-6)
    entropy = quiet_star.normalised_entropy(g["logits"])
    np.testing.assert_allclose(entropy, g["injector_normalised_entropy"], atol=1e-6)
    chosen, _ = quiet_star.injections(g["logits"], float(g["injector_threshold_probe"]))
    np.testing.assert_array_equal(chosen, g["injector_decisions_probe"])
    assert int(quiet_star.injections(g["logits"])[0].sum()) == 0


@pytest.mark.parametrize("file", [FILES["tiny"][0], QUIET / "model.safetensors"], ids=str)
def test_there_and_back_is_the_same_state_dict(file):
    told = QUIET / "architecture.json" if file.parent == QUIET else None
    _, variables = phase3.load(file, told)
    back, wanted = state_dict(variables), load_file(file)
    assert back.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_what_no_file_tells_is_listed(tmp_path, caplog):
    shutil.copy(FILES["micro"][0], tmp_path / "m.safetensors")
    with caplog.at_level(logging.WARNING, "bitnet_jax"):
        module, _ = phase3.load(tmp_path / "m.safetensors", T_max=2)
    assert "n_heads=1" in caplog.text and "sw_window=1024" in caplog.text
    assert "T_max" not in caplog.text and "d_model" not in caplog.text
    assert module.config.T_max == 2


def test_a_json_of_another_model_is_refused(tmp_path):
    file, told = (
        tmp_path / "m.safetensors",
        json.loads(FILES["micro"][0].with_suffix(".json").read_text()),
    )
    shutil.copy(FILES["micro"][0], file)
    told["config"]["titans_config"]["d_ff"] = 64
    (tmp_path / "m.json").write_text(json.dumps(told))
    with pytest.raises(BitnetError, match="the JSON says d_ff is 64, its weights have 48"):
        phase3.load(file)


def test_own_loss_and_distillation():
    module, variables, g = model("micro")
    windows = np.concatenate([g["input_ids"], g["input_ids"][:, :1]], axis=1)
    plain = recursion.deep_supervision(module.config, module, {}, mixing=0.0)
    labels = g["input_ids"]
    own = call(module)(variables, labels, labels=labels)["loss"]
    found = jax.jit(lambda v: plain(module, v, windows)[0])(variables)
    assert float(found) == pytest.approx(float(own), rel=1e-6)
    follow = recursion.deep_supervision(module.config, module, variables, mixing=1.0)
    free = recursion.attached(module.config).build(None)
    value = lambda p: follow(free, {**variables, "params": p}, windows)
    slope, metrics = jax.jit(jax.grad(value, has_aux=True))(variables["params"])
    assert float(metrics["divergence"]) < 1e-6
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slope)) < 1e-4


def test_scores_do_not_depend_on_the_batch_and_a_model_agrees_with_itself():
    module, variables, g = model("micro")
    windows = np.tile(np.concatenate([g["input_ids"], g["input_ids"][:, :1]], axis=1), (2, 1))[:3]
    scores = [recursion.evaluate(module.config, module, variables, windows, b) for b in (1, 3)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    same = recursion.judge(module.config, module, variables, module, variables, windows, 3)
    assert same["top1"] == 1 and same["kl"] == pytest.approx(0, abs=1e-6)
