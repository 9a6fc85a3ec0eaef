"""The contract between the primitives and the lowerings that run them.

A lowering is how one platform runs the three operations: forward, jvp and vjp. It gets arrays by
name, with all leading dimensions folded into rows B and queries Q, and knows nothing of the rules
of JAX. `docs/add_a_lowering.md` writes one step by step.
"""

from typing import Any, Generic, NamedTuple, TypeVar

import jax

from jax_ragged.lowering.params import RaggedAttentionParams

T = TypeVar("T")


class ByOperand(NamedTuple, Generic[T]):
    """One entry for each differentiable operand."""

    query: T
    key: T
    value: T
    key_scale: T | None = None
    value_scale: T | None = None


class ByResult(NamedTuple, Generic[T]):
    """One entry for each result."""

    out: T
    max_logits: T
    denominator: T


class Operands(NamedTuple):
    """The operands of the forward.

    The forms of caches combine. `params.cache_layout` "BHSD" puts the heads of key, value and
    scales before their positions. With a page table, key and value are pools of P pages of T
    positions, [P, T, Hkv, D] and [P, T, Hkv, Dv], and S is W * T. The keys are key_scale * key,
    and the values value_scale * value.

    Attributes:
      query: [B, Q, Hq, D].
      key: [B, S, Hkv, D], in the dtype of query, or one of `NARROW`.
      value: [B, S, Hkv, Dv], likewise.
      lengths: int32 [B, Q], the end of each query's window, exclusive; it may exceed S.
      starts: int32 [B, Q], the first position of each query's window; it may be negative.
      page_table: int32 [B, W], the page of positions w * T to (w + 1) * T of a row, or None. All
        entries are in [0, P), those outside of the windows too.
      key_scale: [B, S, Hkv], or [P, T, Hkv] for a pool, in the dtype of the statistics, with 1
        for a dimension that shares a scale; or None.
      value_scale: as key_scale.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    lengths: jax.Array
    starts: jax.Array
    page_table: jax.Array | None = None
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None


class Residuals(NamedTuple):
    """The operands and the results of the forward, from which the derivatives start.

    Attributes:
      query, key, value, lengths, starts: as in `Operands`.
      page_table, key_scale, value_scale: as in `Operands`.
      out: [B, Q, Hq, Dv], not rounded: float32 (float64 for float64). The derivatives subtract
        products with it from products with the values, which cancel where keys are much alike.
      max_logits: [B, Q, Hq], in the dtype of this `out`.
      denominator: [B, Q, Hq], in the dtype of this `out`.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    lengths: jax.Array
    starts: jax.Array
    out: jax.Array
    max_logits: jax.Array
    denominator: jax.Array
    page_table: jax.Array | None = None
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    @property
    def operands(self) -> Operands:
        """The operands of the forward."""
        return Operands(*(getattr(self, name) for name in Operands._fields))


class Unsupported(Exception):  # noqa: N818  # a refusal, which the dispatcher answers
    """A lowering's refusal of a call, raised before it has emitted anything.

    With `implementation=None` the reference runs instead. The refusal is then logged, and is a
    warning if it carries advice, since the caller can lift it. With `implementation="kernel"` it
    becomes a NotImplementedError.

    Attributes:
      reason: a clause that says why, such as "its kernel takes head dimensions up to 512, and
        this is 640".
      advice: a sentence that says how the caller gets the kernel, such as "Pass block_size=128.",
        or None if nothing short of other data does.
    """

    def __init__(self, reason: str, advice: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice


class Lowering:
    """Base of all lowerings: it refuses every operation. Override the ones your platform has.

    Each method traces plain JAX (Pallas kernels included) and raises `Unsupported` for a call
    that it does not take. The dispatcher has checked the operands before: shapes and dtypes fit
    each other, all sizes are known and none is 0. `device_kind` is the kind of the devices that
    the program is lowered for, as `jax.Device.device_kind` names it, or None where that is not
    known, as in an export.

    Attributes:
      dense_only: whether it reads caches [B, S, Hkv, D] in the dtype of query alone. The dispatcher
        then refuses every other form of cache for it. Set it to False for a lowering that reads
        `params.cache_layout`, page tables and scales, or refuses them itself.
    """

    dense_only = True

    def forward(
        self, operands: Operands, params: RaggedAttentionParams, device_kind: str | None
    ) -> ByResult[jax.Array]:
        """Computes the results.

        Args:
          operands: the folded operands.
          params: the static parameters.
          device_kind: the kind of device.

        Returns:
          out [B, Q, Hq, Dv] in `params.result_dtype(query.dtype)`, max_logits and denominator
          [B, Q, Hq] in float32 (float64 for float64).
        """
        raise Unsupported("it has no kernel for forward")

    def jvp(
        self,
        residuals: Residuals,
        tangents: ByOperand[jax.Array | None],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByResult[jax.Array]:
        """Computes the tangents of the results, linear in the tangents of the operands.

        Args:
          residuals: the folded operands and the results.
          tangents: the folded tangents of the operands, each in its operand's shape and dtype;
            None is a zero. At least one is there.
          params: the static parameters.
          device_kind: the kind of device.

        Returns:
          The tangents, in the shapes and dtypes of the results of `forward`.
        """
        raise Unsupported("it has no kernel for jvp")

    def vjp(
        self,
        residuals: Residuals,
        cotangents: ByResult[jax.Array | None],
        wrt: ByOperand[Any],
        params: RaggedAttentionParams,
        device_kind: str | None,
    ) -> ByOperand[jax.Array | None]:
        """Computes the cotangents of the operands: the transpose of `jvp`.

        Args:
          residuals: the folded operands and the results.
          cotangents: the folded cotangents of the results, each in its result's shape and dtype;
            None is a zero. At least one is there.
          wrt: the dtype in which each operand's cotangent is wanted, or None if it is not. It is
            wider than the operand's where the caller sums cotangents, so that sums round once.
          params: the static parameters.
          device_kind: the kind of device.

        Returns:
          A cotangent in the shape of its operand for each that `wrt` asks for, else None.
        """
        raise Unsupported("it has no kernel for vjp")
