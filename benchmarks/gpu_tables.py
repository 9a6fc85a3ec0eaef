"""The tables of docs/measurements/gpu.md, each with its goals: `python -m benchmarks.gpu`.

Every table times ours and its peers in one process. "Alone" is the time of kernels in JAX's
profiler: of the attention kernels in forward tables, of all kernels of the program in derivative
tables. The other times have what lies between the kernels too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_peers
from benchmarks.gpu_profile import in_a_row, in_loop, least_seconds
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
# S queries a row, each with all positions up to its own.
CAUSAL = tuple(
    _bfloat16(B=B, S=S, Q=S, Hq=Hq, Hkv=Hkv, D=D, windows="full")
    for B, S, Hq, Hkv, D in (
        (4, 2048, 32, 8, 128),
        (2, 4096, 32, 8, 128),
        (1, 8192, 32, 8, 128),
        (16, 512, 32, 8, 128),
        (4, 2048, 16, 16, 64),
    )
)
# Of the floor's speed, on the decode cases whose windows have more bytes than LARGE.
FLOOR_GOAL, LARGE = 0.9, 200e6
# Of cuDNN's speed: the causal forward, and the causal gradient with a multiple of the temporaries.
FORWARD_GOAL, GRADIENT_GOAL, TEMPORARIES_GOAL = 1.0, 0.9, 1.2
# The most that decode's derivatives may take: in forwards, "all three" in floors.
DERIVATIVE_GOALS = {"query": 2.2, "all three": 1.3, "jvp": 2.5}

Attention = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as it is printed; a cell is text or one number, so that it can be drawn."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _close(case: Case, got: Any, want: Any, tol: float) -> None:
    """Raises if an array differs from another by more than a share of its largest value."""
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    error = float(np.abs(got.reshape(want.shape) - want).max() / np.abs(want).max())
    if not error <= tol:
        raise RuntimeError(f"ours and a peer's result differ by {error:.2g} on {case}.")


def decode(bandwidth: float) -> Table:
    """Decode beside cuDNN and, where it is installed, FlashInfer."""
    rows = [_decode(case, bandwidth) for case in DECODE]
    note = (
        f"Times in us. The floor reads the windows at {bandwidth / 1e12:.2f} TB/s. FlashInfer runs "
        f"in a replayed CUDA graph: compare it with the kernels alone. Goals: FlashInfer's speed, "
        f"and {FLOOR_GOAL} of the floor's where the windows have {LARGE / 1e6:.0f} MB."
    )
    header = (
        *("case", "MB", "floor", "ours alone", "ours loop", "cuDNN alone", "cuDNN loop"),
        *("FlashInfer", "of the floor", "of FlashInfer", "goal"),
    )
    return Table("Decode", note, header, rows)


def _decode(case: Case, bandwidth: float) -> tuple[str, ...]:
    problem = Problem.of(case)

    def ours(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        return ragged_attention(q, k, v, lengths, softmax_scale=problem.scale).out

    def cudnn(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        return gpu_peers.cudnn_decode(q, k, v, lengths, problem.scale)

    def time(attention: Callable[..., Any]) -> tuple[str, str, float]:
        def step(q: Any, k: Any, v: Any, lengths: Any) -> Any:
            out = attention(q, k, v, lengths)
            return lengths + (out.ravel()[0] > 1e30).astype(lengths.dtype)

        timing = in_loop(step, problem.operands, gpu_peers.CALLS)
        return _us(timing.attention), _us(timing.call), timing.attention

    *cells_of_ours, alone = time(ours)
    *cells_of_cudnn, _ = time(cudnn)
    floor = case.valid_bytes / bandwidth
    met = case.valid_bytes < LARGE or floor >= FLOOR_GOAL * alone
    flashinfer, of_flashinfer = "", ""
    if gpu_peers.flashinfer_version() is not None:
        candidate = gpu_peers.flashinfer_decode(problem)
        # Both round weights and results to bfloat16.
        _close(case, candidate.out, jax.jit(ours)(*problem.operands), 4e-2)
        seconds = least_seconds(candidate.run, candidate.calls)
        met = met and alone <= seconds
        flashinfer, of_flashinfer = _us(seconds), f"{seconds / alone:.2f}"
    name = f"B{case.B} S{case.S} {case.Hq}/{case.Hkv}/{case.D} {case.windows}"
    return (
        *(name, f"{case.valid_bytes / 1e6:.0f}", _us(floor), *cells_of_ours, *cells_of_cudnn),
        *(flashinfer, f"{floor / alone:.2f}", of_flashinfer, _met(met)),
    )


def _causal_name(case: Case) -> str:
    return f"B{case.B} T{case.S} {case.Hq}/{case.Hkv}/{case.D}"


def _causal_calls(problem: Problem) -> dict[str, Attention]:
    """Causal attention by ours and by cuDNN."""
    ends = jnp.broadcast_to(jnp.arange(1, problem.case.S + 1), problem.query.shape[:2])

    def ours(q: Any, k: Any, v: Any) -> Any:
        return ragged_attention(q, k, v, ends, softmax_scale=problem.scale).out

    return {
        "ours": ours,
        "cuDNN": functools.partial(gpu_peers.cudnn_causal, scale=problem.scale),
    }


def _causal_product(case: Case) -> float:
    """Floating-point operations of one product of the logits' size, below the diagonal."""
    return 1.0 * case.B * case.Hq * case.S**2 * case.D


