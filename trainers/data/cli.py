"""The verbs `relook data import | synth | audit | versions`."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group as Stack
from rich.table import Table

from records.command import ConfigOption, JsonOption, PresetOption, SetOption, emit, progress, settings_of, stderr
from records.errors import DataError

if TYPE_CHECKING:
    from records.store import Store
    from trainers.data.audit import AuditReport
    from trainers.data.importer import ImportReport

app = typer.Typer(help="Import, generate and audit pictures.", no_args_is_help=True)

_SHOWN_REFUSALS = 20


@app.command("import")
def import_command(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with pictures and a table.")],
    columns: Annotated[
        str | None, typer.Option(help="Columns of the table: image=..,dx=..,lesion=..,patient=..,split=..,site=..")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="The table, if it is not the only one in DIR.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Leave the files where they are; copy nothing.")] = False,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import a folder of labelled pictures; a second run goes on where the first stopped."""
    from trainers.data.importer import import_folder

    settings = settings_of(ctx, config, preset, sets)
    with _open(settings) as store, progress() as bar:
        report = import_folder(
            store,
            folder,
            columns=parse_columns(columns),
            table=table,
            in_place=in_place,
            side_px=(settings.trainers.side_px,),
            progress=bar,
        )
    _print_refusals(report)
    emit(as_json, report.as_dict(), _import_table(report))


@app.command("synth")
def synth_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An empty or missing folder.")],
    lesions: Annotated[int, typer.Option(help="How many lesions.")] = 700,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal bytes.")] = 7,
    width: Annotated[int, typer.Option(help="Width of the pictures, px.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Generate dermatoscopy-like pictures in HAM10000's layout."""
    from trainers.data.synth import synthesize

    with progress() as bar:
        report = synthesize(folder, lesions=lesions, seed=seed, width_px=width, progress=bar)
    emit(as_json, report.as_dict(), f"{report.images} pictures of {report.lesions} lesions in {report.folder}")


@app.command("audit")
def audit_command(
    ctx: typer.Context,
    data: Annotated[str | None, typer.Option(help="Folder or dataset id; default: the newest version.")] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a dataset is made of, whether it leaks, and what a random split would have pretended."""
    from trainers.data.audit import audit_dataset
    from trainers.data.importer import open_dataset

    with _open(settings_of(ctx, config, preset, sets)) as store, progress() as bar:
        report = audit_dataset(store, open_dataset(store, data, progress=bar), progress=bar)
    emit(as_json, report, _audit_tables(report))


@app.command("versions")
def versions_command(
    ctx: typer.Context,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the dataset versions, newest first."""
    from records.types import DatasetRecord

    with _open(settings_of(ctx, config, preset, sets)) as store, store.ledger.read() as tx:
        versions = tx.find(DatasetRecord, order_by=("-created_at",))
    table = Table("id", "made", "pictures", "groups", "round", "follows")
    for v in versions:
        parent = v.parent_id[:12] if v.parent_id else ""
        made = f"{v.created_at:%Y-%m-%d %H:%M}"
        table.add_row(v.id[:12], made, str(v.num_images), str(v.num_groups), str(v.round), parent)
    emit(as_json, {"versions": [version.model_dump(mode="json") for version in versions]}, table)


def parse_columns(text: str | None) -> dict[str, str]:
    """Read the value of `--columns`.

    Args:
        text: `dx=diagnosis,lesion=mole_id`, or None.
    Returns:
        What is read from which column.
    Raises:
        DataError: a part is not of the form `what=column`.

    >>> parse_columns("dx=diagnosis,lesion=mole_id")
    {'dx': 'diagnosis', 'lesion': 'mole_id'}
    """
    columns: dict[str, str] = {}
    for part in (text or "").split(",") if text else []:
        what, _, column = part.partition("=")
        if not what.strip() or not column.strip():
            raise DataError(f"--columns cannot read {part!r}; write what=column, for example dx=diagnosis")
        columns[what.strip()] = column.strip()
    return columns


def _open(settings: Any) -> "closing[Store]":
    from records.store import open_store

    return closing(open_store(settings.records))


def _print_refusals(report: "ImportReport") -> None:
    for refused in report.quarantined[:_SHOWN_REFUSALS]:
        stderr.print(f"not used ({refused.code}): {refused.reason}", highlight=False, markup=False)
    if len(report.quarantined) > _SHOWN_REFUSALS:
        stderr.print(f"... and {len(report.quarantined) - _SHOWN_REFUSALS} more; --json lists them all")
    for note in report.notes:
        stderr.print(f"note: {note}", highlight=False, markup=False)


def _import_table(report: "ImportReport") -> Table:
    table = Table(show_header=False, title=f"import {report.import_id}")
    table.add_row("pictures", f"{report.images} ({report.new_images} new, {report.decoded} decoded)")
    table.add_row("lesions", str(report.lesions))
    table.add_row("classes", ", ".join(f"{code} {count}" for code, count in report.classes.items()))
    table.add_row("sides", ", ".join(f"{side} {count}" for side, count in report.sides.items()))
    table.add_row("not used", str(len(report.quarantined)))
    table.add_row("same picture twice", str(len(report.same_bytes)))
    apart = sum(not pair.same_diagnosis for pair in report.near_duplicates)
    table.add_row("near-duplicate pairs", f"{len(report.near_duplicates)} ({apart} of two diagnoses, not joined)")
    table.add_row("dataset", report.dataset_id[:12])
    table.add_row("seconds", f"{report.seconds:.1f}")
    return table


def _audit_tables(report: "AuditReport") -> Stack:
    sides = Table("side", "pictures", "lesions", title=f"dataset {report.dataset_id[:12]}")
    for side, count in report.sides.items():
        sides.add_row(side, str(count), str(report.side_lesions[side]))
    sides.add_row("all", str(report.images), str(report.lesions), style="bold")
    classes = Table("class", "pictures", "share")
    for code, count in report.classes.items():
        classes.add_row(code, str(count), f"{count / max(1, report.images):.1%}")
    random = report.random_split
    return Stack(
        sides,
        classes,
        f"lesions on two sides: {report.leaked_lesions}",
        f"near-duplicate pairs: {report.near_duplicate_pairs}, label conflicts: {report.label_conflicts}, "
        f"rows not used: {report.quarantined}",
        f"a random split of the pictures would have put {random.leaked_lesions} lesions on two sides; "
        f"{random.leaked_test_share:.1%} of its test pictures would show a lesion that was trained on",
    )
