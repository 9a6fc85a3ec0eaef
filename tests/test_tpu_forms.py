"""The TPU kernels on every form of cache: interpreted against the oracle, compiled by libtpu."""

import dataclasses
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # no public reader of races
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

import oracle
from benchmarks.tpu_cases import FORMS, TOPOLOGIES, Scheduled
from cases import Case, Operands, assert_close, assert_results, covering, tiered
from jax_ragged import ragged_attention as _ragged_attention
from jax_ragged.lowering.tpu import choice, forward
from programs import cache_sized, devices, made, optimisations

# Operands come by list and by name.
ragged_attention: Any = _ragged_attention


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of cache.

    Attributes:
      page: positions of a page, or None.
      layout: the order of dimensions.
      dtype: of quantised keys and values, or None.
      shared: the dimensions of the scales that share one, of (positions, heads).
    """

    page: int | None = None
    layout: Literal["BSHD", "BHSD"] = "BSHD"
    dtype: str | None = None
    shared: tuple[bool, bool] = (False, False)

    def __str__(self) -> str:
        words = [self.page, self.layout, self.dtype, *(self.shared if any(self.shared) else ())]
        return "-".join(str(x) for x in words if x is not None)


def _scales(x: np.ndarray[Any, Any], shared: tuple[bool, bool]) -> np.ndarray[Any, Any]:
    """Scales [B, S, Hkv] that bring x [B, S, Hkv, D] to 100, with 1 where they are shared."""
    axes = (3, *((0, 1) if shared[0] else ()), *((2,) if shared[1] else ()))
    largest = np.abs(x).max(axis=axes, keepdims=True)[..., 0]
    return np.asarray(largest / 100, np.float32)


def formed(case: Case, form: Form) -> tuple[Operands, list[Any], dict[str, Any]]:
    """A case's dense operands; and query, key and value in a form, and its keywords.

    Outside of the windows lie NaN, or any numbers with scales of NaN. Pages are in random order,
    and entries of the table outside of the windows are no pages.
    """
    rng = np.random.default_rng(0)
    dense = case.operands()
    # Pages may have more positions than the case has.
    dense = dense._replace(lengths=np.minimum(dense.lengths, case.S))
    inside = oracle.inside(dense.query, case.S, dense.lengths, dense.starts)[:, :, None]
    arrays: dict[str, Any] = {"key": dense.key, "value": dense.value}
    if form.dtype is not None:
        for name in ("key", "value"):
            x = arrays[name].astype(np.float32)
            scale = _scales(x, form.shared)
            x = np.asarray((x / scale[..., None]).round().astype(jnp.dtype(form.dtype)))
            arrays[name], arrays[f"{name}_scale"] = x, scale
            exact = x.astype(np.float64) * scale[..., None]
            dense = dense._replace(**{name: exact})
    for name, x in arrays.items():
        if x.shape[1] == case.S and jnp.issubdtype(x.dtype, jnp.floating):
            mask = inside.reshape(*inside.shape, *(1,) * (x.ndim - 3))
            arrays[name] = np.where(mask, x, np.nan).astype(x.dtype)
    if form.page is not None:
        W = -(-case.S // form.page)
        table = rng.permutation(case.B * W + 2)[: case.B * W].reshape(case.B, W)
        for name, x in arrays.items():
            if x.shape[1] == case.S:
                rest = [(0, 0)] * (x.ndim - 2)
                x = np.pad(x, ((0, 0), (0, W * form.page - case.S), *rest))
                pool = np.full((case.B * W + 2, form.page, *x.shape[2:]), 77).astype(x.dtype)
                pool[table] = x.reshape(case.B, W, form.page, *x.shape[2:])
                arrays[name] = pool
        padded = np.pad(inside[..., 0], ((0, 0), (0, W * form.page - case.S)))
        used = padded.reshape(case.B, W, form.page).any(axis=2)
        arrays["page_table"] = np.where(used, table, -1).astype(np.int32)
    if form.layout == "BHSD":
        for name in set(arrays) - {"page_table"}:
            arrays[name] = arrays[name].swapaxes(1, 2)
    cache = [dense.query, arrays.pop("key"), arrays.pop("value")]
    return dense, list(map(jnp.asarray, cache)), {**arrays, "cache_layout": form.layout}


_SIZES: dict[str, Any] = {"S": 300, "D": 128, "Dv": 128}
# Queries of their own windows, heads of one and of several tokens in a register, a soft cap.
CASES = {
    case.name: case
    for case in (
        Case("tokens", (300, 129, 0), (0, 64, 0), Hq=8, Hkv=2, **_SIZES),
        Case("eight_heads", (300, 65), (7, 0), Hq=16, Hkv=8, **_SIZES),
        Case("sixteen_heads", (300, 65), (7, 0), Hq=32, Hkv=16, **_SIZES),
        Case("not_dividing_the_lanes", (300, 65), (7, 0), Hq=24, Hkv=24, **_SIZES),
        Case("mha", (300, 129), (3, 0), Hq=32, Hkv=32, **_SIZES),
        Case("one_head", (300, 255), (0, 250), Hq=5, Hkv=1, **_SIZES),
        Case("whole_blocks", (384, 129), (0, 64), Hq=8, Hkv=2, S=384, D=128, Dv=128),
        Case("sequence", (300, 129), (128, 7), Hq=4, Hkv=2, S=300, D=64, Dv=80),
        Case("mixed", (300, 129), (128, 7), Hq=4, Hkv=4, S=300, D=128, Dv=256),
        Case(
            "queries",
            ((300, 128, 9), (5, 0, 2**30)),
            ((130, 0, -3), (3, 0, 129)),
            Q=3,
            Hq=8,
            Hkv=4,
            logits_soft_cap=2.0,
            **_SIZES,
        ),
        Case("bfloat16", (300, 129), (0, 64), Hq=8, Hkv=8, dtype="bfloat16", **_SIZES),
        Case(
            "bfloat16_queries",
            ((300, 128),) * 2,
            ((130, 0),) * 2,
            Q=2,
            Hq=32,
            Hkv=4,
            dtype="bfloat16",
            **_SIZES,
        ),
    )
}
_INT8 = {"dtype": "int8"}
ROWS = [
    ("tokens", Form(16)),
    ("queries", Form(48, "BHSD")),
    ("mixed", Form(128, "BHSD", "int8", (False, True))),
    ("bfloat16", Form(128, dtype="int8")),
    *((name, Form(layout="BHSD")) for name in ("tokens", "sequence", "queries", "one_head")),
    *((name, Form(16)) for name in ("eight_heads", "one_head", "queries", "bfloat16")),
    *((name, Form(128)) for name in ("tokens", "sequence", "mixed", "bfloat16_queries")),
    *((name, Form(512)) for name in ("tokens", "sequence")),
    *((name, Form(64, "BHSD")) for name in ("tokens", "mha", "bfloat16")),
    ("whole_blocks", Form(64)),
    *((name, Form(dtype="int8")) for name in ("tokens", "eight_heads", "mha", "sequence")),
    *((name, Form(dtype="int8")) for name in ("one_head", "queries", "bfloat16_queries")),
    *(("eight_heads", Form(dtype="int8", shared=x)) for x in ((True, False), (True, True))),
    *(("tokens", Form(128, dtype="int8", shared=x)) for x in ((True, False), (False, True))),
    *(("queries", Form(16, layout, "int8")) for layout in ("BSHD", "BHSD")),
    *(("bfloat16", Form(None, "BSHD", x)) for x in ("float8_e4m3fn", "float8_e5m2")),
    ("bfloat16", Form(256, "BHSD", "float8_e4m3fn")),
]
DEFAULT = ROWS[:4]
IDS = [f"{name}-{form}" for name, form in ROWS]


def _no_race() -> bool:
    races = interpret_pallas_call.races
    return races is not None and not races.races_found


def _interpreted() -> Any:
    return pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait"
        )
    )


@pytest.mark.parametrize(("name", "form"), tiered(ROWS, DEFAULT), ids=IDS)
def test_values(name: str, form: Form) -> None:
    """Values, with NaN outside of the windows, in scales too, and no race."""
    case = CASES[name]
    dense, cache, keywords = formed(case, form)
    keywords |= {**case.params, "implementation": "kernel"}
    with _interpreted():
        results = jax.block_until_ready(
            ragged_attention(*cache, dense.lengths, dense.starts, **keywords)
        )
    # Sums of 256 products in float32 err by more than 1e-6 of a logit of 1. The oracle's values are
    # those that scales give in float64; the kernel rounds each product with a scale to float32.
    tol = 4e-6 if case.dtype == "float32" else None
    assert_results(results, case, dense, tol=tol)
    assert _no_race()


@pytest.mark.parametrize(
    ("name", "form", "by_head"),
    tiered(
        [
            (name, Form(dtype="int8", shared=shared), by_head)
            for name in (
                *("tokens", "eight_heads", "sixteen_heads", "not_dividing_the_lanes"),
                *("mha", "queries"),
            )
            for shared in ((False, False), (True, False), (False, True))
            for by_head in (False, True)
        ],
        [("sixteen_heads", Form(dtype="int8"), False)],
    ),
    ids=str,
)
def test_readings_of_bytes(
    name: str, form: Form, by_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All heads together and each by itself give the same, whichever the model prefers."""

    def sizes(*call: Any, **_: Any) -> list[Any]:
        return [choice.Sizes(*call, by_head=by_head)]

    monkeypatch.setattr(forward, "readings", sizes)
    # A static parameter that no other program has, so that JAX finds none of them in its caches.
    mask_value = -1.25e30 if by_head else -1.75e30
    case = dataclasses.replace(CASES[name], mask_value=mask_value)
    dense, cache, keywords = formed(case, form)
    keywords |= {**case.params, "implementation": "kernel"}
    with _interpreted():
        results = jax.block_until_ready(
            ragged_attention(*cache, dense.lengths, dense.starts, **keywords)
        )
    assert_results(results, case, dense, tol=4e-6)  # as in `test_values`
    assert _no_race()


