"""The int8 product of a training step on NVIDIA GPUs, scaled and rounded where it is added up.

XLA writes the int32 accumulators to memory, four bytes an output, and reads them again to scale
them; beside an int8 product that is a third of the time. Here a Hopper kernel (Pallas, Mosaic GPU)
keeps them in registers: one warpgroup copies tiles of both operands to shared memory, two multiply
them with wgmma, scale, round and write. The same arithmetic in the same order as XLA's, so the same
bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_ROWS, _COLUMNS, _INPUTS = 128, 128, 128  # of a warpgroup's tile; inputs of a step
_GROUPS = 2  # warpgroups that multiply, one above the other
_STEPS = 4  # tiles on their way at once
_MULTIPROCESSORS = 132  # of a Hopper GPU; any number of blocks gives the same result
_BAND = 4  # neighbouring tiles share operands in L2


def fits(rows: int, inputs: int, outputs: int, dtype: Any) -> bool:
    """Whether the kernel takes a product of this size: whole tiles, bfloat16 or float32 out.

    >>> fits(8192, 2048, 5632, jnp.bfloat16), fits(8, 2048, 5632, jnp.bfloat16)
    (True, False)
    """
    whole = not (rows % (_GROUPS * _ROWS) or inputs % _INPUTS or outputs % _COLUMNS)
    return whole and min(rows, inputs, outputs) > 0 and dtype in (jnp.bfloat16, jnp.float32)


def _tiled(itemsize: int) -> tuple:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128)


def _body(x, codes, row_scale, column_scale, out):
    """All refs in device memory; x (m, k), codes (n, k), scales (m,) and (n,), out (m, n)."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (m, k), n = x.shape, codes.shape[0]
    itemsize = jnp.dtype(out.dtype).itemsize
    high, wide = 64, 128 // itemsize  # of a piece on its way out
    blocks = m // (_GROUPS * _ROWS), n // _COLUMNS
    spec = lambda rows: plgpu.BlockSpec(
        (rows, _INPUTS), lambda i: (0, i), transforms=_tiled(1), memory_space=plgpu.SMEM
    )

    def pipeline(body, context):
        return plgpu.emit_pipeline_warp_specialized(
            body, grid=(k // _INPUTS,), memory_registers=40,
            in_specs=[spec(_GROUPS * _ROWS), spec(_COLUMNS)],
            wg_axis="warpgroup", num_compute_wgs=_GROUPS, max_concurrent_steps=_STEPS,
            compute_context=context,
        )  # fmt: skip

    def tile(info, room, pieces):
        group = lax.axis_index("warpgroup")
        i, j = plgpu.planar_snake(info.index[0], blocks, 1, _BAND)
        above, across = pl.ds(i * _GROUPS * _ROWS, _GROUPS * _ROWS), pl.ds(j * _COLUMNS, _COLUMNS)
        mine = pl.ds(group * _ROWS, _ROWS)

        def add(_, x, codes, sums):
            plgpu.wgmma(sums, x.at[mine], codes.T)
            plgpu.wgmma_wait(0)
            return sums

        def write(values):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            places = [(a, b) for a in range(0, _ROWS, high) for b in range(0, _COLUMNS, wide)]
            for piece, (a, b) in enumerate(places):
                part = slice(a, a + high), slice(b, b + wide)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                pieces[group, piece % 2] = values[part]
                plgpu.commit_smem()
                to = out.at[above, across].at[mine].at[part]
                plgpu.copy_smem_to_gmem(pieces.at[group, piece % 2], to)

        def multiply(run):
            def scoped(sums):
                run(sums)
                layout = plgpu.Layout.WGMMA
                rows = _load(row_scale.at[above].at[mine], layout.reduce(1))
                columns = _load(column_scale.at[across], layout.reduce(0))
                spread = lambda scale, axis: lax.broadcast_in_dim(scale, (_ROWS, _COLUMNS), [axis])
                values = sums[...].astype(jnp.float32) * spread(columns, 1) * spread(rows, 0)
                write(values.astype(out.dtype))

            pl.run_scoped(scoped, plgpu.WGMMAAccumulatorRef((_ROWS, _COLUMNS), jnp.int32))

        pipeline(add, multiply)(x.at[above, :], codes.at[across, :], allocations=room)

    def block(room, pieces):
        loop = plgpu.nd_loop((blocks[0] * blocks[1],), collective_axes="block")
        loop(lambda info: tile(info, room, pieces))

    nothing = lambda *_, **__: None
    pl.run_scoped(
        block,
        pipeline(nothing, nothing).get_allocations(x, codes),
        plgpu.SMEM((_GROUPS, 2, high, wide), out.dtype, transforms=_tiled(itemsize)),
        collective_axes="warpgroup",
    )
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _load(ref: Any, layout: Any) -> jax.Array:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if jax.__version_info__ < (0, 11) else ()  # an argument it had until then
    return plgpu.load(ref, *index, layout=layout, optimized=False)


@functools.cache
def _kernel(m: int, n: int, dtype: Any):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.kernel(
        _body,
        out_type=jax.ShapeDtypeStruct((m, n), dtype),
        grid=(_MULTIPROCESSORS,),
        grid_names=("block",),
        num_threads=_GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def scaled_product(
    x: jax.Array, row_scale: jax.Array, codes: jax.Array, column_scale: jax.Array, dtype: Any
) -> jax.Array:
    """int8 x int8 with a scale for each row and each column, in one kernel.

    out[m, n] = (sum over k of x[m, k] * codes[k, n] as int32) * column_scale[n] * row_scale[m]

    Args:
      x: int8 (m, k), of a size that `fits`.
      row_scale: float32 (m, 1).
      codes: int8 (k, n).
      column_scale: float32 (1, n) or (1, 1).
      dtype: of the result, bfloat16 or float32; the arithmetic is in float32.

    Returns:
      (m, n), on a Hopper GPU.
    """
    m, n = x.shape[0], codes.shape[1]
    column_scale = jnp.broadcast_to(column_scale, (1, n))
    # wgmma wants the inputs adjacent. XLA turns the codes where it rounds or unpacks them.
    return _kernel(m, n, jnp.dtype(dtype))(x, codes.T, row_scale[:, 0], column_scale[0])
