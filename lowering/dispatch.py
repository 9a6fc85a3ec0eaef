"""Which implementation runs: the platform's kernel where it has one that can, else the reference.

A platform's module (cpu, tpu, gpu) has the functions of the reference that it makes faster, by
the same names and on the same folded arrays, and

    unsupported(operation, query, key, value, params, device_kind) -> str | None

which says why it leaves a call to the reference, or None if it takes it. What a user has to
decide, it raises as NotImplementedError instead.
"""

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from absl import logging
from jax.interpreters import mlir

from jax_ragged.lowering import reference
from jax_ragged.lowering._compat import device_kind, interpret_mode
from jax_ragged.lowering.reference import Residuals

# Imported when first lowered for: Pallas is slow to import.
_MODULES: dict[str, str] = {
    "cpu": "jax_ragged.lowering.cpu",
    "tpu": "jax_ragged.lowering.tpu",
    "cuda": "jax_ragged.lowering.gpu",
}


@functools.cache
def _module(platform: str) -> ModuleType | None:
    return importlib.import_module(_MODULES[platform]) if platform in _MODULES else None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One platform's forward, jvp and vjp, called as those of `lowering.reference`.

    Attributes:
      platform: as JAX names it, or "default" for one without kernels.
      device_kind: of the devices lowered for, or None where they are not known.
      unpartitioned_devices: over how many the compiler would have to partition the call, which
        it can the reference only.
    """

    platform: str
    device_kind: str | None = None
    unpartitioned_devices: int = 1

    def forward(self, *operands: Any, params: Any) -> reference.Arrays3:
        results: reference.Arrays3 = self._run("forward", operands, *operands, params=params)
        return results

    def jvp(self, residuals: Residuals, *rest: Any, params: Any) -> reference.Arrays3:
        tangents: reference.Arrays3 = self._run("jvp", residuals, residuals, *rest, params=params)
        return tangents

    def vjp(self, residuals: Residuals, *rest: Any, params: Any) -> reference.Optional3:
        grads: reference.Optional3 = self._run("vjp", residuals, residuals, *rest, params=params)
        return grads

    def _run(self, operation: str, operands: tuple[Any, ...], *arguments: Any, params: Any) -> Any:
        query, key, value = operands[:3]
        reason = self.why_reference(operation, query, key, value, params)
        if reason is not None and params.implementation == "kernel":
            raise NotImplementedError(
                f"ragged_attention: implementation='kernel' cannot be honoured on {self.platform}: "
                f"{reason}. Pass implementation='reference', or None to let the lowering choose."
            )
        name = "reference" if reason is not None else f"{self.platform}_kernel"
        module = reference if reason is not None else _module(self.platform)
        logging.vlog(1, "ragged_attention %s: %s (%s)", operation, name, reason or "supported")
        run: Callable[..., Any] = getattr(module, operation)
        # The scope shows in HLO metadata and profiles which implementation was chosen.
        with jax.named_scope(f"ragged_attention_{operation}_{name}"):
            return run(*arguments, params=params, **self._context(module))

    def _context(self, module: ModuleType | None) -> dict[str, Any]:
        """What a module whose kernels differ by kind of device is told besides."""
        return {"device_kind": self.device_kind} if hasattr(module, "BY_DEVICE_KIND") else {}

    def why_reference(
        self, operation: str, query: Any, key: Any, value: Any, params: Any
    ) -> str | None:
        """Why the reference runs this call, or None if the platform's kernel does."""
        if params.implementation == "reference":
            return "the reference was asked for"
        module = _module(self.platform)
        if module is None:
            return "the platform has no kernels"
        if not hasattr(module, operation):
            return f"the platform has no kernel for {operation}"
        reason: str | None = module.unsupported(
            operation, query, key, value, params, self.device_kind
        )
        if reason is None and self.unpartitioned_devices > 1:
            reason = (
                f"its kernel cannot be partitioned over {self.unpartitioned_devices} devices by "
                "the compiler. Call ragged_attention with partition=PartitionSpec(batch axes, "
                "head axes) under jax.set_mesh(mesh), inside jax.shard_map, or on a mesh of "
                "explicit axes"
            )
            if params.implementation is None:
                warnings.warn(
                    f"ragged_attention: the reference runs on {self.platform}: {reason}; or pass "
                    "implementation='reference' to have this without a warning.",
                    stacklevel=2,
                )
        return reason


def implementation_for(
    platform: str, ctx: mlir.LoweringRuleContext, unpartitioned_devices: int = 1
) -> Implementation:
    """The implementation for a platform, as the lowering context stands."""
    if platform == "cpu" and interpret_mode() is not None:
        platform = "tpu"
    return Implementation(platform, device_kind(ctx), unpartitioned_devices)