_DERIVED = [
    ("tokens", Form(16)),
    ("queries", Form(128, "BHSD", "int8")),
    ("sequence", Form(128)),
    ("eight_heads", Form(16, dtype="int8")),
    ("mixed", Form(128, "BHSD", "int8")),
]


@pytest.mark.parametrize(
    ("name", "form"), tiered(_DERIVED, _DERIVED[1:2]), ids=[f"{n}-{f}" for n, f in _DERIVED]
)
def test_derivatives_of_the_query(name: str, form: Form) -> None:
    """The tangent and the gradient through all three results."""
    case = CASES[name]
    dense, (query, *cache), keywords = formed(case, form)
    keywords |= {**case.params, "implementation": "kernel"}
    bars = case.cotangents()

    def call(query: jax.Array) -> Any:
        return tuple(ragged_attention(query, *cache, dense.lengths, dense.starts, **keywords))

    query_dot = np.random.default_rng(1).standard_normal(query.shape).astype(query.dtype)
    with _interpreted():
        _, dots = jax.jvp(call, (query,), (jnp.asarray(query_dot),))
        (query_bar,) = jax.vjp(call, query)[1](tuple(map(jnp.asarray, bars)))
    zeros = [np.zeros(x.shape) for x in (dense.key, dense.value)]
    expected = oracle.jvp(*dense, (query_dot, *zeros), **case.definition)
    # As for values, and the terms of a derivative cancel.
    for x, want in zip(dots, expected, strict=True):
        assert_close(x, want, 1e-5, scale=1 + float(np.abs(want).max()))
    want = oracle.vjp(*dense, bars, **case.definition).query
    assert_close(query_bar, want, 1e-5, scale=1 + float(np.abs(want).max()))


