"""The verbs of labeling: install, up, down, status, push, pull, sync, invite, agreement, readers, simulate.

The verbs that also need a model (select, second-opinions) are added to `label_app` by `cluster.verbs`, and link and
unlink by `cluster.label_projects`.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from records.command import Call, until_stopped, verb
from records.progress import LineProgress, progress, say, status, stderr

if TYPE_CHECKING:
    from rich.progress import TaskID

    from labeling.agreement import AnchoringReport
    from labeling.cases import CaseSource
    from labeling.client import LabelStudioClient
    from labeling.readers import ReaderCard, Share
    from labeling.sync import SyncReport
    from records.store import Store

CASES = "relook.task_cases"
"""Key in the context's `meta` under which the root command leaves what finds the confirmed cases of tasks."""

app = typer.Typer()
label_app = typer.Typer(help="Run Label Studio; send tasks and read annotations.", no_args_is_help=True)
app.add_typer(label_app, name="label")


@verb(label_app, "install")
def install_command(call: Call) -> None:
    """Install the local Label Studio into its own environment (about 1 GB, two minutes)."""
    from labeling.environment import environment_of, install

    environment = environment_of(call.settings.labeling)
    with status("Label Studio") as shown:
        built = install(environment, shown.update)
    said = f"Label Studio is installed in {environment.folder}" + ("" if built else " already")
    call.emit({"folder": str(environment.folder), "built": built}, said)


@verb(label_app, "up")
def up_command(call: Call) -> None:
    """Start the local Label Studio if it is not running; install it if it is missing."""
    from labeling.local_server import LocalLabelStudio
    from records.home import open_home

    server = LocalLabelStudio(open_home(call.settings.records.home), call.settings.labeling)
    with status("Label Studio") as shown:
        info = server.up(shown.update)
    said = (
        f"Label Studio {info.version} is up at {info.url}\n"
        f"log in as {info.username}; its password is in {server.keys_file}"
    )
    call.emit({**info.model_dump(mode="json"), "keys_file": str(server.keys_file)}, said)


@verb(label_app, "down")
def down_command(call: Call) -> None:
    """Stop the local Label Studio; keep its data."""
    from labeling.local_server import LocalLabelStudio
    from records.home import open_home

    ran = LocalLabelStudio(open_home(call.settings.records.home), call.settings.labeling).down()
    call.emit({"stopped": ran}, "Label Studio is down" if ran else "Label Studio was not running")


@verb(label_app, "status")
def status_command(call: Call) -> None:
    """Show open and annotated review items, and problems with their fix; exit 1 if there is a problem."""
    from labeling.status import status as labeling_status

    with call.store() as store:
        found = labeling_status(store, call.settings.labeling)
    table = Table(show_header=False)
    table.add_row("Label Studio", f"{found.version} at {found.url}" if found.version else "not reachable")
    which = f"{found.project_id}{' (linked)' if found.linked else ''}, {found.tasks} tasks"
    table.add_row("project", which if found.project_id is not None else "none yet")
    table.add_row("review items", ", ".join(f"{count} {state}" for state, count in found.items.items()))
    if found.oldest_waiting_s is not None:
        table.add_row("oldest waits", f"{found.oldest_waiting_s:.0f} s")
    table.add_row("annotations read", str(found.annotations))
    for problem in found.problems:
        table.add_row(Text("problem", style="red"), problem)
    call.emit(found, table)
    # After the table, so that a monitor gets both the exit code and the reasons.
    if found.problems:
        raise typer.Exit(1)


@verb(label_app, "push")
def push_command(call: Call) -> None:
    """Send open review items to Label Studio as tasks, the most urgent first; each is sent once."""
    from labeling.push import push

    # `push` holds a lease in the ledger, so this may run next to a sync without sending anything twice.
    with _connected(call) as (store, client), counting("send tasks") as advance:
        report = push(store, client, call.settings.labeling, advance=advance, cases=_cases(call, store))
    _complain(report.unreadable)
    sent = f"{report.pushed} tasks sent, {report.blind} of them blind; {report.refreshed} updated"
    call.emit(report, sent if report.pushed or report.refreshed else "nothing to send")
    _exit_if(report.unreadable)


