"""What every plan knows of its call: sizes, dtype, parameters and the form of the cache."""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp

from jax_ragged.lowering.cache import heads_axis
from jax_ragged.lowering.contract import Operands, Residuals
from jax_ragged.lowering.gpu.forms import Form
from jax_ragged.lowering.params import RaggedAttentionParams


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything static about one call that does not depend on the schedule.

    Attributes:
      B: rows of the cache.
      Q: queries of a row.
      Hq, Hkv: heads of query, and of key and value.
      D, Dv: head dimensions of query and key, and of value.
      dtype: of query.
      params: the static parameters.
      form: how the cache lies in memory.
    """

    B: int
    Q: int
    Hq: int
    Hkv: int
    D: int
    Dv: int
    dtype: Any
    params: RaggedAttentionParams
    form: Form

    @classmethod
    def of(
        cls, operands: Operands | Residuals, params: RaggedAttentionParams, **choices: Any
    ) -> Self:
        """What the operands tell, with the choices of a schedule, by name."""
        query, key, value = operands[:3]
        B, Q, Hq, D = query.shape
        return cls(
            B, Q, Hq, key.shape[heads_axis(params)], D, value.shape[3], jnp.dtype(query.dtype),
            params, Form.of(operands, params), **choices,
        )  # fmt: skip

    @property
    def S(self) -> int:
        """Positions of a row."""
        return self.form.S

    @property
    def G(self) -> int:
        """Query heads for each head of the cache."""
        return self.Hq // self.Hkv
