"""The verbs of labeling: install, up, down, status, push, pull, sync, invite, agreement, simulate.

Verbs that need a model as well (select, second-opinions) join `label_app` in the cluster room.
"""

import contextlib
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from records.command import Call, verb
from records.progress import progress, stderr

if TYPE_CHECKING:
    from labeling.client import LabelStudioClient
    from records.store import Store

app = typer.Typer()
label_app = typer.Typer(help="Annotators: the local Label Studio, questions out, answers in.", no_args_is_help=True)
app.add_typer(label_app, name="label")


@verb(label_app, "install")
def install_command(call: Call) -> None:
    """Install the local Label Studio into an environment of its own (about 1 GB, two minutes)."""
    from labeling.environment import environment_of, install

    environment = environment_of(call.settings.labeling)
    with _telling() as tell:
        built = install(environment, tell)
    said = f"Label Studio is installed in {environment.folder}" + ("" if built else " already")
    call.emit({"folder": str(environment.folder), "built": built}, said)


@verb(label_app, "up")
def up_command(call: Call) -> None:
    """Start the local Label Studio, or find it running; installs it first if it is missing."""
    from labeling.local_server import LocalLabelStudio
    from records.home import open_home

    settings = call.settings
    server = LocalLabelStudio(open_home(settings.records.home), settings.labeling)
    with _telling() as tell:
        info = server.up(tell)
    said = (
        f"Label Studio {info.version} is up at {info.url}\n"
        f"log in as {info.username}; its password is in {server.keys_file}"
    )
    call.emit({**info.model_dump(mode="json"), "keys_file": str(server.keys_file)}, said)


@verb(label_app, "down")
def down_command(call: Call) -> None:
    """Stop the local Label Studio; its data stays."""
    from labeling.local_server import LocalLabelStudio
    from records.home import open_home

    settings = call.settings
    ran = LocalLabelStudio(open_home(settings.records.home), settings.labeling).down()
    call.emit({"stopped": ran}, "Label Studio is down" if ran else "Label Studio was not running")


@verb(label_app, "status")
def status_command(call: Call) -> None:
    """Show what waits and what was answered, and name what is wrong with its fix."""
    from labeling.status import status

    settings = call.settings
    with call.store() as store:
        found = status(store, settings.labeling)
    table = Table(show_header=False)
    table.add_row("Label Studio", f"{found.version} at {found.url}" if found.version else "does not answer")
    table.add_row("project", f"{found.project_id}, {found.tasks} tasks" if found.project_id is not None else "none yet")
    table.add_row("questions", ", ".join(f"{count} {state}" for state, count in found.items.items()))
    if found.oldest_waiting_s is not None:
        table.add_row("oldest waits", f"{found.oldest_waiting_s:.0f} s")
    table.add_row("answers read", str(found.annotations))
    for problem in found.problems:
        table.add_row("[red]problem[/]", problem)
    call.emit(found, table)
    if found.problems:
        raise typer.Exit(1)


@verb(label_app, "push")
def push_command(call: Call) -> None:
    """Send questions that wait to Label Studio, the most urgent first; a second push adds nothing."""
    from labeling.push import push

    settings = call.settings
    with _connected(settings) as (store, client), _counting("sending questions") as advance:
        report = push(store, client, settings.labeling, advance=advance)
    _complain(report.unreadable)
    sent = f"{report.pushed} questions sent, {report.blind} of them blind; {report.refreshed} brought up to date"
    said = sent if report.pushed or report.refreshed else "nothing waits"
    call.emit(report, said)


@verb(label_app, "pull")
def pull_command(call: Call) -> None:
    """Read answers from Label Studio; edits and deletions are read as well, each once."""
    from labeling.pull import pull

    settings = call.settings
    with _connected(settings) as (store, client), _counting("reading answers") as advance:
        report = pull(store, client, settings.labeling, advance=advance)
    _complain(report.not_understood)
    call.emit(report, f"{report.new_labels} new answers, {report.deleted} withdrawn")