@verb(label_app, "pull")
def pull_command(call: Call) -> None:
    """Read annotations from Label Studio, with edits and deletions; each is read once."""
    from labeling.pull import pull

    with _connected(call) as (store, client), counting("read annotations") as advance:
        report = pull(store, client, call.settings.labeling, advance=advance)
    _complain([*report.failed, *report.not_understood])
    call.emit(report, f"{report.new_labels} new annotations, {report.deleted} withdrawn")
    _exit_if(report.failed)


@verb(label_app, "sync")
def sync_command(
    call: Call,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat until Ctrl-C.")] = False,
    every: Annotated[
        str | None, typer.Option(help="Pause of --watch, such as 15s; default: labeling.poll_every_s.")
    ] = None,
    moved: Annotated[
        bool, typer.Option("--moved", help="Send open review items again that lie at an old address of Label Studio.")
    ] = False,
) -> None:
    """Push and pull, once or repeatedly."""
    from labeling.sync import wait_for_notification
    from records.errors import LabelStudioError
    from records.notifications import last_notification

    pause_s = _seconds(every) if every is not None else call.settings.labeling.poll_every_s
    if not watch:
        with suppress(KeyboardInterrupt), call.store() as store:
            report = _sync(call, store, moved=moved)
            _emit_sync(call, report)
            _exit_if([*report.push.unreadable, *report.pull.failed])
        return
    with until_stopped(), call.store() as store, _heartbeat() as beat:
        while True:
            # Read before the sync: a notification that arrives during it must trigger the next one.
            seen = last_notification(store.ledger)
            try:
                report = _sync(call, store, moved=moved)
                moved = False
            except LabelStudioError as error:
                # Review items wait in the ledger, so an outage of Label Studio delays them and loses nothing.
                say(f"{error}; next attempt in {pause_s:g} s")
            else:
                if report.push.pushed or report.pull.new_labels or report.pull.deleted:
                    _emit_sync(call, report)
            beat()
            wait_for_notification(store.ledger, seen, pause_s)


def _sync(call: Call, store: "Store", *, moved: bool) -> "SyncReport":
    from labeling.connection import require
    from labeling.sync import sync

    with require(store.home, call.settings.labeling) as client, counting("sync tasks and annotations") as advance:
        cases = _cases(call, store)
        report = sync(store, client, call.settings.labeling, advance=advance, moved=moved, cases=cases)
    said = [report.pull.moved] if report.pull.moved is not None else []
    _complain([*said, *report.push.unreadable, *report.pull.failed, *report.pull.not_understood])
    return report


def _cases(call: Call, store: "Store") -> "CaseSource | None":
    maker: Callable[[Store, Any], CaseSource] | None = call.context.meta.get(CASES)
    return None if maker is None else maker(store, call.settings)


def _emit_sync(call: Call, report: "SyncReport") -> None:
    counts = f"{report.push.pushed} sent, {report.pull.new_labels} annotations, {report.pull.deleted} withdrawn"
    call.emit(report, counts)


@contextmanager
def _heartbeat() -> Generator[Callable[[], None]]:
    """Count syncs where stderr is not a terminal; in a terminal a lasting display would mix with the results."""
    if stderr.is_terminal:
        yield lambda: None
        return
    with LineProgress() as lines:
        task = lines.add_task("label sync --watch", total=None, step="sync")
        yield lambda: lines.advance(task)


@verb(label_app, "invite")
def invite_command(call: Call) -> None:
    """Print the link with which an annotator signs up; annotations carry the account's address."""
    from labeling.connection import require
    from records.home import open_home

    with require(open_home(call.settings.records.home), call.settings.labeling) as client:
        link = client.invitation()
    said = f"{link}\nadd the e-mail address of a blind reader to labeling.readers"
    call.emit({"link": link}, said)


@verb(label_app, "agreement")
def agreement_command(call: Call) -> None:
    """Measure how far readers agree, and how far a shown prediction influences them."""
    from labeling.agreement import read_agreement

    with call.store() as store:
        found = read_agreement(store)
    table = Table(show_header=False, title=f"{found.images} images with two readers or more")
    table.add_row("Fleiss' kappa", _kappa(found.fleiss))
    for code, kappa in found.fleiss_by_class.items():
        table.add_row(f"  {code} against the rest", _kappa(kappa))
    for pair, kappa in found.cohen.items():
        table.add_row(f"Cohen's kappa {pair}", _kappa(kappa))
    _add_anchoring(table, found.anchoring)
    call.emit(found, table)


