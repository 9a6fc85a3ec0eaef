"""Cases and peers on GPUs, and one command for every table of their documentation.

    export XLA_PYTHON_CLIENT_PREALLOCATE=false
    python -m benchmarks.gpu [TABLE ...] [--cases TEXT ...] [--save] [--plot]

prints all tables with their goals, or those that are named: decode, pages, quantised, prefill,
gradients, decode-derivatives. `--cases` leaves out cases whose names contain none of the texts.
`--save` writes the tables into docs/measurements/gpu.md, and `--plot` draws docs/gpu.png from the
tables of that page: alone it needs no GPU.

Times are of the device: a JAX function runs in a loop inside one jitted program, a torch function
in a CUDA graph. The loop's own operations and the gaps between kernels cost a JAX call 8 to 15 us
that a CUDA graph does not have: compare the kernels alone with it. Torch is given memory of its
own, hence the environment variable.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from benchmarks import gpu_page, gpu_peers
from benchmarks.gpu_causal import CAUSAL, gradients, prefill
from benchmarks.gpu_decode import DECODE, decode, derivatives
from benchmarks.gpu_forms import QUANTISED, pages, quantised
from benchmarks.gpu_peers import CALLS
from benchmarks.gpu_profile import least_seconds
from benchmarks.gpu_table import Table, name
from benchmarks.measure import Candidate, Case, Goal, Problem, versions

__all__ = ["CALLS", "CASES", "GOALS", "SWEEP", "peers", "read_bandwidth"]

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


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How a table is measured.

    Attributes:
      cases: all its cases.
      table: maps cases and the bandwidth of floors, in bytes a second, to the table.
    """

    cases: Sequence[Case]
    table: Callable[[Sequence[Case], float], Table]

    def named(self, texts: Sequence[str]) -> list[Case]:
        """The cases whose names contain one of the texts; without texts, all."""
        return [x for x in self.cases if not texts or any(text in name(x) for text in texts)]


TABLES = {
    "decode": Measurement(DECODE, decode),
    "pages": Measurement(DECODE, pages),
    "quantised": Measurement(QUANTISED, quantised),
    "prefill": Measurement(CAUSAL, prefill),
    "gradients": Measurement(CAUSAL, gradients),
    "decode-derivatives": Measurement(DECODE[:1], derivatives),
}
# Bytes read and written in a second, by device kind.
_COPIES = {"NVIDIA H200": 4.3e12, "NVIDIA H100 80GB HBM3": 3.0e12}


def read_bandwidth() -> tuple[str, float]:
    """The rate at which XLA sums an array much larger than caches."""
    x = jnp.ones(1 << 31, jnp.bfloat16)
    total = jax.jit(lambda x: x.astype(jnp.float32).sum())
    seconds = least_seconds(lambda: [total(x) for _ in range(10)], 10)
    return "a sum in XLA, the best of 5", x.nbytes / seconds


def _floor_bandwidth() -> tuple[str, float]:
    """The rate at which floors read and write: of a copy where it is known, else of reading."""
    rate = _COPIES.get(jax.devices()[0].device_kind)
    return read_bandwidth() if rate is None else ("a copy by torch within the memory", rate)


def peers(problem: Problem) -> dict[str, Candidate]:
    """jax.nn with cuDNN, and torch's where it is installed."""
    return {"jax.nn cudnn": gpu_peers.cudnn(problem)} | gpu_peers.torch_peers(problem)


def _print_tables(chosen: Mapping[str, Sequence[Case]], *, save: bool) -> None:
    """Measures and prints tables, each of the cases beside its name."""
    how, bandwidth = _floor_bandwidth()
    flashinfer = gpu_peers.flashinfer_version()
    peer = "" if flashinfer is None else f", FlashInfer {flashinfer}"
    floors = f"Floors are at {bandwidth / 1e12:.2f} TB/s, the rate of {how}."
    made_with = f"{versions()}{peer}; bfloat16. {floors}"
    print(made_with, flush=True)
    for title, cases in chosen.items():
        table = TABLES[title].table(cases, bandwidth)
        print(f"\n{gpu_page.text(table)}", flush=True)
        if save:
            gpu_page.save(table, made_with)


def main() -> None:
    """Reads the command line, measures, prints, and saves what is asked for."""
    parser = argparse.ArgumentParser(description="Tables of ragged attention on a GPU.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument(
        "--cases", nargs="+", default=(), metavar="TEXT", help='such as "B16 S8192"'
    )
    parser.add_argument("--save", action="store_true", help="write docs/measurements/gpu.md")
    parser.add_argument("--plot", action="store_true", help="draw docs/gpu.png from that page")
    args = parser.parse_args()
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    if args.cases and args.save:
        parser.error("--save writes whole tables: leave out --cases")
    if args.tables or args.cases or args.save or not args.plot:
        chosen = {title: TABLES[title].named(args.cases) for title in args.tables or TABLES}
        if not any(chosen.values()):
            parser.error(f"no case of these tables has {args.cases} in its name")
        _print_tables({title: x for title, x in chosen.items() if x}, save=args.save)
    if args.plot:
        gpu_page.plot()


if __name__ == "__main__":
    main()
