"""The implementations that the conformance tests run over, each as this machine can run it."""

import collections
import contextlib
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

import jax_ragged
from cases import Case
from forms import FORMS, WIDE_FORMS, FormCase, chosen, random_forms
from jax_ragged import (
    RaggedAttention,
    Unsupported,
    ragged_attention,
    reference_ragged_attention,
)
from jax_ragged.lowering import dispatch
from jax_ragged.lowering.contract import ByOperand, ByResult, Operands, Residuals
from jax_ragged.lowering.params import Implementation, RaggedAttentionParams, statistics_dtype


def gpus() -> list[Any]:
    """The GPUs of this machine."""
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


@dataclasses.dataclass(frozen=True)
class Runner:
    """One way to run the op, and its share of the conformance tests.

    Attributes:
      name: the first part of a test's id.
      values: the names of the cases whose values are tested; None for all.
      derivatives: the names of those whose derivatives are.
      default: the names of those of them that are in the default tier; None for all.
      implementation: the argument of the op.
      kernel: the end of the name of the scope of its kernels, if it has any.
      forms: the cases with forms of caches whose values are tested.
      form_derivatives: the names of those of them whose derivatives are.
      default_forms: the names of those whose values are in the default tier.
      default_derived: of how many of these, the first ones, the derivatives are, too.
    """

    name: str
    values: Collection[str] | None = None
    derivatives: Collection[str] | None = None
    default: Collection[str] | None = None
    implementation: Implementation | None = None
    kernel: str | None = None
    forms: Collection[FormCase] = ()
    form_derivatives: Collection[str] = ()
    default_forms: Sequence[str] = ()
    default_derived: int = 2

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Where calls run on this implementation."""
        with jax.default_device(jax.devices("cpu")[0]):
            yield

    def bound(self, params: dict[str, Any]) -> Callable[..., RaggedAttention]:
        """The op with its keyword arguments."""
        keywords = {"implementation": self.implementation, **params}
        return functools.partial(ragged_attention, **keywords)

    def takes(self, case: Case, *, derivatives: bool) -> bool:
        """Whether a case is tested."""
        names = self.derivatives if derivatives else self.values
        return names is None or case.name in names

    def marks(self, case: Case) -> list[pytest.MarkDecorator]:
        """The marks of the tests of a case."""
        return [] if self.default is None or case.name in self.default else [pytest.mark.full]

    def scopes(self, case: Case, operation: str) -> tuple[str, ...]:
        """Ends of the name of a scope, of which one shows which lowering ran."""
        return ("reference",)

    def form_marks(self, case: FormCase, *, derivatives: bool) -> list[pytest.MarkDecorator]:
        """The marks of the tests of a case with a form of cache."""
        own = [mark for mark in self.marks(case) if mark.name != "full"]
        default = self.default_forms[: self.default_derived if derivatives else None]
        return own if case.name in default else [*own, pytest.mark.full]

    def form_params(self, case: FormCase) -> dict[str, Any]:
        """The static parameters of the call. Block sizes of the table suit the CPU."""
        return {**case.params, "block_size": None}

    def reads(self, case: FormCase, operation: str, wrt: Sequence[str]) -> bool | None:
        """Whether its kernels run a program of an operation, with the forward that it needs.

        The derivatives are with respect to the operands named in wrt.
        A test fails where this is not so; None is for a lowering of which it is not known.
        """
        return False


class Definition(Runner):
    """The op by its definition, which JAX's own rules differentiate."""

    def bound(self, params: dict[str, Any]) -> Callable[..., RaggedAttention]:
        """As of every runner. The definition knows no blocks."""
        definition = {k: v for k, v in params.items() if k != "block_size"}
        return functools.partial(reference_ragged_attention, **definition)

    def takes(self, case: Case, *, derivatives: bool) -> bool:
        """As of every runner."""
        return case.block_size is None and super().takes(case, derivatives=derivatives)

    def scopes(self, case: Case, operation: str) -> tuple[str, ...]:
        """None: it is no primitive."""
        return ()


