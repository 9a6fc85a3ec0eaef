"""The equation that a user sees: named, with the parameters that differ from the defaults."""

from typing import Any

import jax

from cases import SMALL
from jax_ragged import ragged_attention
from programs import pullback

OPERANDS = SMALL.operands()


def _text(fun: Any, *args: Any) -> str:
    return " ".join(str(jax.make_jaxpr(fun)(*args)).split())


def test_call() -> None:
    text = _text(ragged_attention, *OPERANDS)
    assert "= ragged_attention[ params=RaggedAttentionParams() ]" in text
    assert text.count("=") <= 2  # the equation stands by itself


def test_parameters() -> None:
    def run(*operands: Any) -> Any:
        return ragged_attention(*operands, softmax_scale=0.5, logits_soft_cap=30, block_size=128)

    expected = "RaggedAttentionParams(softmax_scale=0.5, logits_soft_cap=30.0, block_size=128)"
    assert expected in _text(run, *OPERANDS)


def test_derivatives() -> None:
    text = _text(pullback(ragged_attention), OPERANDS, ragged_attention(*OPERANDS))
    assert "= ragged_attention[ params=RaggedAttentionParams() ]" in text
    assert "= ragged_attention_vjp[ given=('out', 'max_logits', 'denominator')" in text
    assert "wrt=('query', 'key', 'value')" in text


def test_vmap() -> None:
    text = _text(
        jax.vmap(ragged_attention, (0, None, None, None, None)), OPERANDS.query[None], *OPERANDS[1:]
    )
    assert text.count("ragged_attention[") == 1
