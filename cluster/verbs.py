"""Verbs that need more than one room: `demo`, `promote`; those of rounds are in `cluster.round_cli`.

What they compute with is imported inside them, so that `relook --help` stays quick.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from records.command import ConfigOption, JsonOption, PresetOption, SetOption, emit, settings_of

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
