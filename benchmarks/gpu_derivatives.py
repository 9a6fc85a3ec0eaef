"""Derivatives on Hopper GPUs beside cuDNN's, and of decode in forwards, with the goals.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m benchmarks.gpu_derivatives

The first table has gradients of query, key and value under causal windows, forward included: time
of a call in a row of calls, TFLOP/s of the products that a backward with five of them makes, time
of the kernels alone, and bytes of temporaries. The second has decode, kernels alone, in multiples
of the forward or of the floor. The floor reads the windows' keys and values once, and writes both
gradients whole.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import read_bandwidth
from benchmarks.gpu_profile import kernel_times
from benchmarks.measure import Case, Problem, print_table, time_in_turn, versions
from jax_ragged import ragged_attention

# S queries a row, each with all positions up to its own.
CAUSAL = tuple(
    Case(name, B=B, S=S, Q=S, Hq=Hq, Hkv=Hkv, D=D, dtype="bfloat16", windows="full")
    for name, B, S, Hq, Hkv, D in (
        ("B4 T2048 32/8/128", 4, 2048, 32, 8, 128),
        ("B2 T4096 32/8/128", 2, 4096, 32, 8, 128),
        ("B1 T8192 32/8/128", 1, 8192, 32, 8, 128),
        ("B16 T512 32/8/128", 16, 512, 32, 8, 128),
        ("B4 T2048 16/16/64", 4, 2048, 16, 16, 64),
    )
)
DECODE = Case("decode", B=16, S=8192, Hq=32, Hkv=8, D=128, dtype="bfloat16")
# The share of cuDNN's speed, and the multiple of its temporaries, that causal gradients may have.
SPEED_GOAL, TEMPORARIES_GOAL = 0.9, 1.2
# Multiples of the forward ("all": of the floor) that decode's derivatives may take.
DECODE_GOALS = {"query": 2.2, "all": 1.3, "jvp": 2.5}

_COLUMNS = (
    *("causal", "ours ms (TFLOP/s)", "cuDNN", "speed", "kernels alone: ours", "cuDNN"),
    *("MB ours", "cuDNN", "goal"),
)

Attention = Callable[[Any, Any, Any], Any]


def _ours(problem: Problem) -> Attention:
    ends = jnp.broadcast_to(jnp.arange(1, problem.case.S + 1), problem.query.shape[:2])

    def attention(q: Any, k: Any, v: Any) -> Any:
        return ragged_attention(q, k, v, ends, softmax_scale=problem.scale).out

    return attention


def _cudnn(problem: Problem) -> Attention:
    return functools.partial(
        jax.nn.dot_product_attention,
        scale=problem.scale,
        is_causal=True,
        implementation="cudnn",
    )


def _gradient(attention: Attention, problem: Problem) -> Any:
    """The compiled gradient of all three operands, of a sum with random weights."""

    def gradient(q: Any, k: Any, v: Any, out_bar: Any) -> Any:
        return jax.vjp(attention, q, k, v)[1](out_bar)

    operands = problem.query, problem.key, problem.value
    return jax.jit(gradient).lower(*operands, problem.query).compile()


def _check(name: str, actual: Any, expected: Any) -> None:
    for got, want in zip(actual, expected, strict=True):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        error = float(np.abs(got - want).max() / np.abs(want).max())
        # Both round probabilities, sums and results to bfloat16.
        if not error <= 4 * 2.0**-8:
            raise RuntimeError(f"the gradients of {name} differ by {error:.2g}.")


def _causal(case: Case, repeats: int) -> tuple[str, ...]:
    problem = Problem.of(case)
    operands = (problem.query, problem.key, problem.value, problem.query)
    programs = {
        "ours": _gradient(_ours(problem), problem),
        "cudnn": _gradient(_cudnn(problem), problem),
    }
    _check(case.name, programs["ours"](*operands), programs["cudnn"](*operands))
    runs = {name: functools.partial(program, *operands) for name, program in programs.items()}
    times = {name: x.median for name, x in time_in_turn(runs, repeats, 0.05).items()}
    alone = {name: _alone(program, *operands) for name, program in programs.items()}
    # Two products forward and five backward, of half of all logits.
    flops = 7 * case.B * case.Hq * case.S * case.S * case.D
    temporaries = {
        name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()
    }
    speed = times["cudnn"] / times["ours"]
    met = speed >= SPEED_GOAL and temporaries["ours"] <= TEMPORARIES_GOAL * temporaries["cudnn"]
    return (
        case.name,
        *(f"{t * 1e3:.3f} ({flops / t / 1e12:.0f})" for t in times.values()),
        f"{speed:.2f}",
        *(f"{t * 1e3:.3f}" for t in alone.values()),
        *(f"{n / 1e6:.0f}" for n in temporaries.values()),
        "met" if met else "missed",
    )


def _alone(program: Any, *operands: Any, calls: int = 20) -> float:
    """Seconds of a call's kernels."""

    def run() -> Any:
        return [program(*operands) for _ in range(calls)][-1]

    jax.block_until_ready(run())
    return sum(kernel_times(run, calls=calls).values())


def _decode(case: Case) -> list[tuple[str, ...]]:
    problem = Problem.of(case)

    def forward(lengths: Any) -> Attention:
        return lambda q, k, v: ragged_attention(q, k, v, lengths, softmax_scale=problem.scale).out

    functions: dict[str, Callable[..., Any]] = {
        "forward": lambda q, k, v, n: forward(n)(q, k, v),
        "query": lambda q, k, v, n: jax.vjp(lambda q: forward(n)(q, k, v), q)[1](q),
        "all": lambda q, k, v, n: jax.vjp(forward(n), q, k, v)[1](q),
        "jvp": lambda q, k, v, n: jax.jvp(forward(n), (q, k, v), (q, v, k))[1],
    }
    times = {}
    for name, function in functions.items():
        program = jax.jit(function).lower(*problem.operands).compile()
        times[name] = _alone(program, *problem.operands)
    # The derivatives' programs run the forward too, for its results.
    alone = {name: t - times["forward"] for name, t in times.items() if name != "forward"}
    floor = (case.valid_bytes + case.cache_bytes) / read_bandwidth()[1]
    rows: list[tuple[str, ...]] = [("forward", f"{times['forward'] * 1e6:.1f}", "", "", "")]
    for name, t in alone.items():
        unit = floor if name == "all" else times["forward"]
        what = "floors" if name == "all" else "forwards"
        goal = DECODE_GOALS[name]
        met = "met" if t <= goal * unit else "missed"
        rows.append((name, f"{t * 1e6:.1f}", f"{t / unit:.2f} {what}", f"{goal}", met))
    return rows


def main() -> None:
    """Measures and prints both tables."""
    print(f"{versions()}; bfloat16\n")
    print_table(_COLUMNS, [_causal(case, 5) for case in CAUSAL])
    print(f"\n{DECODE}; kernels alone\n")
    print_table(("derivative", "us", "multiple", "goal", ""), _decode(DECODE))


if __name__ == "__main__":
    main()
