"""Tables of decode on a GPU, on the dense cache: the forward, and its derivatives."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpu_peers
from benchmarks.forms import paged
from benchmarks.gpu_profile import Timing, in_a_row, least_seconds, looped
from benchmarks.gpu_table import Row, Table, check_close, met, name, shown, us
from benchmarks.measure import Case, Problem
from jax_ragged import ragged_attention

_bfloat16 = functools.partial(Case, "", dtype="bfloat16")
DECODE = (
    _bfloat16(B=16, S=8192, Hq=32, Hkv=8, D=128),
    _bfloat16(B=4, S=32768, Hq=32, Hkv=8, D=128),
    _bfloat16(B=64, S=4096, Hq=64, Hkv=8, D=128),
    _bfloat16(B=32, S=8192, Hq=64, Hkv=8, D=64),
    _bfloat16(B=1, S=4096, Hq=32, Hkv=8, D=128, windows="full"),
    _bfloat16(B=8, S=1024, Hq=32, Hkv=8, D=128, windows="full"),
    _bfloat16(B=32, S=4096, Hq=16, Hkv=8, D=256),
    _bfloat16(B=256, S=1024, Hq=28, Hkv=4, D=128),
    _bfloat16(B=16, S=16384, Hq=16, Hkv=1, D=128),
    _bfloat16(B=128, S=2048, Hq=32, Hkv=8, D=128, windows="eighth"),
)
# Of the floor's speed, on the decode cases whose windows have more bytes than LARGE.
FLOOR_GOAL, LARGE = 0.9, 200e6
# Positions of a page of FlashInfer's cache, beside caches of ours that have no pages.
PEER_PAGE = 16
# The most that decode's derivatives may take: in forwards, "all three" in floors.
DERIVATIVE_GOALS = {"query": 2.2, "all three": 1.3, "jvp": 2.5}

# The operands of a call, by name.
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """A decode call, in a compiled loop.

    Attributes:
      run: maps operands by name to the output of the last call [B, Hq, D].
      out: the output of the operands that were timed.
      timing: of a call.
    """

    run: Callable[[Arrays], Any]
    out: Any
    timing: Timing

    @classmethod
    def of(cls, attention: Callable[[Arrays], Any], arrays: Arrays) -> "Call":
        """Compiles and times attention of arrays."""

        def step(arrays: Arrays, last: tuple[Any, Any]) -> tuple[Any, Any]:
            lengths, _ = last
            out = attention(arrays | {"lengths": lengths})
            # A 0 that the compiler does not know to be one keeps every call in the loop.
            return lengths + (out.ravel()[0] > 1e30).astype(lengths.dtype), out

        def operands(arrays: Arrays) -> tuple[Any, ...]:
            # Before the first output stands query, which has its shape and dtype.
            return arrays, (arrays["lengths"], arrays["query"])

        program = looped(step, operands(arrays), gpu_peers.CALLS)

        def run(arrays: Arrays) -> Any:
            return program(*operands(arrays))[1]

        return cls(run, run(arrays), Timing.of(lambda: run(arrays), gpu_peers.CALLS))


def our_call(case: Case) -> Callable[[Arrays], Any]:
    """Our decode call, on any form of a cache."""
    return lambda arrays: ragged_attention(**arrays, softmax_scale=case.D**-0.5).out


def dense_arrays(case: Case) -> Arrays:
    """The operands of a call on the dense cache."""
    names = ("query", "key", "value", "lengths")
    return dict(zip(names, Problem.of(case).operands, strict=True))


def in_pages(arrays: Arrays, page: int, *, shuffled: bool) -> Arrays:
    """The operands with the cache in pages, in random order or in the order of rows."""
    B, S = arrays["key"].shape[:2]
    order = jnp.arange(B * S // page, dtype=jnp.int32)
    if shuffled:
        order = jax.random.permutation(jax.random.key(1), order)
    pools = {x: paged(arrays[x], page, order) for x in ("key", "value")}
    return arrays | pools | {"page_table": order.reshape(B, -1)}


def flashinfer_seconds(case: Case, pages: Arrays, want: Any) -> float | None:
    """FlashInfer's time on pages, after a look at its output; None where it is not installed."""
    if gpu_peers.flashinfer_version() is None:
        return None
    candidate = gpu_peers.flashinfer_decode(
        pages["query"],
        (pages["key"], pages["value"]),
        pages["page_table"],
        pages["lengths"],
        case.D**-0.5,
    )
    # Both round weights and results to bfloat16.
    check_close(case, candidate.out, want, 4e-2)
    return least_seconds(candidate.run, candidate.calls)


