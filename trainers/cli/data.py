"""The verbs `relook data import | synth | download | audit | versions | preview`."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group as Stack
from rich.table import Table

from records.command import ConfigOption, JsonOption, PresetOption, SetOption, emit, progress, settings_of, stderr
from records.errors import ConfigError, DataError
from trainers.cli.data_tables import audit_tables, import_table, pretend_table, print_refusals

if TYPE_CHECKING:
    from records.store import Store

app = typer.Typer(help="Import, generate and audit images.", no_args_is_help=True)


@app.command("import")
def import_command(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with images and a table.")],
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
    """Import a folder of labelled images; a second run goes on where the first stopped."""
    from images.importer import import_folder

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
    print_refusals(report)
    emit(as_json, report.as_dict(), import_table(report))


@app.command("synth")
def synth_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An empty or missing folder.")],
    lesions: Annotated[int, typer.Option(help="How many lesions.")] = 700,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal bytes.")] = 7,
    width: Annotated[int, typer.Option(help="Width of the images, px.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Generate dermatoscopy-like images in HAM10000's layout."""
    from images.synth import synthesize

    with progress() as bar:
        report = synthesize(folder, lesions=lesions, seed=seed, width_px=width, progress=bar)
    emit(as_json, report.as_dict(), f"{report.images} images of {report.lesions} lesions in {report.folder}")


@app.command("download")
def download_command(
    ctx: typer.Context,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="ham10000.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder; default: downloads/DATASET in the home.")] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a published dataset, checked and unpacked; a second run goes on where the first stopped."""
    from images.download import TERMS, download, files_of

    settings = settings_of(ctx, config, preset, sets)
    files = files_of(dataset)
    folder = out or Path(settings.records.home) / "downloads" / dataset
    stderr.print(TERMS[dataset], highlight=False)
    with progress() as bar:
        report = download(files, folder, settings.trainers.download_url, progress=bar)
    done = f"{report.images} images in {report.folder}; next: relook data import {report.folder}"
    emit(as_json, report.as_dict(), done)


@app.command("audit")
def audit_command(
    ctx: typer.Context,
    data: Annotated[str | None, typer.Option(help="Folder or dataset id; default: the newest version.")] = None,
    pretends: Annotated[
        bool, typer.Option("--pretend", help="Also train the model on an honest split and on leaky ones.")
    ] = False,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a dataset is made of, whether it leaks, and what a random split would have pretended."""
    from images.audit import audit_dataset
    from images.importer import open_dataset

    settings = settings_of(ctx, config, preset, sets)
    with _open(settings) as store, progress() as bar:
        dataset = open_dataset(store, data, progress=bar)
        report = audit_dataset(store, dataset, progress=bar)
        if not pretends:
            emit(as_json, report, audit_tables(report))
            return
        from trainers.fitting.pretend import pretend

        shown = pretend(store, settings.trainers, dataset, progress=bar)
    result = {**report.model_dump(mode="json"), "pretend": shown.model_dump(mode="json")}
    emit(as_json, result, Stack(audit_tables(report), pretend_table(shown)))


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
    table = Table("id", "made", "images", "groups", "round", "follows")
    for v in versions:
        parent = v.parent_id[:12] if v.parent_id else ""
        made = f"{v.created_at:%Y-%m-%d %H:%M}"
        table.add_row(v.id[:12], made, str(v.num_images), str(v.num_groups), str(v.round), parent)
    emit(as_json, {"versions": [version.model_dump(mode="json") for version in versions]}, table)


@app.command("preview")
def preview_command(
    ctx: typer.Context,
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="A built-in policy, or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", help="The PNG to write.")],
    data: Annotated[
        str | None, typer.Option(help="Folder or dataset id; default: the newest version, else generated images.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=64, help="Rows.")] = 8,
    draws: Annotated[int, typer.Option(min=1, max=64, help="Columns beside the image as it is.")] = 8,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw what an augmentation policy does to images of the train split, and each of its operations alone."""
    from images.samples import sample_images
    from trainers.augmentation import load_policy
    from trainers.augmentation.preview import paint_preview

    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} is not a PNG; give a name that ends in .png")
    settings = settings_of(ctx, config, preset, sets)
    checked = load_policy(policy)
    with _open(settings) as store, progress() as bar:
        sample = sample_images(store, data, images, settings.trainers.side_px, progress=bar)
    seed = settings.trainers.seed
    sheet = paint_preview(checked, sample.pixels, sample.image_ids, sample.names, draws=draws, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    result = {
        "out": str(out), "policy": checked.name, "policy_hash": checked.content_hash(), "images": len(sample.names),
        "draws": draws, "seed": seed, "source": sample.source,
    }  # fmt: skip
    emit(as_json, result, f"{out}: policy {checked.name} on {len(sample.names)} {sample.source}")


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
