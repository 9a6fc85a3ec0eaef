"""Tables of causal attention on a GPU, S queries a row: the forward, and the gradient."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpu_peers
from benchmarks.gpu_profile import in_a_row, in_loop
from benchmarks.gpu_table import Row, Table, check_close, met, name, shown, us
from benchmarks.measure import Case, Problem
from jax_ragged import ragged_attention

# S queries a row, each with all positions up to its own.
CAUSAL = tuple(
    Case("", B=B, S=S, Q=S, Hq=Hq, Hkv=Hkv, D=D, dtype="bfloat16", windows="full")
    for B, S, Hq, Hkv, D in (
        (4, 2048, 32, 8, 128),
        (2, 4096, 32, 8, 128),
        (1, 8192, 32, 8, 128),
        (16, 512, 32, 8, 128),
        (4, 2048, 16, 16, 64),
    )
)
# Of cuDNN's speed: the causal forward, and the causal gradient with a multiple of the temporaries.
FORWARD_GOAL, GRADIENT_GOAL, TEMPORARIES_GOAL = 1.0, 0.9, 1.2

Attention = Callable[[Any, Any, Any], Any]


def _calls(problem: Problem) -> dict[str, Attention]:
    """Causal attention by ours and by cuDNN."""
    ends = jnp.broadcast_to(jnp.arange(1, problem.case.S + 1), problem.query.shape[:2])

    def ours(q: Any, k: Any, v: Any) -> Any:
        return ragged_attention(q, k, v, ends, softmax_scale=problem.scale).out

    return {
        "ours": ours,
        "cuDNN": functools.partial(gpu_peers.cudnn_causal, scale=problem.scale),
    }


def _product(case: Case) -> float:
    """Floating-point operations of one product of the logits' size, below the diagonal."""
    return 1.0 * case.B * case.Hq * case.S**2 * case.D


def prefill(cases: Sequence[Case], bandwidth: float) -> Table:
    """The causal forward beside cuDNN."""
    del bandwidth
    note = "Times in us. The goal is cuDNN's speed, alone and in a loop of 10 calls."
    header = (
        *("case", "ours alone", "TFLOP/s", "ours loop", "cuDNN alone", "cuDNN TFLOP/s"),
        *("cuDNN loop", "speed alone", "speed in the loop", "goal"),
    )
    return Table("Causal forward", note, header, shown(_prefill(case) for case in cases))


def _prefill(case: Case) -> Row:
    problem = Problem.of(case)
    calls = _calls(problem)
    q, k, v, _ = problem.operands
    # Both round probabilities and results to bfloat16.
    got, want = (jax.jit(call)(q, k, v) for call in calls.values())
    check_close(case, got, want, 4 * 2.0**-8)
    times = {
        label: in_loop(lambda k, v, q, call=call: call(q, k, v), (k, v, q), 10)
        for label, call in calls.items()
    }
    cells = [
        cell
        for t in times.values()
        for cell in (
            *(us(t.attention), f"{2 * _product(case) / t.attention / 1e12:.0f}"),
            us(t.call),
        )
    ]
    alone = times["cuDNN"].attention / times["ours"].attention
    loop = times["cuDNN"].call / times["ours"].call
    goal = met(min(alone, loop) >= FORWARD_GOAL)
    return name(case), *cells, f"{alone:.2f}", f"{loop:.2f}", goal


def _temporaries(program: Any) -> int:
    """The bytes that a compiled program allocates beside its arguments and results."""
    return int(program.memory_analysis().temp_size_in_bytes)


def gradients(cases: Sequence[Case], bandwidth: float) -> Table:
    """The causal gradient of all three operands, forward included, beside cuDNN."""
    del bandwidth
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
    return Table("Causal gradient", note, header, shown(_gradient(case) for case in cases))


def _gradient(case: Case) -> Row:
    problem = Problem.of(case)
    operands = (*problem.operands[:3], problem.query)

    def gradient(call: Attention, *operands: Any) -> Any:
        *primals, out_bar = operands
        return jax.vjp(call, *primals)[1](out_bar)

    programs = {
        label: jax.jit(functools.partial(gradient, call)).lower(*operands).compile()
        for label, call in _calls(problem).items()
    }
    for got, want in zip(*(p(*operands) for p in programs.values()), strict=True):
        # Both round probabilities, sums and results to bfloat16.
        check_close(case, got, want, 4 * 2.0**-8)
    times = {label: in_a_row(program, operands, 20) for label, program in programs.items()}
    # Two products forward and five backward.
    work = 7 * _product(case)
    sizes = {label: _temporaries(program) for label, program in programs.items()}
    speed = times["cuDNN"].call / times["ours"].call
    memory = sizes["ours"] / sizes["cuDNN"]
    cells = [
        cell
        for t in times.values()
        for cell in (us(t.kernels), us(t.call), f"{work / t.call / 1e12:.0f}")
    ]
    goal = met(speed >= GRADIENT_GOAL and memory <= TEMPORARIES_GOAL)
    return name(case), *cells, f"{speed:.2f}", *(f"{n / 1e6:.0f} MB" for n in sizes.values()), goal
