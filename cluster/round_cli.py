"""The verbs `relook round` and `relook rounds`.

relook round --dry-run
relook round --watch --set round.watch_labels=100
relook round --replay 3
"""

import os
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from records.command import ConfigOption, JsonOption, PresetOption, SetOption, emit, settings_of, stderr
from records.errors import ConfigError, IntegrityError

if TYPE_CHECKING:
    from cluster.round import RoundEvent
    from cluster.settings import Settings
    from records.store import Store

app = typer.Typer()


@app.command("round")
def round_verb(
    ctx: typer.Context,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the round that was interrupted.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Start rounds whenever one is due, until stopped.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what a round would do and cost.")] = False,
    replay: Annotated[int | None, typer.Option("--replay", help="Run round N again and compare.")] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a round: collect labels, train, evaluate, ask the gate, roll out, ask annotators."""
    from cluster.promotion import KEY_VARIABLE, caller_of, name_of
    from records.store import open_store

    if resume + watch + dry_run + (replay is not None) > 1:
        raise ConfigError("--resume, --watch, --dry-run and --replay exclude one another; give one of them")
    settings: Settings = settings_of(ctx, config, preset, sets)
    with closing(open_store(settings.records)) as store:
        person = name_of(caller_of(store, os.environ.get(KEY_VARIABLE)))
        if dry_run:
            _show_plan(store, settings, as_json)
        elif replay is not None:
            _replay(store, settings, replay, as_json)
        elif watch:
            _watch(store, settings, person, as_json)
        else:
            _run(store, settings, resume, person, as_json)


@app.command()
def rounds(
    ctx: typer.Context,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the rounds and how they ended."""
    from records.store import open_store
    from records.types import RoundRecord

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store, store.ledger.read() as tx:
        found = tx.find(RoundRecord, order_by=("number",))
    table = Table("round", "began", "model", "dataset", "verdict", "because")
    for record in found:
        began = f"{record.started_at:%Y-%m-%d %H:%M}"
        model, dataset = (record.model_id or "")[:12], (record.dataset_id or "")[:12]
        table.add_row(str(record.number), began, model, dataset, record.verdict or "unfinished", record.why or "")
    emit(as_json, {"rounds": [record.model_dump(mode="json") for record in found]}, table)


def _run(store: "Store", settings: "Settings", resume: bool, person: str, as_json: bool) -> None:
    from cluster.round import run_round
    from cluster.session import start_ray

    with start_ray(settings):
        outcome = run_round(store, settings, resume=resume, started_by=person, on_event=_tell)
    emit(as_json, {"round": outcome.record.number, "steps": outcome.results}, f"round {outcome.record.number} is done")


def _watch(store: "Store", settings: "Settings", person: str, as_json: bool) -> None:
    from cluster.session import start_ray
    from cluster.watch import watch

    def say(text: str) -> None:
        stderr.print(text, highlight=False)

    with start_ray(settings):
        ran = watch(store, settings, started_by=person, on_event=_tell, tell=say)
    emit(as_json, {"rounds": ran}, f"{ran} rounds ran here")


def _show_plan(store: "Store", settings: "Settings", as_json: bool) -> None:
    from cluster.plan import plan_round

    plan = plan_round(store, settings)
    table = Table.grid(padding=(0, 2))
    table.add_row("round", f"{plan.round}" + (" (goes on)" if plan.resumes else ""))
    for step in plan.steps:
        table.add_row("", step)
    took = f"about {plan.expected_s:.0f} s, as earlier rounds did" if plan.expected_s is not None else "not known yet"
    table.add_row("time", took)
    emit(as_json, plan, table)


def _replay(store: "Store", settings: "Settings", number: int, as_json: bool) -> None:
    from cluster.replay import replay_round
    from cluster.session import start_ray

    with start_ray(settings):
        found = replay_round(store, number)
    changed: dict[str, Any] = found.other_packages
    if not found.within_tolerance:
        packages = f"; packages differ: {', '.join(changed)}" if changed else ""
        raise IntegrityError(f"round {number} came out differently: {found.differences}{packages}")
    emit(as_json, found, f"round {number} came out the same" + ("" if found.same_model else " within its tolerance"))


def _tell(event: "RoundEvent") -> None:
    if event.state in ("done", "kept"):
        stderr.print(f"[green]✓[/green] {event.step}: {event.text}", highlight=False)
