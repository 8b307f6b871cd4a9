"""The live view of a demo: what is happening, why, and what came of it so far.

In a terminal it is one screen that is redrawn; elsewhere each chapter is a line.
"""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cluster.demo.traffic import Tally
from records.command import stderr


@dataclass
class Chapter:
    """One step of the story."""

    title: str
    why: str
    lines: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    seconds: float | None = None


class View:
    """Shows chapters as they happen.

    Args:
        tally: the traffic's counts, shown at the bottom while requests run.
    """

    def __init__(self, tally: Tally) -> None:
        self._chapters: list[Chapter] = []
        self._tally = tally
        self._lock = threading.RLock()
        self._spinner = Spinner("dots")
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
    def chapter(self, title: str, why: str) -> Generator[Chapter]:
        """Tell a chapter while the block runs.

        Args:
            title: what happens.
            why: in one sentence, why it happens.
        Yields:
            The chapter; its seconds are known when the block ends.
        """
        chapter = Chapter(title, why)
        with self._lock:
            self._chapters.append(chapter)
        if not stderr.is_terminal:
            stderr.print(f"[bold]{title}[/bold]  [dim]{why}[/dim]", highlight=False)
        try:
            yield chapter
        finally:
            chapter.seconds = time.perf_counter() - chapter.started

    def say(self, text: str) -> None:
        """Add a line that stays to the current chapter."""
        with self._lock:
            self._chapters[-1].lines.append(text)
        if not stderr.is_terminal:
            stderr.print(f"  {text}", highlight=False, markup=False)

    def now(self, text: str) -> None:
        """Show what is happening at this moment; the next call replaces it."""
        self._spinner.update(text=Text(text, style="cyan", overflow="ellipsis", no_wrap=True))

    def _render(self) -> RenderableType:
        with self._lock:
            chapters = list(self._chapters)
        parts: list[RenderableType] = []
        for chapter in chapters:
            mark = "[green]✓[/green]" if chapter.seconds is not None else "[cyan]▸[/cyan]"
            seconds = chapter.seconds if chapter.seconds is not None else time.perf_counter() - chapter.started
            parts.append(Text.from_markup(f"{mark} [bold]{chapter.title}[/bold]  [dim]{seconds:.0f} s[/dim]"))
            if chapter is chapters[-1]:
                parts.append(Text(f"  {chapter.why}", style="dim"))
            parts.extend(Text(f"    {line}") for line in chapter.lines[-6:])
        if chapters and chapters[-1].seconds is None:
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
