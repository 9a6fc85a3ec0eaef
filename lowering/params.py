"""The static parameters of ragged attention."""

import dataclasses
import math
import numbers
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

DEFAULT_MASK_VALUE = -2.381976426469702e38
"""The value of `max_logits` for an empty window, unless `mask_value` says otherwise.

It is 0.7 times the most negative float32, so that the difference of two of them stays finite.
"""

Implementation = Literal["reference", "kernel"]
CacheLayout = Literal["BSHD", "BHSD"]

# The operands that a call may lack.
OPTIONAL = ("page_table", "key_scale", "value_scale")


def statistics_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """The dtype of logits, statistics and accumulators: float64 for float64, else float32."""
    return jnp.dtype("float64" if jnp.dtype(dtype) == jnp.float64 else "float32")


# The numbers that float32 holds with its full precision, and the largest soft cap for which logits
# of any use do not vanish in float32 when they are divided by it.
_LEAST, _MOST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
_MOST_SOFT_CAP = 1e30


_IF_TRACED = {
    "softmax_scale": (
        "Compute it with Python or numpy, as D ** -0.5; mark it with static_argnames in jax.jit; "
        "or multiply query by a factor that is traced."
    )
}


def _known(name: str, value: Any) -> Any:
    """Checks a number that is not one of Python's: its value must be known while tracing."""
    if not isinstance(value, jax.Array) and hasattr(value, "__jax_array__"):
        value = value.__jax_array__()
    if isinstance(value, Tracer):
        advice = "Compute it with Python or numpy, or mark it with static_argnames in jax.jit."
        raise TypeError(
            f"ragged_attention: {name} must be a Python number, known while tracing; got a traced "
            f"{jax.typeof(value).str_short()}. {_IF_TRACED.get(name, advice)}"
        )
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        is_real = (
            value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.number) and jnp.isrealobj(value)
        )
    if not is_real:
        raise TypeError(
            f"ragged_attention: {name} must be a Python number, known while tracing; "
            f"got {value!r} of type {type(value).__name__}. One number holds for the whole call; "
            "fold factors of heads or rows into query."
        )
    return value


def _number(name: str, value: Any) -> float:
    """A number, or an array without dimensions whose value is known, as a number."""
    try:
        number = float(value if type(value) in (float, int) else _known(name, value))
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"ragged_attention: {name} must be finite; got {number}.")
    return number


