"""The live view of a demo: the stages, why each happens, and its results so far.

In a terminal one screen is redrawn; elsewhere every stage and every result is a line.
"""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import TaskID
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cluster.demo.traffic import Tally
from records.progress import LineProgress, duration, say, stderr


@dataclass
class StageView:
    """A stage on the screen; `seconds` is None while it runs."""

    title: str
    why: str
    lines: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    seconds: float | None = None


class View:
    """Shows stages as they run, and below them the counts of the traffic."""

    def __init__(self, tally: Tally) -> None:
        self._stages: list[StageView] = []
        self._tally = tally
        # rich renders in a thread of its own while stages and traffic change what it reads.
        self._lock = threading.RLock()
        self._spinner = Spinner("dots")
        self._progress = LineProgress()
        self._task: TaskID | None = None
        self._live = Live(get_renderable=self._render, console=stderr, refresh_per_second=4, transient=False)

    @contextmanager
    def shown(self) -> Generator["View"]:
        """Show the view while the block runs."""
        if not stderr.is_terminal:
            yield self
            return
        with self._live:
            yield self

    @contextmanager
    def stage(self, title: str, why: str) -> Generator[StageView]:
        """Show a stage as running while the block runs; `why` is one sentence."""
        stage = StageView(title, why)
        with self._lock:
            self._stages.append(stage)
        if not stderr.is_terminal:
            self._task = self._progress.add_task(f"{title}: {why}", total=None)
        try:
            yield stage
        finally:
            stage.seconds = time.perf_counter() - stage.started
            if self._task is not None:
                self._progress.remove_task(self._task)
                self._task = None
                say(f"{title}: done in {duration(stage.seconds)}")

    def say(self, text: str) -> None:
        """Add a permanent line to the current stage."""
        with self._lock:
            self._stages[-1].lines.append(text)
        if not stderr.is_terminal:
            say(f"  {text}")

    def now(self, text: str) -> None:
        """Show what is happening now; the next call replaces it."""
        self._spinner.update(text=Text(text, style="cyan", overflow="ellipsis", no_wrap=True))
        if self._task is not None:
            self._progress.update(self._task, description=text)

    def _render(self) -> RenderableType:
        with self._lock:
            stages = list(self._stages)
        parts: list[RenderableType] = []
        for stage in stages:
            mark = "[green]✓[/green]" if stage.seconds is not None else "[cyan]▸[/cyan]"
            seconds = stage.seconds if stage.seconds is not None else time.perf_counter() - stage.started
            parts.append(Text.from_markup(f"{mark} [bold]{stage.title}[/bold]  [dim]{seconds:.0f} s[/dim]"))
            if stage is stages[-1]:
                parts.append(Text(f"  {stage.why}", style="dim"))
            parts.extend(Text(f"    {line}") for line in stage.lines[-6:])
        if stages and stages[-1].seconds is None:
            parts.append(self._spinner)
        if self._tally.requests:
            parts.append(self._traffic())
        return Panel(Group(*parts), title="relook demo", border_style="cyan", padding=(0, 1))

    def _traffic(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        decisions = "  ".join(f"{name} {count}" for name, count in sorted(self._tally.decisions.items()))
        style = "green" if self._tally.failed == 0 else "red"
        table.add_row(
            Text(f"{self._tally.requests} requests"),
            Text(f"{self._tally.failed} failed", style=style),
            Text(f"{self._tally.flagged} flagged"),
            Text(decisions, style="dim"),
        )
        return Group(Text(""), table, Text(self._tally.last, style="dim", overflow="ellipsis", no_wrap=True))
