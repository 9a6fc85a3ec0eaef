"""Cases, their operands, timing in turn, and tables, for all benchmarks."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jax_ragged import ragged_attention, reference_ragged_attention

Run = Callable[[], Any]
OURS = "jax_ragged"


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: sizes, windows and dtype; Dv is D and the scale is D ** -0.5.

    Attributes:
      windows: "full", "uniform" (lengths uniform over 1 to S), "eighth" (over 1 to S / 8) or
        "short" (over 1 to S / 16).
      valid: the share of S that every row's window has, in place of `windows`.
      Q: queries of a row that share its window, or None for a query without that axis.
      block_size: of ours.
    """

    name: str
    B: int
    S: int
    Hq: int
    Hkv: int
    D: int
    dtype: str = "float32"
    windows: str = "uniform"
    valid: float | None = None
    Q: int | None = None
    block_size: int | None = None

    def lengths(self) -> npt.NDArray[np.int32]:
        """The windows' ends [B], the same in every run."""
        if self.valid is not None:
            return np.full(self.B, max(1, round(self.S * self.valid)), np.int32)
        if self.windows == "full":
            return np.full(self.B, self.S, np.int32)
        most = {"uniform": self.S, "eighth": self.S // 8, "short": self.S // 16}[self.windows]
        return np.random.default_rng(0).integers(1, most + 1, self.B).astype(np.int32)

    @property
    def valid_bytes(self) -> int:
        """The bytes of the cache that must be read at least once."""
        token = 2 * self.Hkv * self.D * jnp.dtype(self.dtype).itemsize
        return int(self.lengths().sum()) * token

    @property
    def cache_bytes(self) -> int:
        """The bytes of the cache."""
        return 2 * self.B * self.S * self.Hkv * self.D * jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        queries = "" if self.Q is None else f" Q{self.Q}"
        windows = self.windows if self.valid is None else f"{self.valid:.2g} valid"
        return (
            f"{self.name}: B{self.B}{queries} S{self.S} Hq{self.Hq} Hkv{self.Hkv} D{self.D} "
            f"{self.dtype}, {windows} ({self.valid_bytes / 1e6:.3g} of "
            f"{self.cache_bytes / 1e6:.3g} MB valid)"
        )


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case and its operands on the default device."""

    case: Case
    query: jax.Array
    key: jax.Array
    value: jax.Array
    lengths: jax.Array

    @classmethod
    def of(cls, case: Case) -> "Problem":
        """Normal operands, drawn on the device."""
        rows = (case.B,) if case.Q is None else (case.B, case.Q)
        keys = jax.random.split(jax.random.key(0), 3)
        cache = (case.B, case.S, case.Hkv, case.D)
        shapes = ((*rows, case.Hq, case.D), cache, cache)
        normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
        query, key, value = (normal(k, s, case.dtype) for k, s in zip(keys, shapes, strict=True))
        return cls(case, query, key, value, jnp.asarray(case.lengths()))

    @property
    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Those of ragged_attention."""
        return self.query, self.key, self.value, self.lengths

    @property
    def scale(self) -> float:
        """The factor of the logits."""
        return float(self.case.D**-0.5)


@dataclasses.dataclass
class Candidate:
    """One implementation, ready to run.

    Attributes:
      run: computes and waits, or enqueues and returns jax arrays to wait for.
      out: its output [B, (Q,) Hq, D], to be compared.
      compile_s: seconds to trace and compile, where it is compiled.
      calls: that one run makes.
    """

    run: Run
    out: npt.NDArray[Any]
    compile_s: float | None = None
    calls: int = 1


def compiled(function: Callable[..., Any], *operands: Any, calls: int = 1) -> Candidate:
    """A JAX function of the operands whose first result, or only one, is the output.

    With several calls, one compiled loop makes them, so that launching costs nothing. The last
    operand, the lengths, takes a 0 from each output that the compiler does not know to be one:
    a call is as dear as the first, and none goes.
    """

    def loop(*operands: Any) -> Any:
        def call(_: Any, lengths: Any) -> Any:
            out = jax.tree.leaves(function(*operands[:-1], lengths))[0]
            return lengths + (out.ravel()[0] > 1e30).astype(lengths.dtype)

        # Not unrolled: XLA would compute the common parts of several calls once.
        return jax.lax.fori_loop(0, calls, call, operands[-1])

    start = time.perf_counter()
    program = jax.jit(function).lower(*operands).compile()
    seconds = time.perf_counter() - start
    out = np.asarray(jax.tree.leaves(program(*operands))[0], np.float32)
    if calls > 1:
        program = jax.jit(loop).lower(*operands).compile()
    return Candidate(lambda: program(*operands), out, seconds, calls)


def ours(problem: Problem, calls: int = 1) -> Candidate:
    """ragged_attention, where the operands are: on one device, or partitioned as they are."""

    def attention(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        block_size, scale = problem.case.block_size, problem.scale
        return ragged_attention(q, k, v, lengths, softmax_scale=scale, block_size=block_size).out

    return compiled(attention, *problem.operands, calls=calls)


def jax_candidates(problem: Problem, calls: int = 1) -> dict[str, Candidate]:
    """Ours, the dense reference and jax.nn.dot_product_attention, which every platform has."""

    def dense(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        return reference_ragged_attention(q, k, v, lengths, softmax_scale=problem.scale).out

    def jax_nn(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        q4 = q[:, None] if problem.case.Q is None else q
        out = jax.nn.dot_product_attention(
            q4, k, v, scale=problem.scale, key_value_seq_lengths=lengths
        )
        return out.reshape(q.shape)

    functions = {"dense reference": dense, "jax.nn": jax_nn}
    peers = {name: compiled(f, *problem.operands, calls=calls) for name, f in functions.items()}
    return {OURS: ours(problem, calls)} | peers


class Platform(Protocol):
    """The contents of benchmarks/<platform>.py.

    Attributes:
      CASES: in the order in which they are measured.
      GOALS: the goals that the table is measured against.
      SWEEP: the case from which the plots start.
      CALLS: of a JAX function in one compiled loop.
    """

    CASES: tuple[Case, ...]
    GOALS: "tuple[Goal, ...]"
    SWEEP: Case
    CALLS: int

    def peers(self, problem: Problem) -> dict[str, Candidate]:
        """Implementations beside the `jax_candidates`, by name."""
        ...

    def read_bandwidth(self) -> tuple[str, float]:
        """How the machine's read bandwidth was measured, and bytes a second."""
        ...


@dataclasses.dataclass(frozen=True)
class Goal:
    """That ours on `case` is `factor` times as fast as `against`.

    `against` is an implementation, "best" for the fastest other than ours, the name of
    another case for ours on that one, or "TB/s" for a rate of valid bytes.
    """

    case: str
    against: str
    factor: float


def platform() -> tuple[str, Platform]:
    """The module of the default device's platform."""
    name = jax.default_backend()
    module: Any = importlib.import_module(f"benchmarks.{name}")
    return name, module


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a call: the median and the least of the samples."""

    median: float
    least: float

    def per(self, calls: int) -> "Times":
        """Where each run made several calls."""
        return Times(self.median / calls, self.least / calls)


def _sample(run: Run, calls: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready([run() for _ in range(calls)][-1:])
    return (time.perf_counter() - start) / calls


def samples_in_turn(
    runs: Mapping[str, Run], repeats: int, sample_s: float = 0.005
) -> dict[str, list[float]]:
    """Seconds of a call of every run, once a round: what disturbs the machine disturbs all alike.

    A sample is as many calls as take about `sample_s`, enqueued one after another: what a call
    costs in a loop. One more call goes before each, so that caches are as they leave them.
    """
    calls = {}
    for name, run in runs.items():
        _sample(run, 1)
        calls[name] = max(1, min(100, round(sample_s / max(_sample(run, 1), 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            _sample(run, 1)
            samples[name].append(_sample(run, calls[name]))
    return samples


def time_in_turn(
    runs: Mapping[str, Run], repeats: int, sample_s: float = 0.005
) -> dict[str, Times]:
    """The median and the least of the samples of `samples_in_turn`."""
    samples = samples_in_turn(runs, repeats, sample_s)
    return {name: Times(statistics.median(x), min(x)) for name, x in samples.items()}


def check_outputs(problem: Problem, candidates: Mapping[str, Candidate]) -> None:
    """Raises if an output differs from the dense reference by more than its dtype's rounding."""
    expected = candidates["dense reference"].out
    tol = {"float32": 1e-4, "float64": 1e-4, "bfloat16": 4e-2, "float16": 5e-3}[problem.case.dtype]
    for name, candidate in candidates.items():
        error = float(np.abs(candidate.out.reshape(expected.shape) - expected).max())
        if not error <= tol:
            raise RuntimeError(f"{name} is wrong on {problem.case}: off by {error:.2g}.")


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            (cells[i].ljust if i == 0 else cells[i].rjust)(widths[i]) for i in range(len(widths))
        )
        return "| " + " | ".join((first, *rest)) + " |"

    return [line(header), line(["-" * w for w in widths]), *map(line, rows)]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table."""
    print("\n".join(table_lines(header, rows)), flush=True)


def versions() -> str:
    """The versions and the machine of a table."""
    device = jax.devices()[0]
    torch = importlib.util.find_spec("torch")
    parts = [f"jax {jax.__version__}", f"{jax.device_count()} x {device.device_kind}"]
    if torch is not None:
        parts.append(f"torch {importlib.metadata.version('torch')}")
    return ", ".join(parts)
