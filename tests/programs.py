"""Reading of jaxprs and of compiled programs, for tests of what a program does."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

NAMES = ("ragged_attention", "ragged_attention_jvp", "ragged_attention_vjp")


def _walk(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _walk(inner)


def equations(fun: Callable[..., Any], *args: Any) -> list[JaxprEqn]:
    """All equations of fun's jaxpr, those of nested jaxprs included."""
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
