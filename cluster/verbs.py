"""Verbs that need more than one room: `demo`, `round`, `rounds`, `promote`.

What they compute with is imported inside them, so that `relook --help` stays quick.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from records.command import ConfigOption, JsonOption, PresetOption, SetOption, emit, settings_of, stderr

if TYPE_CHECKING:
    from cluster.round import RoundEvent

app = typer.Typer()

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Folder in HAM10000's layout or with a table; default: generated pictures."),
]


@app.command()
def demo(
    ctx: typer.Context,
    data: DataOption = None,
    expert: Annotated[
        Literal["simulated", "human"], typer.Option("--expert", help="Who answers in Label Studio.")
    ] = "simulated",
    reopen: Annotated[bool, typer.Option("--reopen", help="Bring the finished demo back.")] = False,
    config: ConfigOption = None,
    preset: PresetOption = "demo",
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Play the whole loop once: search, train, serve, doubt, ask experts, learn, swap."""
    from cluster.demo.command import play_demo, reopen_demo

    settings = settings_of(ctx, config, preset, sets)
    if reopen:
        reopen_demo(settings, as_json=as_json)
    else:
        play_demo(settings, data=data, expert=expert, as_json=as_json)


@app.command("round")
def round_verb(
    ctx: typer.Context,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the round that was interrupted.")] = False,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a round: collect labels, train, evaluate, ask the gate, roll out, ask experts."""
    from cluster.round import run_round
    from cluster.session import start_ray
    from records.store import open_store

    settings = settings_of(ctx, config, preset, sets)
    store = open_store(settings.records)
    with start_ray(settings):
        outcome = run_round(store, settings, resume=resume, on_event=_tell)
    store.close()
    emit(as_json, {"round": outcome.record.number, "steps": outcome.results}, f"round {outcome.record.number} is done")


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

    store = open_store(settings_of(ctx, config, preset, sets).records)
    with store.ledger.read() as tx:
        found = tx.find(RoundRecord, order_by=("number",))
    store.close()
    table = Table("round", "began", "model", "dataset", "verdict", "because")
    for record in found:
        began = f"{record.started_at:%Y-%m-%d %H:%M}"
        model, dataset = (record.model_id or "")[:12], (record.dataset_id or "")[:12]
        table.add_row(str(record.number), began, model, dataset, record.verdict or "unfinished", record.why or "")
    emit(as_json, {"rounds": [record.model_dump(mode="json") for record in found]}, table)


@app.command()
def promote(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Id prefix of 8 or more, bundle path, or candidate.")],
    provisional: Annotated[
        bool, typer.Option("--provisional", help="Serve it without the gate's word; every answer says so.")
    ] = False,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a model answer, if the gate promotes it; a running service takes it up by itself."""
    from cluster.promotion import promote_model
    from records.store import open_store

    settings = settings_of(ctx, config, preset, sets)
    store = open_store(settings.records)
    promoted = promote_model(store, settings, model, provisional=provisional)
    store.close()
    emit(as_json, promoted, f"model {promoted['model_id'][:12]} is {promoted['status']} and answers")


def _tell(event: "RoundEvent") -> None:
    if event.state in ("done", "kept"):
        stderr.print(f"[green]✓[/green] {event.step}: {event.text}", highlight=False)
