"""Decode attention beside its peers, on whatever accelerator is present.

    python -m benchmarks.decode [--cases NAME ...] [--repeats N] [--plot FILE.png]

Prints for each case the time of a call, the bytes of the windows read in a second, the share of
the machine's read bandwidth that this is, and how many times as long as ours a peer takes; then
the goals of the platform. All is measured in turn in one process. --plot measures and draws time
against the valid share of the cache, and against S at fixed valid tokens.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from benchmarks.measure import (
    OURS,
    Case,
    Platform,
    Problem,
    Times,
    check_outputs,
    jax_candidates,
    platform,
    print_table,
    time_in_turn,
    versions,
)
from benchmarks.sweeps import Sweep, draw, print_sweeps


def measure(
    module: Platform, case: Case, repeats: int
) -> tuple[dict[str, Times], dict[str, float]]:
    """The times of all implementations of a case, and the seconds that some took to compile."""
    problem = Problem.of(case)
    candidates = jax_candidates(problem, module.CALLS) | module.peers(problem)
    check_outputs(problem, candidates)
    runs = time_in_turn({name: c.run for name, c in candidates.items()}, repeats)
    times = {name: t.per(candidates[name].calls) for name, t in runs.items()}
    seconds = {n: c.compile_s for n, c in candidates.items() if c.compile_s is not None}
    return times, seconds


def print_case(
    case: Case, times: dict[str, Times], compile_s: dict[str, float], bandwidth: float
) -> None:
    """Prints one case's table."""
    rows = []
    for name, t in sorted(times.items(), key=lambda item: item[1].median):
        rate = case.valid_bytes / t.median
        rows.append(
            (
                name,
                f"{t.median * 1e3:.3f}",
                f"{t.least * 1e3:.3f}",
                f"{rate / 1e9:.4g}",
                f"{rate / bandwidth:.0%}",
                f"{t.median / times[OURS].median:.2f}",
                f"{compile_s[name]:.1f}" if name in compile_s else "",
            )
        )
    print(f"\n{case}\n")
    print_table(
        ("", "median ms", "least ms", "valid GB/s", "of machine", "times ours", "compile s"), rows
    )


def print_goals(module: Platform, measured: dict[str, dict[str, Times]]) -> None:
    """Prints which of the platform's goals the measured cases meet."""
    rows = []
    for goal in module.GOALS:
        if goal.case not in measured or (
            goal.against in {c.name for c in module.CASES} and goal.against not in measured
        ):
            continue
        times = measured[goal.case]
        others = {name: t for name, t in times.items() if not name.startswith(OURS)}
        if goal.against == "TB/s":
            case = next(c for c in module.CASES if c.name == goal.case)
            against = Times(*2 * (case.valid_bytes / 1e12,))
        elif goal.against == "best":
            against = min(others.values(), key=lambda t: t.median)
        elif goal.against in measured:
            against = measured[goal.against][OURS]
        elif goal.against in others:
            against = others[goal.against]
        else:
            continue
        ratio = against.median / times[OURS].median
        met = "yes" if ratio >= goal.factor else "no"
        rows.append((goal.case, goal.against, f"{goal.factor:.2f}", f"{ratio:.2f}", met))
    if rows:
        print()
        print_table(("case", "against", "goal", "times as fast", "met"), rows)


def sweeps(case: Case) -> tuple[list[Case], list[Case]]:
    """Cases of growing valid share at one S, and of growing S with the same valid tokens."""
    shares = [
        dataclasses.replace(case, name=f"{share}", valid=share)
        for share in (1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
    ]
    tokens = case.S // 16
    lengths = [
        dataclasses.replace(case, name=f"{S}", S=S, valid=tokens / S)
        for S in (tokens, 2 * tokens, 4 * tokens, 8 * tokens, 16 * tokens)
    ]
    return shares, lengths


def plot(module: Platform, file: str, repeats: int) -> None:
    """Measures the two sweeps, prints their tables, and saves their picture."""
    case = module.SWEEP

    def sweep(label: str, x: Sequence[float], cases: Sequence[Case]) -> Sweep:
        times = [measure(module, case, repeats)[0] for case in cases]
        ms = {name: tuple(t[name].median * 1e3 for t in times) for name in times[0]}
        return Sweep(label, tuple(x), ms)

    shares, lengths = sweeps(case)
    measured = (
        sweep(f"valid share of S = {case.S}", [c.valid or 0.0 for c in shares], shares),
        sweep(f"S, with {case.S // 16} valid tokens a row", [c.S for c in lengths], lengths),
    )
    title = f"B{case.B} Hq{case.Hq} Hkv{case.Hkv} D{case.D} {case.dtype}; {versions()}"
    print_sweeps(title, measured)
    draw(title, measured, file)


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    name, module = platform()
    names = [case.name for case in module.CASES]
    parser.add_argument("--cases", nargs="*", choices=names, default=names, help="all by default")
    parser.add_argument("--repeats", type=int, default=15, help="samples of each (15)")
    parser.add_argument("--block-size", type=int, help="of ours; left out, the default")
    parser.add_argument("--plot", metavar="FILE.png", help="draw two sweeps besides")
    args = parser.parse_args()
    how, bandwidth = module.read_bandwidth()
    print(f"{versions()}; {name} reads {bandwidth / 1e9:.4g} GB/s ({how})")
    measured = {}
    for case in module.CASES:
        if case.name in args.cases:
            case = dataclasses.replace(case, block_size=args.block_size)
            measured[case.name], compile_s = measure(module, case, args.repeats)
            print_case(case, measured[case.name], compile_s, bandwidth)
    print_goals(module, measured)
    if args.plot:
        plot(module, args.plot, args.repeats)


if __name__ == "__main__":
    main()
