"""Verbs that need nothing but the records: `taxonomy check`, `audit verify`, `trace`, `backup`, `restore`."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from records.command import ConfigOption, JsonOption, PresetOption, SetOption, emit, settings_of
from records.errors import IntegrityError

app = typer.Typer()
taxonomy_app = typer.Typer(help="The classes, their order and what a miss costs.", no_args_is_help=True)
audit_app = typer.Typer(help="The append-only chain of audited actions.", no_args_is_help=True)
app.add_typer(taxonomy_app, name="taxonomy")
app.add_typer(audit_app, name="audit")


@taxonomy_app.command("check")
def taxonomy_check(
    file: Annotated[str, typer.Argument(help="YAML file, or a built-in name.")], as_json: JsonOption = False
) -> None:
    """Check a taxonomy and print its classes in order."""
    from records.taxonomy import load_taxonomy

    taxonomy = load_taxonomy(file)
    table = Table("#", "code", "name", "malignant", "miss cost", title=f"{taxonomy.name} {taxonomy.hash[:12]}")
    for index, c in enumerate(taxonomy.classes):
        table.add_row(str(index), c.code, c.name, "yes" if c.malignant else "no", f"{c.miss_cost:g}")
    emit(as_json, {**taxonomy.model_dump(mode="json"), "hash": taxonomy.hash}, table)


@audit_app.command("verify")
def audit_verify(
    ctx: typer.Context,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the audit chain and name any altered, removed, reordered or cut-off event."""
    from records.audit import verify
    from records.store import open_store

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store:
        faults = verify(store.ledger, store.home)
    if faults:
        raise IntegrityError("the audit chain is broken: " + "; ".join(faults))
    emit(as_json, {"whole": True, "faults": []}, "the audit chain is whole")


@app.command("trace")
def trace_command(
    ctx: typer.Context,
    subject: Annotated[str, typer.Argument(metavar="ID", help="Prediction, image or model id (8 characters do).")],
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the way of an image from request to the model that learned from it."""
    from records.lineage import trace
    from records.store import open_store

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store:
        found = trace(store, subject)
    table = Table("when", "what", "", title=f"{found.kind} {found.subject[:12]}")
    for step in found.steps:
        table.add_row(f"{step.at:%Y-%m-%d %H:%M:%S}", step.kind, step.text)
    emit(as_json, found, table)


@app.command("backup")
def backup_command(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A new folder. It will hold keys: keep it private.")],
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write ledger, blobs, datasets, bundles, keys and reports to a folder; the service may go on answering."""
    from records.backup import back_up
    from records.store import open_store

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store:
        written = back_up(store, folder)
    rows, size = sum(written.rows.values()), sum(file.bytes for file in written.files.values())
    found = {"folder": str(folder), "rows": written.rows, "files": len(written.files), "bytes": size}
    emit(as_json, found, f"{rows} rows and {len(written.files)} files ({size / 1e6:.1f} MB) are in {folder}")


@app.command("restore")
def restore_command(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A folder that `relook backup` wrote.")],
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Restore a backup into an empty home and database; every file is checked before anything is written."""
    from records.restore import restore

    settings = settings_of(ctx, config, preset, sets).records
    restored = restore(folder, settings)
    found = {"home": str(settings.home), "rows": restored.rows, "files": len(restored.files)}
    emit(
        as_json, found, f"restored {sum(restored.rows.values())} rows and {len(restored.files)} files; the audit holds"
    )
