"""Forms of caches on a GPU: pages in random order beside the dense cache.

    python -m benchmarks.gpu_forms [CASE ...]

prints, for each decode case of `benchmarks.gpu` (or those whose number is given), the time of the
kernels alone in us, and how many times that of the dense call it is. Every form's output is
compared with the dense call's.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import CALLS
from benchmarks.gpu_profile import kernel_times
from benchmarks.gpu_tables import DECODE
from benchmarks.measure import Case, Problem, print_table, versions
from jax_ragged import ragged_attention

PAGES = (16, 64, 256)

# The operands of a call by name.
Arrays = dict[str, Any]


def kernels_alone(call: Callable[[Arrays], jax.Array], arrays: Arrays) -> float:
    """The seconds of the kernels of one call, of many in one compiled loop."""

    def loop(arrays: Arrays) -> jax.Array:
        def step(_: Any, lengths: jax.Array) -> jax.Array:
            out = call(arrays | {"lengths": lengths})
            return lengths + (out.ravel()[0] > 1e30).astype(lengths.dtype)

        lengths: jax.Array = jax.lax.fori_loop(0, CALLS, step, arrays["lengths"])
        return lengths

    program = jax.jit(loop).lower(arrays).compile()
    jax.block_until_ready(program(arrays))
    times = kernel_times(program, arrays, calls=CALLS)
    return sum(t for name, t in times.items() if "ragged_attention" in name)


@dataclasses.dataclass(frozen=True)
class Timed:
    """A dense call, timed.

    Attributes:
      arrays: its operands.
      call: the call of any form of them.
      seconds: of its kernels alone.
      out: its output.
    """

    arrays: Arrays
    call: Callable[[Arrays], jax.Array]
    seconds: float
    out: jax.Array

    @classmethod
    def of(cls, case: Case) -> "Timed":
        """Times a case."""
        problem = Problem.of(case)
        names = ("query", "key", "value", "lengths")
        arrays: Arrays = dict(zip(names, problem.operands, strict=True))

        def call(arrays: Arrays) -> jax.Array:
            return ragged_attention(**arrays, softmax_scale=problem.scale).out

        return cls(arrays, call, kernels_alone(call, arrays), jax.jit(call)(arrays))

    def form(self, change: Callable[[Arrays], Arrays], tolerance: float) -> str:
        """Times the call in another form of the cache and checks its output."""
        arrays = jax.jit(change)(self.arrays)
        error = float(jnp.abs(jax.jit(self.call)(arrays) - self.out).max())
        if not error < tolerance:
            raise RuntimeError(f"the output differs from the dense call's by {error}")
        seconds = kernels_alone(self.call, arrays)
        return f"{seconds * 1e6:.1f} ({seconds / self.seconds:.2f})"


def paged(page: int, arrays: Arrays) -> Arrays:
    """The cache in pages, in random order."""
    key = arrays["key"]
    B, W = key.shape[0], key.shape[1] // page
    table = jax.random.permutation(jax.random.key(1), B * W).astype(jnp.int32)
    # Page table[i] of the pool is page i of the cache.
    of_page = jnp.argsort(table)
    pools = {
        name: arrays[name].reshape(B * W, page, *key.shape[2:3], -1)[of_page]
        for name in ("key", "value")
    }
    return arrays | pools | {"page_table": table.reshape(B, W)}


def name_of(case: Case) -> str:
    """A case's sizes."""
    return f"B{case.B} S{case.S} {case.Hq}/{case.Hkv}/{case.D} {case.windows}"


def print_forms(cases: Iterable[Case]) -> None:
    """Prints the table of pages."""
    rows = []
    for case in cases:
        dense = Timed.of(case)
        # Where parts are cut is the same; blocks may begin earlier by 8 positions.
        cells = [dense.form(functools.partial(paged, page), 2e-2) for page in PAGES]
        rows.append((name_of(case), f"{dense.seconds * 1e6:.1f}", *cells))
        print(*rows[-1], flush=True)
    print("\nKernels alone, us (and times the dense call's)\n")
    print_table(("case", "dense", *(f"pages of {page}" for page in PAGES)), rows)


def main() -> None:
    """Prints the table."""
    chosen = [DECODE[int(i)] for i in sys.argv[1:]] or DECODE
    print(versions())
    print_forms(chosen)


if __name__ == "__main__":
    main()
