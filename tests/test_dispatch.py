"""Which lowering runs, and how the dispatcher answers a refusal: one policy for all platforms."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from cases import FLOAT32_SUMMED, SMALL, assert_results
from jax_ragged import Lowering, Unsupported, ragged_attention, register_lowering
from jax_ragged.lowering import dispatch
from jax_ragged.lowering.contract import ByResult, Operands
from jax_ragged.lowering.dispatch import Target
from jax_ragged.lowering.params import RaggedAttentionParams
from jax_ragged.lowering.reference import REFERENCE
from programs import lowered_text


class _Refusing(Lowering):
    """It refuses every call, with or without advice."""

    def __init__(self, advice: str | None) -> None:
        self.advice = advice

    def forward(
        self, operands: Operands, params: RaggedAttentionParams, device_kind: str | None
    ) -> ByResult[jax.Array]:
        raise Unsupported("its kernel takes nothing", self.advice)


@pytest.fixture
def restored() -> Iterator[None]:
    """Puts the CPU's own lowering back after a test that registers another."""
    own = dispatch.lowering_for("cpu")
    assert own is not None
    jax.clear_caches()
    yield
    register_lowering("cpu", own)
    jax.clear_caches()


def _attend(implementation: Any = None) -> Any:
    return ragged_attention(*SMALL.operands(), implementation=implementation, **SMALL.params)


@pytest.mark.usefixtures("restored")
class TestRefusal:
    def test_none_takes_the_reference(self, caplog: pytest.LogCaptureFixture) -> None:
        """Without advice there is nothing that the caller could do: a log line, no warning."""
        register_lowering("cpu", _Refusing(None))
        logging.set_verbosity(logging.DEBUG)
        try:
            assert_results(_attend(), SMALL)
        finally:
            logging.set_verbosity(logging.WARNING)
        assert "forward: no kernel (its kernel takes nothing)" in caplog.text
        assert "forward: reference" in caplog.text

    def test_none_warns_where_the_caller_can_lift_it(self) -> None:
        register_lowering("cpu", _Refusing("Pass something else."))
        with pytest.warns(UserWarning, match=r"takes nothing\. Pass something else\. Pass impl"):
            results = _attend()
        assert_results(results, SMALL)

    def test_kernel_raises(self) -> None:
        register_lowering("cpu", _Refusing("Pass something else."))
        with pytest.raises(NotImplementedError, match=r"on cpu: its kernel takes nothing\. Pass s"):
            _attend("kernel")

    def test_reference_asks_no_kernel(self) -> None:
        register_lowering("cpu", _Refusing("Pass something else."))
        assert_results(_attend("reference"), SMALL)

    def test_operation_without_a_kernel(self) -> None:
        """The base class refuses; forward has a kernel here, its derivatives have none."""

        class Forward(Lowering):
            def forward(
                self, operands: Operands, params: RaggedAttentionParams, device_kind: str | None
            ) -> ByResult[jax.Array]:
                return REFERENCE.forward(operands, params, device_kind)

        register_lowering("cpu", Forward())
        query, *rest = SMALL.operands()

        def loss(query: Any, implementation: Any) -> jax.Array:
            return ragged_attention(query, *rest, implementation=implementation).out.sum()

        text = lowered_text(jax.grad(loss), query, None)
        assert "ragged_attention_forward_cpu_kernel" in text
        assert "ragged_attention_vjp_reference" in text
        with pytest.raises(NotImplementedError, match="it has no kernel for vjp"):
            jax.grad(loss)(query, "kernel")


def test_only_a_lowering_is_registered() -> None:
    with pytest.raises(TypeError, match=r"^register_lowering: .*got <class .*of type type"):
        register_lowering("cpu", Lowering)  # type: ignore[arg-type]


def test_a_platform_is_a_name() -> None:
    with pytest.raises(TypeError, match=r"^register_lowering: platform must be the name.*None"):
        register_lowering(None, Lowering())  # type: ignore[arg-type]


def test_gpu_is_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for JAX, where "gpu" is the backend, and programs are lowered for one of three."""
    monkeypatch.setattr(dispatch, "_LOWERINGS", dict(dispatch._LOWERINGS))
    traced = jax.jit(ragged_attention).trace(*SMALL.operands())

    def scopes(platform: str) -> bool:
        jax.clear_caches()
        text = traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True)
        return f"ragged_attention_forward_{platform}_kernel" in text

    gpus = ("cuda", "rocm", "oneapi")
    assert not any(map(scopes, gpus))  # float32 has no kernel there
    register_lowering("gpu", REFERENCE)
    assert all(map(scopes, gpus))
    register_lowering("cuda", Lowering())
    assert [*map(scopes, gpus)] == [False, True, True]


def test_unknown_platform() -> None:
    """JAX's own error; nothing is registered."""
    with pytest.raises(NotImplementedError, match="abacus"):
        register_lowering("abacus", Lowering())
    assert dispatch.lowering_for("abacus") is None


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"S": 0}, r"nothing to compute, since key has shape \(1, 0, 1, 4\)"),
        ({"B": 0}, r"nothing to compute, since query has shape \(0, 1, 2, 4\)"),
        ({"S": "s"}, r"sizes known while tracing, and key has shape \(1, s, 1, 4\)"),
    ],
)
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_checks_that_platforms_share(platform: str, sizes: dict[str, Any], says: str) -> None:
    B, S = sizes.get("B", 1), sizes.get("S", 6)
    if S == "s":
        (S,) = jax.export.symbolic_shape("s")
    cache: Any = jax.ShapeDtypeStruct((B, S, 1, 4), "float32")
    query: Any = jax.ShapeDtypeStruct((B, 1, 2, 4), "float32")
    windows: Any = jax.ShapeDtypeStruct((B, 1), "int32")
    with pytest.raises(Unsupported, match=says):
        Target(platform).lowering(
            Operands(query, cache, cache, windows, windows), RaggedAttentionParams()
        )


