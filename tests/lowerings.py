"""The implementations that the conformance tests run over, each as this machine can run it."""

import collections
import contextlib
import dataclasses
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

import jax_ragged
from jax_ragged import (
    RaggedAttention,
    Unsupported,
    ragged_attention,
    reference_ragged_attention,
)
from jax_ragged.lowering import dispatch
from jax_ragged.lowering.contract import ByOperand, ByResult, Operands, Residuals
from jax_ragged.lowering.params import Implementation, RaggedAttentionParams, statistics_dtype


def _gpu() -> Any:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        return None


@dataclasses.dataclass(frozen=True)
class Lowering:
    """One way to run the op."""

    name: str
    implementation: Implementation | None = None

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Where calls run on this implementation; skips where there is none to run on."""
        if self.name == "gpu":
            device = _gpu()
            if device is None:
                pytest.skip("this machine has no GPU")
            with jax.default_device(device):
                yield
        elif self.name == "tpu":
            if importlib.util.find_spec("jax_ragged.lowering.tpu") is None:
                pytest.skip("there is no TPU lowering")
            from jax.experimental.pallas import tpu as pltpu

            with jax.default_device(jax.devices("cpu")[0]), pltpu.force_tpu_interpret_mode():
                yield
        else:
            with jax.default_device(jax.devices("cpu")[0]), warnings.catch_warnings():
                if self.name == "own":  # it may refuse any call, with advice too
                    warnings.filterwarnings("ignore", "ragged_attention: the reference runs")
                yield

    def bound(self, params: dict[str, Any]) -> Callable[..., RaggedAttention]:
        """The op with its keyword arguments."""
        if self.name == "definition":
            definition = {k: v for k, v in params.items() if k != "block_size"}
            return lambda *operands: reference_ragged_attention(*operands, **definition)
        keywords = {**params, "implementation": self.implementation}
        return lambda *operands: ragged_attention(*operands, **keywords)


LOWERINGS: tuple[Lowering, ...] = (
    Lowering("definition"),
    Lowering("reference", "reference"),
    Lowering("cpu"),
    Lowering("tpu"),
    Lowering("gpu"),
)


class _Counted(jax_ragged.Lowering):
    """A lowering that counts the programs that it took and refused, by operation."""

    def __init__(self, lowering: jax_ragged.Lowering) -> None:
        self.taken: collections.Counter[str] = collections.Counter()
        self.refused: dict[str, collections.Counter[str]] = {}
        for operation in ("forward", "jvp", "vjp"):
            setattr(self, operation, self._counted(operation, getattr(lowering, operation)))

    def _counted(self, operation: str, run: Callable[..., Any]) -> Callable[..., Any]:
        refused = self.refused[operation] = collections.Counter()

        def counted(*arguments: Any) -> Any:
            try:
                results = run(*arguments)
            except Unsupported as refusal:
                refused[refusal.reason] += 1
                raise
            self.taken[operation] += 1
            return results

        return counted

    def report(self) -> Iterator[str]:
        """Lines for the end of a test run."""
        for operation, refused in self.refused.items():
            yield f"{operation}: took {self.taken[operation]} programs"
            yield from (f"  refused {n} programs: {reason}" for reason, n in refused.items())


def use_only(name: str) -> _Counted:
    """Leaves one lowering to the conformance tests: your own, registered for the CPU.

    Args:
      name: where it is, `module:attribute`: an instance of a subclass of `jax_ragged.Lowering`.

    Returns:
      The registered lowering, with counts.
    """
    global LOWERINGS
    module, _, attribute = name.partition(":")
    counted = _Counted(getattr(importlib.import_module(module), attribute))
    jax_ragged.register_lowering("cpu", counted)
    LOWERINGS = (Lowering("own"),)
    return counted


def refusal(
    target: dispatch.Target,
    operation: str,
    query: Any,
    key: Any,
    value: Any,
    params: RaggedAttentionParams,
) -> Unsupported | None:
    """How a platform refuses an operation on folded operands of these types, or None."""
    B, Q, Hq = query.shape[:3]
    windows: Any = jax.ShapeDtypeStruct((B, Q), "int32")
    statistic: Any = jax.ShapeDtypeStruct((B, Q, Hq), statistics_dtype(query.dtype))
    out: Any = jax.ShapeDtypeStruct((B, Q, Hq, value.shape[3]), statistic.dtype)
    operands = Operands(query, key, value, windows, windows)
    residuals = Residuals(*operands, out, statistic, statistic)
    out_bar = out.update(dtype=params.result_dtype(query.dtype))
    dtypes = ByOperand(query.dtype, key.dtype, value.dtype)
    try:
        run = getattr(target.lowering(operands), operation)
        if operation == "forward":
            jax.eval_shape(lambda x: run(x, params, target.device_kind), operands)
        elif operation == "jvp":
            dots = ByOperand(query, key, value)
            jax.eval_shape(lambda x, t: run(x, t, params, target.device_kind), residuals, dots)
        else:
            bars = ByResult(out_bar, statistic, statistic)
            jax.eval_shape(
                lambda x, t: run(x, t, dtypes, params, target.device_kind), residuals, bars
            )
    except Unsupported as refused:
        return refused
    return None
