"""Forms of caches under meshes, export and donation, and what their compiled CPU programs hold."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec as P

import sharded
from cases import FLOAT32_SUMMED, assert_close, assert_results, tiered
from forms import Arrays, Form, FormCase, Stored
from jax_ragged import RaggedAttention, ragged_attention
from programs import collectives, compiled_text, made, temporary_bytes

# Divisible by a mesh of 2 x 4.
_SIZES: dict[str, Any] = {"Hq": 8, "Hkv": 4, "D": 8, "Dv": 12, "block_size": 8}


def _formed(form: Form) -> FormCase:
    windows = ((20, 0, 7, 9), (3, 0, 6, -4))
    return FormCase(f"mesh-{form}", *windows, S=20, logits_soft_cap=2.0, form=form, **_SIZES)


SHARDED = [
    _formed(Form(5, "BSHD", None, None, "shared")),
    _formed(Form(4, "BHSD", "int8", "token", "clamped")),
    _formed(Form(10, "BSHD", "float8_e4m3fn", "head")),
    _formed(Form(None, "BHSD", "int8", "page")),
    _formed(Form(None, "BSHD", "mixed", "tensor")),
]
every_form = pytest.mark.parametrize(
    "case", tiered(SHARDED, SHARDED[1:2]), ids=lambda case: str(case.form)
)


def _specs(stored: Stored) -> dict[str, P]:
    """Rows over "data", heads over "model"; pools have all pages on every device."""
    form, rows = stored.case.form, None if stored.table is not None else "data"
    specs = {"query": P("data", "model"), "lengths": P("data"), "starts": P("data")}
    specs["page_table"] = P("data")
    for name in ("key", "value", "key_scale", "value_scale"):
        x = stored.arrays.get(name)
        if x is None:
            continue
        heads = (rows, None, "model") if form.layout == "BSHD" else (rows, "model", None)
        specs[name] = {0: P(), 1: P("model")}.get(x.ndim, P(*heads))
    return {name: specs[name] for name in stored.arrays}


def _assert_vjp(grads: Arrays, stored: Stored, cotangents: Any) -> None:
    for name, want, tol in stored.expected_vjp(cotangents):
        # Twice: sums over shards add the errors of two.
        assert_close(grads[name], want, 2 * tol, scale=1, name=name)


def _pullback(stored: Stored, **params: Any) -> Any:
    keywords = stored.case.params | params

    def run(arrays: Arrays, cotangents: Any) -> Any:
        moving = {name: arrays[name] for name in stored.differentiable}
        _, pull = jax.vjp(lambda m: tuple(ragged_attention(**(arrays | m), **keywords)), moving)
        return pull(cotangents)[0]

    return run


class TestMeshes:
    """Rows and heads over a mesh; nothing of a pool or cache is moved."""

    @staticmethod
    def _placed(mesh: Any, stored: Stored, bars: Any = ()) -> tuple[Arrays, Any]:
        specs = _specs(stored)
        arrays = {n: sharded.place(mesh, x, *specs[n]) for n, x in stored.arrays.items()}
        return arrays, tuple(sharded.place(mesh, x, "data", "model") for x in bars)

    @every_form
    def test_explicit(self, case: FormCase) -> None:
        stored, bars = case.stored(), case.cotangents()
        mesh = sharded.make_mesh(AxisType.Explicit)
        with jax.set_mesh(mesh):
            arrays, placed = self._placed(mesh, stored, bars)
            run = functools.partial(ragged_attention, **case.params)
            results = jax.jit(lambda x: run(**x))(arrays)
            assert not collectives(compiled_text(lambda x: run(**x), arrays))
            grads = jax.jit(_pullback(stored))(arrays, placed)
        assert_results(results, case, stored.dense)
        _assert_vjp(grads, stored, bars)
        for name, grad in grads.items():
            assert jax.typeof(grad) == jax.typeof(arrays[name])

    @every_form
    def test_automatic(self, case: FormCase) -> None:
        stored, bars = case.stored(), case.cotangents()
        mesh = sharded.make_mesh(AxisType.Auto)
        arrays, placed = self._placed(mesh, stored, bars)
        params: dict[str, Any] = {"partition": P("data", "model"), "implementation": "kernel"}
        run = functools.partial(ragged_attention, **case.params, **params)
        with jax.set_mesh(mesh):
            results = jax.jit(lambda x: run(**x))(arrays)
            assert not collectives(compiled_text(lambda x: run(**x), arrays))
            grads = jax.jit(_pullback(stored, **params))(arrays, placed)
        assert_results(results, case, stored.dense)
        _assert_vjp(grads, stored, bars)

    @every_form
    def test_shard_map(self, case: FormCase) -> None:
        stored, bars = case.stored(), case.cotangents()
        mesh = sharded.make_mesh(AxisType.Auto)
        out: Any = P("data", "model")
        specs = _specs(stored)
        run = functools.partial(ragged_attention, **case.params)
        mapped = jax.shard_map(
            lambda x: run(**x), mesh=mesh, in_specs=(specs,), out_specs=RaggedAttention(*[out] * 3)
        )
        assert_results(jax.jit(mapped)(stored.arrays), case, stored.dense)
        inside = jax.shard_map(
            _pullback(stored),
            mesh=mesh,
            in_specs=(specs, out),
            out_specs={name: specs[name] for name in stored.differentiable},
        )
        _assert_vjp(jax.jit(inside)(stored.arrays, bars), stored, bars)

    def test_replicated_scale_of_split_heads(self) -> None:
        """Every device holds the scale of each head: it takes its own."""
        case = SHARDED[2]
        stored = case.stored()
        mesh = sharded.make_mesh(AxisType.Explicit)
        with jax.set_mesh(mesh):
            arrays, _ = self._placed(mesh, stored)
            for name in stored.scales:
                arrays[name] = sharded.place(mesh, stored.arrays[name])
            run = functools.partial(ragged_attention, **case.params)
            results = jax.jit(lambda x: run(**x))(arrays)
            text = compiled_text(lambda x: run(**x), arrays)
        assert_results(results, case, stored.dense)
        assert not collectives(text)


@pytest.mark.parametrize("case", [SHARDED[1], SHARDED[0]], ids=lambda case: str(case.form))
def test_export_with_any_number_of_pages_and_rows(case: FormCase) -> None:
    """One program for every size of the pool, of the batch and of the page table."""
    stored = case.stored()
    b, p, w = export.symbolic_shape("b, p, w")
    sizes = {"query": (b,), "lengths": (b,), "starts": (b,), "page_table": (b, w)}
    types = {
        name: jax.ShapeDtypeStruct(
            (*sizes.get(name, (p,)), *x.shape[len(sizes.get(name, (p,))) :]), x.dtype
        )
        for name, x in stored.arrays.items()
    }
    run = functools.partial(ragged_attention, **case.params)
    exported = export.export(jax.jit(lambda x: run(**x)))(types)
    read = export.deserialize(exported.serialize())
    assert_results(read.call(stored.arrays), case, stored.dense)
    # Another pool, batch and table.
    fewer = FormCase(
        "fewer", case.lengths[1:3], case.starts[1:3] if case.starts else None, S=3 * case.S,
        logits_soft_cap=2.0, form=case.form, **_SIZES,
    )  # fmt: skip
    other = fewer.stored()
    assert other.arrays["key"].shape[0] != stored.arrays["key"].shape[0]
    assert_results(read.call(other.arrays), fewer, other.dense)


# Large enough that the loop over blocks runs, and that what has the size of a cache stands out.
LARGE = [
    FormCase(f"large-{form}", (4000, 9), (3, 0), Hq=8, Hkv=2, S=4096, D=32, Dv=32,
             dtype=dtype, form=form)
    for form, dtype in (
        (Form(16), "float32"),
        (Form(1, "BHSD"), "float32"),
        (Form(64, "BHSD", "int8", "token"), "float32"),
        (Form(256, "BSHD", "float8_e4m3fn", "head"), "float32"),
        (Form(None, "BSHD", "float8_e5m2"), "float32"),
        (Form(None, "BHSD"), "float32"),
        (Form(None, "BHSD", "int8", "tensor"), "bfloat16"),
        (Form(32), "bfloat16"),
    )
]  # fmt: skip
every_large = pytest.mark.parametrize(
    "case", tiered(LARGE, LARGE[2:4]), ids=lambda case: f"{case.form}-{case.dtype}"
)
_MADE = ("copy", "convert", "fusion", "gather", "transpose", "broadcast", "concatenate")


def _dense_call(case: FormCase) -> Any:
    """What users do without the forms: make the dense cache first."""

    def run(arrays: Arrays) -> Any:
        dense = []
        for name in ("key", "value"):
            x, scale = arrays[name], arrays.get(f"{name}_scale")
            x = x.astype(case.dtype)
            if scale is not None:
                x = x * jnp.broadcast_to(scale, x.shape[:-1])[..., None].astype(case.dtype)
            x = x.swapaxes(1, 2) if case.form.layout == "BHSD" else x
            if "page_table" in arrays:
                x = x[arrays["page_table"]].reshape(case.B, case.S, *x.shape[2:])
            dense.append(x)
        key, value = dense
        windows = arrays["lengths"], arrays["starts"]
        return ragged_attention(arrays["query"], key, value, *windows).out

    return run


def _call(case: FormCase) -> Any:
    return lambda arrays: ragged_attention(**arrays, **case.params).out


@pytest.mark.optimized
@every_large
def test_no_copy_of_the_cache(case: FormCase) -> None:
    """Of no form; a dense cache made in front of the call shows."""
    arrays = case.stored().arrays
    cache = arrays["key"].size

    def largest(run: Any) -> int:
        return max(size for size, _ in made(compiled_text(run, arrays), *_MADE))

    assert largest(_call(case)) < cache / 8
    assert largest(_dense_call(case)) >= case.B * case.S * case.Hkv * case.D


@pytest.mark.optimized
@every_large
def test_memory_of_derivatives(case: FormCase) -> None:
    """Of forward mode and of the gradient of the query: nothing of the size of the cache."""
    arrays = case.stored().arrays
    rest = {name: x for name, x in arrays.items() if name != "query"}

    def attend(query: Any) -> Any:
        return ragged_attention(query, **rest, **case.params).out

    def gradient(query: Any) -> Any:
        return jax.grad(lambda x: attend(x).astype("float32").sum())(query)

    def forward_mode(query: Any) -> Any:
        return jax.jvp(attend, (query,), (query,))[1]

    dense = arrays | {"query": arrays["query"]}
    least = min(arrays["key"].nbytes, arrays["key"].size)
    for run in (gradient, forward_mode):
        assert temporary_bytes(run, arrays["query"]) < least / 2
    assert temporary_bytes(_dense_call(case), dense) > least / 2


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_pool_is_donated_in_a_scan(dtype: str | None) -> None:
    """Steps of decoding in lax.scan write to the donated pool and read it, without a copy."""
    stored = FormCase("scan", (60, 9), (3, 0), S=64, D=32, Dv=32, form=Form(16)).stored()
    table, lengths = (jnp.asarray(stored.arrays[name]) for name in ("page_table", "lengths"))
    query = jnp.asarray(stored.arrays["query"])
    pool = jnp.tile(stored.arrays["key"], (64, 1, 1, 1)).astype(dtype or "float32")
    named: Arrays = {"page_table": table}
    if dtype is not None:
        named |= dict.fromkeys(("key_scale", "value_scale"), jnp.float32(0.02))

    def step(pool: Any, x: Any, i: Any, before: bool = False, **more: Any) -> Any:
        at = lengths + i
        new = x[:, :2] if dtype is None else jnp.clip(x[:, :2] * 50, -127, 127)
        written = pool.at[table[jnp.arange(2), at // 16], at % 16].set(new.astype(pool.dtype))
        read = pool if before else written
        return written, ragged_attention(x, read, written, at + 1, **named, **more).out

    def decode(pool: Any, query: Any, before: bool) -> Any:
        def body(carry: Any, i: Any) -> Any:
            return step(carry[0], carry[1], i, before, block_size=16), None

        return jax.lax.scan(body, (pool, query), jnp.arange(4))[0]

    def temporary(before: bool) -> int:
        run = jax.jit(lambda pool, query: decode(pool, query, before), donate_argnums=0)
        analysis = run.lower(pool, query).compile().memory_analysis()
        assert analysis is not None
        return int(analysis.temp_size_in_bytes)

    assert temporary(before=False) < pool.nbytes / 8
    # A program that still reads the pool as it was before the update has to copy it.
    assert temporary(before=True) >= pool.nbytes
    expected, x = pool, query
    for i in range(4):
        expected, x = step(expected, x, i, implementation="reference")
    run = jax.jit(lambda pool, query: decode(pool, query, before=False), donate_argnums=0)
    after, out = run(pool, query)
    assert pool.is_deleted()
    # A number on the edge of two of int8 may be cut off to either.
    tol = FLOAT32_SUMMED if dtype is None else 0.02
    assert_close(out, x, tol)
    assert_close(after, expected, tol)
