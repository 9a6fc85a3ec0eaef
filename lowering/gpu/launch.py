"""Starts a Mosaic GPU kernel whose refs have names."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ragged.lowering._compat import unchecked_varying_axes
from jax_ragged.lowering.gpu.chip import SHARED_MEMORY, ceil_to

Arrays = dict[str, jax.Array]


class Refs:
    """The refs of a kernel as attributes, by the names that `launch` got them under."""

    def __init__(self, refs: Mapping[str, Any]) -> None:
        self.__dict__.update(refs)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the kernel has no ref {name!r}, only {sorted(self.__dict__)}")

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def launch(
    body: Callable[[Refs], None],
    *,
    name: str,
    ctas: int,
    warpgroups: int,
    inputs: Mapping[str, jax.Array],
    results: Mapping[str, jax.ShapeDtypeStruct],
    updated: Mapping[str, jax.Array] | None = None,
    scratch: Mapping[str, Any] | None = None,
    interpret: Any = None,
) -> Arrays:
    """Runs a kernel on a grid of CTAs.

    Args:
      body: the kernel. It finds its place by `lax.axis_index("cta")` and, with several warpgroups,
        `lax.axis_index("wg")`.
      name: the kernel's name in profiles.
      ctas: the number of CTAs.
      warpgroups: the number of warpgroups in each CTA.
      inputs: the operands.
      results: the shapes and dtypes of the results, which the kernel writes whole.
      updated: arrays that the kernel changes in place; they are results too.
      scratch: shared memory and barriers.
      interpret: the parameters of JAX's interpreter, or None to run on a GPU.

    Returns:
      The results and the updated arrays by name.
    """
    names = (*inputs, *(updated or {}), *results)
    threads: dict[str, Any] = {}
    if warpgroups > 1:
        threads = {"num_threads": warpgroups, "thread_name": "wg"}
    mesh = plgpu.Mesh(grid=(ctas,), grid_names=("cta",), kernel_name=name, **threads)

    def kernel(*refs: Any) -> None:
        operands = dict(zip(names, refs, strict=True))
        pl.run_scoped(
            lambda **allocated: body(Refs(operands | allocated)),
            collective_axes=threads.get("thread_name", ()),
            **(scratch or {}),
        )

    with unchecked_varying_axes():
        call = pl.kernel(
            kernel,
            out_type=tuple(results.values()),
            mesh=mesh,
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
            ),
            interpret=interpret,
            name=name,
        )
        if not updated:
            made: Any = call(*inputs.values())
            return dict(zip(results, made, strict=True))
        if results:
            raise ValueError("a kernel that updates arrays has no other results")

        def update(refs: dict[str, Any]) -> None:
            call(*inputs.values(), *(refs[name] for name in updated))

        changed: Arrays = pl.run_state(update)(dict(updated))
        return changed


def shared_rows(shape: tuple[int, ...], dtype: Any, like: int | None = None) -> Any:
    """Shared memory [..., rows, columns] as the copy engine fills it and matrix products read it.

    The copy engine permutes ("swizzles") the bytes of 8 rows so that reading columns of the tile
    meets no bank conflicts. The more bytes of a row take part the better: 128, or 64 or 32 where
    the row is no multiple of more. Both operands of a product need the same: the one for rows of
    `like` columns, if it is not the array's own.
    """
    size = jax.numpy.dtype(dtype).itemsize
    swizzle = swizzle_columns(shape[-1] if like is None else like, dtype) * size
    # Any: the types of JAX 0.12 call both classes abstract.
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    transforms = tiling((8, swizzle // size)), swizzling(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def most_stages(
    scratch_of: Callable[[int], Mapping[str, Any]], most: int, multiple: int = 1
) -> int:
    """The most stages for which a CTA has shared memory: 0 if it has none for the fewest.

    Args:
      scratch_of: the shared memory and barriers of a kernel with so many stages.
      most: the most that are of use.
      multiple: of which the number is one.
    """

    def size(stages: int) -> int:
        arrays = (x for x in scratch_of(stages).values() if not isinstance(x, plgpu.Barrier))
        sizes = (math.prod(x.shape) * jax.numpy.dtype(x.dtype).itemsize for x in arrays)
        # JAX puts every array at a multiple of 1024 bytes.
        return sum(ceil_to(x, 1024) for x in sizes)

    numbers = range(most // multiple * multiple, 0, -multiple)
    return next((n for n in numbers if size(n) <= SHARED_MEMORY), 0)


def overhanging(start: int, size: int, unit: int, index: Any) -> Any:
    """A slice of an array in global memory that may end beyond the array.

    The copy engine fills up with zeros what it reads beyond an array, and writes nothing there. The
    compiler is not to know where the slice starts, or it refuses.

    Args:
      start: of the slice, in the array.
      size: of the slice.
      unit: of which the start and the array's size are multiples.
      index: any value that is not negative.
    """
    return pl.ds(pl.multiple_of(start + jax.numpy.minimum(index, 0), unit), size)


@functools.cache
def swizzle_columns(columns: int, dtype: Any) -> int:
    """How many columns are permuted together, for rows of so many columns."""
    size: int = jax.numpy.dtype(dtype).itemsize
    return next(n // size for n in (128, 64, 32) if columns * size % n == 0)


def padded(x: jax.Array, axis: int, size: int, mode: str = "constant") -> jax.Array:
    """Pads x at the end of an axis to a size; x itself where it has that size already."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jax.numpy.pad(x, widths, mode=mode)
