"""The cost of derivatives, in forwards: ragged attention, and the dense reference by autodiff.

    python -m benchmarks.derivatives [--repeats N] [--scale N]

Prints, for the same valid tokens in caches of growing S, the time of the forward, of forward mode
(results and tangents, for tangents of query, key and value) and of reverse mode (results and
gradients), each also as a multiple of the forward, measured in turn in one process. "query" is
reverse mode for query alone, for which nothing of the size of the cache is written. "zeros" is a
program that only writes the zeros of two arrays of the size of key and value, as every gradient
of them must: a floor of reverse mode, and "above it" what is left, in forwards.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import (
    Case,
    Problem,
    compiled,
    platform,
    print_table,
    time_in_turn,
    versions,
)
from jax_ragged import ragged_attention, reference_ragged_attention

_COLUMNS = ("forward", "forward mode", "reverse mode", "query")


def _functions(attention: Callable[..., Any], scale: float) -> dict[str, Callable[..., Any]]:
    def forward(lengths: Any, *qkv: Any) -> Any:
        return attention(*qkv, lengths, softmax_scale=scale).out

    def forward_mode(lengths: Any, *qkv: Any) -> Any:
        return jax.jvp(lambda *x: forward(lengths, *x), qkv, qkv)

    def reverse_mode(lengths: Any, *qkv: Any) -> Any:
        out, pull = jax.vjp(lambda *x: forward(lengths, *x), *qkv)
        return out, pull(out)

    def query(lengths: Any, q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(lambda q: forward(lengths, q, k, v), q)
        return out, pull(out)

    return dict(zip(_COLUMNS, (forward, forward_mode, reverse_mode, query), strict=True))


def _zeros(zero: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Of two signs: XLA would make one constant and copy it.
    return jnp.full(key.shape, zero), jnp.full(value.shape, -zero)


def _measure(case: Case, repeats: int) -> list[tuple[str, ...]]:
    problem = Problem.of(case)
    operands = (problem.lengths, problem.query, problem.key, problem.value)
    implementations = {"jax_ragged": ragged_attention, "dense": reference_ragged_attention}
    runs = {
        f"{name}/{column}": compiled(function, *operands).run
        for name, attention in implementations.items()
        for column, function in _functions(attention, problem.scale).items()
    }
    zero = jnp.zeros((), case.dtype)
    runs["zeros"] = compiled(_zeros, zero, problem.key, problem.value).run
    times = time_in_turn(runs, repeats)
    zeros = times["zeros"].median * 1e3
    rows = []
    for name in implementations:
        ms = [times[f"{name}/{column}"].median * 1e3 for column in _COLUMNS]
        ratios = [f"{t:.2f} ({t / ms[0]:.2f})" for t in ms[1:]]
        above = (ms[_COLUMNS.index("reverse mode")] - zeros) / ms[0]
        rows.append((str(case.S), name, f"{ms[0]:.2f}", *ratios, f"{zeros:.2f}", f"{above:.2f}"))
    return rows


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9, help="samples of each (9)")
    parser.add_argument("--scale", type=int, default=1, help="divides S and the valid tokens (1)")
    args = parser.parse_args()
    _, module = platform()
    base = module.SWEEP
    tokens = base.S // 4 // args.scale
    rows = []
    for factor in (1, 2, 4):
        S = factor * tokens
        case = dataclasses.replace(base, name=f"S{S}", S=S, valid=1 / factor)
        rows += _measure(case, args.repeats)
    print(
        f"{versions()}; B{base.B} Hq{base.Hq} Hkv{base.Hkv} D{base.D} {base.dtype}, "
        f"{tokens} valid tokens a row; ms (times the forward)\n"
    )
    print_table(("S", "", *_COLUMNS, "zeros", "above it"), rows)


if __name__ == "__main__":
    main()
