"""What others have on a GPU: cuDNN through jax.nn, torch's attention, and FlashInfer."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Candidate, Problem, compiled

CALLS = 200


def cudnn_decode(q: Any, k: Any, v: Any, lengths: Any, scale: float) -> Any:
    """cuDNN's attention of query [B, Hq, D] or [B, Q, Hq, D]."""
    rows = q[:, None] if q.ndim == 3 else q
    out = jax.nn.dot_product_attention(
        rows,
        k,
        v,
        scale=scale,
        query_seq_lengths=jnp.full_like(lengths, rows.shape[1]),
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out.reshape(q.shape)


def cudnn_causal(q: Any, k: Any, v: Any, scale: float) -> Any:
    """cuDNN's attention of query [B, S, Hq, D] to all positions up to each query's own."""
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation="cudnn"
    )


def cudnn(problem: Problem) -> Candidate:
    """cuDNN in a loop of calls."""

    def run(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        return cudnn_decode(q, k, v, lengths, problem.scale)

    return compiled(run, *problem.operands, calls=CALLS)


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


def torch_peers(problem: Problem) -> dict[str, Candidate]:
    """torch's SDPA and flex_attention, each as a CUDA graph; none where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
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


def flashinfer_version() -> str | None:
    """The version of FlashInfer; None where it is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    return importlib.metadata.version("flashinfer-python")


def flashinfer_decode(
    query: jax.Array,
    pools: tuple[jax.Array, jax.Array],
    page_table: jax.Array,
    lengths: jax.Array,
    scale: float,
) -> Candidate:
    """FlashInfer's paged decode as a CUDA graph, planned before it is timed.

    Args:
      query: [B, Hq, D], bfloat16.
      pools: pages of keys and of values [P, T, Hkv, D], bfloat16 or an 8-bit float without scale.
      page_table: the pages of each row [B, W].
      lengths: the ends of the windows [B], 1 or more.
      scale: the factor of the logits.

    Returns:
      The candidate; its output is [B, 1, Hq, D].
    """
    torch: Any = importlib.import_module("torch")
    flashinfer: Any = importlib.import_module("flashinfer")
    page, Hkv, D = pools[0].shape[1:]
    ends, table = np.asarray(lengths), np.asarray(page_table)
    counts = -(-ends // page)
    pages = np.concatenate([row[:n] for row, n in zip(table, counts, strict=True)])
    q, k, v = (_to_torch(x) for x in (query, *pools))

    def int32(x: Any) -> Any:
        return torch.tensor(np.asarray(x, np.int32), device=q.device)

    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        int32(np.concatenate([[0], np.cumsum(counts)])),
        int32(pages),
        int32(ends - (counts - 1) * page),
        query.shape[1],
        Hkv,
        D,
        page,
        sm_scale=scale,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    # `_graphed` swaps heads and queries of [B, Hq, 1, D].
    return _graphed(lambda: wrapper.run(q, (k, v))[:, :, None])


def _to_torch(x: jax.Array) -> Any:
    """The same array in torch."""
    torch: Any = importlib.import_module("torch")
    if x.dtype.itemsize > 1:
        return torch.from_dlpack(x)
    # Older versions of torch know no 8-bit floats in DLPack.
    octets = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return torch.from_dlpack(octets).view(getattr(torch, x.dtype.name))
