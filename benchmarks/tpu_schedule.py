"""The TPU kernels by the schedules of the real compiler, without a TPU.

    python -m benchmarks.tpu_schedule [--generations=v5e,7x] [--forms] [--save]

libtpu compiles each case for each generation and writes its VLIW code. One bundle issues in a
cycle, so the bundles of a grid step that lies in a window are the cycles of its compute; what the
DMA of the step's block takes follows from the generation's bandwidth and clock. A kernel is bound
by memory where the first are fewer.

Assumptions: bandwidths are those that jax publishes for a core, clocks are estimates from
published peak rates; no cycle is lost to memory banks, to the issue of DMAs or to waiting within
a step; DMA reaches the published bandwidth. The fraction of bandwidth is then
min(1, DMA cycles / bundles) for long windows. The first and the last block of a window run the
masked code, whose bundles are not in the figure.

The derivatives are those of the output: tangents for tangents of query, keys and values, whose
steps read the tangents of the cache too; cotangents of the query alone; and those of all three,
whose steps write what they read.

With --forms, the forward of caches in other forms than [B, S, Hkv, D]. The last column is the time
of a step, the larger of bundles and DMA cycles, over the DMA cycles of its positions in bfloat16.
The bytes of scales are in none of the figures.
"""

import dataclasses
import importlib.metadata
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    SingleDeviceSharding,
    use_abstract_mesh,
)

from benchmarks.tpu_cases import FORMS, SCHEDULED, TOPOLOGIES, Scheduled
from jax_ragged import ragged_attention
from jax_ragged.lowering.contract import Operands
from jax_ragged.lowering.tpu.chips import MIB, chip_of
from jax_ragged.lowering.tpu.choice import Sizes, choose, readings
from jax_ragged.lowering.tpu.cost import Work
from jax_ragged.lowering.tpu.cotangents import vjp_work
from jax_ragged.lowering.tpu.forward import forward_choice
from jax_ragged.lowering.tpu.tangents import jvp_work

DUMP = tempfile.TemporaryDirectory(prefix="tpu_schedule_")
B, S = 8, 4096
DTYPE = jnp.bfloat16
GOAL = 0.8

