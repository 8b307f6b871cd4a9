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
    stdout,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from rich.console import RenderableType

    from tuning.settings import TuningSettings
    from tuning.trials import SearchEvent

app = typer.Typer()
tune_app = typer.Typer(help="Search for better training settings.", invoke_without_command=True)
app.add_typer(tune_app, name="tune")


@tune_app.callback()
def tune(
    ctx: typer.Context,
    trials: Annotated[int | None, typer.Option(help="Configurations to try; default: tuning.trials.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder or dataset id; default: the newest version.")] = None,
    space: Annotated[
        list[str] | None, typer.Option(help="name=a,b or name=low..high or a YAML file; may be given more than once.")
    ] = None,
    searcher: Annotated[str | None, typer.Option("--searcher", help="random, tpe or pbt.")] = None,
    scheduler: Annotated[str | None, typer.Option("--scheduler", help="asha, median or none.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Fresh seeds that confirm the winner.")] = None,
    fit_winner: Annotated[
        bool, typer.Option("--fit/--no-fit", help="Train the winner with its whole budget and register its bundle.")
    ] = True,
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
    from images.importer import open_dataset
    from records.ids import new_id
    from records.store import open_store
    from tuning.page import write_report
    from tuning.report import RUN_PREFIX, find_run, report_on
    from tuning.search import search, searched_space
    from tuning.winner import fit_winner as fit

    settings = settings_of(ctx, config, preset, sets)
    changes = {"trials": trials, "searcher": searcher, "scheduler": scheduler, "confirm_seeds": seeds}
    tuning = _changed(settings.tuning, changes, space or [])
    searched_space(tuning, settings.trainers)
    with closing(open_store(settings.records)) as store:
        with progress() as bar:
            dataset = open_dataset(store, data, progress=bar)
        runs = store.home.runs
        run_dir = find_run(runs) if resume else runs / f"{RUN_PREFIX}{new_id()[:16]}"
        with ray_of(ctx, settings), _watching() as on_event:
            result = search(store, tuning, settings.trainers, dataset, run_dir=run_dir, on_event=on_event)
        bundle = None
        if fit_winner:
            with progress() as bar:
                bundle = fit(store, result, dataset, run_dir, bar)
    found = report_on(run_dir)
    page = write_report(found, run_dir)
    facts = {"model_id": None if bundle is None else bundle.id, "report": str(page)}
    emit(as_json, found.model_dump(mode="json") | facts, _summary(run_dir))
    if bundle is not None:
        stderr.print(f"Model {bundle.id[:12]} is trained with the winner's settings and registered.", highlight=False)
    stderr.print(f"Report: {page}", highlight=False, soft_wrap=True)
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
    """Show a search: leaderboard, effects, failures with their reasons, how to train its winner; write its page."""
    from records.home import open_home
    from tuning.live import comparison_table, effects_table
    from tuning.page import write_report
    from tuning.report import find_run, report_on

    runs: Path = open_home(settings_of(ctx, config, preset, sets).records.home).runs
    folder = find_run(runs, run)
    found = report_on(folder)
    page = write_report(found, folder)
    emit(as_json, found.model_dump(mode="json") | {"report": str(page)}, _summary(folder))
    if not as_json:
        stdout.print(effects_table(found.effects))
        if found.comparison is not None:
            stdout.print(comparison_table(found.comparison))
    stderr.print(f"Report: {page}", highlight=False, soft_wrap=True)


def _summary(folder: "Path") -> "RenderableType":
    from tuning.journal import read_journal
    from tuning.live import search_summary

    return search_summary(*read_journal(folder))


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


def _changed(tuning: "TuningSettings", changes: "Mapping[str, object]", space: list[str]) -> "TuningSettings":
    """Apply the options of the command line to the settings; what was not given stays."""
    from pydantic import ValidationError

    from records.errors import ConfigError
    from tuning.settings import TuningSettings

    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return TuningSettings.model_validate(
            tuning.model_dump() | given | ({"space": (*tuning.space, *space)} if space else {})
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "tuning"
        raise ConfigError(f"tuning.{name} cannot be {first['input']!r}: {first['msg']}") from error
