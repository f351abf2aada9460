"""Launches kernels that are written warp by warp (`warp.Warp`), in Pallas' Mosaic GPU."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.deformable_conv.limits import check_indexable
from pallas_kernels.deformable_conv.points import Points, PointsTangent
from pallas_kernels.deformable_conv.simulated_warp import SimulatedWarp
from pallas_kernels.deformable_conv.warp import Warp

MAX_SHARED_BYTES = 226 * 1024  # that a block may have, less what Mosaic takes
WARPS_OF_A_GROUP = 4  # Mosaic's unit of threads


def launch(
    kernel: Callable,
    *,
    name: str,
    num_blocks: int,
    shared_bytes: int,
    points: Points,
    inputs: tuple[jax.Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    num_warps: int,
    interpret: bool,
    tangent: PointsTangent | None = None,
) -> list[jax.Array]:
    """Runs kernel(warp, points, shared, *inputs, *outputs) on `num_blocks` blocks.

    With a `tangent` of the points, `points` is the pair of both. `shared` is the address of the
    block's `shared_bytes` of shared memory; num_warps is a multiple of 4. `interpret` simulates the
    warps on the CPU.
    """
    arrays = (*points, *(tangent or ()), *inputs)
    check_indexable(name, (*arrays, *outputs))

    def run(warp, shared, refs):
        refs = iter(refs)
        fields = type(points)(*itertools.islice(refs, len(points)))
        if tangent is not None:
            fields = fields, type(tangent)(*itertools.islice(refs, len(tangent)))
        kernel(warp, fields, warp.shared_memory(shared), *refs)

    if interpret:

        def simulate(*arrays):
            out = [np.empty(x.shape, x.dtype) for x in outputs]
            for x in out:  # nothing may be taken from where nothing was written
                x.reshape(-1).view(np.uint8).fill(255)
            refs = (*map(np.asarray, arrays), *out)
            with np.errstate(invalid="ignore", over="ignore"):  # a GPU says nothing either
                run(SimulatedWarp(num_blocks, num_warps, shared_bytes), None, refs)
            return out

        return list(jax.pure_callback(simulate, list(outputs), *arrays, vmap_method="sequential"))

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def inline(context, *refs):
            del context
            *refs, shared = refs
            run(Warp(num_warps), shared, refs)

        inline(*refs)

    body.__name__ = name
    warpgroups = num_warps // WARPS_OF_A_GROUP
    threads = {} if warpgroups == 1 else dict(num_threads=warpgroups, thread_name="warpgroup")
    return plgpu.kernel(
        body,
        out_type=list(outputs),
        scratch_types=[plgpu.SMEM((shared_bytes // 4,), jnp.float32)],
        grid=(num_blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **threads,
    )(*arrays)