def prefill(bandwidth: float) -> Table:
    """The causal forward beside cuDNN."""
    del bandwidth
    rows = []
    for case in CAUSAL:
        problem = Problem.of(case)
        calls = _causal_calls(problem)
        q, k, v, _ = problem.operands
        # Both round probabilities and results to bfloat16.
        got, want = (jax.jit(call)(q, k, v) for call in calls.values())
        _close(case, got, want, 4 * 2.0**-8)
        times = {
            name: in_loop(lambda k, v, q, call=call: call(q, k, v), (k, v, q), 10)
            for name, call in calls.items()
        }
        cells = [
            cell
            for t in times.values()
            for cell in (
                *(_us(t.attention), f"{2 * _causal_product(case) / t.attention / 1e12:.0f}"),
                _us(t.call),
            )
        ]
        alone = times["cuDNN"].attention / times["ours"].attention
        loop = times["cuDNN"].call / times["ours"].call
        met = _met(min(alone, loop) >= FORWARD_GOAL)
        rows.append((_causal_name(case), *cells, f"{alone:.2f}", f"{loop:.2f}", met))
    note = "Times in us. The goal is cuDNN's speed, alone and in a loop of 10 calls."
    header = (
        *("case", "ours alone", "TFLOP/s", "ours loop", "cuDNN alone", "cuDNN TFLOP/s"),
        *("cuDNN loop", "speed alone", "speed in the loop", "goal"),
    )
    return Table("Causal forward", note, header, rows)


def _temporaries(program: Any) -> int:
    """The bytes that a compiled program allocates beside its arguments and results."""
    return int(program.memory_analysis().temp_size_in_bytes)


