"""Cases and peers on GPUs: jax.nn with cuDNN, torch's SDPA and flex_attention, and FlashInfer.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m benchmarks.gpu [decode] [prefill]

prints the tables of docs/gpu.md: for each case the time of a call in a loop and the times of its
kernels alone, for ours, cuDNN and (decode, where it is installed) FlashInfer.

Times are of the device: a JAX function runs in a loop inside one jitted program, a torch function
in a CUDA graph. The loop's own operations and the gaps between kernels cost a JAX call 8 to 15 us
that a CUDA graph does not have: compare the kernels alone with it. Torch is given memory of its
own, hence the environment variable.
"""

import dataclasses
import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_profile import kernel_times
from benchmarks.measure import Candidate, Case, Goal, Problem, compiled, print_table, versions
from jax_ragged import ragged_attention

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
# The decode cases whose kernels are timed alone.
DECODE = (
    Case("", B=16, S=8192, Hq=32, Hkv=8, D=128, dtype="bfloat16"),
    Case("", B=4, S=32768, Hq=32, Hkv=8, D=128, dtype="bfloat16"),
    Case("", B=64, S=4096, Hq=64, Hkv=8, D=128, dtype="bfloat16"),
    Case("", B=32, S=8192, Hq=64, Hkv=8, D=64, dtype="bfloat16"),
    Case("", B=1, S=4096, Hq=32, Hkv=8, D=128, dtype="bfloat16", windows="full"),
    Case("", B=8, S=1024, Hq=32, Hkv=8, D=128, dtype="bfloat16", windows="full"),
    Case("", B=32, S=4096, Hq=16, Hkv=8, D=256, dtype="bfloat16"),
    Case("", B=256, S=1024, Hq=28, Hkv=4, D=128, dtype="bfloat16"),
    Case("", B=16, S=16384, Hq=16, Hkv=1, D=128, dtype="bfloat16"),
    Case("", B=128, S=2048, Hq=32, Hkv=8, D=128, dtype="bfloat16", windows="eighth"),
)
PAGE = 16


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Causal attention of B sequences of T tokens to themselves."""

    B: int
    T: int
    Hq: int
    Hkv: int
    D: int

    @property
    def operations(self) -> float:
        """Floating-point operations of both products, without those above the diagonal."""
        return 2.0 * self.B * self.Hq * self.T**2 * self.D

    def __str__(self) -> str:
        return f"B{self.B} T{self.T} {self.Hq}/{self.Hkv}/{self.D}"


PREFILL = (
    Prefill(4, 2048, 32, 8, 128),
    Prefill(2, 4096, 32, 8, 128),
    Prefill(1, 8192, 32, 8, 128),
    Prefill(16, 512, 32, 8, 128),
    Prefill(4, 2048, 16, 16, 64),
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


def _flashinfer(problem: Problem) -> Candidate:
    """FlashInfer's paged decode, pages of 16 positions in order, planned before it is timed."""
    torch: Any = importlib.import_module("torch")
    flashinfer: Any = importlib.import_module("flashinfer")
    case = problem.case
    query, key, value = (torch.from_dlpack(x) for x in (problem.query, problem.key, problem.value))
    pages = case.S // PAGE
    pools = tuple(x.reshape(case.B * pages, PAGE, case.Hkv, case.D) for x in (key, value))
    lengths = case.lengths()
    counts = -(-lengths // PAGE)
    rows = np.repeat(np.arange(case.B) * pages, counts)
    offsets = np.concatenate([np.arange(n) for n in counts])

    def int32(x: Any) -> Any:
        return torch.tensor(np.asarray(x, np.int32), device="cuda")

    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        int32(np.concatenate([[0], np.cumsum(counts)])),
        int32(rows + offsets),
        int32(lengths - (counts - 1) * PAGE),
        case.Hq,
        case.Hkv,
        case.D,
        PAGE,
        sm_scale=problem.scale,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    # `_graphed` swaps heads and queries of [B, Hq, 1, D].
    return _graphed(lambda: wrapper.run(query, pools)[:, :, None])


def _seconds(run: Callable[[], Any], calls: int) -> float:
    """The least time of a call in 5 samples."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def _loop_and_kernels(
    body: Callable[..., Any], operands: tuple[Any, ...], calls: int
) -> tuple[float, float]:
    """Times `calls` calls of body in one loop; it maps the last operand to its successor.

    Returns:
      The seconds of a call in the loop, and those of its attention kernels alone.
    """

    def loop(*operands: Any) -> Any:
        step = functools.partial(body, *operands[:-1])
        return jax.lax.fori_loop(0, calls, lambda _, x: step(x), operands[-1])

    program = jax.jit(loop).lower(*operands).compile()
    seconds = _seconds(lambda: program(*operands), calls)
    kernels = kernel_times(program, *operands, calls=calls)
    names = ("ragged_attention", "sdpa", "fort_native")
    alone = [t for name, t in kernels.items() if any(part in name for part in names)]
    if not alone:
        raise RuntimeError(f"none of {names} is among the kernels {sorted(kernels)}")
    return seconds, sum(alone)


def _cudnn_decode(q: Any, k: Any, v: Any, lengths: Any, scale: float) -> Any:
    out = jax.nn.dot_product_attention(
        q[:, None],
        k,
        v,
        scale=scale,
        query_seq_lengths=jnp.ones_like(lengths),
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out[:, 0]


def decode_table() -> None:
    """Prints the decode cases; the floor reads the windows at 4.3 TB/s, as an H200 copies."""
    has_flashinfer = importlib.util.find_spec("flashinfer") is not None
    rows = []
    for case in DECODE:
        problem = Problem.of(case)
        ours = functools.partial(ragged_attention, softmax_scale=problem.scale)
        peer = functools.partial(_cudnn_decode, scale=problem.scale)

        def attend(call: Any, q: Any, k: Any, v: Any, lengths: Any) -> Any:
            out = jax.tree.leaves(call(q, k, v, lengths))[0]
            return lengths + (out.ravel()[0] > 1e30).astype(lengths.dtype)

        times = [
            _loop_and_kernels(functools.partial(attend, call), problem.operands, CALLS)
            for call in (ours, peer)
        ]
        flashinfer = ""
        if has_flashinfer:
            candidate = _flashinfer(problem)
            expected = np.asarray(ours(*problem.operands).out, np.float32)
            error = float(np.abs(candidate.out.reshape(expected.shape) - expected).max())
            if not error < 4e-2:
                raise RuntimeError(f"FlashInfer and ours differ by {error} on {case}")
            flashinfer = f"{_seconds(candidate.run, candidate.calls) * 1e6:.1f}"
        floor = case.valid_bytes / 4.3e12
        us = [f"{t * 1e6:.1f}" for pair in times for t in pair]
        name = f"B{case.B} S{case.S} {case.Hq}/{case.Hkv}/{case.D} {case.windows}"
        rows.append((name, f"{floor * 1e6:.1f}", us[1], us[0], us[3], us[2], flashinfer))
        print(*rows[-1], flush=True)
    print("\nDecode, us: kernels alone, and a call in a loop (FlashInfer: in a CUDA graph)\n")
    header = ("case", "floor", "ours", "loop", "cuDNN", "loop", "FlashInfer")
    print_table(header, rows)


def prefill_table() -> None:
    """Prints the causal cases."""
    calls, rows = 10, []
    for case in PREFILL:
        keys = jax.random.split(jax.random.key(0), 3)
        kv = (case.B, case.T, case.Hkv, case.D)
        q, k, v = (
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(keys, ((case.B, case.T, case.Hq, case.D), kv, kv), strict=True)
        )
        ends = jnp.broadcast_to(jnp.arange(1, case.T + 1, dtype=jnp.int32), (case.B, case.T))
        scale = case.D**-0.5

        def ours(k: Any, v: Any, ends: Any, q: Any, scale: float = scale) -> Any:
            return ragged_attention(q, k, v, ends, softmax_scale=scale).out

        def peer(k: Any, v: Any, ends: Any, q: Any, scale: float = scale) -> Any:
            del ends
            return jax.nn.dot_product_attention(
                q, k, v, scale=scale, is_causal=True, implementation="cudnn"
            )

        got, want = (jax.jit(f)(k, v, ends, q).astype(jnp.float32) for f in (ours, peer))
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        if not error < 1e-2:
            raise RuntimeError(f"cuDNN and ours differ by {error} of the norm on {case}")
        times = [_loop_and_kernels(f, (k, v, ends, q), calls) for f in (ours, peer)]
        cells = [f"{t * 1e6:.0f} ({case.operations / t / 1e12:.0f})" for p in times for t in p]
        rows.append((str(case), cells[1], cells[0], cells[3], cells[2]))
        print(*rows[-1], flush=True)
    print("\nCausal forward, us (TFLOP/s): kernels alone, and a call in a loop\n")
    print_table(("case", "ours", "loop", "cuDNN", "loop"), rows)


TABLES = {"decode": decode_table, "prefill": prefill_table}


def main() -> None:
    """Prints the tables that the command line names, or all."""
    chosen = sys.argv[1:] or list(TABLES)
    if unknown := set(chosen) - set(TABLES):
        sys.exit(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    print(versions())
    for name in chosen:
        TABLES[name]()


if __name__ == "__main__":
    main()
