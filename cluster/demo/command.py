"""`relook demo`: run the loop, print its summary, and in a terminal keep the servers up until `q` is pressed."""

import os
import select
import sys
import termios
import tty
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Group
from rich.panel import Panel
from rich.table import Table

from cluster.demo.run import Running, reopened_demo, running_demo
from cluster.demo.stages import AnnotatorKind
from cluster.demo.state import DemoSummary, prepare_home
from cluster.settings import Settings
from records.command import emit
from records.progress import stderr
from records.store import open_store


def run_demo(
    settings: Settings,
    *,
    data: Path | None,
    columns: Mapping[str, str] | None,
    annotator: AnnotatorKind,
    as_json: bool,
) -> None:
    """Run the demo and print its summary; without `data`, a folder, images are generated.

    RefusedError if the home holds work that is not a demo's.
    """
    prepare_home(settings, data)
    store = open_store(settings.records)
    with running_demo(settings, store, data=data, columns=columns, annotator=annotator) as running:
        _show(running, as_json)
    store.close()


def reopen_demo(settings: Settings, *, as_json: bool) -> None:
    """Start the servers of the finished demo again and print its summary; RefusedError if none was finished here."""
    store = open_store(settings.records)
    with reopened_demo(settings, store) as running:
        _show(running, as_json)
    store.close()


def _show(running: Running, as_json: bool) -> None:
    # Without a terminal nobody can press q: in a script the demo ends by itself.
    stays = sys.stdin.isatty() and stderr.is_terminal
    emit(as_json, running.summary, _ending(running, stays))
    if stays:
        _stay_until_q(running)


def _ending(running: Running, stays: bool) -> Group:
    summary = running.summary
    return Group(_rounds_table(summary), _facts_table(summary), _next_steps(running, stays))


def _rounds_table(summary: DemoSummary) -> Table:
    table = Table("", "round 1", "round 2", title="What the annotations changed", title_justify="left")
    first, second = summary.rounds

    def cells(name: str, *values: object) -> None:
        table.add_row(name, *(str(value) for value in values))

    cells("model", first.model_id[:12], second.model_id[:12])
    cells("labels from annotators", first.labels_from_annotators, second.labels_from_annotators)
    cells(
        "balanced accuracy (test)",
        *(_with_interval(r.balanced_accuracy, r.balanced_accuracy_ci) for r in summary.rounds),
    )
    if key := second.key_class:
        cells(f"{key} sensitivity", *(_number(r.key_class_sensitivity) for r in summary.rounds))
        cells(f"{key} specificity", *(_number(r.key_class_specificity) for r in summary.rounds))
    cells("status", first.status, second.status)
    cells("because", first.why, second.why)
    return table


def _facts_table(summary: DemoSummary) -> Table:
    table = Table.grid(padding=(0, 2))
    tasks = summary.label_studio
    table.add_row("requests", f"{summary.served['requests']}, {summary.served['failed']} failed")
    table.add_row(
        "Label Studio",
        f"{tasks['tasks_pushed']} tasks, {tasks['annotations_pulled']} annotations, "
        f"{tasks['lost']} lost, {tasks['duplicated']} duplicated",
    )
    table.add_row("harmed challenger", "refused" if summary.gate["harmed_challenger_refused"] else "NOT refused")
    table.add_row("swap under traffic", f"{summary.swap['requests']} requests, {summary.swap['failed']} failed")
    table.add_row("time", f"{sum(summary.seconds.values()):.0f} s")
    return table


def _next_steps(running: Running, stays: bool) -> Panel:
    prediction = running.summary.trace.get("prediction_id", "PREDICTION_ID")
    # The program as it was called, so that the lines can be copied whether or not the environment is activated.
    relook = sys.argv[0] if Path(sys.argv[0]).name == "relook" else "relook"
    steps = {
        f"trace {prediction}": "the history of the flagged image",
        "models": "all models, and which one serves",
        "demo --reopen": "start this demo's servers again",
        "demo --annotator human": "annotate the tasks yourself",
        "demo --data DIR": "the same on your own images",
    }
    lines = [f"{relook} {verb:<40} {what}" for verb, what in steps.items()]
    if stays:
        server = running.label_studio
        addresses = [
            f"page and API     {running.service.url}",
            f"Label Studio     {server.url}  user {server.username}  password: see below",
        ]
        lines = [*addresses, "", *lines]
    title = "still running" if stays else "what to try next"
    return Panel("\n".join(lines), title=title, border_style="cyan", expand=False)


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})" if interval else f"{value:.3f}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _stay_until_q(running: Running) -> None:
    # On stderr: stdout may be a file that keeps the summary, and the password does not belong there.
    password = running.label_studio.password.get_secret_value()
    stderr.print(f"Label Studio's password for {running.label_studio.username}: {password}", highlight=False)
    stderr.print("the servers keep running; press q to stop them", highlight=False)
    with _keys():
        while True:
            ready, _, _ = select.select([sys.stdin], [], [], 1.0)
            if ready and os.read(sys.stdin.fileno(), 1) in (b"q", b"Q", b""):
                return


@contextmanager
def _keys() -> Generator[None]:
    """Read single keys without Enter; restore the terminal's mode at the end."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
