"""The verbs `relook tune` and `relook tune report`.

relook tune --trials 12
relook tune report --json
"""

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live

from records.command import Call, advises_resume, group_verb, stdout, verb
from records.progress import duration, progress, say, stderr

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import RenderableType

    from records.datasets import DatasetVersion
    from records.store import Store
    from trainers.tracking.settings import TrackingSettings
    from tuning.settings import TuningSettings
    from tuning.trials import SearchEvent, SearchResult

app = typer.Typer()
tune_app = typer.Typer(help="Search for better training settings.", invoke_without_command=True)
app.add_typer(tune_app, name="tune")


def _searchers() -> list[str]:
    from tuning.settings import Searcher

    return [searcher.value for searcher in Searcher]


def _schedulers() -> list[str]:
    from tuning.settings import Scheduler

    return [scheduler.value for scheduler in Scheduler]


@group_verb(tune_app)
def tune(
    call: Call,
    trials: Annotated[int | None, typer.Option(help="Number of trials; default: tuning.trials.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder or dataset id; default: the newest version.")] = None,
    space: Annotated[
        list[str] | None, typer.Option(help="Axis name=a,b or name=low..high, or a YAML file; may be repeated.")
    ] = None,
    searcher: Annotated[
        str | None, typer.Option("--searcher", help="What proposes trials: {choices}.", autocompletion=_searchers)
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="What stops trials early: {choices}.", autocompletion=_schedulers)
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Number of fresh seeds that confirm the winner.")] = None,
    fit_winner: Annotated[
        bool, typer.Option("--fit/--no-fit", help="Train the winner for all epochs and register its bundle.")
    ] = True,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume the unfinished search with its settings and ended trials."),
    ] = False,
    run: Annotated[str | None, typer.Option("--run", help="Name or folder of the search that --resume means.")] = None,
) -> None:
    """Search training settings; val alone chooses the winner."""
    from images.importer import open_dataset
    from tuning.journal import FILE_NAME, read_journal
    from tuning.resumed import require_unchanged, resumed_settings, with_options
    from tuning.search import fit_winner as fit
    from tuning.search import search, search_folder, search_lease, searched_space

    settings = call.settings
    tuning, trainers = settings.tuning, settings.trainers
    with call.store() as store:
        run_dir = search_folder(store, resume=resume, name=run)
        if resume:
            named = [text.partition("=")[0].strip() for text in call.sets]
            tuning, trainers = resumed_settings(run_dir, tuning, trainers, named)
            data = data or read_journal(run_dir)[0].dataset_id
        changes = {"trials": trials, "searcher": searcher, "scheduler": scheduler, "confirm_seeds": seeds}
        tuning = with_options(tuning, changes, space or [])
        if resume:
            require_unchanged(run_dir, tuning, trainers)
        # Computed here only for its errors: an impossible space is refused before data are imported and Ray starts.
        searched_space(tuning, trainers)
        # A progress of its own, ended before the search: two live displays cannot share one terminal.
        with progress() as bar:
            dataset = open_dataset(store, data, progress=bar)
        say(f"search {run_dir.name}{' goes on' if resume else ''}: {tuning.trials} trials")
        lease = search_lease(store, run_dir, resume=resume)
        shown = show_search(settings.tracking, run_dir.name, tuning)
        with lease, advises_resume((run_dir / FILE_NAME).is_file), call.ray(settings), shown as on_event:
            result = search(store, tuning, trainers, dataset, run_dir=run_dir, on_event=on_event)
        bundle = None
        # Outside of Ray's block: the fit runs in this process and may use the cores that the trials had.
        if tuning.leak != "none":
            _show_leak(store, result, dataset, run_dir)
        elif fit_winner:
            with progress() as bar:
                bundle = fit(store, result, dataset, run_dir, bar, settings.tracking)
    _show_result(call, run_dir, None if bundle is None else bundle.id)


def _show_leak(store: "Store", result: "SearchResult", dataset: "DatasetVersion", run_dir: "Path") -> None:
    """Train the winner on honest and leaky splits; a search with a mistake in it registers no model."""
    from records.durable import write_file
    from trainers.fitting.pretend import pretend
    from tuning.report import LEAK_FILE

    say("the mistake was made on purpose, so no model is registered; the winner is trained on three splits")
    with progress() as bar:
        found = pretend(store, result.settings, dataset, progress=bar)
    write_file(run_dir / LEAK_FILE, found.model_dump_json(indent=2) + "\n")


def _show_result(call: Call, run_dir: "Path", model_id: str | None) -> None:
    from tuning.report import report_on, write_report

    # From the journal and not from the search in memory, so that `relook tune report` shows the same.
    found = report_on(run_dir)
    page = write_report(found, run_dir)
    facts = {"model_id": model_id, "report": str(page)}
    call.emit(found.model_dump(mode="json") | facts, _summary(run_dir))
    if found.leak is not None and not call.as_json:
        from trainers.fitting.pretend import PretendReport, pretend_table

        stdout.print(pretend_table(PretendReport.model_validate(found.leak)))
    if model_id is not None:
        say(f"Model {model_id[:12]} is trained with the winner's settings and registered.")
    stderr.print(f"Report: {page}", highlight=False, soft_wrap=True)
    stderr.print(f"Train the winner: {found.command}", highlight=False, soft_wrap=True)


@verb(tune_app, "report")
def report(
    call: Call,
    run: Annotated[str | None, typer.Option("--run", help="Name or folder of a search; default: the last one.")] = None,
) -> None:
    """Show a search: trials, effects, failures, the command that trains the winner; write its page."""
    from records.home import open_home
    from tuning.live import comparison_table, effects_table
    from tuning.report import find_run, report_on, write_report

    runs: Path = open_home(call.settings.records.home).runs
    folder = find_run(runs, run)
    found = report_on(folder)
    page = write_report(found, folder)
    call.emit(found.model_dump(mode="json") | {"report": str(page)}, _summary(folder))
    if not call.as_json:
        stdout.print(effects_table(found.effects))
        if found.comparison is not None:
            stdout.print(comparison_table(found.comparison))
    stderr.print(f"Report: {page}", highlight=False, soft_wrap=True)


def _summary(folder: "Path") -> "RenderableType":
    from tuning.journal import read_journal
    from tuning.live import search_summary

    return search_summary(*read_journal(folder))


@contextmanager
def show_search(
    tracking: "TrackingSettings", name: str, tuning: "TuningSettings"
) -> "Iterator[Callable[[SearchEvent], None]]":
    """Show a search, and record its trials as a run of MLflow with this name if there is one."""
    from trainers.settings import flat_values
    from trainers.tracking.server import Tracked
    from tuning.search import track_trial

    params = {f"tuning.{key}": value for key, value in flat_values(tuning.model_dump(mode="json")).items()}
    with Tracked(tracking, "tune", name, params) as tracked, _shown() as show:

        def listen(event: "SearchEvent") -> None:
            track_trial(tracked, event)
            show(event)

        yield listen


@contextmanager
def _shown() -> "Iterator[Callable[[SearchEvent], None]]":
    """Show a search: a live table in a terminal, one line per trial that ended elsewhere."""
    from tuning.live import SearchView, line_of, seconds_left

    if not stderr.is_terminal:

        def print_line(event: "SearchEvent") -> None:
            if line := line_of(event):
                left_s = seconds_left(event)
                say(f"search: {line}" + ("" if left_s is None else f", at most {duration(left_s)} left"))

        yield print_line
        return
    view = SearchView()
    with Live(view, console=stderr, refresh_per_second=4, transient=True):
        yield view.update
