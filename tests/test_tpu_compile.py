"""The forward TPU kernel by the real compiler: nothing of the cache moves but the windows."""

import itertools
from collections.abc import Iterator

import jax
import pytest

from benchmarks.tpu_cases import SCHEDULED, TOPOLOGIES, Scheduled
from cases import covering, tiered
from programs import cache_sized, compile_call

HEADS = (1, 2, 4, 8, 16, 32)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
DTYPES = ("bfloat16", "float32")


def _heads(Hkv: int) -> int:
    """Hq: MHA for many heads, GQA and MQA for few."""
    return Hkv if Hkv >= 16 else 4 * Hkv


def _cases() -> Iterator[tuple[str, int, int, int, str]]:
    """Every (Hkv, D, dtype) for each generation, with Dv = D and with another Dv.

    How keys are read follows from Hkv, D, dtype and whether Dv is D, and how values are from Dv
    likewise. The other Dv runs through all of HEAD_DIMS for each Hkv, dtype and generation too, and
    every pair of D and Dv occurs. On older versions of JAX, and of libtpu with them, a part, with
    every pair of two of the five; in the default tier, every value of the five.
    """
    shapes = itertools.product(enumerate(TOPOLOGIES), enumerate(HEADS), enumerate(DTYPES))
    for (g, generation), (h, Hkv), (t, dtype) in shapes:
        for i, D in enumerate(HEAD_DIMS):
            other = HEAD_DIMS[(i + 1 + (g + h + t) % 5) % len(HEAD_DIMS)]
            yield from ((generation, Hkv, D, Dv, dtype) for Dv in (D, other))


_ALL = list(_cases())
_DEFAULT = covering(_ALL, together=1)
_PART = set(_ALL[:: 1 if jax.__version_info__ >= (0, 12) else 7]) | set(covering(_ALL))


def _assert_reads_in_place(
    generation: str, Hkv: int, D: int, Dv: int, dtype: str, Hq: int, Q: int = 1
) -> None:
    B, S = 4, 2048
    program = compile_call(generation, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv, dtype=dtype, B=B, S=S, Q=Q)
    assert cache_sized(program, B * S * Hkv * min(D, Dv) // 2) == []
    assert "tpu_custom_call" in program.as_text()
    memory = program.memory_analysis()
    # The rows of queries, and their results before those of empty windows are filled in; on a
    # megacore chip one row more, and its two parts in float32. Those of a head are padded to 8, and
    # all to 128 lanes. The rest is the work list, whose arrays take a least size each.
    rows = Hkv * -(-Q * Hq // Hkv // 8) * 8
    lanes, value_lanes = (-(-n // 128) * 128 for n in (D, Dv))
    size = 2 if dtype == "bfloat16" else 4
    queries = size * B * rows * lanes
    results = (B + 1) * rows * (size * value_lanes + 2 * 4) + 2 * rows * 4 * value_lanes
    assert memory.temp_size_in_bytes <= queries + results + 2**19


@pytest.mark.parametrize(
    ("generation", "Hkv", "D", "Dv", "dtype"), tiered([c for c in _ALL if c in _PART], _DEFAULT)
)
def test_reads_in_place(generation: str, Hkv: int, D: int, Dv: int, dtype: str) -> None:
    _assert_reads_in_place(generation, Hkv, D, Dv, dtype, _heads(Hkv))


@pytest.mark.parametrize(
    ("D", "Dv"), tiered([(64, 256), (256, 64), (80, 256), (96, 192)], [(64, 256)])
)
def test_many_large_heads_in_the_smallest_vmem(D: int, Dv: int) -> None:
    """A block of 128 positions takes most of the VMEM of a v4."""
    _assert_reads_in_place("v4", 32, D, Dv, "float32", 32)


_SCHEDULED = list(itertools.product(TOPOLOGIES, SCHEDULED))
_DIAGONAL = _SCHEDULED[:: len(SCHEDULED) - 1]


@pytest.mark.parametrize(("generation", "case"), tiered(_SCHEDULED, _DIAGONAL), ids=str)
def test_scheduled_cases(generation: str, case: Scheduled) -> None:
    """What benchmarks/tpu_schedule.py reads the schedules of."""
    _assert_reads_in_place(generation, case.Hkv, case.D, case.D, "bfloat16", case.Hq, Q=case.Q)


@pytest.mark.parametrize(
    ("Hq", "name"), [(8, "ragged_attention_mha"), (32, "ragged_attention_gqa")]
)
def test_kernel_names(Hq: int, name: str) -> None:
    assert name in compile_call("v5e", Hq=Hq, Hkv=8, D=128).as_text()