@verb(label_app, "sync")
def sync_command(
    call: Call,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C.")] = False,
    every: Annotated[
        str | None, typer.Option(help="Pause between two looks, for example 15s; default: labeling.poll_every_s.")
    ] = None,
) -> None:
    """Push and pull, once or for as long as it runs."""
    from labeling.connection import require
    from labeling.sync import sync, wait_for_notification
    from records.errors import LabelStudioError
    from records.hints import last_ring

    settings = call.settings
    pause_s = _seconds(every) if every is not None else settings.labeling.poll_every_s
    with contextlib.suppress(KeyboardInterrupt), call.store() as store:
        while True:
            rung = last_ring(store.ledger)  # before the look, so that what rings during it is looked at next
            try:
                client = require(store.home, settings.labeling)
                with client, _counting("questions and answers") as advance:
                    report = sync(store, client, settings.labeling, advance=advance)
            except LabelStudioError as error:
                if not watch:
                    raise
                # The items wait in the ledger, so an outage costs time and nothing else.
                stderr.print(f"[yellow]{error}[/]; next look in {pause_s:g} s")
            else:
                _complain([*report.push.unreadable, *report.pull.not_understood])
                busy = report.push.pushed or report.pull.new_labels or report.pull.deleted
                if busy or not watch:
                    said = (
                        f"{report.push.pushed} sent, {report.pull.new_labels} answers, {report.pull.deleted} withdrawn"
                    )
                    call.emit(report, said)
            if not watch:
                return
            wait_for_notification(store.ledger, rung, pause_s)


@verb(label_app, "invite")
def invite_command(call: Call) -> None:
    """Print the link under which an annotator makes an account; answers carry its address."""
    from labeling.connection import require
    from records.home import open_home

    settings = call.settings
    with require(open_home(settings.records.home), settings.labeling) as client:
        link = client.invitation()
    said = f"{link}\nwhoever reads blind is also named in labeling.readers, by e-mail address"
    call.emit({"link": link}, said)


@verb(label_app, "agreement")
def agreement_command(call: Call) -> None:
    """Show how far readers agree, and how much the model's opinion draws them."""
    from labeling.agreement import read_agreement

    with call.store() as store:
        found = read_agreement(store)
    table = Table(show_header=False, title=f"{found.images} images with two readers or more")
    table.add_row("Fleiss' kappa", _kappa(found.fleiss))
    for code, kappa in found.fleiss_by_class.items():
        table.add_row(f"  {code} against the rest", _kappa(kappa))
    for pair, kappa in found.cohen.items():
        table.add_row(f"Cohen's kappa {pair}", _kappa(kappa))
    seen = found.anchoring
    table.add_row("agree with the model", f"{seen.shown_agreeing} of {seen.shown} who saw its answer")
    table.add_row("", f"{seen.blind_agreeing} of {seen.blind} who did not")
    if seen.difference is not None and seen.interval is not None:
        low, high = seen.interval
        table.add_row("difference", f"{seen.difference:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}")
    call.emit(found, table)


@verb(label_app, "simulate")
def simulate_command(
    call: Call,
    truth: Annotated[Path | None, typer.Option(help="CSV with image_id and label; default: that of the demo.")] = None,
    error_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of answers that name another class.")] = 0.0,
    cant_tell_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of answers that are can't tell.")] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many answers.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what it gets wrong.")] = 0,
) -> None:
    """Let a simulated annotator answer the open tasks whose truth is known, through Label Studio's own API."""
    from labeling.simulated_annotator import annotate, read_truth

    settings = call.settings
    with _connected(settings) as (store, client), _counting("answering") as advance:
        known = read_truth(truth or store.home.demo / "truth.parquet", store.taxonomy)
        given = annotate(
            client, store, known, error_rate=error_rate, cant_tell_rate=cant_tell_rate, seed=seed, limit=limit,
            advance=advance,
        )  # fmt: skip
    found = {
        "answered": len(given),
        "correct": sum(one.correct for one in given),
        "cant_tell": sum(one.label is None for one in given),
    }
    call.emit(found, f"{found['answered']} answers, {found['correct']} of them right; read them with label pull")


def _kappa(kappa: float | None) -> str:
    return "says nothing yet" if kappa is None else f"{kappa:.2f}"


@contextmanager
def _connected(settings: Any) -> Generator[tuple["Store", "LabelStudioClient"]]:
    from labeling.connection import require

    with call.store() as store, require(store.home, settings.labeling) as client:
        yield store, client


def _seconds(text: str) -> float:
    from records.errors import ConfigError

    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = 0.0
    if not 1.0 <= seconds <= 3600.0:
        raise ConfigError(f"--every {text!r} is not a pause of 1 s to 1 h; write for example 15s or 2m")
    return seconds


def _complain(sentences: list[str]) -> None:
    for sentence in sentences:
        stderr.print(f"[yellow]{sentence}[/]")


@contextmanager
def _telling() -> Generator[Callable[[str], None]]:
    """Show what goes on: a spinner in a terminal, elsewhere a line every few seconds."""
    if stderr.is_terminal:
        with stderr.status("Label Studio") as spinner:
            yield spinner.update
        return
    last_s = -10.0

    def tell(text: str) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= 5.0 or not text.startswith(("fetching", "starting")):
            last_s = time.monotonic()
            stderr.print(text, highlight=False)

    yield tell


@contextmanager
def _counting(what: str) -> Generator[Callable[[int, int], None]]:
    with progress() as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance
