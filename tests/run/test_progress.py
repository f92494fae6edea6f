"""Progress without a terminal, and the count of compiled programs."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from r3rag_jax.run.progress import ProgressBar, num_compiled


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.mark.parametrize("live", [True, False])
def test_without_a_terminal_every_tenth_is_a_line(live: bool, console: Console) -> None:
    with ProgressBar("RL", 40, console=console, live=live) as bar:
        for step in range(40):
            bar.advance(reward=step / 3, em=50.0)
    assert lines(console)[:3] == [
        "RL 1/40  reward 0  em 50",
        "RL 4/40  reward 1  em 50",
        "RL 8/40  reward 2.333  em 50",
    ]
    assert len(lines(console)) == 11 and lines(console)[-1] == "RL 40/40  reward 13  em 50"


def test_a_resumed_phase_starts_where_it_was(console: Console) -> None:
    with ProgressBar("cold start", 10, console=console, live=False, done=7) as bar:
        bar.advance(2)
    assert lines(console) == ["cold start 9/10"]


def test_a_terminal_gets_a_live_bar() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with ProgressBar("RL", 2, console=console, live=True) as bar:
        bar.advance(reward=1.5)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1/2" in text and "reward 1.5" in text and "\x1b[" in text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_title_is_no_markup(is_terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=is_terminal, color_system=None)
    with ProgressBar("eval [/bold] [red]", 2, console=console, live=True) as bar:
        bar.advance(2)
    assert "eval [/bold] [red]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_other_processes_are_silent(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with ProgressBar("RL", 2, console=console, live=False) as bar:
        bar.advance(2)
    assert lines(console) == []


def test_compilations_are_counted_once() -> None:
    num_compiled()  # counts from here on

    @jax.jit
    def double_and_add(x: jax.Array) -> jax.Array:
        return 2 * x + 0.12345

    values = [jnp.zeros(3), jnp.ones(3), jnp.zeros(5)]
    before = num_compiled()
    double_and_add(values[0])
    after = num_compiled()
    assert after > before
    double_and_add(values[1])
    assert num_compiled() == after  # a call with the same shapes compiles nothing
    double_and_add(values[2])
    assert num_compiled() > after
