"""``python -m bitnet_jax.ops`` compiles every C++ op now, for an image or a cluster."""

from . import attention, int8, native, quantise, training

for op in (native, int8, quantise, training, attention):
    print(f"{op.__name__.rpartition('.')[2]}: {op.status()}")
