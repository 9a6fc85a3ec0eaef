"""Functions of a call to transform, and reading of the jaxprs and programs that JAX makes of them.

Programs are compiled for TPUs that are not there, too.

`test_programs.py` shows every reader a program that has the pattern which other tests rule out.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.sharding import SingleDeviceSharding

import cases
from benchmarks.tpu_cases import TOPOLOGIES
from jax_ragged import ragged_attention

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# The operations that move or make an array in optimised HLO.
MOVES = ("copy", "transpose", "convert", "fusion", "pad")
ALL = (0, 1, 2)
WRT = ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), ALL)
NAMES = ("ragged_attention", "ragged_attention_jvp", "ragged_attention_vjp")


def op(case: cases.Case, **params: Any) -> Callable[..., Any]:
    """ragged_attention with a case's static parameters; its results as a plain tuple."""
    keywords = {**case.params, **params}
    return lambda *operands: tuple(ragged_attention(*operands, **keywords))


def _moving(
    fun: Callable[..., Any], operands: Sequence[Any], wrt: Sequence[int]
) -> Callable[..., Any]:
    def of_moving(*moving: Any) -> Any:
        full = list(operands)
        for i, x in zip(wrt, moving, strict=True):
            full[i] = x
        return fun(*full)

    return of_moving


def pullback(fun: Callable[..., Any], wrt: Sequence[int] = ALL) -> Callable[..., Any]:
    """(operands, cotangents) to the cotangents of the operands in wrt."""

    def run(operands: Sequence[Any], cotangents: Any) -> Any:
        _, pull = jax.vjp(_moving(fun, operands, wrt), *(operands[i] for i in wrt))
        return pull(cotangents)

    return run


def pushforward(fun: Callable[..., Any], wrt: Sequence[int] = ALL) -> Callable[..., Any]:
    """(operands, tangents of those in wrt) to the tangents of the results."""

    def run(operands: Sequence[Any], tangents: Any) -> Any:
        primals = tuple(operands[i] for i in wrt)
        return jax.jvp(_moving(fun, operands, wrt), primals, tuple(tangents))[1]

    return run


def _walk(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _walk(inner)


def equations(fun: Callable[..., Any], *args: Any) -> list[JaxprEqn]:
    """All equations of fun's jaxpr and of the jaxprs nested in it."""
    return list(_walk(jax.make_jaxpr(fun)(*args).jaxpr))


def counts(fun: Callable[..., Any], *args: Any) -> dict[str, int]:
    """How many equations of each of the three primitives fun has; those with none left out."""
    found = [eqn.primitive.name for eqn in equations(fun, *args)]
    return {name: found.count(name) for name in NAMES if name in found}


def largest_made(fun: Callable[..., Any], *args: Any) -> int:
    """The most elements that any equation of fun makes, inside of no primitive of ours.

    Reshapes, which move nothing (an inserted or removed dimension of 1), do not count.
    """
    free = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "jit", "pjit", "transpose")
    sizes = [0]
    for eqn in equations(fun, *args):
        inputs = [getattr(x.aval, "size", 0) for x in eqn.invars]
        for x in eqn.outvars:
            size = getattr(x.aval, "size", 0)
            if not (eqn.primitive.name in free and size in inputs):
                sizes.append(size)
    return max(sizes)


def temporary_bytes(fun: Callable[..., Any], *args: Any) -> int:
    """The bytes that the compiled program allocates beside its arguments and results."""
    analysis = jax.jit(fun).lower(*args).compile().memory_analysis()
    assert analysis is not None
    return int(analysis.temp_size_in_bytes)


def lowered_text(fun: Callable[..., Any], *args: Any) -> str:
    """The lowered program with its scopes; arguments that are not arrays are static."""
    static = [i for i, x in enumerate(args) if x is None or isinstance(x, str)]
    lowered = jax.jit(fun, static_argnums=static).lower(*args)
    return str(lowered.as_text(debug_info=True))


def compiled_text(fun: Callable[..., Any], *args: Any) -> str:
    """The text of a program compiled for the devices of its arguments."""
    return str(jax.jit(fun).lower(*args).compile().as_text())


def collectives(text: str) -> dict[str, int]:
    """How many of each kind of collective an optimised program has; those with none left out."""
    found = {x: len(re.findall(rf"\b{x}(?:-start)?\(", text)) for x in COLLECTIVES}
    return {x: n for x, n in found.items() if n}


def made(text: str, *operations: str) -> list[tuple[int, str]]:
    """The size, in elements, and the line of each result of these operations in optimised HLO."""
    kinds = "|".join(map(re.escape, operations))
    pattern = re.compile(rf"= \(?\w+\[([\d,]*)\].*? (?:{kinds})(?:-start)?\(")
    matches = [(pattern.search(line), line) for line in text.splitlines()]
    return [
        (math.prod(int(n) for n in match[1].split(",") if n), line.strip()[:160])
        for match, line in matches
        if match
    ]


def emitted(text: str, *operations: str) -> list[tuple[int, str]]:
    """As `made`, in a module of StableHLO, before a compiler has seen it."""
    found = []
    for line in text.splitlines():
        sizes = re.findall(r"tensor<((?:\d+x)*)[a-z]", line)
        if sizes and any(re.search(rf'stablehlo\.{x}[ "]', line) for x in operations):
            found.append((math.prod(int(n) for n in sizes[-1].split("x") if n), line.strip()[:160]))
    return found


def cache_sized(program: Any, elements: int) -> list[str]:
    """The operations of a compiled program that move or make as many elements as a cache has."""
    return [line for size, line in made(program.as_text(), *MOVES) if size >= elements]


@contextlib.contextmanager
def optimisations(on: bool) -> Iterator[None]:
    """Whether XLA makes its expensive optimisations, as it does for users."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not on)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def devices(generation: str) -> Any:
    """The devices of a generation's topology, for which programs can be compiled."""
    name = TOPOLOGIES[generation]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


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
    sharding = SingleDeviceSharding(devices(generation)[0])

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def call(*operands: jax.Array) -> Any:
        return ragged_attention(*operands, implementation="kernel", **params)

    Dv = D if Dv is None else Dv
    lowered = jax.jit(transform(call)).lower(
        array((B, Q, Hq, D), dtype),
        array((B, S, Hkv, D), dtype),
        array((B, S, Hkv, Dv), dtype),
        array((B, Q), jnp.int32),
        array((B, Q), jnp.int32),
    )
    with optimisations(True):
        return lowered.compile()
