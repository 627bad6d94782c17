"""The PyTorch reference arithmetic of a Phase 3 network against the reference's own numbers.

Needs torch installed; with BITNET_TEST_TORCH, as .ci/run sets it, its absence is an error.
"""

import importlib.util
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bitnet_jax.interop import phase3
from bitnet_jax.interop.phase3_keys import state_dict

if os.environ.get("BITNET_TEST_TORCH"):
    import torch
else:
    torch = pytest.importorskip("torch", reason="torch is not installed; .ci/run has it")

from safetensors.torch import load_file

PATH = Path(__file__).parent.parent / "benchmarks" / "phase3_torch.py"
SPEC = importlib.util.spec_from_file_location("phase3_torch", PATH)
peer = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(peer)

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = GOLDEN / "phase3_variants"
PAIRS = {
    "tiny": (GOLDEN / "phase3_tiny" / "model", GOLDEN / "phase3_tiny" / "golden.npz"),
    "small": (GOLDEN / "phase3_small" / "model", GOLDEN / "phase3_small" / "golden.npz"),
    "micro": (VARIANTS / "micro", VARIANTS / "micro_golden.npz"),
}
LIMIT = 1e-4  # of the golden array's spread (of the logits' for logits)


def close(got, want, limit=LIMIT, name=""):
    """Of the same shape, and no further off than `limit` of the spread, or size, of `want`."""
    got = torch.stack(got) if isinstance(got, list) else got
    got = got.detach().double().numpy()
    assert got.shape == want.shape, name
    error = abs(got - want.astype(np.float64)).max() / (want.std() or abs(want) or 1)
    assert error < limit, f"{name}: {error:.2e}"


def inputs(golden, *names):
    """Token ids as torch's, and the golden arrays named."""
    return tuple(
        torch.from_numpy(golden[n].astype(np.int64) if n in ("input_ids", "labels") else golden[n])
        for n in names
    )


@pytest.fixture(params=PAIRS)
def pair(request):
    path, golden = PAIRS[request.param]
    return peer.load_pair(path), np.load(golden)


def test_every_part(pair):
    """Inside the backbone, and all that a call returns."""
    model, golden = pair
    seen, b = {}, model.backbone
    for i, layer in enumerate(b.layers):
        if i == 0:
            layer.register_forward_pre_hook(lambda m, a: seen.update(embed_out=a[0]))
        layer.register_forward_hook(lambda m, a, x, i=i: seen.update({f"layer{i}_out": x}))
    b.norm.register_forward_hook(lambda m, a, x: seen.update(backbone_norm=x))
    b.ltm.register_forward_hook(lambda m, a, x: seen.update(ltm_out=x[0]))
    ids, labels, memory = inputs(golden, "input_ids", "labels", "memory_state_in")
    assert_array_equal(b.ltm.memory_state, memory)
    out = model(ids, memory, labels=labels)
    seen |= {"y_history": out["all_y"], "z_history": out["all_z"]}
    seen |= {"memory_state_in": memory, "memory_state_out": out["memory_state"]}
    seen |= {"loss_gate_with_labels": out["loss_gate"]} | out
    beside = ("input_ids", "labels", "logits_", "mask", "grad", "halting", "memory_state_out_")
    names = [n for n in golden.files if not n.startswith(beside)]
    assert len(names) >= 17
    for name in names:
        close(seen[name], golden[name], name=name)
    assert out["halting_steps"].dtype == torch.int64
    assert_array_equal(out["halting_steps"], golden["halting_steps"])
    assert not out["memory_state"].requires_grad
    assert_array_equal(out["all_logits"][-1].detach(), out["logits"].detach())


def test_only_the_last_logits_unless_asked(pair):
    model, golden = pair
    (ids,) = inputs(golden, "input_ids")
    with torch.inference_mode():
        out, whole = model(ids), model(ids, all_steps=True)  # memory: the buffer, which stays
    close(out["logits"], golden["logits"])
    assert_array_equal(out["logits"], whole["logits"])
    assert (len(out["all_logits"]), len(whole["all_logits"])) == (1, 4) and "loss" not in out


@pytest.fixture
def tiny():
    path, golden = PAIRS["tiny"]
    return peer.load_pair(path), np.load(golden)


def test_memory_and_masks(tiny):
    model, golden = tiny
    ids, memory = inputs(golden, "input_ids", "memory_state_in")
    with torch.inference_mode():
        second = model(ids, model(ids, memory)["memory_state"])
        close(second["logits"], golden["logits_call2"])
        close(second["memory_state"], golden["memory_state_out_call2"])
        close(model(ids, torch.zeros_like(memory))["logits"], golden["logits_zero_memory"])
        for mask in ("causal", "rows"):
            (allowed,) = inputs(golden, f"mask_{mask}")
            want = golden["logits_causal" if mask == "causal" else "logits_mask_rows"]
            close(model(ids, memory, allowed)["logits"], want, name=mask)
        short = model(ids[:1, :7], memory)
        close(short["logits"], golden["logits_b1_t7"])
        close(short["memory_state"], golden["memory_state_out_b1_t7"])


