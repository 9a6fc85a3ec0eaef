"""Cases and peers on GPUs: jax.nn with cuDNN, and torch's SDPA and flex_attention.

Times are of the device: a JAX function runs in a loop inside one jitted program, a torch function
in a CUDA graph. Torch is given memory of its own: run with XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import Candidate, Case, Goal, Problem, compiled

CALLS = 200
SWEEP = Case("sweep", B=16, S=8192, Hq=32, Hkv=8, D=128, dtype="bfloat16")
CASES = (
    Case("gqa", B=16, S=8192, Hq=32, Hkv=8, D=128, dtype="bfloat16"),
    Case("gqa_full", B=16, S=8192, Hq=32, Hkv=8, D=128, dtype="bfloat16", windows="full"),
    Case("mha", B=64, S=4096, Hq=32, Hkv=32, D=128, dtype="bfloat16"),
    Case("one_long_row", B=1, S=131072, Hq=32, Hkv=8, D=128, dtype="bfloat16", windows="full"),
    Case("short_rows", B=128, S=2048, Hq=32, Hkv=8, D=128, dtype="bfloat16", windows="eighth"),
    Case("eight_queries", B=16, S=8192, Hq=32, Hkv=8, D=128, dtype="bfloat16", Q=8),
    Case("mqa", B=32, S=8192, Hq=16, Hkv=1, D=128, dtype="bfloat16"),
)
GOALS = (
    Goal("gqa", "TB/s", 3.4),
    Goal("gqa_full", "TB/s", 3.8),
    Goal("mha", "TB/s", 4.0),
    Goal("one_long_row", "TB/s", 3.0),
    Goal("short_rows", "best", 3.0),
    Goal("eight_queries", "gqa", 1 / 1.3),
)


def read_bandwidth() -> tuple[str, float]:
    """The rate at which XLA sums an array much larger than caches."""
    x = jnp.ones(1 << 31, jnp.bfloat16)
    total = jax.jit(lambda x: x.astype(jnp.float32).sum())
    jax.block_until_ready(total(x))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([total(x) for _ in range(10)])
        best = min(best, (time.perf_counter() - start) / 10)
    return "a sum in XLA, the best of 5", x.nbytes / best


def peers(problem: Problem) -> dict[str, Candidate]:
    """jax.nn with cuDNN, and torch's where it is installed."""
    candidates = {"jax.nn cudnn": _cudnn(problem)}
    if importlib.util.find_spec("torch") is not None:
        candidates |= _torch(problem)
    return candidates


def _cudnn(problem: Problem) -> Candidate:
    def run(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        q4 = q[:, None] if problem.case.Q is None else q
        ones = jnp.full_like(lengths, q4.shape[1])
        out = jax.nn.dot_product_attention(
            q4,
            k,
            v,
            scale=problem.scale,
            query_seq_lengths=ones,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
        return out.reshape(q.shape)

    return compiled(run, problem.query, problem.key, problem.value, problem.lengths, calls=CALLS)


def _graphed(function: Callable[[], Any]) -> Candidate:
    """A torch function as a CUDA graph."""
    torch: Any = importlib.import_module("torch")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            out = function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    def run() -> None:
        for _ in range(CALLS):
            graph.replay()
        torch.cuda.synchronize()

    run()
    return Candidate(run, out.float().transpose(1, 2).cpu().numpy(), None, CALLS)


def _torch(problem: Problem) -> dict[str, Candidate]:
    torch: Any = importlib.import_module("torch")
    masks: Any = importlib.import_module("torch.nn.attention.flex_attention")
    create_block_mask, flex_attention = masks.create_block_mask, masks.flex_attention
    scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention
    case = problem.case
    query = problem.query[:, None] if case.Q is None else problem.query
    # [B, S, H, D] in memory, seen as [B, H, S, D].
    q, k, v = (torch.from_dlpack(x).transpose(1, 2) for x in (query, problem.key, problem.value))
    lengths = torch.from_dlpack(problem.lengths)
    grouped = case.Hq != case.Hkv
    inside = torch.arange(case.S, device=q.device)[None] < lengths[:, None]

    def sdpa() -> Any:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=inside[:, None, None], scale=problem.scale, enable_gqa=grouped
        )

    def in_window(b: Any, h: Any, q_index: Any, t: Any) -> Any:
        del h, q_index
        return t < lengths[b]

    mask = create_block_mask(in_window, case.B, None, query.shape[1], case.S, device=q.device)
    compiled_flex = torch.compile(flex_attention)

    def flex() -> Any:
        return compiled_flex(q, k, v, block_mask=mask, scale=problem.scale, enable_gqa=grouped)

    return {"torch SDPA": _graphed(sdpa), "torch flex_attention": _graphed(flex)}