@pytest.mark.parametrize(
    "form", tiered([Form(layout="BHSD"), Form(16), Form(dtype="float8_e4m3fn")], [])
)
def test_gradients_of_the_cache(form: Form) -> None:
    """They are in the form of the cache: in place, or through the dense one."""
    case = CASES["tokens"]
    dense, (query, *cache), keywords = formed(case, form)
    moving = {"query": query, "key": cache[0], "value": cache[1]}
    if form.dtype is not None:
        moving = {name: jnp.asarray(keywords.pop(name)) for name in ("key_scale", "value_scale")}
        keywords |= {"query": query, "key": cache[0], "value": cache[1]}

    def grads(implementation: str) -> Any:
        def call(moving: Any) -> Any:
            operands: Any = keywords | moving | {"lengths": dense.lengths, "starts": dense.starts}
            results = ragged_attention(**operands, implementation=implementation)
            return sum(x.sum() for x in (results.out, results.denominator))

        return jax.grad(call)(moving)

    with _interpreted():
        got = grads("kernel")
    want = grads("reference")
    for name, x in want.items():
        assert_close(got[name], x, 1e-5, scale=1 + float(np.abs(x).max()), name=name)


def test_mapped_table() -> None:
    """Beams with tables of their own read one pool."""
    case = dataclasses.replace(CASES["tokens"], lengths=(300, 129), starts=(0, 64))
    dense, cache, keywords = formed(case, Form(64))
    table = jnp.asarray(keywords.pop("page_table"))
    keywords |= {**case.params, "implementation": "kernel"}

    def call(table: jax.Array) -> jax.Array:
        out = ragged_attention(
            *cache, dense.lengths, dense.starts, page_table=table, **keywords
        ).out
        assert isinstance(out, jax.Array)
        return out

    with _interpreted():
        out = jax.vmap(call)(jnp.stack([table, table[::-1]]))
        first, second = call(table), call(table[::-1])
    np.testing.assert_array_equal(np.asarray(out), np.asarray(jnp.stack([first, second])))


