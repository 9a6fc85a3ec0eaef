"""checkpoint: the results are named, so that a policy saves them and nothing runs twice."""

from typing import Any

import jax
import pytest

import oracle
from cases import FLOAT32, FLOAT32_DERIVATIVE, SMALL_QUERIES, assert_close
from programs import counts, op, pullback

NAMES = ("ragged_attention_out", "ragged_attention_max_logits", "ragged_attention_denominator")
POLICIES = jax.checkpoint_policies
SAVED = POLICIES.save_only_these_names(*NAMES)
CASE = SMALL_QUERIES


def _gradients(policy: Any) -> Any:
    return pullback(jax.checkpoint(op(CASE), policy=policy))


@pytest.mark.parametrize(
    "policy",
    [None, SAVED, POLICIES.everything_saveable],
    ids=["none", "named", "everything"],
)
def test_gradients(policy: Any) -> None:
    operands, bars = CASE.operands(), CASE.cotangents()
    expected = oracle.vjp(*operands, bars, **CASE.definition)
    for run in (_gradients(policy), jax.jit(_gradients(policy))):
        for got, want in zip(run(operands, bars), expected, strict=True):
            assert_close(got, want, FLOAT32_DERIVATIVE)


@pytest.mark.parametrize(
    ("policy", "runs"),
    [
        (None, 2),
        (POLICIES.nothing_saveable, 2),
        (POLICIES.save_only_these_names("another"), 2),
        (POLICIES.save_only_these_names(*NAMES[:2]), 2),
        (SAVED, 1),
        (POLICIES.everything_saveable, 1),
    ],
    ids=["none", "nothing", "another", "two_named", "all_named", "everything"],
)
def test_forward_runs(policy: Any, runs: int) -> None:
    """Unsaved values are computed again; with the three names saved, nothing is."""

    def loss(query: Any) -> Any:
        out, _, _ = jax.checkpoint(op(CASE), policy=policy)(query, *CASE.operands()[1:])
        return (out**2).sum()

    run = jax.jit(jax.grad(loss))
    found = counts(run, CASE.operands().query)
    assert found == {"ragged_attention": runs, "ragged_attention_vjp": 1}
    # The compiled program does not undo it.
    text = run.lower(CASE.operands().query).as_text()
    assert text.count("call @ragged_attention(") + text.count("call @ragged_attention_") == runs + 1


def test_names_are_in_the_jaxpr() -> None:
    text = str(jax.make_jaxpr(_gradients(SAVED))(CASE.operands(), CASE.cotangents()))
    for name in NAMES:
        assert f"name={name}" in text


def test_under_vmap_and_scan() -> None:
    """A stack of layers, each under checkpoint, as a model has them."""
    operands = CASE.operands()

    def layer(query: Any, _: None) -> Any:
        out = op(CASE)(query, *operands[1:])[0]
        return query + out.sum(-1, keepdims=True), None

    def loss(query: Any, body: Any) -> Any:
        return (jax.lax.scan(body, query, None, length=3)[0] ** 2).sum()

    saved = jax.checkpoint(layer, policy=SAVED)
    want = jax.grad(loss)(operands.query, layer)
    got = jax.grad(loss)(operands.query, saved)
    assert_close(got, want, FLOAT32)