class Reference(Runner):
    """The reference, which knows no blocks."""

    def takes(self, case: Case, *, derivatives: bool) -> bool:
        """As of every runner."""
        return case.block_size is None and super().takes(case, derivatives=derivatives)


class Cpu(Runner):
    """The CPU's kernels, compiled as for users."""

    def marks(self, case: Case) -> list[pytest.MarkDecorator]:
        """As of every runner."""
        return [*super().marks(case), pytest.mark.optimized]

    def scopes(self, case: Case, operation: str) -> tuple[str, ...]:
        """Its kernels take all that there is to compute."""
        return ("cpu_kernel",) if case.B and case.S and case.Q != 0 else ("reference",)

    def form_params(self, case: FormCase) -> dict[str, Any]:
        """As of every runner."""
        return case.params

    def reads(self, case: FormCase, operation: str, wrt: Sequence[str]) -> bool | None:
        """As of every runner: it takes all forms."""
        return True


class Tpu(Runner):
    """The TPU's kernels, interpreted on the CPU."""

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """As of every runner."""
        with super().context(), pltpu.force_tpu_interpret_mode():
            yield

    def scopes(self, case: Case, operation: str) -> tuple[str, ...]:
        """Its kernels take two dtypes."""
        taken = case.B and case.S and case.Q != 0 and case.dtype in ("float32", "bfloat16")
        return ("tpu_kernel",) if taken else ("reference",)

    def reads(self, case: FormCase, operation: str, wrt: Sequence[str]) -> bool | None:
        """As of every runner: all forms but pages that XLA would move."""
        page = case.form.page
        unit = 128 if case.D % 128 or case.Dv % 128 else 8
        of_unit = page is None or page % unit == 0
        return case.dtype in ("float32", "bfloat16") and of_unit


class Gpu(Runner):
    """The GPU's kernels, on a GPU, compiled as for users."""

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """As of every runner."""
        with jax.default_device(gpus()[0]):
            yield

    def marks(self, case: Case) -> list[pytest.MarkDecorator]:
        """As of every runner."""
        return [*super().marks(case), pytest.mark.gpu, pytest.mark.optimized]

    def scopes(self, case: Case, operation: str) -> tuple[str, ...]:
        """The tests of the GPU say what its kernels take; few cases of the table suit them."""
        query, key, value = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.operands()[:3])
        if case.Q is None:
            query = query.update(shape=(case.B, 1, case.Hq, case.D))
        params = RaggedAttentionParams(**case.params)
        target = dispatch.Target("cuda", gpus()[0].device_kind)
        refused = refusal(target, operation, query, key, value, params)
        return ("cuda_kernel",) if refused is None else ("reference",)

    def reads(self, case: FormCase, operation: str, wrt: Sequence[str]) -> bool | None:
        """As of every runner: what docs/gpu.md says of forms."""
        narrow = case.form.dtype is not None
        of_query = tuple(wrt) == ("query",) and operation == "vjp"
        scaled = case.form.scale is not None
        derived = not narrow or (of_query and (case.dtype == "bfloat16" or not scaled))
        unit = 32 if narrow else 16
        sizes = case.D % unit == case.Dv % unit == 0 and (case.form.page or 16) % 16 == 0
        of_dtype = case.dtype in ("bfloat16", "float16")
        return of_dtype and sizes and (operation == "forward" or derived)


class Own(Runner):
    """A lowering of one's own, registered for the CPU; its refusals pass, and are reported."""

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """As of every runner."""
        with super().context(), warnings.catch_warnings():
            # It may refuse any call, with advice too.
            warnings.filterwarnings("ignore", "ragged_attention: the reference runs")
            yield

    def scopes(self, case: Case, operation: str) -> tuple[str, ...]:
        """As of every runner."""
        return ("cpu_kernel", "reference")

    def reads(self, case: FormCase, operation: str, wrt: Sequence[str]) -> bool | None:
        """As of every runner."""
        return None