def _compiled(generation: str, case: Scheduled) -> tuple[Any, Any]:
    operands = case.operands(4, 8192, SingleDeviceSharding(devices(generation)[0]))
    lowered = jax.jit(case.call).lower(operands)
    with optimisations(True):
        return lowered.compile(), operands


_FORMS: list[dict[str, Any]] = [
    {"layout": "BHSD"},
    {"page": 128},
    {"page": 256, "layout": "BHSD"},
    {"dtype": "int8"},
    {"dtype": "int8", "layout": "BHSD", "page": 128},
]


def _heads_and_dims() -> list[tuple[str, Scheduled]]:
    """Generations, heads, head dimensions and forms: every combination of three, or of two.

    Three on the newest versions of JAX, and of libtpu with them.
    """
    rows = [
        row
        for row in itertools.product(
            TOPOLOGIES, (1, 2, 4, 8, 16), (64, 80, 96, 128, 192, 256), range(len(_FORMS))
        )
        if row[1:] != (4, 256, 3)  # XLA would copy it: refused
    ]
    chosen = covering(rows, 3 if jax.__version_info__ >= (0, 12) else 2)
    return [
        (generation, Scheduled(Hkv if Hkv >= 16 else 4 * Hkv, Hkv, D, **_FORMS[form]))
        for generation, Hkv, D, form in chosen
    ]


_COMPILED = [*itertools.product(TOPOLOGIES, FORMS), *_heads_and_dims()]
_COMPILED_DEFAULT = [
    ("v5e", FORMS[0]),
    ("v4", Scheduled(32, 8, 128, dtype="int8")),
    ("7x", Scheduled(64, 8, 64, layout="BHSD")),
    ("v6e", Scheduled(32, 8, 128, page=128, dtype="int8")),
]


