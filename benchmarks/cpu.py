"""Cases and peers on CPUs: torch's scaled_dot_product_attention, masked and row by row.

With several devices (JAX_NUM_CPU_DEVICES=2 in the environment), ours besides with the heads
partitioned over them.
"""

import dataclasses
import importlib.util
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.measure import OURS, Candidate, Case, Goal, Problem, ours

CALLS = 1
SWEEP = Case("sweep", B=8, S=4096, Hq=32, Hkv=8, D=128)
CASES = (
    Case("gqa", B=8, S=4096, Hq=32, Hkv=8, D=128),
    Case("mha", B=8, S=2048, Hq=32, Hkv=32, D=128),
    Case("gqa_bfloat16", B=8, S=4096, Hq=32, Hkv=8, D=128, dtype="bfloat16"),
    Case("gqa_full", B=8, S=4096, Hq=32, Hkv=8, D=128, windows="full"),
    Case("short_rows", B=32, S=4096, Hq=16, Hkv=2, D=64, windows="short"),
    Case("eight_queries", B=8, S=4096, Hq=32, Hkv=8, D=128, Q=8),
    Case("one_long_row", B=1, S=32768, Hq=32, Hkv=8, D=128, windows="full"),
    Case("small", B=1, S=128, Hq=32, Hkv=8, D=128, windows="full"),
    Case("tiny", B=1, S=128, Hq=4, Hkv=2, D=64, windows="full"),
)
GOALS = (
    Goal("gqa", "torch row by row", 1.3),
    Goal("gqa", "jax.nn", 12),
    Goal("mha", "torch row by row", 1.1),
    Goal("mha", "jax.nn", 15),
    Goal("gqa_bfloat16", "best", 10),
    Goal("gqa_bfloat16", "gqa", 1.0),
    Goal("gqa_full", "best", 1.0),
    Goal("short_rows", "best", 20),
    Goal("eight_queries", "gqa", 1 / 1.5),
    Goal("small", "dense reference", 1 / 1.5),
    Goal("tiny", "dense reference", 1 / 1.5),
)


def read_bandwidth() -> tuple[str, float]:
    """The rate at which two threads of numpy sum halves of an array much larger than caches."""
    halves = np.split(np.ones(1 << 26, np.float32), 2)
    best = float("inf")
    for _ in range(10):
        threads = [threading.Thread(target=np.sum, args=(half,)) for half in halves]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = min(best, time.perf_counter() - start)
    return "two threads of numpy.sum, the best of 10", 2 * halves[0].nbytes / best


def peers(problem: Problem) -> dict[str, Candidate]:
    """Torch, where it is installed, and ours with the heads over all devices."""
    return _torch(problem) | _partitioned(problem)


def _partitioned(problem: Problem) -> dict[str, Candidate]:
    devices = jax.device_count()
    if devices == 1 or problem.case.Hkv % devices:
        return {}
    mesh = jax.make_mesh((devices,), ("heads",), axis_types=(AxisType.Explicit,))

    def place(x: jax.Array, *spec: str | None) -> jax.Array:
        placed: jax.Array = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        return placed

    rows = (problem.query.ndim - 2) * (None,)
    parts = dataclasses.replace(
        problem,
        query=place(problem.query, *rows, "heads"),
        key=place(problem.key, None, None, "heads"),
        value=place(problem.value, None, None, "heads"),
        lengths=place(problem.lengths),
    )
    return {f"{OURS}, {devices} devices": ours(parts)}


def _torch(problem: Problem) -> dict[str, Candidate]:
    if importlib.util.find_spec("torch") is None:
        return {}
    torch: Any = importlib.import_module("torch")
    scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention

    def tensor(x: Any) -> Any:
        wide = torch.from_numpy(np.array(x, np.float32))
        return wide.to(getattr(torch, str(jnp.dtype(problem.case.dtype))))

    q, k, v = (tensor(x) for x in (problem.query, problem.key, problem.value))
    if problem.case.Q is None:
        q = q[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    lengths = [int(n) for n in problem.lengths]
    mask = torch.arange(problem.case.S)[None] < torch.tensor(lengths)[:, None]
    options: dict[str, Any] = {
        "scale": problem.scale,
        "enable_gqa": problem.case.Hq != problem.case.Hkv,
    }

    def masked() -> Any:
        return scaled_dot_product_attention(q, k, v, mask[:, None, None], **options)

    def row_by_row() -> Any:
        rows = [
            scaled_dot_product_attention(
                q[b, None], k[b, None, :, :n], v[b, None, :, :n], **options
            )
            for b, n in enumerate(lengths)
        ]
        return torch.cat(rows)

    def candidate(run: Any) -> Candidate:
        return Candidate(run, run().transpose(1, 2).float().numpy())

    return {"torch masked": candidate(masked), "torch row by row": candidate(row_by_row)}
