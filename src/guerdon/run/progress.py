"""Progress of a loop: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

Metrics = Mapping[str, Any]


@runtime_checkable
class Progress(Protocol):
    """What a run needs of a display."""

    def advance(self, done: int, metrics: Metrics) -> None:
        """``done`` steps are finished; ``metrics`` are those of the last."""

    def note(self, text: str) -> None:
        """Show a line of text."""

    def close(self) -> None:
        """Show the last state and let go of the terminal."""


def open_progress(total: int, what: str, done: int, headline: str, first: float | None = None) -> Progress:
    """A display for a loop of ``total`` steps (each a ``what``) of which ``done`` are finished.

    Args:
        headline: the metric to show, as its first value and the newest.
        first: its first value, if that is known from before a resume.
    """
    state = _State(total, what, done, headline, first)
    return Bar(state) if sys.stdout.isatty() else Lines(state)


class _State:
    """The numbers to show."""

    def __init__(self, total: int, what: str, done: int, headline: str, first: float | None) -> None:
        self.total, self.what, self.done, self.headline = total, what, done, headline
        self.first = first
        self.now: float | None = None
        # the rate is that of the last samples: it follows a change (compilation at first) within seconds
        self.samples: deque[tuple[float, int]] = deque([(time.perf_counter(), done)], maxlen=40)

    def advance(self, done: int, metrics: Metrics) -> None:
        self.done = done
        value = metrics.get(self.headline)
        if isinstance(value, (int, float)):
            self.now = value
            if self.first is None:
                self.first = value
        now = time.perf_counter()
        if now - self.samples[-1][0] >= 0.5:
            self.samples.append((now, done))

    @property
    def rate(self) -> float | None:
        """Steps a second, None before it is known."""
        now = time.perf_counter()
        then, done = self.samples[0]
        return (self.done - done) / (now - then) if self.done > done and now > then else None

    def rate_text(self) -> str:
        rate = self.rate
        if rate is None:
            return ""
        return f"{rate:.3g} {self.what}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.what}"

    def eta_text(self) -> str:
        rate = self.rate
        return "" if rate is None else f"ETA {clock((self.total - self.done) / rate)}"

    def headline_text(self, arrow: str) -> str:
        if self.first is None or self.now is None:
            return ""
        return f"{self.headline} {self.first:.4g} {arrow} {self.now:.4g}"


def clock(seconds: float) -> str:
    """``0:07``, ``12:30``, ``3:05:00``."""
    whole = int(seconds + 0.5)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Lines:
    """A plain line at the start of training, every ``every`` seconds, and at the end."""

    def __init__(self, state: _State, every: float = 5.0) -> None:
        self._state, self._every = state, every
        self._shown_at, self._shown = -float("inf"), state.done

    def advance(self, done: int, metrics: Metrics) -> None:
        self._state.advance(done, metrics)
        if time.perf_counter() - self._shown_at >= self._every:
            self._show()

    def note(self, text: str) -> None:
        try:
            print(text, flush=True)
        except (OSError, ValueError):  # nobody reads any more (`| head`, a closed stream): no reason to stop
            self._every = float("inf")

    def _show(self) -> None:
        state = self._state
        self._shown_at, self._shown = time.perf_counter(), state.done
        parts = [
            f"{state.what} {state.done}/{state.total} ({100 * state.done // state.total}%)",
            state.rate_text(),
            state.eta_text(),
            state.headline_text("->"),
        ]
        self.note("  ".join(part for part in parts if part))

    def close(self) -> None:
        if self._shown != self._state.done and self._every < float("inf"):
            self._show()


class Bar:
    """A live bar by rich."""

    def __init__(self, state: _State, console: Any = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Rich

        self._state = state
        self._rich = Rich(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[cyan]{task.fields[speed]}"),
            TextColumn("[bold]{task.fields[headline]}"),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self._task = self._rich.add_task(
            f"{state.what}s", total=state.total, completed=state.done, speed="", headline=""
        )
        self._updated = 0.0
        self._rich.start()

    def advance(self, done: int, metrics: Metrics) -> None:
        self._state.advance(done, metrics)
        # no more often than the screen: a step may take a millisecond
        if (now := time.perf_counter()) - self._updated >= 0.1:
            self._updated = now
            self._update()

    def _update(self) -> None:
        state = self._state
        speed = "  ".join(part for part in (state.rate_text(), state.eta_text()) if part)
        self._rich.update(self._task, completed=state.done, speed=speed, headline=state.headline_text("→"))

    def note(self, text: str) -> None:
        self._rich.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._update()
        self._rich.stop()