# The TPU interpreter takes seconds a case. The kernels have tests of their own besides.
_TPU_DERIVATIVES = (
    "empty_windows",
    "queries",
    "soft_cap_scale",
    "bfloat16_queries",
    "tiles_queries",
)
_TPU_VALUES = (
    "gqa",
    "windows",
    "empty_windows",
    "past_the_end",
    "before_the_start",
    "mha",
    "mqa",
    "queries",
    "value_head_dim",
    "no_positions",
    "soft_cap_scale",
    "mask_value",
    "bfloat16_queries",
    "float64",
    "tiles_gqa",
    "tiles_queries",
    "tiles_bfloat16",
)

# Windows of every kind, each way that heads and queries stand, dtypes, and sizes of accelerators.
# test_cpu runs some of the others through the CPU's blocks in the default tier.
_DEFAULT = (
    "windows",
    "empty_windows",
    "past_the_end",
    "before_the_start",
    "mqa",
    "queries",
    "queries_mixed",
    "value_head_dim",
    "no_positions",
    "no_queries",
    "block_divides",
    "soft_cap_scale",
    "large_logits",
    "bfloat16_queries",
    "float16",
    "float64",
    "tiles_bfloat16",
)
_TPU_DEFAULT = (
    "windows",
    "queries",
    "no_positions",
    "bfloat16_queries",
    "float64",
    "tiles_bfloat16",
)
_FEW = (*_TPU_DEFAULT, "empty_windows", "soft_cap_scale", "large_logits", "float16")

# Forms such that every value of every property occurs, or every pair of two properties' values
# (for derivatives: of the size of a page, the layout and the dtype).
_SINGLES, _PAIRS = chosen(FORMS, 1), chosen(FORMS, 2, of=3)
_WIDE_SINGLES, _WIDE_PAIRS = chosen(WIDE_FORMS, 1), chosen(WIDE_FORMS, 2)
# For accelerators, with a few sizes that do not suit their tiles.
_WIDE = (*WIDE_FORMS, *(case for case in FORMS if case.name in _SINGLES))
# Those for which XLA on CPUs has no product unless the reference prevents it.
_SWAPPED = [x.name for x in WIDE_FORMS if x.dtype == "bfloat16" and str(x.form).endswith("BHSD")]
_RANDOM = random_forms(32)
# The interpreter takes seconds for each.
_TPU_FORMS = {*_WIDE_PAIRS, *_WIDE_SINGLES, *_SINGLES}


def _named(*names: str) -> tuple[FormCase, ...]:
    return tuple(case for case in (*FORMS, *WIDE_FORMS) if case.name in names)


RUNNERS: tuple[Runner, ...] = (
    Definition(
        "definition",
        derivatives=("gqa", "empty_windows", "queries", "soft_cap_scale", "bfloat16", "float64"),
        default=_FEW,
    ),
    Reference(
        "reference",
        default=_FEW,
        implementation="reference",
        forms=_named(*_PAIRS, *_WIDE_PAIRS, *_SWAPPED),
        form_derivatives=(*_SINGLES, *_WIDE_SINGLES, *_SWAPPED),
        default_forms=(_SWAPPED[0], *_SINGLES[:2]),
    ),
    Cpu(
        "cpu",
        default=_DEFAULT,
        kernel="cpu_kernel",
        # All on the newest versions of JAX; every pair of properties' values on the others.
        forms=FORMS if jax.__version_info__ >= (0, 12) else _named(*chosen(FORMS, 2)),
        form_derivatives=_PAIRS,
        default_forms=_SINGLES,
    ),
    Tpu(
        "tpu",
        _TPU_VALUES,
        _TPU_DERIVATIVES,
        default=_TPU_DEFAULT,
        kernel="tpu_kernel",
        forms=_named(*_TPU_FORMS),
        form_derivatives=_WIDE_SINGLES,
        default_forms=_WIDE_SINGLES[:1],
        default_derived=0,  # test_tpu_forms has some
    ),
    Gpu(
        "gpu",
        kernel="cuda_kernel",
        forms=(*_WIDE, *_RANDOM),
        form_derivatives=(*_WIDE_PAIRS, *_SINGLES, *(case.name for case in _RANDOM)),
        default_forms=_WIDE_PAIRS,
    ),
)


