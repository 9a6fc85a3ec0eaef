"""What every plan knows of its call: sizes, dtype, parameters and the form of the cache."""

import dataclasses
from typing import Any

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

    @staticmethod
    def of(operands: Operands | Residuals, params: RaggedAttentionParams) -> "Call":
        """What the operands tell. A plan is made of its `vars` and the choices of a schedule."""
        query, key, value = operands[:3]
        B, Q, Hq, D = query.shape
        Hkv, Dv = key.shape[heads_axis(params)], value.shape[3]
        form = Form.of(operands, params)
        return Call(B, Q, Hq, Hkv, D, Dv, jnp.dtype(query.dtype), params, form)

    @property
    def S(self) -> int:
        """Positions of a row."""
        return self.form.S

    @property
    def G(self) -> int:
        """Query heads for each head of the cache."""
        return self.Hq // self.Hkv