def test_gradients(tiny):
    model, golden = tiny
    ids, labels, memory = inputs(golden, "input_ids", "labels", "memory_state_in")
    model(ids, memory, labels=labels)["loss"].backward()
    named, without = dict(model.named_parameters()), set()
    for name, x in named.items():
        if x.grad is None:
            without.add(name)
            continue
        norm, head = golden[f"grad_norm/{name}"], golden[f"grad_head/{name}"]
        close(x.grad.norm(), norm, name=name)
        error = abs(x.grad.flatten()[:128].numpy() - head).max()
        assert error < LIMIT * norm / x.numel() ** 0.5 + 1e-8, f"{name}: {error:.2e}"
    assert without == {n[10:] for n in golden.files if n.startswith("grad_none/")}
    assert len(named) - len(without) == sum(n.startswith("grad_norm/") for n in golden.files)


def test_gradients_that_stop_between_steps(tiny):
    """The returned logits' loss trains no backbone weight, but for the table they are read with."""
    model, golden = tiny
    ids, labels = inputs(golden, "input_ids", "labels")

    def reached():
        model.zero_grad()
        model(ids, labels=labels)["step_losses"][-1].backward()
        return {n for n, x in model.named_parameters() if x.grad is not None}

    assert {n for n in reached() if "backbone" in n} == {"backbone.token_emb.weight"}
    model.trm.detach = False
    assert reached() >= {"backbone.ltm.w_down.weight", "trm.z0_proj.weight"}


@pytest.mark.parametrize(
    "file", ["micro_head_duplicated", "micro_save_model", "micro_fp16", "micro_bf16"]
)
def test_other_forms_on_disk(file):
    short = VARIANTS / f"{file}_golden.npz"
    golden = np.load(short if short.exists() else VARIANTS / "micro_golden.npz")
    config = peer.Config.from_json(json.loads((VARIANTS / "micro.json").read_text())["config"])
    tensors = {k: v.float() for k, v in load_file(VARIANTS / f"{file}.safetensors").items()}
    check(peer.from_tensors(config, tensors), golden)


def test_the_legacy_file():
    tensors = torch.load(VARIANTS / "phase3_tiny_legacy.pt", weights_only=True)
    config = json.loads((GOLDEN / "phase3_tiny" / "model.json").read_text())["config"]
    model = peer.from_tensors(peer.Config.from_json(config), tensors)
    check(model, np.load(PAIRS["tiny"][1]))


@pytest.mark.parametrize(
    "folder, tensors, about, golden",
    [
        ("phase3_variants", "step1_baked", "step1_baked_architecture", "step1_baked_golden"),
        ("phase3_quietstar_tiny", "model", "architecture", "golden"),
    ],
)
def test_a_grown_vocabulary_and_a_head_of_its_own(folder, tensors, about, golden):
    folder, cut = GOLDEN / folder, "base_model."
    found = load_file(folder / f"{tensors}.safetensors")
    found = {k.removeprefix(cut): v for k, v in found.items() if "coherence" not in k}
    found = {k: v for k, v in found.items() if "mixing_head" not in k}
    config = peer.Config.from_json(json.loads((folder / f"{about}.json").read_text()))
    model = peer.from_tensors(config, found)
    assert model.config.vocab_size == config.vocab_size + 8
    check(model, np.load(folder / f"{golden}.npz"))


def check(model, golden):
    """The outputs that every golden file has, and those that some have."""
    ids, memory = inputs(golden, "input_ids", "memory_state_in")
    with torch.inference_mode():
        out = model(ids, memory)
    out |= {"memory_state_out": out["memory_state"], "last_hidden_state": out["all_y"][-1]}
    names = {"logits", "memory_state_out", "halt_probs", "last_hidden_state"} & {*golden.files}
    assert len(names) >= 3
    for name in names:
        close(out[name], golden[name], name=name)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_pair_is_read_again(tmp_path, tied):
    config = peer.Config(**SMALLEST)
    model = peer.TRMTitansMAGModel(config, seed=3).eval()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    model.backbone.ltm.memory_state += 0.5
    peer.save_pair(model, tmp_path / "model.v1")
    about = json.loads((tmp_path / "model.v1.json").read_text())
    assert {*about} == {*json.loads((VARIANTS / "micro.json").read_text())}
    saved = load_file(tmp_path / "model.v1.safetensors")
    assert ("lm_head.weight" in saved) is not tied
    again = peer.load_pair(tmp_path / "model.v1")
    assert again.config == config
    for name, x in model.state_dict().items():
        assert_array_equal(again.state_dict()[name], x, err_msg=name)