def _add_anchoring(table: Table, seen: "AnchoringReport") -> None:
    table.add_row("agree with the model", f"{seen.shown_agreeing} of {seen.shown} who saw its prediction")
    table.add_row("", f"{seen.blind_agreeing} of {seen.blind} who did not")
    if seen.difference is not None and seen.interval is not None:
        low, high = seen.interval
        table.add_row("difference", f"{seen.difference:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}")


@verb(label_app, "readers")
def readers_command(
    call: Call,
    reader: Annotated[
        str | None, typer.Option("--reader", help="Open the card of this annotator, who then counts as having seen it.")
    ] = None,
) -> None:
    """Show how right, consistent and fast annotators are; each sees their own card before it is listed."""
    from labeling.readers import list_cards, open_card

    with call.store() as store:
        if reader is not None:
            one = open_card(store, reader, actor="relook label readers")
            call.emit(one, _card_table(one))
            return
        found = list_cards(store)
    for name in found.unopened:
        say(f"{name} has not seen their card yet: relook label readers --reader {name}")
    call.emit(found, Group(*map(_card_table, found.cards)) if found.cards else "no card has been opened yet")


def _card_table(card: "ReaderCard") -> Table:
    table = Table(show_header=False, title=f"{card.reader}, as of {card.as_of:%Y-%m-%d %H:%M} UTC")
    table.add_row("images annotated", str(card.annotations))
    undecided = f"; {card.gold_undecided} more without a class" if card.gold_undecided else ""
    table.add_row("gold tasks right", _share_text(card.gold) + undecided)
    table.add_row("  of malignant ones, named malignant", _share_text(card.malignant))
    for truth, named in card.confusion.items():
        table.add_row(f"  {truth} was called", ", ".join(f"{label} {number}" for label, number in named.items()))
    table.add_row("agrees with most others", _share_text(card.agreement))
    if card.seconds is not None:
        ends = card.seconds_interval
        between = f", 95 % interval {ends[0]:.0f} to {ends[1]:.0f} s" if ends else ""
        table.add_row("time of a task, median", f"{card.seconds:.0f} s{between}")
    _add_anchoring(table, card.anchoring)
    return table


def _share_text(share: "Share") -> str:
    if share.share is None or share.interval is None:
        return "none yet"
    low, high = share.interval
    return f"{share.hits} of {share.of}, {share.share:.2f} (95 % interval {low:.2f} to {high:.2f})"


@verb(label_app, "simulate")
def simulate_command(
    call: Call,
    truth: Annotated[Path | None, typer.Option(help="CSV with image_id and label; default: the demo's.")] = None,
    error_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of annotations with a wrong class.")] = 0.0,
    cant_tell_rate: Annotated[
        float, typer.Option(min=0, max=1, help='Share of annotations that say "can\'t tell".')
    ] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="How many annotations at most.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the errors.")] = 0,
) -> None:
    """Annotate the open tasks whose truth is known, through Label Studio's API."""
    from labeling.simulated_annotator import annotate, read_truth

    with _connected(call) as (store, client), counting("annotate") as advance:
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
    call.emit(
        found, f"{found['answered']} annotations, {found['correct']} of them right; `relook label pull` reads them"
    )


def _kappa(kappa: float | None) -> str:
    return "undefined" if kappa is None else f"{kappa:.2f}"


@contextmanager
def _connected(call: Call) -> Generator[tuple["Store", "LabelStudioClient"]]:
    from labeling.connection import require

    with call.store() as store, require(store.home, call.settings.labeling) as client:
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
        say(sentence)


def _exit_if(failed: list[str]) -> None:
    """Exit with 1, after the result was printed, if somebody has to look at what failed."""
    if failed:
        say(f"{len(failed)} could not be processed and will be tried again; the others were not affected")
        raise typer.Exit(1)


@contextmanager
def counting(what: str) -> Generator[Callable[[int, int], None]]:
    """Show a count on stderr; yield what takes (done, total), whose first call adds the task: no work shows nothing."""
    with progress() as bar:
        task: TaskID | None = None

        def advance(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = bar.add_task(what, total=total)
            bar.update(task, completed=done, total=total)

        yield advance
