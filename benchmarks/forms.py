"""Forms of caches beside the dense one: pages, layouts, quantised values, and stacks of layers.

    python -m benchmarks.forms [--repeats N] [--scale N]

Prints the time of a call on each form of one cache, and its ratio to the call on the dense
cache; then the time of a decode step (new tokens written, and attention) over a stack of layers
carried through `lax.scan`, and its ratio to as many single calls, each on a cache of its own. All
is measured in turn in one process. A ratio is the median of the rounds' ratios, which a machine
that is busy with other work changes least; its quartiles stand beside it. The goals are limits to
ratios; the last table prints by how much they are met.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import (
    Candidate,
    Case,
    Problem,
    Run,
    compiled,
    print_table,
    samples_in_turn,
    versions,
)
from jax_ragged import quantize_cache, ragged_attention

CASE = Case("forms", B=8, S=4096, Hq=32, Hkv=8, D=128)
LAYERS = Case("layers", B=4, S=1024, Hq=16, Hkv=4, D=64)
PAGES = (16, 32, 64, 256)
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Goal:
    """That a run takes at most `most` times as long as another.

    Attributes:
      run: the name of the run.
      against: the name of the other.
      most: the limit of the ratio.
    """

    run: str
    against: str
    most: float


GOALS = (
    *(Goal(f"pages of {page}", DENSE, 1.15) for page in PAGES if page >= 32),
    Goal("int8", DENSE, 1.0),
    Goal("scan over 4 layers", "4 single calls", 1.2),
)


def paged(x: jax.Array, page: int, order: jax.Array) -> jax.Array:
    """The pool [P, T, ...] whose page order[i] holds the i-th page of x [B, S, ...]."""
    pages = x.reshape(-1, page, *x.shape[2:])
    return jnp.zeros_like(pages).at[order].set(pages)


def _form(
    problem: Problem, page: int | None = None, layout: str = "BSHD", dtype: str | None = None
) -> Candidate:
    """The call on one form of the problem's cache; pages are in random order."""
    cache = {"key": problem.key, "value": problem.value}
    arrays: dict[str, Any] = dict(cache)
    if dtype is not None:
        for name, x in cache.items():
            arrays[name], arrays[f"{name}_scale"] = quantize_cache(x, dtype)
    if page is not None:
        count = problem.case.B * problem.case.S // page
        order = jax.random.permutation(jax.random.key(1), count)
        arrays = {name: paged(x, page, order) for name, x in arrays.items()}
        arrays["page_table"] = order.reshape(problem.case.B, -1)
    if layout == "BHSD":
        cached = {n: x.swapaxes(1, 2) for n, x in arrays.items() if n != "page_table"}
        arrays |= cached

    def attend(query: Any, arrays: Any, lengths: Any) -> Any:
        keywords: dict[str, Any] = {"softmax_scale": problem.scale, "cache_layout": layout}
        return ragged_attention(query=query, lengths=lengths, **arrays, **keywords).out

    return compiled(attend, problem.query, arrays, problem.lengths)


def forms(problem: Problem) -> dict[str, Candidate]:
    """A run for each form."""
    return {
        DENSE: _form(problem),
        **{f"pages of {page}": _form(problem, page) for page in PAGES},
        "BHSD": _form(problem, layout="BHSD"),
        "BHSD, pages of 64": _form(problem, 64, "BHSD"),
        "int8": _form(problem, dtype="int8"),
        "float8_e4m3fn": _form(problem, dtype="float8_e4m3fn"),
        "float8_e5m2": _form(problem, dtype="float8_e5m2"),
        "int8, pages of 32": _form(problem, 32, dtype="int8"),
    }


# The largest error that quantised keys and values may make in an output of unit normal values:
# twice the largest that was measured, for short windows. Others are as exact as float32.
_ERRORS = {"int8": 0.03, "float8_e4m3fn": 0.15, "float8_e5m2": 0.3}


def check(candidates: Mapping[str, Candidate]) -> None:
    """Raises for an output that is not that of the dense cache."""
    for name, candidate in candidates.items():
        tol = next((t for dtype, t in _ERRORS.items() if name.startswith(dtype)), 1e-4)
        error = float(np.abs(candidate.out - candidates[DENSE].out).max())
        if not error <= tol:
            raise RuntimeError(f"{name} is off by {error:.2g}, more than {tol}.")


def _write(cache: Any, at: tuple[Any, ...], new: Any) -> Any:
    return tuple(x.at[at].set(new) for x in cache)


def _scan(case: Case, layers: int) -> Callable[..., Any]:
    """A decode step over a stack [L * B, S, Hkv, D], which it gets donated and returns."""

    def step(cache: Any, query: Any, lengths: Any) -> Any:
        row = jnp.arange(case.B)

        def layer(carry: Any, i: Any) -> Any:
            cache, x = carry
            pages = i * case.B + row
            cache = _write(cache, (pages, lengths - 1), x[:, : case.Hkv])
            key, value = cache
            x = ragged_attention(x, key, value, lengths, page_table=pages[:, None]).out
            return (cache, x), None

        return jax.lax.scan(layer, (cache, query), jnp.arange(layers))[0]

    return step


def _single(case: Case) -> Callable[..., Any]:
    """The same for one layer's cache."""

    def step(cache: Any, query: Any, lengths: Any) -> Any:
        cache = _write(cache, (jnp.arange(case.B), lengths - 1), query[:, : case.Hkv])
        key, value = cache
        return cache, ragged_attention(query, key, value, lengths).out

    return step


def stacks(case: Case, layers: int) -> dict[str, Run]:
    """A scan over layers, and as many single calls, which give the same output."""
    problem = Problem.of(case)
    query, lengths = problem.query, problem.lengths
    keys = jax.random.split(jax.random.key(2), layers)
    shape = problem.key.shape
    normal = jax.jit(lambda key: jax.random.normal(key, (2, *shape)) * case.D**-0.5)
    drawn = [normal(key) for key in keys]
    single = jax.jit(_single(case), donate_argnums=0)
    scan = jax.jit(_scan(case, layers), donate_argnums=0)
    # Each run replaces the caches that it was given: they are donated.
    apart = [(x[0].copy(), x[1].copy()) for x in drawn]
    stack = [tuple(jnp.concatenate([x[i] for x in drawn]) for i in (0, 1))]
    del drawn

    def single_calls() -> Any:
        x = query
        for i, cache in enumerate(apart):
            apart[i], x = single(cache, x, lengths)
        return x

    def scanned() -> Any:
        stack[0], x = scan(stack[0], query, lengths)
        return x

    np.testing.assert_allclose(scanned(), single_calls(), atol=1e-4)
    return {f"scan over {layers} layers": scanned, f"{layers} single calls": single_calls}


def _ratio(samples: Mapping[str, Sequence[float]], name: str, against: str) -> tuple[float, ...]:
    """The lower quartile, the median and the upper quartile of the rounds' ratios."""
    ratios = [x / y for x, y in zip(samples[name], samples[against], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def print_times(samples: Mapping[str, Sequence[float]], against: str) -> None:
    """Prints a table of times and of ratios to one of the runs."""
    rows = []
    for name, x in samples.items():
        low, middle, high = _ratio(samples, name, against)
        least = f"{min(x) * 1e3:.3f}"
        ratios = f"{middle:.2f}", f"{low:.2f} to {high:.2f}"
        rows.append((name, f"{statistics.median(x) * 1e3:.3f}", least, *ratios))
    print()
    print_table(("", "median ms", "least ms", f"times {against}", "quartiles"), rows)


def print_goals(samples: Mapping[str, Sequence[float]]) -> None:
    """Prints which goals are met, and by how much."""
    rows = []
    for goal in GOALS:
        _, ratio, _ = _ratio(samples, goal.run, goal.against)
        share = abs(1 - ratio / goal.most)
        met = f"{'met' if ratio <= goal.most else 'missed'} by {share:.0%}"
        rows.append((goal.run, goal.against, f"{goal.most:.2f}", f"{ratio:.2f}", met))
    print()
    print_table(("run", "against", "at most", "ratio", ""), rows)


def _smaller(case: Case, scale: int) -> Case:
    return dataclasses.replace(case, S=max(256, case.S // scale))


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15, help="rounds, 2 or more (15)")
    parser.add_argument("--scale", type=int, default=1, help="divides S, for a quick look (1)")
    args = parser.parse_args()
    if args.repeats < 2 or args.scale < 1:
        parser.error("--repeats must be 2 or more, and --scale 1 or more")
    print(versions())
    case, layered = (_smaller(x, args.scale) for x in (CASE, LAYERS))
    measure: Callable[..., dict[str, list[float]]]
    measure = functools.partial(samples_in_turn, repeats=args.repeats)
    candidates = forms(Problem.of(case))
    check(candidates)
    samples = measure({name: c.run for name, c in candidates.items()})
    print(f"\n{case}")
    print_times(samples, DENSE)
    for layers in (4, 32):
        of_layers = measure(stacks(layered, layers))
        print(f"\n{layered}, {layers} layers")
        print_times(of_layers, f"{layers} single calls")
        samples |= of_layers
    print_goals(samples)


if __name__ == "__main__":
    main()
