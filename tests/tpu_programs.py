"""Compiling for TPUs that are not there, and reading what the compiler made."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jax_ragged import ragged_attention

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}
# What moves or makes an array in optimised HLO.
_MOVES = re.compile(r"= \(?\w+\[([\d,]+)\].*? (copy|copy-start|transpose|convert|fusion|pad)\(")


@functools.cache
def device(generation: str) -> Any:
    """A device of a generation, for which programs can be compiled."""
    return topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[generation]
    ).devices[0]


def compile_call(
    generation: str,
    *,
    Hq: int,
    Hkv: int,
    D: int,
    Dv: int | None = None,
    dtype: str = "bfloat16",
    B: int = 4,
    S: int = 2048,
    Q: int = 1,
    transform: Callable[[Any], Any] = lambda call: call,
    **params: Any,
) -> Any:
    """The compiled program of one call of the kernel on one device, or of its derivative."""
    sharding = SingleDeviceSharding(device(generation))

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def call(*operands: jax.Array) -> Any:
        return ragged_attention(*operands, implementation="kernel", **params)

    Dv = D if Dv is None else Dv
    return (
        jax.jit(transform(call))
        .lower(
            array((B, Q, Hq, D), dtype),
            array((B, S, Hkv, D), dtype),
            array((B, S, Hkv, Dv), dtype),
            array((B, Q), jnp.int32),
            array((B, Q), jnp.int32),
        )
        .compile()
    )


def cache_sized(program: Any, elements: int) -> list[str]:
    """The operations of a program that move or make as many elements as a cache has."""
    found = []
    for line in program.as_text().splitlines():
        match = _MOVES.search(line)
        if match and _size(match[1]) >= elements:
            found.append(line.strip()[:160])
    return found


def _size(shape: str) -> int:
    return functools.reduce(lambda x, y: x * int(y), shape.split(","), 1)
