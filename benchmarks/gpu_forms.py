"""Forms of caches on a GPU: pages in random order and quantised values, beside the dense cache.

    python -m benchmarks.gpu_forms [pages | quantised] [CASE ...]

prints, for each decode case of `benchmarks.gpu` and one more (or those whose number is given), the
time of the kernels alone in us, and how many times that of the dense bfloat16 call it is. Every
form's output is compared with the dense call's. Quantised caches have a scale for each token and
head.
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
from jax_ragged import quantize_cache, ragged_attention

PAGES = (16, 64, 256)
CASES = (*DECODE, Case("", B=64, S=4096, Hq=32, Hkv=32, D=128, dtype="bfloat16"))

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
        name: x.reshape(B * W, page, *x.shape[2:])[of_page]
        for name, x in arrays.items()
        if name.startswith(("key", "value"))
    }
    return arrays | pools | {"page_table": table.reshape(B, W)}


def quantised(dtype: str, arrays: Arrays) -> Arrays:
    """The cache in a narrow dtype, with a scale for each token and head."""
    changed = dict(arrays)
    for name in ("key", "value"):
        changed[name], changed[f"{name}_scale"] = quantize_cache(arrays[name], dtype)
    return changed


def name_of(case: Case) -> str:
    """A case's sizes."""
    return f"B{case.B} S{case.S} {case.Hq}/{case.Hkv}/{case.D} {case.windows}"


# Forms by their headings, each with the largest difference that its output may have. Outputs in
# bfloat16 are of size 1; int8 and float8 round values to 7 and 4 bits.
Forms = dict[str, tuple[Callable[[Arrays], Arrays], float]]
TABLES: dict[str, Forms] = {
    "pages": {f"pages of {page}": (functools.partial(paged, page), 2e-2) for page in PAGES},
    "quantised": {
        "int8": (functools.partial(quantised, "int8"), 6e-2),
        "int8, pages of 16": (lambda x: paged(16, quantised("int8", x)), 6e-2),
        "float8_e4m3fn": (functools.partial(quantised, "float8_e4m3fn"), 0.25),
    },
}


def print_forms(forms: Forms, cases: Iterable[Case]) -> None:
    """Prints a table."""
    rows = []
    for case in cases:
        dense = Timed.of(case)
        cells = [dense.form(*form) for form in forms.values()]
        rows.append((name_of(case), f"{dense.seconds * 1e6:.1f}", *cells))
        print(*rows[-1], flush=True)
    print("\nKernels alone, us (and times those of the dense bfloat16 call)\n")
    print_table(("case", "dense", *forms), rows)


def main() -> None:
    """Prints the tables that the command line names, or all."""
    tables = [name for name in sys.argv[1:] if name in TABLES] or list(TABLES)
    cases = [CASES[int(i)] for i in sys.argv[1:] if i not in TABLES] or CASES
    print(versions())
    for name in tables:
        print_forms(TABLES[name], cases)


if __name__ == "__main__":
    main()
