"""Verbs that need more than one room: `demo`, `promote`, `retention`, `erase`, `monitor`.

Those of rounds are in `cluster.round_cli`.

What they compute with is imported inside them, so that `relook --help` stays quick.
"""

import os
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

import typer

from records.command import ConfigOption, JsonOption, PresetOption, SetOption, emit, progress, settings_of
from records.errors import ConfigError

app = typer.Typer()

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Folder in HAM10000's layout or with a table; default: generated images."),
]


@app.command()
def demo(
    ctx: typer.Context,
    data: DataOption = None,
    annotator: Annotated[
        Literal["simulated", "human"], typer.Option("--annotator", help="Who answers in Label Studio.")
    ] = "simulated",
    reopen: Annotated[bool, typer.Option("--reopen", help="Bring the finished demo back.")] = False,
    config: ConfigOption = None,
    preset: PresetOption = "demo",
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Play the whole loop once: search, train, serve, doubt, ask annotators, learn, swap."""
    from cluster.demo.command import play_demo, reopen_demo

    settings = settings_of(ctx, config, preset, sets)
    if reopen:
        reopen_demo(settings, as_json=as_json)
    else:
        play_demo(settings, data=data, annotator=annotator, as_json=as_json)


@app.command()
def promote(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Id prefix of 8 or more, bundle path, or candidate.")],
    provisional: Annotated[
        bool, typer.Option("--provisional", help="Serve it without the gate's word; every answer says so.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Whatever the gate says; needs --reason, and an admin's key in RELOOK_KEY.")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why it is forced; others will read it.")] = "",
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a model answer, if the gate promotes it; a running service takes it up by itself."""
    from cluster.promotion import KEY_VARIABLE, caller_of, promote_model
    from records.store import open_store

    if force and provisional:
        raise ConfigError("--force and --provisional exclude each other; give one of them")
    settings = settings_of(ctx, config, preset, sets)
    with closing(open_store(settings.records)) as store:
        promoted = promote_model(
            store,
            settings,
            model,
            provisional=provisional,
            forced_because=reason if force else None,
            caller=caller_of(store, os.environ.get(KEY_VARIABLE)),
        )
    emit(as_json, promoted, f"model {promoted['model_id'][:12]} is {promoted['status']} and answers")


@app.command("retention")
def retention_command(
    ctx: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete served images and answers whose time is over and that nobody needs; the audit keeps what went."""
    from cluster.upkeep import retain, sentence
    from records.retention import find_due
    from records.store import open_store

    settings = settings_of(ctx, config, preset, sets)
    with closing(open_store(settings.records)) as store, progress() as bar:
        if dry_run:
            found = find_due(store)
        else:
            task = bar.add_task("images and answers", total=None)
            found = retain(store, lambda done, total: bar.update(task, completed=done, total=total))
    emit(as_json, {"dry_run": dry_run, **found.model_dump(mode="json")}, sentence(found, dry_run=dry_run))


@app.command("erase")
def erase_command(
    ctx: typer.Context,
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Whole ids of images.")] = None,
    patient: Annotated[
        str | None, typer.Option("--patient", help="All images of this patient, named as they came.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which, and erase nothing.")] = False,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Erase images because a person asks: bytes, heat maps and what was said of the person; each is audited."""
    from cluster.upkeep import erase, images_to_erase
    from records.store import open_store

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store, progress() as bar:
        wanted = images_to_erase(store, images or (), patient)
        task = bar.add_task("images", total=len(wanted))
        erased = [] if dry_run else erase(store, wanted, lambda done: bar.update(task, completed=done))
    left = [one.left_in_place for one in erased if one.left_in_place is not None]
    body = {"dry_run": dry_run, "images": wanted, "blobs": sum(one.blobs for one in erased), "left_in_place": left}
    said = [f"{len(wanted)} images {'would be erased' if dry_run else 'are erased'}"]
    said += wanted if dry_run else []
    said += [f"{path} was imported in place: delete it yourself" for path in left]
    emit(as_json, body, "\n".join(said))


@app.command("monitor")
def monitor_command(
    ctx: typer.Context,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say how good the answers are that were really given, from the random audit sample alone."""
    from cluster.monitor import monitor, report
    from records.store import open_store

    settings = settings_of(ctx, config, preset, sets)
    with closing(open_store(settings.records)) as store:
        found = monitor(store, settings.serving.audit_share)
    empty = "no image of the audit sample has an annotator's answer yet; `relook label sync` brings answers in"
    emit(as_json, {"quality": [q.model_dump(mode="json") for q in found]}, report(found) if found else empty)
