"""Arguments as JAX users pass them, turned into the arrays and parameters that the calls need."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

_INT32 = np.iinfo(np.int32)


class SupportsJaxArray(Protocol):
    """An object that stands for an array, such as a variable of flax."""

    def __jax_array__(self) -> jax.Array:
        """Returns the array."""
        ...


# Whatever `jnp.asarray` takes: arrays, numbers, nested lists of them, objects for arrays.
ArrayLike: TypeAlias = jax.typing.ArrayLike | SupportsJaxArray | Sequence[Any]
# A number that is known while tracing; arrays have no dimensions.
ScalarLike: TypeAlias = float | np.number[Any] | np.ndarray[Any, Any] | jax.Array | SupportsJaxArray


def array(operation: str, name: str, x: Any) -> jax.Array | np.ndarray[Any, Any]:
    """An argument as an array; arrays of JAX and numpy stay as they are.

    Raises:
      TypeError: for an argument that `jnp.asarray` does not take.
    """
    # Arrays of numpy enter JAX with the call that they are for, as with any function of JAX.
    if isinstance(x, jax.Array) or (isinstance(x, np.ndarray) and x.dtype.kind not in "OSUmM"):
        return x
    try:
        if x is not None and not isinstance(x, str | bytes):
            return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise _no_array(operation, name, x) from error
    raise _no_array(operation, name, x)


def _no_array(operation: str, name: str, x: Any) -> TypeError:
    dtype = f" of {x.dtype}" if isinstance(x, np.ndarray) else ""
    whole = " For windows of the whole cache, pass S." if name == "lengths" and x is None else ""
    return TypeError(
        f"{operation}: {name} must be an array, or anything that jnp.asarray turns into one; "
        f"got {type(x).__name__}{dtype}. Pass an array of numbers.{whole}"
    )


def positions(operation: str, name: str, x: Any) -> jax.Array | np.ndarray[Any, Any]:
    """Lengths, starts or a page table as an array; numbers of the host saturate at int32.

    Without x64, JAX would take the low 32 bits of wide integers as they enter a program.
    """
    if isinstance(x, int | np.integer | list | tuple):
        held = jax.tree.map(_saturated, x)
        of_jax = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(held))
        try:
            x = held if of_jax else np.asarray(held)
        except ValueError as error:
            raise _no_array(operation, name, x) from error
    windows = array(operation, name, x)
    if isinstance(windows, np.ndarray):
        windows = saturated_int32(windows)
    return windows


def _saturated(x: Any) -> Any:
    """A number of the host, if it is an integer, as the nearest that int32 holds."""
    if isinstance(x, bool) or not isinstance(x, int | np.integer):
        return x
    return min(max(int(x), _INT32.min), _INT32.max)


def saturated_int32(x: Any) -> Any:
    """Integers as int32: a number that int32 cannot hold becomes the nearest that it holds.

    An array of numpy stays one. An array of another dtype comes back as it is.
    """
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return x
    held = jnp.iinfo(x.dtype)
    if held.min < _INT32.min or held.max > _INT32.max:
        low, high = max(held.min, _INT32.min), min(held.max, _INT32.max)
        xp = np if isinstance(x, np.ndarray) else jnp
        x = xp.clip(x, np.array(low, x.dtype), np.array(high, x.dtype))
    return x.astype(np.int32)


def factors(operation: str, name: str, x: Any) -> jax.Array | np.ndarray[Any, Any]:
    """Scales or sinks as an array; an integer of Python is a number like any other."""
    is_int = isinstance(x, int) and not isinstance(x, bool)
    return array(operation, name, float(x) if is_int else x)


def scale_or_default(softmax_scale: Any, query: jax.Array | np.ndarray[Any, Any]) -> Any:
    """The scale, `D ** -0.5` for None.

    Raises:
      ValueError: for None where D is symbolic.
    """
    if softmax_scale is not None:
        return softmax_scale
    (D,) = query.shape[-1:] or (1,)  # a query without dimensions is refused with the operands
    if not isinstance(D, int):
        raise ValueError(
            "ragged_attention: softmax_scale must be a number where the head dimension is "
            f"symbolic; got None for query {query.shape}. Pass the number."
        )
    return max(D, 1) ** -0.5


def partition_spec(partition: Any, query: jax.Array | np.ndarray[Any, Any]) -> Any:
    """The spec of `partition` with an entry for each dimension of query but the last.

    Entries that are left out at the end are None, and a last one for the head dimension may be
    there, if it is None: so the sharding of query may be passed as it is.

    Raises:
      ValueError: for a spec that is unreduced or reduced over mesh axes.
    """
    spec = partition.spec if isinstance(partition, NamedSharding) else partition
    if not isinstance(spec, PartitionSpec):
        return spec
    if spec.unreduced or spec.reduced:
        raise ValueError(
            "ragged_attention: partition must say how dimensions are split, and nothing of "
            f"reductions; got {spec}."
        )
    entries = [*spec]
    while entries and entries[-1] is None:
        entries.pop()
    missing = query.ndim - 1 - len(entries)
    return PartitionSpec(*entries, *[None] * missing)


def mesh_of(partition: Any, *operands: Any) -> AbstractContextManager[Any]:
    """The mesh of a NamedSharding as the context of a call, where there is no mesh yet.

    Raises:
      ValueError: if the context, or an operand's type, has another mesh.
    """
    if not isinstance(partition, NamedSharding):
        return contextlib.nullcontext()
    mesh: Mesh | AbstractMesh = partition.mesh
    context = jax.sharding.get_abstract_mesh()
    types = [jax.typeof(x).sharding.mesh for x in operands if isinstance(x, jax.Array)]
    for other in (context, *types):
        if not other.empty and dict(other.shape) != dict(mesh.shape):
            raise ValueError(
                "ragged_attention: the mesh of partition must be the mesh of the context and of "
                f"the operands; got {dict(mesh.shape)} where they have {dict(other.shape)}. Pass "
                "the PartitionSpec alone to take theirs."
            )
    if not context.empty:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
