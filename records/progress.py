"""Progress on stderr: a bar in a terminal, lines of plain text everywhere else.

`progress()` and `status()` are used by every verb. Where stderr is a file or a pipe, rich draws nothing, so
`LineProgress` prints a line when a task begins, when it ends, at every step with a new detail or message (an epoch, a
package), and at most once per minute for a task that only counts. Nothing here writes to stdout.
"""

import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from records.console import WholeConsole

STEP_PAUSE_S = 1.0
COUNT_PAUSE_S = 60.0

stderr = WholeConsole(stderr=True)


def say(text: str) -> None:
    """Print a line on stderr; with the time of day where stderr is not a terminal."""
    if stderr.is_terminal:
        stderr.print(text, highlight=False, markup=False)
    else:
        write_line(text)


def write_line(text: str) -> None:
    """Write a line with the time of day to stderr, whatever its width."""
    # Not through rich, which would fold the line at 80 columns. Flushed, because a file is read while it grows.
    sys.stderr.write(f"{datetime.now():%H:%M:%S} {text}\n")
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> duration(4.2), duration(100), duration(7500)
    ('4 s', '1 min 40 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def progress() -> Progress:
    """Return progress on stderr: bars in a terminal, lines elsewhere.

    A task may have the fields `step` (what is counted, such as "epoch"), `within` (the position within a step that
    takes long), `detail` (the result of the last step) and `left_s` (seconds left, where the caller knows better than
    the rate of the counts).
    """
    if not stderr.is_terminal:
        return LineProgress()
    return Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        _DetailColumn(),
        console=stderr,
        transient=True,
    )


@contextmanager
def status(text: str) -> Generator["Status"]:
    """Show work whose length is not known: a spinner in a terminal, lines elsewhere.

    Args:
        text: what is being done.
    Yields:
        What replaces the text, and what ends the display before the block ends.
    """
    if stderr.is_terminal:
        # Not a bar without a length: a spinner redraws one line, and engines that start print lines of their own.
        with stderr.status(text) as spinner:
            yield Status(spinner.update, spinner.stop)
        return
    with LineProgress() as lines:
        task = lines.add_task(text, total=None)
        yield Status(lambda new: lines.update(task, description=new), lines.stop)


@dataclass(frozen=True)
class Status:
    """A running `status`: `update` replaces its text, `stop` ends it early."""

    update: Callable[[str], None]
    stop: Callable[[], None]


class _DetailColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        shown = (task.fields.get("within", ""), task.fields.get("detail", ""))
        return Text(", ".join(text for text in shown if text))


@dataclass
class _Printed:
    """What was printed of a task."""

    at_s: float
    steps_at_s: float = float("-inf")
    detail: str = ""
    message: str = ""
    ended: bool = False


class LineProgress(Progress):
    """Progress whose tasks print lines instead of drawing bars.

    Args:
        write: prints one line.
        clock: seconds that only grow.
    """

    def __init__(self, write: Callable[[str], None] = write_line, clock: Callable[[], float] = time.monotonic) -> None:
        # Disabled, so that rich neither starts its refresh thread nor prints an empty line at the end.
        super().__init__(console=stderr, disable=True, get_time=clock)
        # Every method below holds rich's own lock: downloads and decoding advance their tasks from threads.
        self._write = write
        self._printed: dict[TaskID, _Printed] = {}

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        """Add a task and print that it begins."""
        with self._lock:
            task_id = super().add_task(description, *args, **fields)
            task = self._tasks[task_id]
            message = _without_numbers(description)
            self._printed[task_id] = _Printed(self.get_time(), detail=task.fields.get("detail", ""), message=message)
            # A total of None is not known yet; a total of 0 is no work, which needs no line.
            if task.total != 0:
                self._write(_line(task) if task.total else f"{task.description} ...")
        return task_id

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task and print a line if one is due."""
        with self._lock:
            super().update(task_id, **changes)
            self._print_if_due(self._tasks[task_id])

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Count on and print a line if one is due."""
        with self._lock:
            super().advance(task_id, advance)
            self._print_if_due(self._tasks[task_id])

    def remove_task(self, task_id: TaskID) -> None:
        """Forget a task without a last line."""
        with self._lock:
            super().remove_task(task_id)
            del self._printed[task_id]

    def stop(self) -> None:
        """Print the last line of every task that has not ended."""
        # Not rich's own `stop`, which has no display to end here; a second call finds every task ended.
        self._end_all("done in")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """End the tasks; after an error their last lines say that they stopped."""
        self._end_all("done in" if kind is None else "stopped after")

    def _end_all(self, how: str) -> None:
        with self._lock:
            for task_id, printed in self._printed.items():
                self._end(self._tasks[task_id], printed, how)

    def _print_if_due(self, task: Task) -> None:
        printed, now_s = self._printed[task.id], self.get_time()
        if printed.ended:
            return
        # Before the pauses: the last step is printed however soon it follows.
        if task.total and task.completed >= task.total:
            self._end(task, printed, "done in")
            return
        detail, message = task.fields.get("detail", ""), _without_numbers(task.description)
        # A text that only counts differently ("package 3 of 9") is a count; another text is a step.
        is_step = detail != printed.detail or message != printed.message
        # The first line does not delay the first step: a run of two short epochs still prints both.
        step_is_due = is_step and now_s - printed.steps_at_s >= STEP_PAUSE_S
        if step_is_due or now_s - printed.at_s >= COUNT_PAUSE_S:
            printed.at_s = now_s
            if is_step:
                printed.steps_at_s, printed.detail, printed.message = now_s, detail, message
            self._write(_line(task, _left_s(task)))

    def _end(self, task: Task, printed: _Printed, how: str) -> None:
        if printed.ended:
            return
        printed.ended = True
        if task.total != 0:
            self._write(f"{_line(task)}, {how} {duration(task.elapsed or 0.0)}")


def _line(task: Task, left_s: float | None = None) -> str:
    """Return `what: count, detail, time left`; what is not known is left out."""
    count = ""
    if task.total:
        count = f"{int(task.completed)}/{int(task.total)}"
    elif task.completed:
        count = f"{int(task.completed)}"
    step = task.fields.get("step", "")
    parts = [f"{step} {count}".strip() if count else "", task.fields.get("within", ""), task.fields.get("detail", "")]
    if left_s is not None:
        parts.append(f"{duration(left_s)} left")
    listed = ", ".join(part for part in parts if part)
    return f"{task.description}: {listed}" if listed else task.description


def _left_s(task: Task) -> float | None:
    known: float | None = task.fields.get("left_s")
    if known is not None:
        return known
    if not task.total or not task.completed or task.elapsed is None:
        return None
    # Not rich's own estimate: it forgets counts older than 30 s, and a step may take longer than that.
    return task.elapsed / task.completed * (task.total - task.completed)


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "", text)
