"""Cases on TPUs; the peers are those that every platform has."""

import time

import jax
import jax.numpy as jnp

from benchmarks.measure import Candidate, Case, Goal, Problem

CALLS = 1
SWEEP = Case("sweep", B=16, S=8192, Hq=32, Hkv=8, D=128, dtype="bfloat16")
CASES = (
    Case("gqa", B=16, S=8192, Hq=32, Hkv=8, D=128, dtype="bfloat16"),
    Case("gqa_full", B=16, S=8192, Hq=32, Hkv=8, D=128, dtype="bfloat16", windows="full"),
    Case("gqa_short", B=16, S=8192, Hq=32, Hkv=8, D=128, dtype="bfloat16", windows="short"),
    Case("mha", B=32, S=2048, Hq=32, Hkv=32, D=128, dtype="bfloat16"),
    Case("mqa", B=32, S=8192, Hq=16, Hkv=1, D=128, dtype="bfloat16"),
    Case("eight_queries", B=16, S=8192, Hq=32, Hkv=8, D=128, dtype="bfloat16", Q=8),
)
GOALS = (Goal("gqa", "best", 1.5), Goal("gqa_full", "best", 1.0))


def read_bandwidth() -> tuple[str, float]:
    """The rate at which XLA sums an array much larger than caches."""
    x = jnp.ones(1 << 28, jnp.bfloat16)
    total = jax.jit(lambda x: x.astype(jnp.float32).sum())
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready([total(x) for _ in range(10)])
        best = min(best, (time.perf_counter() - start) / 10)
    return "a sum in XLA, the best of 10", x.nbytes / best


def peers(problem: Problem) -> dict[str, Candidate]:
    """None besides JAX's own."""
    del problem
    return {}