@dataclasses.dataclass(frozen=True, repr=False)
class RaggedAttentionParams:
    """Static parameters, validated on construction.

    Attributes:
      softmax_scale: factor of `<query, key>`: 0, or of a size that float32 holds.
      logits_soft_cap: `c` of `c * tanh(logit / c)`, positive, such that float32 holds `logit / c`;
        or None for no cap.
      block_size: positions of the cache that a kernel reads at a time, or None for the
        lowering's own choice.
      mask_value: `max_logits` of an empty window, finite in float32.
      implementation: "reference" or "kernel" forces one, None lets the lowering choose.
      partition: mesh axes of the leading dimensions and, last, of the heads, or None.
      out_dtype: the name of the dtype of `out`, or None for the dtype of query.
      cache_layout: the order of the dimensions of key and value: "BSHD" has positions before
        heads, "BHSD" heads before positions.
      optional: the names of the operands of `OPTIONAL` that the call has.
    """

    softmax_scale: float = 1.0
    logits_soft_cap: float | None = None
    block_size: int | None = None
    mask_value: float = DEFAULT_MASK_VALUE
    implementation: Implementation | None = None
    partition: PartitionSpec | None = None
    out_dtype: str | None = None
    cache_layout: CacheLayout = "BSHD"
    optional: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "softmax_scale", _number("softmax_scale", self.softmax_scale))
        if self.softmax_scale != 0 and not _LEAST <= abs(self.softmax_scale) <= _MOST:
            raise ValueError(
                f"ragged_attention: softmax_scale must be 0 or of a size from {_LEAST:.3g} to "
                f"{_MOST:.3g}, which float32 holds; got {self.softmax_scale}. Scale query instead."
            )
        set_field(self, "mask_value", _number("mask_value", self.mask_value))
        if abs(self.mask_value) > _MOST:
            raise ValueError(
                "ragged_attention: mask_value must be finite in float32; "
                f"got {self.mask_value}. The default is {DEFAULT_MASK_VALUE}."
            )
        if self.logits_soft_cap is not None:
            cap = _number("logits_soft_cap", self.logits_soft_cap)
            if cap <= 0:
                raise ValueError(
                    f"ragged_attention: logits_soft_cap must be positive; got {cap}. "
                    "Pass None for no cap."
                )
            if not _LEAST <= cap <= _MOST_SOFT_CAP:
                raise ValueError(
                    f"ragged_attention: logits_soft_cap must be from {_LEAST:.3g} to "
                    f"{_MOST_SOFT_CAP:.3g}, so that float32 holds logit / cap; got {cap}. "
                    "Pass None for no cap."
                )
            set_field(self, "logits_soft_cap", cap)
        if self.block_size is not None:
            if isinstance(self.block_size, bool) or not isinstance(
                self.block_size, int | np.integer
            ):
                raise TypeError(
                    "ragged_attention: block_size must be a Python int or None; "
                    f"got {self.block_size!r} of type {type(self.block_size).__name__}. "
                    "Pass None to let the lowering choose; in jax.jit, mark it with "
                    "static_argnames."
                )
            if self.block_size <= 0:
                raise ValueError(
                    f"ragged_attention: block_size must be positive; got {self.block_size}. "
                    "Pass None to let the lowering choose."
                )
            set_field(self, "block_size", int(self.block_size))
        if self.implementation not in (None, "reference", "kernel"):
            raise ValueError(
                "ragged_attention: implementation must be 'reference', 'kernel' or None; "
                f"got {self.implementation!r}. 'reference' is plain XLA, and None takes the kernel "
                "of the platform where it has one for the call."
            )
        if self.partition is not None and not isinstance(self.partition, PartitionSpec):
            raise TypeError(
                "ragged_attention: partition must be a jax.sharding.PartitionSpec, a "
                f"NamedSharding or None; got {self.partition!r} of type "
                f"{type(self.partition).__name__}. Pass PartitionSpec(batch axes, head axes)."
            )

        if self.cache_layout not in ("BSHD", "BHSD"):
            raise ValueError(
                "ragged_attention: cache_layout must be 'BSHD', for a cache [B, S, Hkv, D], or "
                f"'BHSD', for a cache [B, Hkv, S, D]; got {self.cache_layout!r}."
            )
        if tuple(name for name in OPTIONAL if name in self.optional) != self.optional:
            raise ValueError(
                f"ragged_attention: optional must hold names of {OPTIONAL}, each once and in "
                f"this order; got {self.optional!r}."
            )
        if self.out_dtype is not None:
            try:
                set_field(self, "out_dtype", jnp.dtype(self.out_dtype).name)
            except TypeError as error:
                raise TypeError(
                    "ragged_attention: out_dtype must be a dtype or None; "
                    f"got {self.out_dtype!r} of type {type(self.out_dtype).__name__}."
                ) from error

    def result_dtype(self, query_dtype: DTypeLike) -> np.dtype[Any]:
        """The dtype of `out`, of its tangent and of its cotangent."""
        return jnp.dtype(query_dtype if self.out_dtype is None else self.out_dtype)

    @property
    def paged(self) -> bool:
        """Whether key and value are pools of pages."""
        return "page_table" in self.optional

    def with_unrounded_out(self, query_dtype: DTypeLike) -> "RaggedAttentionParams":
        """The same, but for an `out` in the dtype of the statistics, as derivatives need it."""
        wide = statistics_dtype(query_dtype)
        out_dtype = None if wide == jnp.dtype(query_dtype) else wide.name
        return dataclasses.replace(self, out_dtype=out_dtype)

    def __repr__(self) -> str:
        """Names the fields that differ from the defaults, for jaxprs."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"
