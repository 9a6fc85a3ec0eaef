"""Times of the kernels of a compiled JAX program on a GPU, from JAX's profiler."""

import collections
import glob
import os
import tempfile
from typing import Any

import jax


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
