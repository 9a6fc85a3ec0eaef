"""Reads jaxprs: their runs, nested ones too, and the integers that are known in each."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.core import Tracer
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from jax_ragged.lowering._compat import opened

Array = npt.NDArray[Any]
Thunk = Callable[[], Array | None]

# The primitives that are followed from the arguments to lengths and starts, where all operands are
# integers or booleans. Programs compute positions of a cache with these. With more primitives, a
# model would run.
# fmt: off
_FOLLOWED = frozenset((
    "abs", "add", "and", "argmax", "argmin", "broadcast_in_dim", "clamp", "concatenate",
    "convert_element_type", "copy", "cumsum", "div", "dynamic_slice", "dynamic_update_slice",
    "eq", "expand_dims", "gather", "ge", "gt", "iota", "le", "lt", "max", "min", "mul", "ne",
    "neg", "not", "or", "pad", "reduce_and", "reduce_max", "reduce_min",
    "reduce_or", "reduce_prod", "reduce_sum", "rem", "reshape", "rev", "select_n", "sign",
    "slice", "sort", "squeeze", "sub", "transpose", "xor",
))
_CALLS = frozenset((
    "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit",
    "pjit", "remat", "remat2",
))
# fmt: on


# What makes a new array of all the elements of a cache, and what changes its shape alone.
_COPIES = frozenset(
    (
        "concatenate",
        "convert_element_type",
        "copy",
        "dynamic_slice",
        "gather",
        "mul",
        "pad",
        "rev",
        "select_n",
        "slice",
        "transpose",
    )
)
_RESHAPES = frozenset((
    "broadcast_in_dim", "expand_dims", "name", "pcast", "pvary", "reshape", "slice", "squeeze",
))  # fmt: skip


class Maker(NamedTuple):
    """The operation that makes an array, and the bytes that it writes."""

    operation: str
    bytes: int


class Atom(NamedTuple):
    """A variable or literal of an enclosing jaxpr."""

    scope: "Scope"
    atom: Any


def concrete(x: Any) -> Array | None:
    """An integer or boolean array of known elements, or None."""
    if isinstance(x, Tracer | jax.ShapeDtypeStruct):
        return None
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return np.asarray(x) if isinstance(x, int) else None
    return np.asarray(x) if _is_integer(dtype) else None


def _is_integer(dtype: Any) -> bool:
    return bool(dtype == np.bool_ or jnp.issubdtype(dtype, np.integer))


def aval_of(atom: Any) -> Any:
    """The type of a variable or literal of a jaxpr."""
    return atom.aval


class Scope:
    """One run of a jaxpr, or `weight` equal runs. It finds the known integers when asked."""

    def __init__(
        self,
        jaxpr: Jaxpr,
        inputs: Sequence[Array | Thunk | None],
        weight: int | None = 1,
        *,
        conditional: bool = False,
        follow: bool = True,
        outer: Sequence["Atom | Maker | None"] = (),
    ) -> None:
        self.jaxpr = jaxpr
        self.weight = weight
        self.conditional = conditional
        self._follow = follow
        # Where each input comes from, for those that an enclosing jaxpr hands in as they are.
        self._outer = dict(zip(jaxpr.invars, outer, strict=False))
        self._known: dict[Any, Any] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True)
        )
        self._made_by = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
        self._nested: dict[int, list[tuple[str, Scope]]] = {}

    def maker(self, atom: Any) -> "Maker | None":
        """The operation that makes a new array of a variable's elements, or None if there is none.

        Followed back through changes of shape alone, and out of the jaxprs that hand it in.
        """
        if isinstance(atom, Literal):
            return None
        eqn = self._made_by.get(atom)
        if eqn is None:
            origin = self._outer.get(atom)
            if isinstance(origin, Maker) or origin is None:
                return origin
            return origin.scope.maker(origin.atom)
        name, size = eqn.primitive.name, aval_of(atom).size
        if name in _CALLS:
            ((_, inside),) = self.nested(eqn)
            return inside.maker(inside.jaxpr.outvars[list(eqn.outvars).index(atom)])
        if name in _RESHAPES and aval_of(eqn.invars[0]).size == size:
            return self.maker(eqn.invars[0])
        return Maker(name, size * aval_of(atom).dtype.itemsize) if name in _COPIES else None

    def read(self, atom: Any) -> Array | None:
        """The elements of a variable or literal, or None where they are not known."""
        if isinstance(atom, Literal):
            return concrete(atom.val)
        if atom not in self._known:
            self._evaluate(self._made_by[atom])
        known = self._known[atom]
        if callable(known):
            known = self._known[atom] = known()
        return known  # type: ignore[no-any-return]

    def _evaluate(self, eqn: JaxprEqn) -> None:
        """Finds the results of an equation, as far as they are known."""
        self._known.update((var, None) for var in eqn.outvars)
        name = eqn.primitive.name
        if not self._follow or not any(_is_integer(aval_of(v).dtype) for v in eqn.outvars):
            return
        if name in _CALLS or name in ("scan", "cond"):
            scopes = [scope for _, scope in self.nested(eqn)]
            if scopes and not any(scope.conditional for scope in scopes):
                last = scopes[-1]
                for var, out in zip(eqn.outvars, last.jaxpr.outvars, strict=True):
                    if name != "scan" or aval_of(var).ndim == aval_of(out).ndim:
                        self._known[var] = functools.partial(last.read, out)
        elif name in _FOLLOWED:
            operands = [self.read(atom) for atom in eqn.invars]
            if all(x is not None for x in operands):
                results = eqn.primitive.bind(*map(jnp.asarray, operands), **eqn.params)
                if not eqn.primitive.multiple_results:
                    results = [results]
                self._known.update(zip(eqn.outvars, map(np.asarray, results), strict=True))

    def nested(self, eqn: JaxprEqn) -> list[tuple[str, "Scope"]]:
        """The runs of the jaxprs inside an equation, each with a label."""
        if id(eqn) not in self._nested:
            self._nested[id(eqn)] = list(self._enter(eqn))
        return self._nested[id(eqn)]

    def _enter(self, eqn: JaxprEqn) -> Iterator[tuple[str, "Scope"]]:
        name = eqn.primitive.name
        reads: list[Array | Thunk | None] = [functools.partial(self.read, x) for x in eqn.invars]
        if name in _CALLS:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            label = eqn.params.get("name")
            outer = [Atom(self, x) for x in eqn.invars]
            yield f"{name} {label}" if label else name, self._inside(inner, reads, outer=outer)
        elif name == "scan":
            for scope in self._trips(eqn):
                yield f"scan x{eqn.params['length']}", scope
        elif name == "while":
            yield from self._while(eqn, reads)
        elif name == "cond":
            yield from self._branches(eqn, reads[1:])
        else:
            unknown = self._follow and name not in ("shard_map", "pmap", "xla_pmap")
            for inner in jaxprs_in_params(eqn.params):
                nothing = [None] * len(inner.invars)
                weight = None if unknown else self.weight
                yield name, self._inside(inner, nothing, weight=weight, follow=False)

    def _inside(self, jaxpr: Any, inputs: Sequence[Any], **changes: Any) -> "Scope":
        """A run inside this one, with its weight and condition unless changed."""
        inner, consts = opened(jaxpr)
        inherited = {
            "weight": self.weight,
            "conditional": self.conditional,
            "follow": self._follow,
        }
        return Scope(inner, [*map(concrete, consts), *inputs], **(inherited | changes))

    def _trips(self, eqn: JaxprEqn) -> Iterator["Scope"]:
        """The runs of a scan's body; one for all if no integer differs from trip to trip.

        The ranks tell constants, carry and scanned operands apart, since the names of the
        parameters that tell it differ between versions of JAX.
        """
        body, length = opened(eqn.params["jaxpr"])[0], eqn.params["length"]
        ranks = [
            (aval_of(x).ndim, aval_of(v).ndim) for x, v in zip(eqn.invars, body.invars, strict=True)
        ]
        n_xs = sum(outer > inner for outer, inner in ranks)
        ranks = [
            (aval_of(x).ndim, aval_of(v).ndim)
            for x, v in zip(eqn.outvars, body.outvars, strict=True)
        ]
        n_carry = sum(outer == inner for outer, inner in ranks)
        n_consts = len(eqn.invars) - n_xs - n_carry
        fixed, xs = eqn.invars[:n_consts], eqn.invars[n_consts + n_carry :]
        carry_in = body.invars[n_consts : n_consts + n_carry]
        varies = [
            new is not old and _is_integer(aval_of(old).dtype)
            for old, new in zip(carry_in, body.outvars, strict=False)
        ]
        constants = [functools.partial(self.read, x) for x in fixed]
        slices = [
            Maker("scan", aval_of(x).size * aval_of(x).dtype.itemsize)
            for x in body.invars[n_consts + n_carry :]
        ]
        outer = [*(Atom(self, x) for x in fixed), *[None] * n_carry, *slices]
        carry: list[Any] = [
            functools.partial(self.read, x) for x in eqn.invars[n_consts : -n_xs or None]
        ]
        if not any(varies) and not any(_is_integer(aval_of(x).dtype) for x in xs):
            weight = None if self.weight is None else self.weight * length
            inputs = [*constants, *carry, *[None] * n_xs]
            yield self._inside(eqn.params["jaxpr"], inputs, weight=weight, outer=outer)
            return
        order = reversed(range(length)) if eqn.params["reverse"] else range(length)
        for trip in order:
            elements = [functools.partial(self._element, x, trip) for x in xs]
            inputs = [*constants, *carry, *elements]
            scope = self._inside(eqn.params["jaxpr"], inputs, outer=outer)
            yield scope
            carry = [
                scope.read(v) if _is_integer(aval_of(v).dtype) else None
                for v in body.outvars[:n_carry]
            ]

    def _element(self, scanned: Any, trip: int) -> Array | None:
        known = self.read(scanned)
        return None if known is None else known[trip]

    def _while(self, eqn: JaxprEqn, reads: Sequence[Any]) -> Iterator[tuple[str, "Scope"]]:
        """The condition and the body, once each: only their constants are known."""
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = [None] * (len(reads) - n_cond - n_body)
        for name, fixed in (
            ("cond", reads[:n_cond]),
            ("body", reads[n_cond : n_cond + n_body]),
        ):
            inner = eqn.params[f"{name}_jaxpr"]
            yield f"while {name}", self._inside(inner, [*fixed, *carry], weight=None)

    def _branches(self, eqn: JaxprEqn, reads: Sequence[Any]) -> Iterator[tuple[str, "Scope"]]:
        """The branch that is taken, if it is known, else all branches."""
        branches, index = eqn.params["branches"], self.read(eqn.invars[0])
        outer = [Atom(self, x) for x in eqn.invars[1:]]
        if index is not None:
            taken = min(max(int(index), 0), len(branches) - 1)
            yield f"branch {taken}", self._inside(branches[taken], reads, outer=outer)
            return
        for i, branch in enumerate(branches):
            yield f"branch {i}", self._inside(branch, reads, conditional=True, outer=outer)