class _Counted(jax_ragged.Lowering):
    """A lowering that counts the programs that it took and refused, by operation."""

    def __init__(self, lowering: jax_ragged.Lowering) -> None:
        self.dense_only = lowering.dense_only
        self.taken: collections.Counter[str] = collections.Counter()
        self.refused: dict[str, collections.Counter[str]] = {}
        for operation in ("forward", "jvp", "vjp"):
            setattr(self, operation, self._counted(operation, getattr(lowering, operation)))

    def _counted(self, operation: str, run: Callable[..., Any]) -> Callable[..., Any]:
        refused = self.refused[operation] = collections.Counter()

        def counted(*arguments: Any) -> Any:
            try:
                results = run(*arguments)
            except Unsupported as refusal:
                refused[refusal.reason] += 1
                raise
            self.taken[operation] += 1
            return results

        return counted

    def report(self) -> Iterator[str]:
        """Lines for the end of a test run."""
        for operation, refused in self.refused.items():
            yield f"{operation}: took {self.taken[operation]} programs"
            yield from (f"  refused {n} programs: {reason}" for reason, n in refused.items())


def use_only(name: str) -> _Counted:
    """Leaves one lowering to the conformance tests: your own, registered for the CPU.

    Args:
      name: where it is, `module:attribute`: an instance of a subclass of `jax_ragged.Lowering`.

    Returns:
      The registered lowering, with counts.
    """
    global RUNNERS
    module, _, attribute = name.partition(":")
    counted = _Counted(getattr(importlib.import_module(module), attribute))
    jax_ragged.register_lowering("cpu", counted)
    RUNNERS = (
        Own(
            "own",
            kernel="cpu_kernel",
            forms=_WIDE,
            form_derivatives=(*_WIDE_PAIRS, *_SINGLES),
            default_forms=_SINGLES,
        ),
    )
    return counted


def refusal(
    target: dispatch.Target,
    operation: str,
    query: Any,
    key: Any,
    value: Any,
    params: RaggedAttentionParams,
) -> Unsupported | None:
    """How a platform refuses an operation on folded operands of these types, or None."""
    B, Q, Hq = query.shape[:3]
    windows: Any = jax.ShapeDtypeStruct((B, Q), "int32")
    statistic: Any = jax.ShapeDtypeStruct((B, Q, Hq), statistics_dtype(query.dtype))
    out: Any = jax.ShapeDtypeStruct((B, Q, Hq, value.shape[3]), statistic.dtype)
    operands = Operands(query, key, value, windows, windows)
    residuals = Residuals(query, key, value, windows, windows, out, statistic, statistic)
    out_bar = out.update(dtype=params.result_dtype(query.dtype))
    dtypes = ByOperand(query.dtype, key.dtype, value.dtype)
    try:
        run = getattr(target.lowering(operands, params), operation)
        if operation == "forward":
            jax.eval_shape(lambda x: run(x, params, target.device_kind), operands)
        elif operation == "jvp":
            dots = ByOperand(query, key, value)
            jax.eval_shape(lambda x, t: run(x, t, params, target.device_kind), residuals, dots)
        else:
            bars = ByResult(out_bar, statistic, statistic)
            jax.eval_shape(
                lambda x, t: run(x, t, dtypes, params, target.device_kind), residuals, bars
            )
    except Unsupported as refused:
        return refused
    return None
