"""Which lowering runs: the platform's where it takes the call, else the reference.

One policy holds on all platforms. `implementation=None` takes the platform's kernel, or the
reference for a call that the kernel refuses: the refusal is logged, and is a warning if the caller
can lift it. `"kernel"` raises the refusal. `"reference"` asks for the reference.
"""

import dataclasses
import importlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.interpreters import mlir

from jax_ragged.lowering._compat import device_kind, interpret_mode
from jax_ragged.lowering.cache import require_dense
from jax_ragged.lowering.contract import (
    ByOperand,
    ByResult,
    Lowering,
    Operands,
    Residuals,
    Unsupported,
)
from jax_ragged.lowering.params import RaggedAttentionParams, statistics_dtype
from jax_ragged.lowering.reference import REFERENCE

# By platform: a lowering, or the module whose LOWERING it is. A module is imported when a program
# is first lowered for its platform, since Pallas is slow to import.
_LOWERINGS: dict[str, Lowering | str] = {
    "cpu": "jax_ragged.lowering.cpu",
    "tpu": "jax_ragged.lowering.tpu",
    "cuda": "jax_ragged.lowering.gpu",
}


def register(platform: str, lowering: Lowering) -> None:
    """Sets the lowering of a platform, in place of an earlier one."""
    _LOWERINGS[platform] = lowering


def lowering_for(platform: str) -> Lowering | None:
    """The lowering of a platform, or None for one without kernels."""
    found = _LOWERINGS.get(platform)
    if isinstance(found, str):
        found = _LOWERINGS[platform] = importlib.import_module(found).LOWERING
    return found


@dataclasses.dataclass(frozen=True)
class Target:
    """The place that one call is lowered for; it runs the operations there.

    Attributes:
      platform: the platform's name in JAX, or "default" for one without kernels.
      device_kind: the kind of the devices, or None where they are not known.
      unpartitioned_devices: the number of devices over which the compiler would have to partition
        the call. It can partition the reference only.
      summed: whether each result is summed over the shards of a mesh afterwards; empty for none.
    """

    platform: str
    device_kind: str | None = None
    unpartitioned_devices: int = 1
    summed: tuple[bool, ...] = ()

    def forward(self, operands: Operands, params: RaggedAttentionParams) -> ByResult[jax.Array]:
        """Runs `Lowering.forward`."""
        results: ByResult[jax.Array] = self._run("forward", params, operands)
        return results

    def jvp(
        self,
        residuals: Residuals,
        tangents: ByOperand[jax.Array | None],
        params: RaggedAttentionParams,
    ) -> ByResult[jax.Array]:
        """Runs `Lowering.jvp`."""
        dots: ByResult[jax.Array] = self._run("jvp", params, residuals, tangents)
        return dots

    def vjp(
        self,
        residuals: Residuals,
        cotangents: ByResult[jax.Array | None],
        wrt: ByOperand[Any],
        params: RaggedAttentionParams,
    ) -> ByOperand[jax.Array | None]:
        """Runs `Lowering.vjp`."""
        bars: ByOperand[jax.Array | None] = self._run("vjp", params, residuals, cotangents, wrt)
        return bars

    def _run(self, operation: str, params: RaggedAttentionParams, *arguments: Any) -> Any:
        if params.implementation == "reference":
            return self._call(REFERENCE, operation, "reference", params, *arguments)
        try:
            lowering = self.lowering(arguments[0], params)
            name = f"{self.platform}_kernel"
            return self._call(lowering, operation, name, params, *arguments)
        except Unsupported as refusal:
            refuse(refusal, operation, self.platform, params)
        return self._call(REFERENCE, operation, "reference", params, *arguments)

    def _call(
        self,
        lowering: Lowering,
        operation: str,
        name: str,
        params: RaggedAttentionParams,
        *arguments: Any,
    ) -> Any:
        # The scope shows in HLO metadata and profiles which lowering was chosen.
        with jax.named_scope(f"ragged_attention_{operation}_{name}"):
            results = getattr(lowering, operation)(*arguments, params, self.device_kind)
        _check_results(lowering, operation, results, params, *arguments)
        logging.vlog(1, "ragged_attention %s: %s", operation, name)
        return results

    def lowering(self, arrays: Operands | Residuals, params: RaggedAttentionParams) -> Lowering:
        """The platform's lowering, after the checks that all platforms share.

        Raises:
          Unsupported: if there is none, or for a call that no kernel takes.
        """
        lowering = lowering_for(self.platform)
        if lowering is None:
            raise Unsupported("the platform has no kernels")
        if lowering.dense_only:
            require_dense(arrays, params)
        for name, x in arrays._asdict().items():
            if x is None:
                continue
            if not all(isinstance(size, int) for size in x.shape):
                raise Unsupported(
                    f"its kernels need sizes known while tracing, and {name} has shape {x.shape}"
                )
            if 0 in x.shape:
                raise Unsupported(f"there is nothing to compute, since {name} has shape {x.shape}")
        if self.unpartitioned_devices > 1:
            raise Unsupported(
                f"its kernel cannot be partitioned over {self.unpartitioned_devices} devices by "
                "the compiler",
                "Call ragged_attention with partition=PartitionSpec(batch axes, head axes) under "
                "jax.set_mesh(mesh), inside jax.shard_map, or on a mesh of explicit axes.",
            )
        return lowering