SMALLEST = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 24, "vocab_size": 11}
SMALLEST |= {"max_seq_len": 8, "sw_window": 3, "d_mem": 6, "mag_hidden": 5}


def test_other_configurations():
    """Another number of steps has its own weights; a text is cut where positions end."""
    config = peer.Config(**SMALLEST, T_max=1, micro_steps=3, step_weights=(0.5, 1.0))
    model, ids = peer.TRMTitansMAGModel(config).eval(), torch.arange(10)[None]
    out = model(ids[:, :8], labels=ids[:, :8])
    assert len(out["step_losses"]) == 2 and out["halting_steps"].tolist() == [2]
    assert_array_equal(model(ids)["logits"].detach(), out["logits"].detach())


OTHERS = {
    "wide window, slow memory": {"sw_window": 40, "memory_decay": 0.999, "T_max": 2},
    "window of one, fast memory": {"sw_window": 1, "memory_decay": 0.5, "n_heads": 4},
    "five steps": {"T_max": 5, "micro_steps": 1, "step_weights": (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)},
    "three layers, other widths": {"n_layers": 3, "d_model": 48, "n_heads": 3, "d_ff": 56},
    "gradients through all steps": {"T_max": 2, "detach_between_steps": False},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=list(OTHERS))
def test_our_network_on_other_configurations(changes, tmp_path):
    """Ours on the pair that PyTorch wrote: every output, the losses, and all gradients.

    The memory is of a draw that puts no ReLU's input within 2e-5 of its spread of zero: nearer,
    the last digit, which differs between CPUs, decides what a gradient holds.
    """
    steps = {"step_weights": (0.5, 0.75, 1.0)} if changes.get("T_max") == 2 else {}
    config = peer.Config(**SMALLEST | {"max_seq_len": 40, "halt_threshold": 0.5} | steps | changes)
    model = peer.TRMTitansMAGModel(config, seed=3).eval()
    with torch.no_grad():  # weights that say something
        for x in model.backbone.parameters():
            x.mul_(8 if x.ndim == 2 else 1)
        model.backbone.ltm.memory_state.normal_(generator=torch.Generator().manual_seed(10))
    peer.save_pair(model, tmp_path / "model")
    module, variables = phase3.load(tmp_path / "model")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (3, 29))
    wanted = model(torch.from_numpy(ids), labels=torch.from_numpy(ids))
    wanted["loss"].backward()

    def loss(params):
        tree = {**variables, "params": params}
        found = module.apply(tree, ids, labels=ids, return_all_steps=True)
        return found["loss"], found

    slope, found = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    spread = float(wanted["logits"].detach().std())
    for name in wanted:
        a = wanted[name]
        a = torch.stack(a) if isinstance(a, list) else a
        a = a.detach().numpy()
        np.testing.assert_allclose(found[name], a, rtol=0, atol=LIMIT * spread, err_msg=name)
    slope = state_dict({"params": slope})
    for name, x in model.named_parameters():
        g = np.zeros(x.shape) if x.grad is None else x.grad.numpy()
        limit = LIMIT * max(abs(g).max(), 1e-3)
        np.testing.assert_allclose(slope[name], g, rtol=0, atol=limit, err_msg=name)


def test_the_initialisation_is_the_references():
    """By the spread of every tensor of the small model, which is untrained."""
    model = peer.load_pair(PAIRS["small"][0])
    want = {k: v.clone() for k, v in model.state_dict().items() if "memory" not in k}
    model.initialise(7)
    for name, x in model.state_dict().items():
        if name in want and x.numel() > 1:
            a, b = float(x.std()), float(want[name].std())
            assert a == pytest.approx(b, rel=0.25, abs=1e-6), name
            assert float(x.abs().max()) == pytest.approx(float(want[name].abs().max()), rel=0.35)
    assert not model.backbone.ltm.memory_state.any()
    other = peer.TRMTitansMAGModel(model.config, seed=7)
    assert_array_equal(other.trm.z0_proj.weight.detach(), model.trm.z0_proj.weight.detach())


def test_the_production_model_has_111_keys():
    """And 32,571,041 parameters, the head's counted once."""
    with torch.device("meta"):
        model = peer.TRMTitansMAGModel()
    assert len(model.state_dict()) == 111
    assert sum(x.numel() for x in model.parameters()) == 32_571_041