class TestHigherOrders:
    """Derivatives of second and higher order have no kernel: the reference runs, and says so."""

    @staticmethod
    def _hessian_product(implementation: Any) -> Any:
        query, *rest = SMALL.operands()

        def loss(query: Any) -> jax.Array:
            out = ragged_attention(query, *rest, implementation=implementation).out
            return jnp.sin(out).sum()

        return lambda query_dot: jax.jvp(jax.grad(loss), (jnp.asarray(query),), (query_dot,))[1]

    def test_scope_and_log(self, caplog: pytest.LogCaptureFixture) -> None:
        product, query_dot = self._hessian_product(None), jnp.ones_like(SMALL.operands().query)
        logging.set_verbosity(logging.DEBUG)
        try:
            text = lowered_text(product, query_dot)
        finally:
            logging.set_verbosity(logging.WARNING)
        assert "ragged_attention_vjp_reference" in text
        assert "ragged_attention_vjp_cpu_kernel" in text  # the first order
        assert "derivatives of second and higher order have no kernel" in caplog.text

    def test_kernel_is_refused(self) -> None:
        product, query_dot = self._hessian_product("kernel"), jnp.ones_like(SMALL.operands().query)
        with pytest.raises(NotImplementedError, match="second and higher order have no kernel"):
            product(query_dot)

    def test_reference_is_taken(self) -> None:
        query_dot = jnp.ones_like(SMALL.operands().query)
        reference, mixed = (self._hessian_product(x)(query_dot) for x in ("reference", None))
        # Two lowerings in float32, of a product of three derivatives of order 1.
        np.testing.assert_allclose(reference, mixed, rtol=0, atol=FLOAT32_SUMMED)


class _Changed(Lowering):
    """The reference, whose results are changed by a function of the operation and them."""

    dense_only = False

    def __init__(self, change: Callable[[str, Any], Any]) -> None:
        for operation in ("forward", "jvp", "vjp"):
            setattr(self, operation, functools.partial(self._run, operation))
        self.change = change

    def _run(self, operation: str, *arguments: Any) -> Any:
        return self.change(operation, getattr(REFERENCE, operation)(*arguments))


@pytest.mark.usefixtures("restored")
class TestResultsOfALowering:
    """They have the shapes and dtypes of the contract; nothing is cast or broadcast silently."""

    @pytest.mark.parametrize(
        ("operation", "change", "message"),
        [
            (
                "forward",
                lambda x: x._replace(out=x.out.astype("bfloat16")),
                r"_Changed.forward must return out as float32\[3, 1, 2, 3\]; "
                r"got bfloat16\[3, 1, 2, 3\]\. jax_ragged.Lowering says",
            ),
            (
                "forward",
                lambda x: x._replace(denominator=x.denominator[:1]),
                r"must return denominator as float32\[3, 1, 2\]; got float32\[1, 1, 2\]",
            ),
            ("forward", tuple, "_Changed.forward must return a ByResult; got tuple"),
            (
                "forward",
                lambda x: x._replace(max_logits=None),
                r"must return max_logits as float32\[3, 1, 2\]; got None",
            ),
            (
                "vjp",
                lambda x: x._replace(query=x.query[..., :1]),
                r"vjp must return query as float32\[3, 1, 2, 4\]; got float32\[3, 1, 2, 1\]",
            ),
            (
                "vjp",
                lambda x: x._replace(key=x.query),
                r"must return key as None; got float32\[3, 1, 2, 4\]",
            ),
        ],
    )
    def test_errors(self, operation: str, change: Any, message: str) -> None:
        register_lowering("cpu", _Changed(lambda name, x: change(x) if name == operation else x))
        run = _attend if operation == "forward" else jax.grad(_query_loss)
        arguments = () if operation == "forward" else (SMALL.operands().query,)
        with pytest.raises(TypeError, match=f"ragged_attention: .*{message}"):
            run(*arguments)

    def test_unchanged(self) -> None:
        register_lowering("cpu", _Changed(lambda _, x: x))
        assert_results(_attend(), SMALL)
        assert np.isfinite(jax.grad(_query_loss)(SMALL.operands().query)).all()


def _query_loss(query: Any) -> Any:
    return ragged_attention(query, *SMALL.operands()[1:], **SMALL.params).out.sum()
