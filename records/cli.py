"""Verbs that read and write the records alone: `taxonomy check | use`, `audit verify`, `trace`, `backup`, `restore`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from records.command import Call, JsonCall, verb
from records.errors import ConfigError, IntegrityError

app = typer.Typer()
taxonomy_app = typer.Typer(help="Check a taxonomy: classes, their order, the cost of a miss.", no_args_is_help=True)
audit_app = typer.Typer(help="Verify the append-only chain of audited actions.", no_args_is_help=True)
app.add_typer(taxonomy_app, name="taxonomy")
app.add_typer(audit_app, name="audit")


@verb(taxonomy_app, "check")
def taxonomy_check(call: JsonCall, file: Annotated[str, typer.Argument(help="YAML file or built-in name.")]) -> None:
    """Check a taxonomy and print its classes in order."""
    from records.taxonomy import load_taxonomy

    taxonomy = load_taxonomy(file)
    table = Table("#", "code", "name", "malignant", "miss cost", title=f"{taxonomy.name} {taxonomy.hash[:12]}")
    for index, c in enumerate(taxonomy.classes):
        table.add_row(str(index), c.code, c.name, "yes" if c.malignant else "no", f"{c.miss_cost:g}")
    call.emit({**taxonomy.model_dump(mode="json"), "hash": taxonomy.hash}, table)


@verb(taxonomy_app, "use")
def taxonomy_use(call: Call, file: Annotated[str, typer.Argument(help="YAML file or built-in name.")]) -> None:
    """Replace the taxonomy of the home; it must have the classes of all labels."""
    from contextlib import closing

    from records.datasets import build_version
    from records.store import open_store, remember_taxonomy
    from records.taxonomy import load_taxonomy
    from records.types import SourceLabel

    taxonomy = load_taxonomy(file)
    settings = call.settings.records
    # Opened with the taxonomy that it has: with the new one in the environment it would be refused.
    remembered = settings.model_copy(update={"taxonomy": None})
    with closing(open_store(remembered)) as store, store.ledger.begin() as tx:
        remember_taxonomy(tx, taxonomy, replaces=True)
        is_labelled = bool(tx.count(SourceLabel))
    dataset_id = ""
    if is_labelled:
        with closing(open_store(remembered)) as store:
            dataset_id = build_version(store).version.id
    text = f"this home has the taxonomy {taxonomy.name!r} ({taxonomy.hash[:12]})"
    if dataset_id:
        text += f"; dataset {dataset_id[:12]} follows, and models of another taxonomy have to be trained again"
    call.emit({"name": taxonomy.name, "hash": taxonomy.hash, "dataset_id": dataset_id}, text)


@verb(audit_app, "verify")
def audit_verify(
    call: Call,
    anchor: Annotated[
        bool, typer.Option("--anchor", help="Also compare it with the heads at records.audit_anchor.")
    ] = False,
) -> None:
    """Check the audit chain and name any altered, removed, reordered, foreign or cut-off event."""
    from records.audit import num_unkeyed, verify, verify_anchor

    anchored: int | None = None
    with call.store() as store:
        faults = verify(store.ledger, store.home)
        if anchor:
            differences, anchored = verify_anchor(store.ledger)
            faults += differences
        unkeyed = num_unkeyed(store.ledger)
    if faults:
        raise IntegrityError("the audit chain is broken: " + "; ".join(faults))
    text = "the audit chain is whole"
    text += f"; it is unkeyed up to event {unkeyed}" if unkeyed else ""
    text += f"; it is anchored up to event {anchored}" if anchored is not None else ""
    call.emit({"whole": True, "faults": [], "unkeyed_up_to": unkeyed, "anchored_up_to": anchored}, text)


@verb(audit_app, "rotate-key")
def audit_rotate_key(call: Call) -> None:
    """Put a new key of the audit chain in force; earlier keys stay in their file, to verify earlier events."""
    from records.audit import rotate_key

    with call.store() as store:
        key_id = rotate_key(store.ledger, actor=f"uid {os.getuid()}")
    call.emit({"key_id": key_id}, f"the next events are keyed with {key_id}; keep a copy of the file of keys")


@verb(app, "trace")
def trace_command(
    call: Call,
    subject: Annotated[
        str, typer.Argument(metavar="ID", help="Prediction, image or model id; a prefix of 8 characters is enough.")
    ],
) -> None:
    """Show what happened to an image: request, prediction, annotation, dataset version, model."""
    from records.lineage import trace

    with call.store() as store:
        found = trace(store, subject)
    table = Table("when", "what", "", title=f"{found.kind} {found.subject[:12]}")
    for step in found.steps:
        table.add_row(f"{step.at:%Y-%m-%d %H:%M:%S}", step.kind, step.text)
    call.emit(found, table)


@verb(app, "backup")
def backup_command(
    call: Call,
    folder: Annotated[Path, typer.Argument(help="New folder. It will hold keys: keep it private.")],
) -> None:
    """Back up ledger, blobs, datasets, bundles, keys and reports to a folder; the service may keep running."""
    from records.backup import back_up

    with call.store() as store:
        written = back_up(store, folder)
    rows, size = sum(written.rows.values()), sum(file.bytes for file in written.files.values())
    found = {"folder": str(folder), "rows": written.rows, "files": len(written.files), "bytes": size}
    call.emit(found, f"{rows} rows and {len(written.files)} files ({size / 1e6:.1f} MB) are in {folder}")


@verb(app, "restore")
def restore_command(
    call: Call,
    folder: Annotated[Path, typer.Argument(help="Folder that `relook backup` wrote.")],
    erased: Annotated[
        Path | None, typer.Option("--erased", help="File with ids of images that were erased since; they stay erased.")
    ] = None,
) -> None:
    """Restore a backup into an empty home and database; check every file before writing any."""
    from records.backup import restore
    from records.erasure import read_erased

    if erased is not None and not erased.is_file():
        raise ConfigError(f"--erased {erased} is no file; `relook erase --list` prints the ids for one")
    settings = call.settings.records
    restored = restore(folder, settings, read_erased(erased) if erased is not None else ())
    found = {"home": str(settings.home), "rows": restored.rows, "files": len(restored.files)}
    call.emit(found, f"restored {sum(restored.rows.values())} rows and {len(restored.files)} files; the audit holds")
