"""Times of JAX programs on a GPU: of a call, and of its kernels alone from JAX's profiler."""

import collections
import dataclasses
import functools
import glob
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

# What the names of attention kernels have in them: ours, and cuDNN's.
ATTENTION = ("ragged_attention", "sdpa", "fort_native")


def kernel_times(program: Any, *operands: Any, calls: int) -> dict[str, float]:
    """Runs a program once and returns the seconds that each of its kernels takes in a call.

    Args:
      program: a compiled program that has run before.
      operands: its operands.
      calls: the number of calls that the program makes.

    Returns:
      The time of all runs of a kernel by its name, divided by the calls; the longest first.
      Copies are among them.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program(*operands))
        (file,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        profile = jax.profiler.ProfileData.from_file(file)
    times: collections.Counter[str] = collections.Counter()
    for plane in profile.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if "Stream" in line.name else ():
                times[event.name] += event.duration_ns
    return {name: ns * 1e-9 / calls for name, ns in times.most_common()}


def least_seconds(run: Callable[[], Any], calls: int, samples: int = 5) -> float:
    """The least time of a call, of a run that makes so many and has not been warmed up."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(samples):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, (time.perf_counter() - start) / calls)
    return best


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
      call: the time of a call among many, with what lies between its kernels.
      attention: the time of its attention kernels alone.
      around: the time of all its other kernels.
    """

    call: float
    attention: float
    around: float

    @classmethod
    def of(cls, run: Callable[[], Any], calls: int) -> "Timing":
        """Times a run that makes so many calls."""
        call = least_seconds(run, calls)
        kernels = kernel_times(run, calls=calls)
        attention = sum(t for name, t in kernels.items() if any(part in name for part in ATTENTION))
        if not attention:
            raise RuntimeError(f"none of {ATTENTION} is among the kernels {sorted(kernels)}")
        return cls(call, attention, sum(kernels.values()) - attention)

    @property
    def kernels(self) -> float:
        """The time of all kernels."""
        return self.attention + self.around


def looped(body: Callable[..., Any], operands: tuple[Any, ...], calls: int) -> Any:
    """Compiles so many calls of body in a loop; it maps the last operand to its successor."""

    def loop(*operands: Any) -> Any:
        step = functools.partial(body, *operands[:-1])
        return jax.lax.fori_loop(0, calls, lambda _, x: step(x), operands[-1])

    return jax.jit(loop).lower(*operands).compile()


def in_loop(body: Callable[..., Any], operands: tuple[Any, ...], calls: int) -> Timing:
    """Times calls of body in a compiled loop, as `looped` makes it."""
    program = looped(body, operands, calls)
    return Timing.of(functools.partial(program, *operands), calls)


def in_a_row(program: Any, operands: tuple[Any, ...], calls: int) -> Timing:
    """Times calls of a compiled program, enqueued one after another."""
    return Timing.of(lambda: [program(*operands) for _ in range(calls)][-1], calls)
