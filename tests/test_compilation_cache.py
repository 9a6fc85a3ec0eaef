"""No second trace, lowering or compilation: eager, jitted, and several times in one program."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax import monitoring

from cases import SMALL
from derivatives import op, pullback

pytestmark = pytest.mark.usefixtures("fast_compile")
OPERANDS, BARS = SMALL.operands(), SMALL.cotangents()


@pytest.fixture
def work() -> Iterator[list[str]]:
    """The traces, lowerings and compilations that a test causes."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event.startswith("/jax/core/compile/"):
            events.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield events
    monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    "run",
    [
        lambda: op(SMALL)(*OPERANDS),
        lambda: pullback(op(SMALL))(OPERANDS, BARS),
        lambda: jax.vmap(op(SMALL), (0, None, None, None, None))(
            OPERANDS.query[None], *OPERANDS[1:]
        ),
    ],
    ids=["call", "grad", "vmap"],
)
def test_second_eager_call_compiles_nothing(run: Callable[[], Any], work: list[str]) -> None:
    jax.clear_caches()
    run()
    assert any("backend_compile" in event for event in work)
    work.clear()
    run()
    assert not [event for event in work if "backend_compile" in event or "to_mlir" in event]


def test_calls_of_one_program_share_a_function() -> None:
    def run(query: Any) -> Any:
        return [op(SMALL)(query + i, *OPERANDS[1:])[0] for i in range(3)]

    text = jax.jit(run).lower(OPERANDS.query).as_text()
    assert text.count("func.func private @ragged_attention") == 1
    assert text.count("call @ragged_attention") == 3