def beside(ours: float, peer: float | None) -> tuple[str, str]:
    """Cells of a peer's time, and of our speed in multiples of the peer's."""
    return ("", "") if peer is None else (us(peer), f"{peer / ours:.2f}")


def decode(cases: Sequence[Case], bandwidth: float) -> Table:
    """Decode beside cuDNN and, where it is installed, FlashInfer."""
    note = (
        f"Times in us. The floor reads the windows at {bandwidth / 1e12:.2f} TB/s. FlashInfer runs "
        f"in a replayed CUDA graph: compare it with the kernels alone. Goals: FlashInfer's speed, "
        f"and {FLOOR_GOAL} of the floor's where the windows have {LARGE / 1e6:.0f} MB."
    )
    header = (
        *("case", "MB", "floor", "ours alone", "ours loop", "cuDNN alone", "cuDNN loop"),
        *("FlashInfer", "of the floor", "of FlashInfer", "goal"),
    )
    return Table("Decode", note, header, shown(_decode(case, bandwidth) for case in cases))


def _decode(case: Case, bandwidth: float) -> Row:
    arrays = dense_arrays(case)

    def cudnn(arrays: Arrays) -> Any:
        return gpu_peers.cudnn_decode(
            arrays["query"], arrays["key"], arrays["value"], arrays["lengths"], case.D**-0.5
        )

    ours, theirs = (Call.of(attention, arrays) for attention in (our_call(case), cudnn))
    # Both round weights and results to bfloat16.
    check_close(case, theirs.out, ours.out, 4e-2)
    flashinfer = flashinfer_seconds(case, in_pages(arrays, PEER_PAGE, shuffled=False), ours.out)
    alone, floor = ours.timing.attention, case.valid_bytes / bandwidth
    time, speed = beside(alone, flashinfer)
    goal = met(
        (flashinfer is None or alone <= flashinfer)
        and (case.valid_bytes < LARGE or floor >= FLOOR_GOAL * alone)
    )
    return (
        *(name(case), f"{case.valid_bytes / 1e6:.0f}", us(floor)),
        *(us(x) for t in (ours.timing, theirs.timing) for x in (t.attention, t.call)),
        *(time, f"{floor / alone:.2f}", speed, goal),
    )


def derivatives(cases: Sequence[Case], bandwidth: float) -> Table:
    """Derivatives of a decode call beside its forward and the floor."""
    (case,) = cases
    problem = Problem.of(case)

    def forward(lengths: Any) -> Callable[[Any, Any, Any], Any]:
        return lambda q, k, v: ragged_attention(q, k, v, lengths, softmax_scale=problem.scale).out

    functions: dict[str, Callable[..., Any]] = {
        "forward": lambda q, k, v, n: forward(n)(q, k, v),
        "query": lambda q, k, v, n: jax.vjp(lambda q: forward(n)(q, k, v), q)[1](q),
        "all three": lambda q, k, v, n: jax.vjp(forward(n), q, k, v)[1](q),
        "jvp": lambda q, k, v, n: jax.jvp(forward(n), (q, k, v), (q, v, k))[1],
    }
    times = {}
    for label, function in functions.items():
        program = jax.jit(function).lower(*problem.operands).compile()
        times[label] = in_a_row(program, problem.operands, 20)
    base = times.pop("forward")
    floor = (case.valid_bytes + case.cache_bytes) / bandwidth
    rows: list[Row] = [
        ("forward", us(base.kernels), us(base.attention), us(base.around), "", "", "")
    ]
    for label, t in times.items():
        # The programs of the derivatives run the forward too, for its results.
        alone = t.kernels - base.kernels
        unit, word = (floor, "floors") if label == "all three" else (base.kernels, "forwards")
        goal = DERIVATIVE_GOALS[label]
        kinds = (alone, t.attention - base.attention, t.around - base.around)
        multiple = f"{alone / unit:.2f}"
        rows.append((label, *map(us, kinds), multiple, f"{goal} {word}", met(alone <= goal * unit)))
    note = (
        f"{name(case)}; kernels alone, in us, "
        'without those of the forward that the program runs before; "around" are XLA\'s kernels. '
        f"The floor of all three, {us(floor)} us, reads the windows once and writes both "
        f"gradients of the cache whole, at {bandwidth / 1e12:.2f} TB/s."
    )
    header = ("derivative", "alone", "ours", "around", "multiple", "at most", "goal")
    return Table("Decode derivatives", note, header, rows)
