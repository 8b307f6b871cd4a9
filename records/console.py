"""The console of results and of messages: what it prints can be copied, because no word of it is broken or cut off.

Paths and ids are words. Where the output is no terminal, nothing is wrapped, whatever `COLUMNS` says; in a terminal,
which wraps long lines itself, a table that does not fit wraps its texts between words and stands out on the right if
its longest words do not fit. Texts are printed as they are: a path may hold `[/a]` or `:cat:`.
"""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_NO_LIMIT = 100_000


class WholeConsole(Console):
    """A console that breaks and crops no word; the arguments are rich's."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, with every word whole."""
        # What draws and redraws a screen, such as a progress bar, has to fit it and passes as it is.
        if all(isinstance(one, str | Text | Table | Group | Panel) for one in objects):
            objects = tuple(one if isinstance(one, str | Text) else _Whole(one) for one in objects)
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)


class _Whole:
    """Draws a renderable as wide as its longest words need."""

    def __init__(self, drawn: RenderableType) -> None:
        self._drawn = drawn

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        unlimited = options.update(width=_NO_LIMIT)
        _widen(self._drawn, console, unlimited)
        least = Measurement.get(console, unlimited, self._drawn).minimum
        width = max(options.max_width, least) if console.is_terminal else _NO_LIMIT
        return console.render(self._drawn, options.update(width=width))


def _widen(drawn: Any, console: Console, options: ConsoleOptions) -> None:
    """Give every column of the tables in a renderable the width of its longest word, or of its longest line."""
    if isinstance(drawn, Group):
        for one in drawn.renderables:
            _widen(one, console, options)
    elif isinstance(drawn, Panel):
        _widen(drawn.renderable, console, options)
    elif isinstance(drawn, Table):
        for column in drawn.columns:
            sizes = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
            column.min_width = max(size.maximum if column.no_wrap else size.minimum for size in sizes)
