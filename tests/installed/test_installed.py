"""Tests of the installed package alone: it needs neither the checkout nor the extras."""

import importlib.metadata
import importlib.resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ragged
import jax_ragged.primitives


def _arrays() -> tuple[jax.Array, ...]:
    random = np.random.default_rng(0)
    shapes = ((2, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    return tuple(jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes)


def test_call_and_gradient_agree_with_the_reference() -> None:
    query, key, value = _arrays()
    lengths = jnp.array([3, 9])

    def loss(function: Any) -> Any:
        return lambda *arrays: jnp.sin(function(*arrays, lengths).out).sum()

    got, want = (
        jax.value_and_grad(loss(f), (0, 1, 2))(query, key, value)
        for f in (jax_ragged.ragged_attention, jax_ragged.reference_ragged_attention)
    )
    # Sums of a few unit-scale products in float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_equation_is_named() -> None:
    query, key, value = _arrays()
    jaxpr = jax.make_jaxpr(jax_ragged.ragged_attention)(query, key, value, jnp.array([3, 9]))
    assert jax_ragged.primitives.ragged_attention_p in [eqn.primitive for eqn in jaxpr.eqns]


def test_metadata_and_types_are_shipped() -> None:
    assert importlib.metadata.version("jax_ragged") == jax_ragged.__version__
    assert importlib.resources.files("jax_ragged").joinpath("py.typed").is_file()
    installed = [str(f) for f in importlib.metadata.files("jax_ragged") or ()]
    assert not [f for f in installed if f.startswith(("primitives", "lowering", "tests"))]
