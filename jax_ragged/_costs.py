"""The bytes and flops of the ragged attention in a program, read from its jaxpr."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from jax_ragged._jaxprs import Maker, Scope, aval_of, concrete
from jax_ragged.lowering._compat import opened
from jax_ragged.primitives import (
    ragged_attention_jvp_p,
    ragged_attention_p,
    ragged_attention_vjp_p,
)
from jax_ragged.primitives._avals import joined_sizes
from jax_ragged.primitives._folding import Folding
from jax_ragged.primitives._primitive import definition_of
from jax_ragged.primitives._signature import Signature

Array = npt.NDArray[Any]

_PRIMITIVES = (ragged_attention_p, ragged_attention_jvp_p, ragged_attention_vjp_p)


@dataclasses.dataclass(frozen=True)
class EquationCost:
    """One ragged attention equation of a program. Inside shard_map it describes one shard.

    Bytes count every needed operand once and every result once. Key, value and their tangents
    count the positions inside some window; gradients count whole. Flops count the matrix
    products, two for a multiplication and addition.

    Attributes:
      name: the name of the primitive.
      where: the nested jaxprs around it, outermost first.
      trips: the number of times that it runs, all loops around it multiplied. None inside a while
        loop, whose trip count a jaxpr does not hold; then all figures are for one trip.
      conditional: whether it lies in a branch that may not be taken.
      sizes: B, Q, Hq, Hkv, S, D and Dv, folded as kernels see them.
      dtype: the dtype of query and out.
      bytes_at_most: bytes in all trips, if every window were the whole cache.
      bytes: bytes in all trips, for the windows given; None if these are not known.
      flops_at_most: flops in all trips, if every window were the whole cache.
      flops: flops in all trips, for the windows given; None if these are not known.
      copies: the operation and the bytes of a copy, for each operand of the cache that the program
        copies in front of the equation. The equation reads the windows alone, and such a copy
        costs the whole cache at every trip.
    """

    name: str
    where: tuple[str, ...]
    trips: int | None
    conditional: bool
    sizes: Mapping[str, int]
    dtype: str
    bytes_at_most: int
    bytes: int | None
    flops_at_most: int
    flops: int | None
    copies: Mapping[str, Maker]

    @property
    def intensity(self) -> float:
        """Flops for each byte, for the windows given if they are known, else at most."""
        if self.bytes is None or self.flops is None:
            flops, moved = self.flops_at_most, self.bytes_at_most
        else:
            flops, moved = self.flops, self.bytes
        return flops / moved if moved else 0.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """The ragged attention equations of a program, as `costs` finds them; print shows a table.

    Attributes:
      equations: one for each equation, in the order of the program.
    """

    equations: tuple[EquationCost, ...]

    @property
    def bytes_at_most(self) -> int | None:
        """The sum over the equations, all branches taken; None if a trip count is not known."""
        return self._total("bytes_at_most")

    @property
    def bytes(self) -> int | None:
        """The sum over the equations; None if windows, trip counts or branches are not known."""
        return self._total("bytes")

    @property
    def flops_at_most(self) -> int | None:
        """The sum over the equations, all branches taken; None if a trip count is not known."""
        return self._total("flops_at_most")

    @property
    def flops(self) -> int | None:
        """The sum over the equations; None if windows, trip counts or branches are not known."""
        return self._total("flops")

    def _total(self, figure: str) -> int | None:
        exact = not figure.endswith("at_most")
        total = 0
        for eqn in self.equations:
            amount = getattr(eqn, figure)
            if amount is None or eqn.trips is None or (exact and eqn.conditional):
                return None
            total += amount
        return total

    def __str__(self) -> str:
        """A table with a line for each equation and one for the total."""
        sizes = ("B", "Q", "Hq", "Hkv", "S", "D", "Dv")
        head = ["equation", "in", "trips", *sizes, "dtype", "bytes <=", "bytes", "flops", "flops/B"]
        lines = [
            [
                eqn.name,
                "/".join(eqn.where) or "-",
                "?" if eqn.trips is None else f"{'<=' if eqn.conditional else ''}{eqn.trips}",
                *(str(eqn.sizes[letter]) for letter in sizes),
                eqn.dtype,
                _quantity(eqn.bytes_at_most, 1024),
                _quantity(eqn.bytes, 1024),
                _quantity(eqn.flops_at_most if eqn.flops is None else eqn.flops, 1000),
                f"{eqn.intensity:.2f}",
            ]
            for eqn in self.equations
        ]
        total = ["total", *[""] * (len(head) - 5)]
        total += [_quantity(self.bytes_at_most, 1024), _quantity(self.bytes, 1024)]
        flops = self.flops_at_most if self.flops is None else self.flops
        table = [head, *lines, [*total, _quantity(flops, 1000), ""]]
        widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
        printed = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        printed += [
            f"{eqn.name}: {name} is copied in front of it by {copy.operation}, "
            f"{_quantity(copy.bytes, 1024)}B a trip. Pass the cache as it lies."
            for eqn in self.equations
            for name, copy in eqn.copies.items()
        ]
        return "\n".join(printed)


def _quantity(amount: int | None, base: int) -> str:
    """An amount with a prefix: binary ones, Ki and up, for base 1024; "?" for None."""
    if amount is None:
        return "?"
    scaled, prefixes = float(amount), ["", "K", "M", "G", "T", "P"]
    while scaled >= base and len(prefixes) > 1:
        scaled /= base
        prefixes.pop(0)
    infix = "i" if base == 1024 and prefixes[0] else ""
    return f"{scaled:.4g} {prefixes[0]}{infix}".rstrip()


def costs(fn_or_jaxpr: Callable[..., Any] | Any, *args: Any) -> Costs:
    """Finds every ragged attention equation of a program, and its cost.

    No array of the size of a cache is made and no model is run. The program is traced, and only
    integer arithmetic is followed from the arguments to the lengths and starts of each equation.
    Windows that the arguments determine in this way (through jit, vmap, grad, checkpoint, scan
    and the branches of cond) give exact figures. Other windows give the largest possible ones.

    Args:
      fn_or_jaxpr: a function of arrays, to be traced, or a jaxpr as `jax.make_jaxpr` returns.
      *args: its arguments: arrays where the windows depend on them, and arrays or
        `jax.ShapeDtypeStruct` elsewhere. A jaxpr takes one for each of its inputs, or none.

    Returns:
      A `Costs` with one `EquationCost` for each equation; empty if the program has none.

    Raises:
      TypeError, ValueError: for arguments that do not fit, and for symbolic shapes.

    Examples:
      The windows hold 3 + 5 positions, of 2 heads with 16 elements of 4 bytes, in key and in
      value: 2,048 bytes. Query and out have 1,024, and lengths, starts and statistics 76:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_ragged import costs, ragged_attention
      >>> query = jax.ShapeDtypeStruct((2, 4, 16), "float32")
      >>> cache = jax.ShapeDtypeStruct((2, 8, 2, 16), "float32")
      >>> found = costs(ragged_attention, query, cache, cache, jnp.array([3, 5]))
      >>> found.bytes, found.bytes_at_most
      (3148, 5196)
    """
    if callable(fn_or_jaxpr):
        closed: Any = jax.make_jaxpr(fn_or_jaxpr)(*args)
        args = tuple(jax.tree.leaves(args))
    else:
        closed = fn_or_jaxpr
    jaxpr, consts = opened(closed)
    if not isinstance(jaxpr, Jaxpr):
        raise TypeError(
            "costs: fn_or_jaxpr must be a function or a jaxpr; "
            f"got {type(fn_or_jaxpr).__name__}. "
            "Pass the function and its arguments: costs(fn, *args)."
        )
    if args and len(args) != len(jaxpr.invars):
        raise ValueError(
            "costs: a jaxpr takes one argument for each of its inputs, or none; "
            f"got {len(args)} for {len(jaxpr.invars)}."
        )
    inputs = [concrete(x) for x in args] or [None] * len(jaxpr.invars)
    scope = Scope(jaxpr, [*map(concrete, consts), *inputs])
    with jax.ensure_compile_time_eval():
        return Costs(tuple(_equation_costs([scope], ())))


def _has_attention(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive in _PRIMITIVES or any(map(_has_attention, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _equation_costs(scopes: Sequence[Scope], where: tuple[str, ...]) -> Iterator[EquationCost]:
    """The costs of one jaxpr and the jaxprs inside it, over all of its runs."""
    for eqn in scopes[0].jaxpr.eqns:
        if eqn.primitive in _PRIMITIVES:
            yield _equation_cost(eqn, scopes, where)
        elif any(map(_has_attention, jaxprs_in_params(eqn.params))):
            entered: dict[tuple[str, Jaxpr], list[Scope]] = {}
            for scope in scopes:
                for label, inner in scope.nested(eqn):
                    entered.setdefault((label, inner.jaxpr), []).append(inner)
            for (label, _), inside in entered.items():
                yield from _equation_costs(inside, (*where, label))


def _equation_cost(eqn: JaxprEqn, scopes: Sequence[Scope], where: tuple[str, ...]) -> EquationCost:
    call = _Call.of(eqn)
    weights = [scope.weight for scope in scopes]
    trips = None if None in weights else sum(w for w in weights if w is not None)
    exact = _sum_of_runs(
        weights,
        [call.known_amounts(*call.windows(eqn, scope)) for scope in scopes],
    )
    at_most = call.amounts(np.array(call.sizes["S"]), np.array(0))
    return EquationCost(
        name=eqn.primitive.name,
        where=where,
        trips=trips,
        conditional=any(scope.conditional for scope in scopes),
        sizes=call.sizes,
        dtype=str(call.operands["query"].dtype),
        bytes_at_most=at_most[0] * (1 if trips is None else trips),
        bytes=None if exact is None else exact[0],
        flops_at_most=at_most[1] * (1 if trips is None else trips),
        flops=None if exact is None else exact[1],
        copies=call.copies(eqn, scopes[0]),
    )


def _sum_of_runs(
    weights: Sequence[int | None], runs: Sequence[tuple[int, int] | None]
) -> tuple[int, int] | None:
    """The bytes and flops of weighted runs; in a while loop, of one trip if all are alike."""
    known = [amounts for amounts in runs if amounts is not None]
    if len(known) < len(runs):
        return None
    if None in weights:
        return known[0] if len(set(known)) == 1 else None
    counted = [
        (w * moved, w * computed)
        for w, (moved, computed) in zip(weights, known, strict=True)
        if w is not None
    ]
    return sum(moved for moved, _ in counted), sum(computed for _, computed in counted)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The operands and results of one equation by name, and its folded sizes."""

    signature: Signature
    operands: Mapping[str, Any]
    results: Mapping[str, Any]
    leading: tuple[int, ...]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, eqn: JaxprEqn) -> "_Call":
        signature = definition_of(eqn.primitive).signature(**eqn.params)
        operands = signature.bind([aval_of(x) for x in eqn.invars])
        results = {
            spec.name: aval_of(x) for spec, x in zip(signature.results, eqn.outvars, strict=True)
        }
        folding = Folding.of(signature, operands)
        sizes = {"B": folding.B, "Q": folding.Q}
        sizes |= joined_sizes(signature, operands, len(folding.leading))
        key = operands["key"]
        if not all(isinstance(n, int) for n in sizes.values()):
            raise ValueError(
                f"costs: every size must be known; got {key.str_short()} for key. "
                "Trace the function with static shapes."
            )
        return cls(signature, operands, results, folding.leading, sizes)

    def windows(self, eqn: JaxprEqn, scope: Scope) -> tuple[Array | None, Array | None]:
        """The lengths and starts of the equation, as far as they are known in a run of it."""
        atoms = self.signature.bind(eqn.invars)
        return scope.read(atoms["lengths"]), scope.read(atoms["starts"])

    def copies(self, eqn: JaxprEqn, scope: Scope) -> dict[str, Maker]:
        """The operands of the cache that a copy in front of the equation makes."""
        made = {
            spec.name: scope.maker(x)
            for spec, x in zip(self.signature.operands, eqn.invars, strict=True)
            if {"S", "T"} & {*spec.trailing}
        }
        return {name: maker for name, maker in made.items() if maker is not None}

    def known_amounts(self, lengths: Array | None, starts: Array | None) -> tuple[int, int] | None:
        """The amounts, or None where the windows are not known."""
        return None if lengths is None or starts is None else self.amounts(lengths, starts)

    def amounts(self, lengths: Array, starts: Array) -> tuple[int, int]:
        """Bytes moved and flops computed for the windows of lengths and starts."""
        S = self.sizes["S"]
        end = np.broadcast_to(np.minimum(lengths, S).astype(np.int64), self.leading)
        begin = np.broadcast_to(np.maximum(starts, 0).astype(np.int64), self.leading)
        windows = (begin, np.maximum(begin, end))
        moved = sum(a.size * a.dtype.itemsize for a in self.results.values())
        for spec in self.signature.operands:
            aval = self.operands[spec.name]
            if not self._needed(spec.name):
                continue
            if "S" in spec.trailing or "T" in spec.trailing:
                # Pages that rows share are counted for each row: which they are is not known.
                rows = self.operands.get("page_table", aval).shape[: len(self.leading)]
                sizes = dict(zip(spec.trailing, aval.shape[len(self.leading) :], strict=True))
                at_each = math.prod(sizes.get(letter, 1) for letter in ("Hkv", "D", "Dv"))
                if spec.broadcasts and 1 in (sizes.get("S"), sizes.get("T")):
                    moved += aval.size * aval.dtype.itemsize
                else:
                    moved += _union(*windows, rows) * at_each * aval.dtype.itemsize
            else:
                moved += aval.size * aval.dtype.itemsize
        tokens = int((windows[1] - windows[0]).sum())
        return moved, 2 * self.sizes["Hq"] * self._width() * tokens

    def _needed(self, name: str) -> bool:
        """Whether it is read: not value and out, where no derivative goes through the weights."""
        derivative = "out" in self.operands
        return name not in ("value", "out") or not derivative or self._moves_probabilities

    @property
    def _moves_probabilities(self) -> bool:
        """Whether the derivative of out with respect to query or key is asked for."""
        names = {*self.operands, *self.results}
        through = {"out_dot", "out_bar"} & names
        return bool(through and {"query_dot", "key_dot", "query_bar", "key_bar"} & names)

    def _width(self) -> int:
        """Multiplications in all products, for one query head and one position of its window."""
        D, Dv = self.sizes["D"], self.sizes["Dv"]
        if "out" not in self.operands:
            return D + Dv
        names = {*self.operands, *self.results}
        width = D + Dv * self._moves_probabilities
        width += D * len({"query_dot", "key_dot", "query_bar", "key_bar"} & names)
        return width + Dv * len({"value_dot", "value_bar"} & names)


def _union(begin: Array, end: Array, leading: Sequence[int]) -> int:
    """Counts the positions inside some window, each once for all windows that share it.

    Windows [*N] share a cache in the dimensions in which the cache has size 1.
    """
    shared = [i for i, n in enumerate(leading) if n == 1]
    rows = math.prod(leading)
    begin, end = (
        np.moveaxis(x, shared, range(-len(shared), 0)).reshape(rows, -1) for x in (begin, end)
    )
    if begin.size == 0:
        return 0
    order = np.argsort(begin, axis=1)
    begin, end = (np.take_along_axis(x, order, axis=1) for x in (begin, end))
    reached = np.maximum.accumulate(end, axis=1)
    reached = np.concatenate([np.zeros_like(reached[:, :1]), reached[:, :-1]], axis=1)
    return int(np.maximum(end - np.maximum(begin, reached), 0).sum())
