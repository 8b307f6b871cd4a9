"""The verbs `relook tune` and `relook tune report`.

relook tune --trials 12
relook tune report --json
"""

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live

from records.command import (
    ConfigOption,
    JsonOption,
    PresetOption,
    SetOption,
    emit,
    progress,
    ray_of,
    settings_of,
    stderr,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tuning.settings import TuningSettings
    from tuning.trials import SearchEvent

app = typer.Typer()
tune_app = typer.Typer(help="Search for better training settings.", invoke_without_command=True)
app.add_typer(tune_app, name="tune")


@tune_app.callback()
def tune(
    ctx: typer.Context,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Configurations to try; default: the setting tuning.trials.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Folder or dataset id; default: the newest version.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last search; what it has settled is not run again.")
    ] = False,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search optimizers, schedulers and augmentations; the winner is chosen by validation only."""
    if ctx.invoked_subcommand is not None:
        return
    from records.ids import new_id
    from records.store import open_store
    from trainers.data.importer import open_dataset
    from tuning.live import search_summary
    from tuning.report import RUN_PREFIX, find_run, report_on
    from tuning.search import search

    settings = settings_of(ctx, config, preset, sets)
    tuning = _with_trials(settings.tuning, trials)
    with closing(open_store(settings.records)) as store:
        with progress() as bar:
            dataset = open_dataset(store, data, progress=bar)
        runs = store.home.runs
        run_dir = find_run(runs) if resume else runs / f"{RUN_PREFIX}{new_id()[:16]}"
        with ray_of(ctx, settings), _watching() as on_event:
            result = search(store, tuning, settings.trainers, dataset, run_dir=run_dir, on_event=on_event)
    found = report_on(run_dir)
    emit(as_json, found, search_summary(result.header, result.trials))
    stderr.print(f"Train the winner: {found.command}", highlight=False, soft_wrap=True)


@tune_app.command()
def report(
    ctx: typer.Context,
    run: Annotated[str | None, typer.Option("--run", help="Name or folder of a search; default: the last one.")] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a search: its leaderboard, its failures with their reasons, and how to train its winner."""
    from records.home import open_home
    from tuning.journal import read_journal
    from tuning.live import search_summary
    from tuning.report import find_run, report_on

    runs: Path = open_home(settings_of(ctx, config, preset, sets).records.home).runs
    folder = find_run(runs, run)
    emit(as_json, report_on(folder), search_summary(*read_journal(folder)))


@contextmanager
def _watching() -> "Iterator[Callable[[SearchEvent], None]]":
    """Show a search: a live table in a terminal, one line per trial that ended elsewhere."""
    from tuning.live import SearchView, line_of

    if not stderr.is_terminal:

        def print_line(event: "SearchEvent") -> None:
            if line := line_of(event):
                stderr.print(line, highlight=False, soft_wrap=True)

        yield print_line
        return
    view = SearchView()
    with Live(view, console=stderr, refresh_per_second=4, transient=True):
        yield view.update


def _with_trials(tuning: "TuningSettings", trials: int | None) -> "TuningSettings":
    from tuning.settings import TuningSettings

    if trials is None:
        return tuning
    if trials < 1:
        raise typer.BadParameter(f"--trials {trials}: at least 1 configuration has to be tried", param_hint="--trials")
    return TuningSettings.model_validate(tuning.model_dump() | {"trials": trials})
