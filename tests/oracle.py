"""Ragged attention and its derivatives in float64 numpy, by loops over rows, queries and heads.

Written from the definition, apart from all other code. Values come from the formulas alone,
tangents from the values by the complex step, cotangents from the chain rule with explicit
Jacobians of the softmax; `test_oracle.py` checks the three against each other.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Results(NamedTuple):
    """out [B, (Q,) Hq, Dv], max_logits and denominator [B, (Q,) Hq]."""

    out: Array
    max_logits: Array
    denominator: Array


class Gradients(NamedTuple):
    """Cotangents of query, key and value, in their shapes."""

    query: Array
    key: Array
    value: Array


def _wide(x: npt.ArrayLike) -> Array:
    x = np.asarray(x)
    return x if np.iscomplexobj(x) else x.astype(np.float64)


def _windows(query: Array, S: int, lengths: Array, starts: Array | None) -> list[list[range]]:
    """The positions that each query of each row attends to: by row b, then query q."""
    B, Q = query.shape[:2]
    lengths = np.asarray(lengths)
    starts = np.zeros_like(lengths) if starts is None else np.asarray(starts)

    def of(x: Array, b: int, q: int) -> int:
        return int(x[b] if x.ndim == 1 else x[b, q])

    return [
        [range(max(of(starts, b, q), 0), min(of(lengths, b, q), S)) for q in range(Q)]
        for b in range(B)
    ]


def attention(
    query: Array,
    key: Array,
    value: Array,
    lengths: Array,
    starts: Array | None = None,
    *,
    softmax_scale: float = 1.0,
    logits_soft_cap: float | None = None,
    mask_value: float = -2.381976426469702e38,
) -> Results:
    """The three results by their definition, in float64 (complex128 for complex operands)."""
    query, key, value = _wide(query), _wide(key), _wide(value)
    if query.ndim == 3:
        results = attention(
            query[:, None],
            key,
            value,
            lengths,
            starts,
            softmax_scale=softmax_scale,
            logits_soft_cap=logits_soft_cap,
            mask_value=mask_value,
        )
        return Results(*(x[:, 0] for x in results))
    B, Q, Hq, _ = query.shape
    _, S, Hkv, Dv = value.shape
    windows = _windows(query, S, lengths, starts)
    dtype = np.result_type(query, key, value)
    out = np.zeros((B, Q, Hq, Dv), dtype)
    max_logits = np.full((B, Q, Hq), mask_value, dtype)
    denominator = np.zeros((B, Q, Hq), dtype)
    for b, q, h in np.ndindex(B, Q, Hq):
        window = list(windows[b][q])
        if not window:
            continue
        kv = h // (Hq // Hkv)
        logits = softmax_scale * (key[b, window, kv] @ query[b, q, h])
        if logits_soft_cap is not None:
            logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
        # argmax takes the first position that attains the maximum, as the definition does for
        # derivatives; of complex numbers (see jvp) the real part is the value.
        m = logits[np.argmax(logits.real)]
        weights = np.exp(logits - m)
        max_logits[b, q, h] = m
        denominator[b, q, h] = weights.sum()
        out[b, q, h] = (weights / weights.sum()) @ value[b, window, kv]
    return Results(out, max_logits, denominator)


def jvp(
    query: Array,
    key: Array,
    value: Array,
    lengths: Array,
    starts: Array | None,
    tangents: Sequence[Array | None],
    **params: Any,
) -> Results:
    """The tangents of the results, exact to rounding: f(x + i h x.) = f(x) + i h f.(x) + O(h^2).

    With h = 1e-100 the square vanishes and nothing is subtracted.
    """
    step = 1e-100
    moved = [
        _wide(x) if t is None else _wide(x) + 1j * step * _wide(t)
        for x, t in zip((query, key, value), tangents, strict=True)
    ]
    results = attention(moved[0], moved[1], moved[2], lengths, starts, **params)
    return Results(*(np.imag(x) / step for x in results))


def vjp(
    query: Array,
    key: Array,
    value: Array,
    lengths: Array,
    starts: Array | None,
    cotangents: Sequence[Array | None],
    *,
    softmax_scale: float = 1.0,
    logits_soft_cap: float | None = None,
    mask_value: float = -2.381976426469702e38,
) -> Gradients:
    """The cotangents of query, key and value for cotangents of the results; None is 0.

    Of complex operands it is analytic, so that the complex step gives its own tangents.
    """
    query, key, value = _wide(query), _wide(key), _wide(value)
    if query.ndim == 3:
        out_bar, m_bar, l_bar = (None if c is None else np.asarray(c)[:, None] for c in cotangents)
        grads = vjp(
            query[:, None],
            key,
            value,
            lengths,
            starts,
            (out_bar, m_bar, l_bar),
            softmax_scale=softmax_scale,
            logits_soft_cap=logits_soft_cap,
            mask_value=mask_value,
        )
        return Gradients(grads.query[:, 0], grads.key, grads.value)
    B, Q, Hq, _ = query.shape
    _, S, Hkv, Dv = value.shape
    windows = _windows(query, S, lengths, starts)
    shapes = ((B, Q, Hq, Dv), (B, Q, Hq), (B, Q, Hq))
    out_bar, m_bar, l_bar = (
        np.zeros(shape) if c is None else _wide(c)
        for shape, c in zip(shapes, cotangents, strict=True)
    )
    dtype = np.result_type(query, key, value, out_bar, m_bar, l_bar)
    query_bar, key_bar, value_bar = (np.zeros(x.shape, dtype) for x in (query, key, value))
    for b, q, h in np.ndindex(B, Q, Hq):
        window = list(windows[b][q])
        if not window:
            continue
        kv = h // (Hq // Hkv)
        k, v = key[b, window, kv], value[b, window, kv]
        scaled = softmax_scale * (k @ query[b, q, h])
        logits, slope = scaled, np.ones_like(scaled)
        if logits_soft_cap is not None:
            logits = logits_soft_cap * np.tanh(scaled / logits_soft_cap)
            slope = 1 / np.cosh(scaled / logits_soft_cap) ** 2
        first = np.argmax(logits.real)
        weights = np.exp(logits - logits[first])
        P = weights / weights.sum()
        # Jacobians with respect to the logits, a row for each element; out's is v' @ dP.
        dP = np.diag(P) - np.outer(P, P)
        dmax = np.eye(len(window))[first]
        ddenominator = weights - weights.sum() * dmax
        P_bar = v @ out_bar[b, q, h]
        logits_bar = P_bar @ dP + m_bar[b, q, h] * dmax + l_bar[b, q, h] * ddenominator
        scaled_bar = softmax_scale * slope * logits_bar
        query_bar[b, q, h] += scaled_bar @ k
        key_bar[b, window, kv] += np.outer(scaled_bar, query[b, q, h])
        value_bar[b, window, kv] += np.outer(P, out_bar[b, q, h])
    return Gradients(query_bar, key_bar, value_bar)


def vjp_tangent(
    query: Array,
    key: Array,
    value: Array,
    lengths: Array,
    starts: Array | None,
    cotangents: Sequence[Array],
    operands_dot: Sequence[Array],
    cotangents_dot: Sequence[Array],
    **params: Any,
) -> Gradients:
    """The tangent of `vjp` for tangents of query, key, value and of the cotangents.

    By the complex step, as `jvp`.
    """
    step = 1e-100
    moved = [x + 1j * step * t for x, t in zip((query, key, value), operands_dot, strict=True)]
    bars = [x + 1j * step * t for x, t in zip(cotangents, cotangents_dot, strict=True)]
    grads = vjp(moved[0], moved[1], moved[2], lengths, starts, bars, **params)
    return Gradients(*(np.imag(x) / step for x in grads))


def inside(
    query: Array, S: int, lengths: Array, starts: Array | None = None
) -> npt.NDArray[np.bool_]:
    """Which positions of each row's cache lie in a window of one of its queries: [B, S]."""
    if np.ndim(query) == 3:
        query = np.asarray(query)[:, None]
    mask = np.zeros((query.shape[0], S), bool)
    for b, windows in enumerate(_windows(query, S, lengths, starts)):
        for window in windows:
            mask[b, list(window)] = True
    return mask