def _check_results(
    lowering: Lowering, operation: str, results: Any, params: RaggedAttentionParams, *arguments: Any
) -> None:
    """Raises TypeError for results that are not as `Lowering` says: a fault of the lowering."""
    arrays = arguments[0]
    if operation == "vjp":
        wrt = arguments[2]
        expected: Any = ByOperand(
            *(
                None if dtype is None else (getattr(arrays, name).shape, jnp.dtype(dtype))
                for name, dtype in wrt._asdict().items()
            )
        )
    else:
        statistics = arrays.query.shape[:3], statistics_dtype(arrays.query.dtype)
        out = (
            (*arrays.query.shape[:3], arrays.value.shape[3]),
            params.result_dtype(arrays.query.dtype),
        )
        expected = ByResult(out, statistics, statistics)

    def described(type_: Any) -> str:
        return "None" if type_ is None else f"{type_[1]}{list(type_[0])}"

    name = f"{type(lowering).__name__}.{operation}"
    if not isinstance(results, type(expected)):
        raise TypeError(
            f"ragged_attention: {name} must return a {type(expected).__name__}; "
            f"got {type(results).__name__}."
        )
    for field, want in expected._asdict().items():
        x = getattr(results, field)
        got = (x.shape, x.dtype) if isinstance(x, jax.Array) else None
        if got != want or (x is None) != (want is None):
            raise TypeError(
                f"ragged_attention: {name} must return {field} as {described(want)}; got "
                f"{described(got) if got or x is None else type(x).__name__}. "
                "jax_ragged.Lowering says what each method returns."
            )


def refuse(
    refusal: Unsupported, operation: str, platform: str, params: RaggedAttentionParams
) -> None:
    """Answers a refusal by the policy: raises it for "kernel", else logs it, and perhaps warns."""
    advice = f"{refusal.advice} " if refusal.advice else ""
    if params.implementation == "kernel":
        raise NotImplementedError(
            f"ragged_attention: implementation='kernel' cannot be honoured on {platform}: "
            f"{refusal.reason}. {advice}"
            "Pass implementation='reference', or None to let the lowering choose."
        ) from refusal
    logging.vlog(1, "ragged_attention %s: no kernel (%s)", operation, refusal.reason)
    if refusal.advice:
        warnings.warn(
            f"ragged_attention: the reference runs on {platform}: {refusal.reason}. {advice}"
            "Pass implementation='reference' to have it without this warning.",
            stacklevel=2,
        )


def target_of(
    platform: str,
    ctx: mlir.LoweringRuleContext,
    unpartitioned_devices: int = 1,
    summed: tuple[bool, ...] = (),
) -> Target:
    """The target of a lowering rule, as its context stands."""
    if platform == "cpu" and interpret_mode() is not None:
        platform = "tpu"
    return Target(platform, device_kind(ctx), unpartitioned_devices, summed)


def higher_order_target(params: RaggedAttentionParams, summed: tuple[bool, ...] = ()) -> Target:
    """The target of derivatives of second and higher order: the reference.

    No lowering has kernels for them. The reference forms the logits of all S positions. `summed`
    is as in `Target`.

    Raises:
      NotImplementedError: while tracing, for `implementation="kernel"`.
    """
    refusal = Unsupported("derivatives of second and higher order have no kernel")
    refuse(refusal, "higher order", "every platform", params)
    return Target("default", summed=summed)