@pytest.mark.parametrize(("generation", "case"), tiered(_COMPILED, _COMPILED_DEFAULT), ids=str)
def test_reads_in_place(generation: str, case: Scheduled) -> None:
    """No copy of cache, pool or scales, whatever its form."""
    program, operands = _compiled(generation, case)
    assert "tpu_custom_call" in program.as_text()
    read = [operands.key, *([] if operands.key_scale is None else [operands.key_scale])]
    least = min(math.prod(x.shape) for x in read)
    assert cache_sized(program, least // 2) == []


def test_scales_of_short_pages_are_gathered() -> None:
    """XLA keeps pages of less than 128 positions in the lanes of scales: these alone are moved."""
    program, operands = _compiled("v5e", Scheduled(32, 8, 128, page=16, dtype="int8"))
    assert cache_sized(program, math.prod(operands.key_scale.shape) // 2) != []
    assert cache_sized(program, math.prod(operands.key.shape) // 2) == []


def test_a_gathered_pool_is_found() -> None:
    """The twin of `test_reads_in_place` whose pages are gathered in front of the call."""
    case = Scheduled(32, 8, 128, page=64)
    operands = case.operands(4, 2048, SingleDeviceSharding(devices("v5e")[0]))

    def gathered(operands: Any) -> Any:
        key, value = (
            x[operands.page_table].reshape(4, 2048, 8, 128) for x in (operands.key, operands.value)
        )
        return ragged_attention(
            operands.query, key, value, operands.lengths, implementation="kernel"
        )

    with optimisations(True):
        program: Any = jax.jit(gathered).lower(operands).compile()
    size = math.prod(operands.key.shape)
    assert [n for n, _ in made(program.as_text(), "gather", "fusion", "copy") if n >= size // 2]


@pytest.mark.parametrize("generation", tiered(TOPOLOGIES, ["v5e"]))
@pytest.mark.parametrize("D", tiered([128, 64], [128]))
def test_scan_over_a_stack_of_layers(generation: str, D: int) -> None:
    """The recipe of docs/caches.md: a donated stack, written in place and read as pages."""
    L, B, S, Hq, Hkv = 4, 4, 2048, 32, 8
    sharding = SingleDeviceSharding(devices(generation)[0])

    row = np.arange(B)

    def written(cache: Any, i: Any, new: Any, lengths: Any) -> Any:
        if D % 128 == 0:
            return cache.at[i, row, lengths].set(new)
        # XLA keeps positions in the lanes then, and copies the stack for a scatter.
        for b in row:
            token = new[b][None, None, None]
            cache = jax.lax.dynamic_update_slice(cache, token, (i, int(b), lengths[b], 0, 0))
        return cache

    def step(keys: Any, values: Any, x: Any, new: Any, lengths: Any, *, read: bool) -> Any:
        def layer(carry: Any, i: Any) -> Any:
            keys, values, x = carry
            keys, values = (written(cache, i, new[i], lengths) for cache in (keys, values))
            if read:
                pools = [c.reshape(L * B, S, Hkv, D) for c in (keys, values)]
                table = {"page_table": (i * B + row)[:, None]}
            else:
                pools, table = [keys[i], values[i]], {}
            x = ragged_attention(x, *pools, lengths + 1, implementation="kernel", **table).out
            return (keys, values, x), None

        return jax.lax.scan(layer, (keys, values, x), jnp.arange(L))[0]

    def temporary(read: bool) -> Any:
        def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        stack, x, new = array(L, B, S, Hkv, D), array(B, Hq, D), array(L, B, Hkv, D)
        jitted = jax.jit(step, donate_argnums=(0, 1), static_argnames="read")
        lowered = jitted.lower(stack, stack, x, new, array(B, dtype=jnp.int32), read=read)
        with optimisations(True):
            program: Any = lowered.compile()
        return program.memory_analysis().temp_size_in_bytes

    cache = 2 * B * S * Hkv * D
    assert temporary(read=True) < cache // 4
    # The twin: a layer's cache is sliced out of the stack.
    assert temporary(read=False) >= cache


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Scheduled(64, 8, 64, page=64), "pages of 64 positions side by side in the lanes"),
        (Scheduled(16, 4, 256, dtype="int8"), "XLA would copy the cache"),
        (Scheduled(32, 8, 128, page=20), "multiple of 8 positions.*these have 20"),
        (Scheduled(8, 2, 128, page=5, dtype="int8"), "multiple of 8 positions"),
    ],
    ids=str,
)
def test_refused(case: Scheduled, reason: str) -> None:
    """Forms that no kernel reads in place are refused with the reason."""
    operands = case.operands(4, 8000, SingleDeviceSharding(devices("v5e")[0]))
    with pytest.raises(NotImplementedError, match=reason):
        jax.jit(case.call).lower(operands)


@pytest.mark.parametrize(
    ("generation", "page", "dtype", "tile"),
    tiered(
        [("v4", 24, "int8", 32), ("v6e", 144, "float8_e5m2", 32), ("7x", 24, "bfloat16", 16)],
        [("7x", 40, "bfloat16", 16)],
    ),
)
def test_pages_that_cut_tiles(generation: str, page: int, dtype: str, tile: int) -> None:
    """Of a head dimension of several registers, whole tiles are copied, or parts of one."""

    def lowered(page: int) -> Any:
        case = Scheduled(6, 3, 256, page=page, dtype=dtype)
        operands = case.operands(2, 6 * page, SingleDeviceSharding(devices(generation)[0]))
        return jax.jit(case.call).lower(operands)

    reason = f"pages of {page} would cut them.*Use pages of a multiple of {tile} positions"
    with pytest.raises(NotImplementedError, match=reason):
        lowered(page)
    for fitting in (tile // 2, 3 * tile):
        assert "tpu_custom_call" in lowered(fitting).compile().as_text()
