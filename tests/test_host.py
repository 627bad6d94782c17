"""What is looked at once is looked at by numpy where it lies, and by JAX where it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.host import all_finite, host_view, largest

from .battery import run_python


class Device:
    """Stands for an array on an accelerator: `host_view` may not fetch it."""

    platform = "gpu"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values(dtype):
    x = np.array([[1.0, -3.0], [0.5, 0.0]], dtype)
    for kind in (np.asarray, jnp.asarray):
        assert all_finite(kind(x)) and largest(kind(x)) == 3.0
        for bad in (np.nan, np.inf, -np.inf):
            y = x.copy()
            y[1, 1] = bad
            assert not all_finite(kind(y))
    assert largest(jnp.zeros((0, 4), dtype)) == 0.0 and all_finite(jnp.zeros((0, 4), dtype))


def test_nothing_is_compiled_and_nothing_copied():
    x = jnp.arange(4099.0)
    view = host_view(x)
    assert isinstance(view, np.ndarray) and view.ctypes.data == x.unsafe_buffer_pointer()
    compiled = []
    listen = lambda event, seconds, **_: compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    assert all_finite(x) and largest(x) == 4098
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_what_lies_on_a_device_stays_there(monkeypatch):
    x = jnp.ones(3)
    monkeypatch.setattr(type(x), "devices", lambda self: {Device()})
    assert host_view(x) is x and all_finite(x) and largest(x) == 1


def test_over_four_devices():
    run_python(
        """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from bitnet_jax.host import all_finite, largest
there = NamedSharding(jax.make_mesh((4,), ("d",)), P("d"))
x = jax.device_put(np.array([0, 1, 2, 3, 4, -9, 6, 7], np.float32), there)
assert all_finite(x) and largest(x) == 9
assert not all_finite(jax.device_put(np.array([0, 0, 0, np.nan], np.float32), there))
""",
        devices=4,
    )
