"""The type of the results."""

from typing import NamedTuple

import jax
from jax import export

from jax_ragged.lowering._compat import forget_serialization


class RaggedAttention(NamedTuple):
    """The results of ragged attention.

    The log-sum-exp of the logits of a window that is not empty is
    `max_logits + jnp.log(denominator)`. `out * denominator[..., None]` is the output before it is
    normalised. `merge_partials` merges the results for parts of a window.

    Attributes:
      out: [B, (Q,) Hq, Dv] in `out_dtype`, by default the dtype of query: the normalised
        attention output.
      max_logits: [B, (Q,) Hq] in float32 (float64 for float64): the largest logit of the window,
        `mask_value` for an empty one.
      denominator: as max_logits: the sum of `exp(logit - max_logits)` over the window.
    """

    out: jax.Array
    max_logits: jax.Array
    denominator: jax.Array


_SERIALIZED_NAME = "jax_ragged.RaggedAttention"
forget_serialization(_SERIALIZED_NAME)
export.register_namedtuple_serialization(RaggedAttention, serialized_name=_SERIALIZED_NAME)