def gradients(bandwidth: float) -> Table:
    """The causal gradient of all three operands, forward included, beside cuDNN."""
    del bandwidth
    rows = []
    for case in CAUSAL:
        problem = Problem.of(case)
        operands = (*problem.operands[:3], problem.query)

        def gradient(call: Attention, *operands: Any) -> Any:
            *primals, out_bar = operands
            return jax.vjp(call, *primals)[1](out_bar)

        programs = {
            name: jax.jit(functools.partial(gradient, call)).lower(*operands).compile()
            for name, call in _causal_calls(problem).items()
        }
        for got, want in zip(*(p(*operands) for p in programs.values()), strict=True):
            # Both round probabilities, sums and results to bfloat16.
            _close(case, got, want, 4 * 2.0**-8)
        times = {name: in_a_row(program, operands, 20) for name, program in programs.items()}
        # Two products forward and five backward.
        work = 7 * _causal_product(case)
        sizes = {name: _temporaries(program) for name, program in programs.items()}
        speed = times["cuDNN"].call / times["ours"].call
        memory = sizes["ours"] / sizes["cuDNN"]
        cells = [
            cell
            for t in times.values()
            for cell in (_us(t.kernels), _us(t.call), f"{work / t.call / 1e12:.0f}")
        ]
        met = _met(speed >= GRADIENT_GOAL and memory <= TEMPORARIES_GOAL)
        temporaries = (str(n) for n in sizes.values())
        rows.append((_causal_name(case), *cells, f"{speed:.2f}", *temporaries, met))
    note = (
        "Gradients of query, key and value, forward included. Times in us; TFLOP/s counts two "
        "products forward and five backward. Temporaries are the bytes that the program allocates "
        f"beside arguments and results. Goals: {GRADIENT_GOAL} of cuDNN's speed, and "
        f"{TEMPORARIES_GOAL} times its temporaries."
    )
    header = (
        *("case", "ours alone", "ours", "TFLOP/s", "cuDNN alone", "cuDNN", "cuDNN TFLOP/s"),
        *("speed", "temporaries", "cuDNN's", "goal"),
    )
    return Table("Causal gradient", note, header, rows)


def decode_derivatives(bandwidth: float) -> Table:
    """Derivatives of a decode call beside its forward and the floor."""
    case = DECODE[0]
    problem = Problem.of(case)

    def forward(lengths: Any) -> Attention:
        return lambda q, k, v: ragged_attention(q, k, v, lengths, softmax_scale=problem.scale).out

    functions: dict[str, Callable[..., Any]] = {
        "forward": lambda q, k, v, n: forward(n)(q, k, v),
        "query": lambda q, k, v, n: jax.vjp(lambda q: forward(n)(q, k, v), q)[1](q),
        "all three": lambda q, k, v, n: jax.vjp(forward(n), q, k, v)[1](q),
        "jvp": lambda q, k, v, n: jax.jvp(forward(n), (q, k, v), (q, v, k))[1],
    }
    times = {}
    for name, function in functions.items():
        program = jax.jit(function).lower(*problem.operands).compile()
        times[name] = in_a_row(program, problem.operands, 20)
    base = times.pop("forward")
    floor = (case.valid_bytes + case.cache_bytes) / bandwidth
    rows: list[tuple[str, ...]] = [
        ("forward", _us(base.kernels), _us(base.attention), _us(base.around), "", "", "")
    ]
    for name, t in times.items():
        # The programs of the derivatives run the forward too, for its results.
        alone = t.kernels - base.kernels
        unit, word = (floor, "floors") if name == "all three" else (base.kernels, "forwards")
        goal = DERIVATIVE_GOALS[name]
        kinds = (alone, t.attention - base.attention, t.around - base.around)
        multiple = f"{alone / unit:.2f}"
        rows.append(
            (name, *map(_us, kinds), multiple, f"{goal} {word}", _met(alone <= goal * unit))
        )
    note = (
        f"B{case.B} S{case.S} {case.Hq}/{case.Hkv}/{case.D} {case.windows}; kernels alone, in us, "
        'without those of the forward that the program runs before; "around" are XLA\'s kernels. '
        f"The floor of all three, {_us(floor)} us, reads the windows once and writes both "
        f"gradients of the cache whole, at {bandwidth / 1e12:.2f} TB/s."
    )
    header = ("derivative", "alone", "ours", "around", "multiple", "at most", "goal")
    return Table("Decode derivatives", note, header, rows)


TABLES: dict[str, Callable[[float], Table]] = {
    "decode": decode,
    "prefill": prefill,
    "gradients": gradients,
    "decode-derivatives": decode_derivatives,
}
