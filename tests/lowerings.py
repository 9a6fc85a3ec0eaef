"""The implementations that the conformance tests run over, each as this machine can run it."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

from jax_ragged import RaggedAttention, ragged_attention, reference_ragged_attention
from jax_ragged.lowering.params import Implementation


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
            with jax.default_device(jax.devices("cpu")[0]):
                yield

    def bound(self, params: dict[str, Any]) -> Callable[..., RaggedAttention]:
        """The op with its keyword arguments."""
        if self.name == "definition":
            definition = {k: v for k, v in params.items() if k != "block_size"}
            return lambda *operands: reference_ragged_attention(*operands, **definition)
        keywords = {**params, "implementation": self.implementation}
        return lambda *operands: ragged_attention(*operands, **keywords)


LOWERINGS = (
    Lowering("definition"),
    Lowering("reference", "reference"),
    Lowering("cpu"),
    Lowering("tpu"),
    Lowering("gpu"),
)
