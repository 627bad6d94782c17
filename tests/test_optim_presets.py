"""The phase presets."""

import jax
import optax
import pytest

from bitnet_jax import BitnetError
from bitnet_jax.optim import PRESETS, mugrokfast, preset

from .optim_battery import LAYERS, assert_trees_close, run, tree


@pytest.mark.parametrize("phase", PRESETS)
def test_a_preset_is_mugrokfast_with_its_settings(phase):
    grads = [tree(1), tree(2)]
    got, _, _ = run(preset(phase, axes=LAYERS), tree(), grads)
    want, _, _ = run(mugrokfast(**PRESETS[phase], axes=LAYERS), tree(), grads)
    assert_trees_close(got, want, 0, 0)
    other, _, _ = run(mugrokfast(3e-3, axes=LAYERS), tree(), grads)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(other)))


def test_the_phases_are_those_that_train_by_gradients():
    assert list(PRESETS) == [1, 3, 4, 5, 6, 7]
    assert [p for p in PRESETS if PRESETS[p].get("ste")] == [5]


def test_changes_replace_what_the_preset_says():
    still = preset(4, learning_rate=optax.constant_schedule(0.0), axes=LAYERS)
    updates, _, _ = run(still, tree(), [tree(1)])
    assert not any(u.any() for u in jax.tree.leaves(updates[0]))


@pytest.mark.parametrize("phase", [0, 2, 8, 99, "4"])
def test_an_unknown_phase_is_told_in_one_line(phase):
    with pytest.raises(BitnetError, match=f"^phase {phase!r} has no preset; there are 1, 3, 4, 5"):
        preset(phase)


def test_an_unknown_argument_is_told_in_one_line():
    with pytest.raises(BitnetError, match="kl_coefficient"):
        preset(3, kl_coefficient=0.1)


def test_presets_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        PRESETS[1] = {}
