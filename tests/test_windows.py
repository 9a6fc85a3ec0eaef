"""windows_from_mask: the windows that masks hold, and the masks that are no windows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import sharded
from cases import CASES, assert_results
from jax_ragged import Windows, ragged_attention, windows_from_mask

S = 6


def _mask(lengths: Any, starts: Any = 0) -> Any:
    t = np.arange(S)
    return (t >= np.asarray(starts)[..., None]) & (t < np.asarray(lengths)[..., None])


LENGTHS = np.array([[0, 1, 6], [6, 4, 3]])
STARTS = np.array([[0, 0, 0], [5, 2, 3]])


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32"])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray, np.ndarray.tolist])
@pytest.mark.parametrize("jit", [False, True])
def test_windows_of_a_mask(dtype: str, array: Any, jit: bool) -> None:
    """An empty window, positions 3 to 3 of the last row, is 0 to 0."""
    run: Any = jax.jit(windows_from_mask) if jit else windows_from_mask
    windows = run(array(_mask(LENGTHS, STARTS).astype(dtype)))
    assert isinstance(windows, Windows)
    np.testing.assert_array_equal(windows.lengths, [[0, 1, 6], [6, 4, 0]])
    np.testing.assert_array_equal(windows.starts, [[0, 0, 0], [5, 2, 0]])
    assert windows.lengths.dtype == windows.starts.dtype == jnp.int32


def test_all_masks_of_six_positions() -> None:
    """Those with one run of True come back from their windows; all others are errors."""
    windows = 0
    for bits in range(2**S):
        mask = np.array([bits >> t & 1 for t in range(S)], bool)
        runs = "".join("01"[int(x)] for x in mask).split("0")
        if sum(map(bool, runs)) > 1:
            with pytest.raises(ValueError, match=r"^windows_from_mask: .*mask\[:\].*merge"):
                windows_from_mask(mask)
            continue
        lengths, starts = windows_from_mask(mask)
        np.testing.assert_array_equal(_mask(lengths, starts), mask)
        windows += 1
    assert windows == 1 + S * (S + 1) // 2


def test_no_positions() -> None:
    np.testing.assert_array_equal(windows_from_mask(np.zeros((2, 0), bool)), np.zeros((2, 2)))


def test_attention_is_of_the_windows() -> None:
    case = CASES[0]
    query, key, value, lengths, starts = case.operands()
    begin = jnp.zeros_like(lengths) if starts is None else starts
    t = jnp.arange(case.S)
    mask = (t >= begin[..., None]) & (t < lengths[..., None])

    def run(query: Any, key: Any, value: Any, mask: Any) -> Any:
        lengths, starts = windows_from_mask(mask)
        return ragged_attention(query, key, value, lengths, starts, **case.params)

    results = jax.jit(run)(query, key, value, mask)
    assert_results(results, case)


GAP: Any = np.array([[1, 1, 0], [1, 0, 1]], bool)


def test_checkify_finds_a_gap_under_jit() -> None:
    """Alone, under vmap and in a scan; and it raises no false alarm."""

    def scanned(mask: Any) -> Any:
        return jax.lax.map(windows_from_mask, mask)

    for run in (windows_from_mask, jax.vmap(windows_from_mask), scanned):
        checked = checkify.checkify(jax.jit(run))
        checked(~GAP | True)[0].throw()
        with pytest.raises(checkify.JaxRuntimeError, match="must be neighbours"):
            checked(GAP)[0].throw()


def test_gap_under_jit_is_filled() -> None:
    """Without checkify, as the docstring says: from the first True to the last."""
    lengths, starts = jax.jit(windows_from_mask)(GAP)
    np.testing.assert_array_equal(lengths, [2, 3])
    np.testing.assert_array_equal(starts, [0, 0])


def test_numbers_in_a_program_are_checked_while_tracing() -> None:
    with pytest.raises(ValueError, match=r"mask\[1, :\]"):
        jax.jit(lambda: windows_from_mask(GAP))()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_split_masks(kind: AxisType) -> None:
    mask = jnp.asarray(_mask(np.arange(4)))
    mesh = sharded.make_mesh(kind)
    with jax.set_mesh(mesh):
        placed = jax.device_put(mask, NamedSharding(mesh, P("data")))
        for run in (windows_from_mask, jax.jit(windows_from_mask)):
            np.testing.assert_array_equal(run(placed).lengths, np.arange(4))


def test_in_shard_map() -> None:
    mask = _mask(np.arange(4))
    run = jax.shard_map(
        windows_from_mask,
        mesh=sharded.make_mesh(AxisType.Auto),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    np.testing.assert_array_equal(jax.jit(run)(mask).lengths, np.arange(4))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (jnp.ones((2, 3)), TypeError, "mask must be boolean, or integers.*got float32.*mask >= 0"),
        (jnp.array(True), ValueError, r"mask must have shape \[..., S\]; got a scalar"),
    ],
)
def test_errors(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^windows_from_mask: {message}"):
        windows_from_mask(mask)
