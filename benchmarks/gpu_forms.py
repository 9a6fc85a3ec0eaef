"""Tables of decode on a GPU, on other forms of caches: in pages, and quantised."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from benchmarks.gpu_decode import (
    DECODE,
    PEER_PAGE,
    Arrays,
    Call,
    beside,
    dense_arrays,
    flashinfer_seconds,
    in_pages,
    our_call,
)
from benchmarks.gpu_table import Row, Table, check_close, met, name, shown, us
from benchmarks.measure import Case
from jax_ragged import quantize_cache

QUANTISED = (
    *(case for case in DECODE if (case.Hq, case.Hkv, case.D) == (32, 8, 128)),
    Case("", B=64, S=4096, Hq=32, Hkv=32, D=128, dtype="bfloat16"),
)
# Positions of a page, and the most that a call on pages may take: in calls on the dense cache.
PAGES, PAGES_GOAL = (16, 64, 256), 1.05
# The most that a call on a quantised cache may take, by query heads and KV heads: in calls on the
# cache in bfloat16.
QUANTISED_GOALS = {(32, 8): 0.65, (32, 32): 0.6}


def pages(cases: Sequence[Case], bandwidth: float) -> Table:
    """Decode on pages beside the dense cache and, where it is installed, FlashInfer."""
    del bandwidth
    note = (
        "Kernels alone, in us, on pages of so many positions in random order. FlashInfer reads the "
        f"same pages, in a replayed CUDA graph. Goals: at most {PAGES_GOAL} times the call on the "
        "dense cache, and FlashInfer's speed."
    )
    header = ("case", "page", "dense", "ours", "times dense", "FlashInfer", "of FlashInfer", "goal")
    rows = (row for case in cases for row in _pages(case))
    return Table("Pages in random order", note, header, shown(rows))


def _pages(case: Case) -> Iterator[Row]:
    arrays = dense_arrays(case)
    dense = Call.of(our_call(case), arrays)
    base = dense.timing.attention
    for page in PAGES:
        paged = in_pages(arrays, page, shuffled=True)
        call = Call.of(our_call(case), paged)
        # The same sums, which may be cut differently; both round to bfloat16.
        check_close(case, call.out, dense.out, 2e-2)
        alone, flashinfer = call.timing.attention, flashinfer_seconds(case, paged, dense.out)
        goal = alone <= PAGES_GOAL * base and (flashinfer is None or alone <= flashinfer)
        yield (
            *(name(case), str(page), us(base), us(alone), f"{alone / base:.2f}"),
            *(*beside(alone, flashinfer), met(goal)),
        )


def _quantised(arrays: Arrays, dtype: str, scales: str) -> Arrays:
    """The operands with a narrow cache; scales of a "head" [Hkv] or a "position" [B, S, Hkv]."""
    changed = dict(arrays)
    for part in ("key", "value"):
        x = arrays[part]
        if scales == "head":
            by_head = jnp.moveaxis(x, 2, 0)
            values, scale = quantize_cache(by_head.reshape(x.shape[2], -1), dtype)
            values = jnp.moveaxis(values.reshape(by_head.shape), 0, 2)
        else:
            values, scale = quantize_cache(x, dtype)
        changed |= {part: values, f"{part}_scale": scale}
    return changed


def _widened(arrays: Arrays) -> Arrays:
    """The operands with the bfloat16 cache that a quantised one stands for."""
    cache = {
        x: (arrays[x].astype(jnp.float32) * arrays[f"{x}_scale"][..., None]).astype(jnp.bfloat16)
        for x in ("key", "value")
    }
    return {x: arrays[x] for x in ("query", "lengths")} | cache


def quantised(cases: Sequence[Case], bandwidth: float) -> Table:
    """Decode on quantised caches beside bfloat16 and, where it is installed, FlashInfer."""
    del bandwidth
    goals = " or ".join(f"{goal} ({Hq}/{Hkv} heads)" for (Hq, Hkv), goal in QUANTISED_GOALS.items())
    note = (
        "Kernels alone, in us, with one scale for each head, or for each position of a head. "
        f"FlashInfer reads the cache in pages of {PEER_PAGE} in order and without scales, in a "
        f"replayed CUDA graph. Goals: at most {goals} of the time of the call on the bfloat16 "
        "cache."
    )
    header = (
        *("case", "cache", "a scale for each", "bfloat16", "ours", "times bfloat16", "at most"),
        *("FlashInfer", "of FlashInfer", "goal"),
    )
    rows = (row for case in cases for row in _quantised_rows(case))
    return Table("Quantised caches", note, header, shown(rows))


def _quantised_rows(case: Case) -> Iterator[Row]:
    arrays = dense_arrays(case)
    wide = Call.of(our_call(case), arrays)
    base, most = wide.timing.attention, QUANTISED_GOALS[case.Hq, case.Hkv]
    quantise = jax.jit(_quantised, static_argnames=("dtype", "scales"))
    for dtype in ("int8", "float8_e4m3fn"):
        for scales in ("head", "position"):
            narrow = quantise(arrays, dtype=dtype, scales=scales)
            call = Call.of(our_call(case), narrow)
            # The same numbers; one side rounds them to bfloat16 after the scales, one before.
            check_close(case, call.out, wide.run(jax.jit(_widened)(narrow)), 4e-2)
            alone, flashinfer = call.timing.attention, None
            # FlashInfer reads no int8, and takes no scales but one for all heads.
            if dtype != "int8" and scales == "head":
                flashinfer = _flashinfer(case, arrays, dtype, wide)
            yield (
                *(name(case), dtype, scales, us(base), us(alone), f"{alone / base:.2f}"),
                *(f"{most}", *beside(alone, flashinfer), met(alone <= most * base)),
            )


def _flashinfer(case: Case, arrays: Arrays, dtype: str, wide: Call) -> float | None:
    """FlashInfer's time on the cache rounded to dtype, without scales."""
    rounded = {x: arrays[x].astype(dtype) for x in ("key", "value")}
    pages = in_pages(arrays | rounded, PEER_PAGE, shuffled=False)
    same = {x: y.astype(jnp.bfloat16) for x, y in rounded.items()}
    return flashinfer_seconds(case, pages, wide.run(arrays | same))