_GENERATIONS = flags.DEFINE_list("generations", list(TOPOLOGIES), "which to compile for")
_PEERS = flags.DEFINE_bool("peers", True, "whether to compile jax's own kernels too")
_FORMS = flags.DEFINE_bool("forms", False, "compile the forms of caches, and nothing else")
_SAVE = flags.DEFINE_bool(
    "save", False, "write tpu_schedule.md and .png into docs/measurements, or tpu_forms.md"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What is printed of one case on one generation; None is not applicable."""

    generation: str
    kernel: str
    case: str
    temp: int
    copies: int
    block: float | None
    bundles: int
    dma: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.dma is None else self.bundles / self.dma

    def cells(self) -> tuple[str, ...]:
        ratio = self.ratio
        return (
            self.generation,
            self.kernel,
            self.case,
            f"{self.temp}",
            f"{self.copies}",
            "-" if self.block is None else f"{self.block:g}",
            f"{self.bundles}",
            "-" if self.dma is None else f"{self.dma:.0f}",
            "-" if ratio is None else f"{ratio:.2f}",
            "-" if ratio is None else f"{min(1.0, 1 / ratio):.2f}",
        )


HEADER = (
    "chip",
    "kernel",
    "Hq/Hkv/D",
    "temp bytes",
    "cache copies",
    "MiB a step",
    "bundles",
    "DMA cycles",
    "ratio",
    "of bandwidth",
)

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:LB|PB|PF|LH|LE|CT)?\s*:\s*(>*)", re.MULTILINE)
_MOVES = re.compile(r"= \(?\w+\[([\d,]+)\].*? (copy|copy-start|transpose|convert|fusion|pad)\(")


@dataclasses.dataclass(frozen=True)
class _Region:
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin + 1


class Schedule:
    """The bundles of a kernel: their loop depth, text, and the regions that a branch can skip."""

    def __init__(self, text: str) -> None:
        marks = list(_BUNDLE.finditer(text))
        ends = [m.start() for m in marks[1:]] + [len(text)]
        self.depth = [len(m[2]) for m in marks]
        self.text = [text[m.end() : end] for m, end in zip(marks, ends, strict=True)]
        self.regions = list(self._regions())

    def _regions(self) -> Iterator[_Region]:
        begun: dict[str, int] = {}
        for i, body in enumerate(self.text):
            for what, name in re.findall(r"(Start|End) region (\d+)", body):
                if what == "Start":
                    begun[name] = i
                elif name in begun:
                    yield _Region(begun[name], i)

    def _has(self, region: _Region, test: Callable[[int], bool]) -> bool:
        return any(test(i) for i in range(region.begin, region.end + 1))

    def steady_step(self) -> int:
        """The bundles of a grid step in the middle of a row.

        The loop over the grid, without what such a step skips: the masked block with its loop
        over chunks; and what only stores, beside the unmasked block: the reset of a new row, the
        zeros of a block outside of the windows, the results at the end of a row.
        """
        grid = [i for i, depth in enumerate(self.depth) if depth >= 1]
        inside = [r for r in self.regions if grid[0] < r.begin and r.end < grid[-1]]
        looping = [r for r in inside if self._has(r, lambda i: self.depth[i] > 1)]
        flat = [r for r in inside if r not in looping]
        unmasked = max(flat, key=lambda r: r.size)
        masked = max((r for r in looping if r.begin > unmasked.end), key=lambda r: r.size)
        skipped = masked.size
        end = -1
        for r in sorted(flat, key=lambda r: (r.begin, -r.end)):
            nested = r.begin <= end or masked.begin <= r.begin <= masked.end
            if r != unmasked and not nested and self._stores_only(r):
                skipped += r.size
                end = r.end
        return len(grid) - skipped

    def _stores_only(self, region: _Region) -> bool:
        stores = self._has(region, lambda i: " vst" in self.text[i])
        dma = self._has(region, lambda i: "dma." in self.text[i])
        return stores and not dma


def _clear_dump() -> None:
    for path in Path(DUMP.name).iterdir():
        path.unlink()


def _kernel_text(name: str) -> str:
    paths = [p for p in Path(DUMP.name).glob(f"*{name}*final_bundles.txt") if "sched" not in p.name]
    return max(paths, key=lambda p: p.stat().st_mtime).read_text()


def _size(shape: str) -> int:
    size = 1
    for n in shape.split(","):
        size *= int(n)
    return size


def _copies(program: Any, elements: int) -> int:
    found = (_MOVES.search(line) for line in program.as_text().splitlines())
    return sum(1 for match in found if match and _size(match[1]) >= elements)


def _half_of(operands: Operands) -> int:
    """Half the elements of the smallest of the arrays that are as long as the cache."""
    cache = (x for x in (*operands[1:3], operands.key_scale) if x is not None)
    return min(math.prod(x.shape) for x in cache) // 2


def _compile(generation: str, call: Callable[..., Any], *arrays: Any) -> tuple[Any, Any]:
    """The device of a generation, and the program compiled for it."""
    device: Any = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[generation]
    ).devices[0]
    sharding = SingleDeviceSharding(device)
    _clear_dump()
    arrays = jax.tree.map(lambda x: x.update(sharding=sharding), arrays)
    # jax's kernels ask what device they are traced for.
    kind = AbstractDevice(
        platform="tpu", device_kind=device.device_kind, num_cores=chip_of(device.device_kind).cores
    )
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        lowered = jax.jit(call).lower(*arrays)
    return device, lowered.compile()


def ours(generation: str, case: Scheduled) -> Row:
    """The kernel with its default block size."""
    operands = case.operands(B, S)
    device, program = _compile(generation, case.call, operands)
    chip = chip_of(device.device_kind)
    chosen = forward_choice(operands, case.params(operands), chip)
    mib = chosen.work.moved_bytes(chosen.blocks.T) / MIB
    return Row(
        generation,
        "ours",
        str(case),
        program.memory_analysis().temp_size_in_bytes,
        _copies(program, _half_of(operands)),
        mib,
        Schedule(_kernel_text("ragged_attention_[gm]")).steady_step(),
        mib * chip.dma_cycles,
    )


def _jvp(operands: Any, windows: Any, moving: Any) -> Any:
    def out(*operands: jax.Array) -> jax.Array:
        return ragged_attention(*operands, *windows, implementation="kernel").out

    return jax.jvp(out, operands, moving)[1]


def _vjp(operands: Any, windows: Any, moving: Any) -> Any:
    def out(*operands: jax.Array) -> jax.Array:
        return ragged_attention(*operands, *windows, implementation="kernel").out

    return jax.vjp(out, *operands)[1](moving[0])


def _vjp_of_query(operands: Any, windows: Any, moving: Any) -> Any:
    query, *cache = operands

    def out(query: jax.Array) -> jax.Array:
        return ragged_attention(query, *cache, *windows, implementation="kernel").out

    return jax.vjp(out, query)[1](moving[0])


ALL = (True, True, True)
DERIVATIVES: dict[str, tuple[Callable[..., Any], Callable[[Sizes], Work]]] = {
    "jvp": (_jvp, lambda x: jvp_work(x, ALL)),
    "vjp of query": (_vjp_of_query, lambda x: vjp_work(x, (True, False, False))),
    "vjp": (_vjp, lambda x: vjp_work(x, ALL)),
}


def derivative(generation: str, case: Scheduled, name: str) -> Row:
    """The kernel of a derivative with its default block size; its DMA reads and writes."""
    function, work_of = DERIVATIVES[name]

    def call(operands: Operands, moving: Any) -> Any:
        return function(operands[:3], operands[3:5], moving)

    operands = case.operands(B, S)
    device, program = _compile(generation, call, operands, operands[:3])
    chip, params = chip_of(device.device_kind), case.params(operands)
    chosen = choose(readings(operands, params), work_of, chip, params)
    mib = chosen.work.moved_bytes(chosen.blocks.T) / MIB
    return Row(
        generation,
        name,
        str(case),
        program.memory_analysis().temp_size_in_bytes,
        _copies(program, _half_of(operands)),
        mib,
        Schedule(_kernel_text(f"ragged_attention_{name[:3]}")).steady_step(),
        mib * chip.dma_cycles,
    )


def paged_attention(generation: str, case: Scheduled) -> Row:
    """jax's paged attention: its cache is head-major pages, its bundles the whole kernel's."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as peer

    page = 64
    pages = (case.Hkv, B * S // page, page, case.D)

    def call(q: Any, k: Any, v: Any, lengths: Any, indices: Any) -> Any:
        return peer(q, k, v, lengths, indices, pages_per_compute_block=8)

    shapes = (
        ((B, case.Hq, case.D), DTYPE),
        (pages, DTYPE),
        (pages, DTYPE),
        ((B,), jnp.int32),
        ((B, S // page), jnp.int32),
    )
    return _peer("paged_attention", generation, case, call, *shapes)


def ragged_paged_attention(generation: str, case: Scheduled) -> Row:
    """jax's ragged paged attention: keys and values interleaved in pages."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
        ragged_paged_attention as peer,
    )

    page = 64

    def call(*operands: Any) -> Any:
        return peer(*operands, num_kv_pages_per_block=8, num_queries_per_block=8)

    shapes = (
        ((B, case.Hq, case.D), DTYPE),
        ((B * S // page, page, 2 * case.Hkv, case.D), DTYPE),
        ((B,), jnp.int32),
        ((B, S // page), jnp.int32),
        ((B + 1,), jnp.int32),
        ((1,), jnp.int32),
    )
    return _peer("ragged_paged_attention", generation, case, call, *shapes)


def _peer(name: str, generation: str, case: Scheduled, call: Any, *shapes: Any) -> Row:
    arrays = [jax.ShapeDtypeStruct(*x) for x in shapes]
    _, program = _compile(generation, call, *arrays)
    paths = Path(DUMP.name).glob("*schedule-analysis_final_bundles.txt")
    totals = [
        int(match[1])
        for path in paths
        for text in [path.read_text()]
        if "tpu_custom_call" in text
        for match in [re.search(r"total scheduled bundles:\s*(\d+)", text)]
        if match
    ]
    return Row(
        generation,
        name,
        str(case),
        program.memory_analysis().temp_size_in_bytes,
        _copies(program, B * S * case.Hkv * case.D // 2),
        None,
        max(totals),
        None,
    )


def _lines(rows: list[Row]) -> Iterator[str]:
    yield "| " + " | ".join(HEADER) + " |"
    yield "|" + "---|" * len(HEADER)
    for row in rows:
        yield "| " + " | ".join(row.cells()) + " |"


def _plot(rows: list[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    mine = [r for r in rows if r.ratio is not None]
    kernels, cases, generations = (
        list(dict.fromkeys(getattr(r, name) for r in mine))
        for name in ("kernel", "case", "generation")
    )
    figure, panels = plt.subplots(
        len(kernels), figsize=(10, 2.6 * len(kernels)), layout="constrained", squeeze=False
    )
    width = 0.8 / len(generations)
    for kernel, axes in zip(kernels, panels[:, 0], strict=True):
        for i, generation in enumerate(generations):
            ratios = {
                r.case: r.ratio for r in mine if (r.generation, r.kernel) == (generation, kernel)
            }
            axes.bar(
                [j + (i - (len(generations) - 1) / 2) * width for j in range(len(cases))],
                [ratios.get(case) or 0.0 for case in cases],
                width,
                label=generation,
            )
        axes.axhline(GOAL, color="black", linestyle="--", linewidth=1, label=f"goal {GOAL}")
        axes.set_xticks(range(len(cases)), cases)
        axes.set_title("forward" if kernel == "ours" else kernel, fontsize="medium")
    figure.supylabel("bundles of a step / cycles of its DMA")
    figure.supxlabel("Hq/Hkv/D, bfloat16, default block size")
    panels[0, 0].legend(ncols=len(generations) + 1, fontsize="small")
    figure.savefig(path, dpi=120)


_MEASUREMENTS = Path(__file__).resolve().parent.parent / "docs" / "measurements"


def _title(title: str, arguments: str) -> str:
    return (
        f"# {title}\n\n"
        f"Written by `python -m benchmarks.tpu_schedule {arguments}` with jax "
        f"{jax.__version__} and libtpu {importlib.metadata.version('libtpu')}; "
        "[On TPUs](tpu.md) explains the columns.\n\n"
    )


def _save(rows: list[Row]) -> None:
    text = _title("Schedules of the TPU kernels", "--save")
    text += "\n".join(_lines(rows)) + "\n\n![ratios](tpu_schedule.png)\n"
    (_MEASUREMENTS / "tpu_schedule.md").write_text(text)
    _plot(rows, _MEASUREMENTS / "tpu_schedule.png")


def _forms() -> None:
    """Prints the forms of caches, each on all generations, and saves them if that is asked for."""
    lines = [
        "| " + " | ".join((*HEADER, "of bfloat16's DMA")) + " |",
        "|" + "---|" * (len(HEADER) + 1),
    ]
    for case in (SCHEDULED[0], *FORMS):
        for generation in _GENERATIONS.value:
            row = ours(generation, case)
            assert row.dma is not None
            wide = row.dma * jnp.dtype(DTYPE).itemsize / jnp.dtype(case.dtype).itemsize
            cells = (*row.cells(), f"{max(row.bundles, row.dma) / wide:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    if _SAVE.value:
        text = _title("Schedules of the forms of caches", "--forms --save")
        (_MEASUREMENTS / "tpu_forms.md").write_text(text + "\n".join(lines) + "\n")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    unknown = set(_GENERATIONS.value) - set(TOPOLOGIES)
    if unknown:
        raise app.UsageError(f"--generations: {sorted(unknown)} not in {list(TOPOLOGIES)}")
    # Read when libtpu is loaded, by the first compilation.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP.name} --xla_jf_dump_llo_text=true"
    jax.config.update("jax_platforms", "cpu")
    if _FORMS.value:
        _forms()
        return
    rows: list[Row] = []
    for generation in _GENERATIONS.value:
        for case in SCHEDULED:
            rows.append(ours(generation, case))
            print("\t".join(rows[-1].cells()), flush=True)
        for name in DERIVATIVES:
            for case in SCHEDULED:
                rows.append(derivative(generation, case, name))
                print("\t".join(rows[-1].cells()), flush=True)
        for peer in (paged_attention, ragged_paged_attention) if _PEERS.value else ():
            for case in SCHEDULED[:2]:
                try:
                    rows.append(peer(generation, case))
                    print("\t".join(rows[-1].cells()), flush=True)
                except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
                    reason = str(error).splitlines()[0][:100]
                    print(f"{generation}\t{peer.__name__}\t{case}\tdoes not compile: {reason}")
    print(__doc__)
    print("\n".join(_lines(rows)))
    over = [r for r in rows if r.ratio is not None and r.ratio > GOAL]
    print(f"\n{len(over)} of {len(rows)} over the goal of {GOAL}:")
    for row in over:
        print(f"  {row.generation} {row.kernel} {row.case}: {row.ratio:.2f}")
    if _SAVE.value:
        _save(rows)


if __name__ == "__main__":
    app.run(main)
