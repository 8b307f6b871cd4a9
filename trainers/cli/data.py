"""The verbs `relook data import | export | synth | download | audit | versions | split | preview`, `taxonomy from`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Group as Stack
from rich.table import Table

from images.pairs import parse_columns, parse_labels
from records.cli import taxonomy_app
from records.command import Call, JsonCall, verb
from records.errors import ConfigError, DataError
from records.progress import progress, say, stderr

if TYPE_CHECKING:
    from images.audit import AuditReport
    from images.importer import ImportReport

app = typer.Typer(help="Import, generate and audit images.", no_args_is_help=True)

_SHOWN_REFUSALS = 20


LabelStudioOption = Annotated[
    str | None, typer.Option("--label-studio", metavar="URL", help="Import a project from there instead of DIR.")
]
ProjectOption = Annotated[int | None, typer.Option("--project", min=1, help="Number of that project.")]
ChoicesOption = Annotated[
    str | None, typer.Option("--choices", metavar="NAME", help="Choices of its page that name the class.")
]
HostsOption = Annotated[
    list[str] | None, typer.Option("--allow-host", metavar="HOST", help="Fetch its images from there, too.")
]
ConsentOption = Annotated[
    Literal["review", "training", "display"],
    typer.Option("--consent", help="What the people in the images agreed to; each includes the ones before."),
]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", help="File with the token; default: RELOOK_LABELING__TOKEN.")
]

FROM_PROJECT: "list[Callable[[Call, str, int, ProjectOptions], None]]" = []
"""What imports a Label Studio project; `cluster` puts it here, because this room may not import labeling."""


@dataclass(frozen=True)
class ProjectOptions:
    """What `relook data import --label-studio` says about the project; see `import_project`."""

    choices: str | None
    labels: dict[str, str]
    columns: dict[str, str]
    allowed_hosts: list[str]
    token_file: Path | None
    correct: bool


def _policies() -> list[str]:
    from trainers.augmentation import POLICIES

    return list(POLICIES)


def _datasets() -> list[str]:
    from images.download import TERMS

    return list(TERMS)


def _layouts() -> list[str]:
    from images.layouts import LAYOUTS

    return list(LAYOUTS)


def _forms() -> list[str]:
    from images.layouts.exported import FORMS

    return list(FORMS)


LayoutOption = Annotated[
    str | None,
    typer.Option(help="{choices}; default: the one that is recognised, which is said.", autocompletion=_layouts),
]
AtlasOption = Annotated[
    Path | None,
    typer.Option("--seed-atlas", help="Folder with a few confirmed images of each class; all go to train."),
]


@verb(app, "import")
def import_command(
    call: Call,
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Folder with images and a table, or its .zip or .tar.gz.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns of the table: image=..,dx=..,lesion=..,patient=..,split=..,site=..")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labels of the table and the classes that they mean: MEL=mel,NEV=nv.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="The table, if DIR holds several.")] = None,
    layout: LayoutOption = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Register the files where they are; copy nothing.")
    ] = False,
    correct: Annotated[
        bool, typer.Option("--correct", help="Take over labels that differ from those imported before.")
    ] = False,
    consent: ConsentOption = "training",
    seed_atlas: AtlasOption = None,
    label_studio: LabelStudioOption = None,
    project: ProjectOption = None,
    choices: ChoicesOption = None,
    allow_host: HostsOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Import labelled images from a folder or a Label Studio project; a second run resumes the first."""
    from images.importer import import_folder
    from records.types import Consent

    said = parse_labels(labels)
    source = folder or seed_atlas
    if label_studio is not None and project is not None and source is None and not (table or layout or in_place):
        about = ProjectOptions(choices, said, parse_columns(columns), allow_host or [], token_file, correct)
        FROM_PROJECT[0](call, label_studio, project, about)
        return
    if source is None or (folder and seed_atlas) or label_studio or project or choices or allow_host or token_file:
        raise ConfigError(
            "name a folder to import; or a project, with --label-studio URL --project N and without DIR, --table, "
            "--layout and --in-place; or an atlas, with --seed-atlas DIR and without another DIR"
        )
    with call.store() as store, progress() as bar:
        report = import_folder(
            store,
            source,
            columns=parse_columns(columns),
            labels=said,
            table=table,
            layout=layout,
            in_place=in_place,
            correct=correct,
            consent=Consent(consent),
            to_train=seed_atlas is not None,
            # Decoded at the size that training will use, so that the first training need not decode again.
            frames=(call.settings.trainers.model.frame,),
            progress=bar,
        )
    print_refusals(report)
    call.emit(report.as_dict(), import_table(report))


@verb(app, "export")
def export_command(
    call: Call,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Id of a dataset version, 8 or more characters.")],
    form: Annotated[str, typer.Option("--format", help="{choices}.", autocompletion=_forms)],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder, empty or new; default: relook-VERSION-FORMAT here.")
    ] = None,
) -> None:
    """Write a dataset version for other tools, with splits, labels, their sources and the licences."""
    from images.export import export_dataset
    from records.datasets import load_dataset

    with call.store() as store, progress() as bar:
        dataset = load_dataset(store, version)
        folder = out or Path(f"relook-{dataset.id[:12]}-{form}")
        report = export_dataset(store, dataset, form, folder, progress=bar)
    for note in report.notes:
        stderr.print(f"note: {note}", highlight=False, markup=False)
    licences = "; ".join(report.licences) or "none was stated by the sources"
    done = f"{report.images} images in {report.folder} as dataset {report.dataset_id[:12]}; licences: {licences}"
    call.emit(report.as_dict(), done)


@verb(app, "synth")
def synth_command(
    call: JsonCall,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; empty or missing.")],
    lesions: Annotated[int, typer.Option(help="Number of lesions.")] = 700,
    seed: Annotated[int, typer.Option(help="Seed; equal seeds give equal bytes.")] = 7,
    width: Annotated[int, typer.Option(help="Width of the images in pixels.")] = 200,
) -> None:
    """Generate dermatoscopy-like images in HAM10000's layout."""
    from images.synth import synthesize

    with progress() as bar:
        report = synthesize(folder, lesions=lesions, seed=seed, width_px=width, progress=bar)
    call.emit(report.as_dict(), f"{report.images} images of {report.lesions} lesions in {report.folder}")


@verb(app, "download")
def download_command(
    call: Call,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="{choices}.", autocompletion=_datasets)],
    out: Annotated[Path | None, typer.Option("--out", help="Folder; default: downloads/DATASET in the home.")] = None,
) -> None:
    """Download, verify and unpack a published dataset; a second run resumes the first."""
    from images.download import TERMS, download, files_of

    settings = call.settings
    files = files_of(dataset)
    folder = out or Path(settings.records.home) / "downloads" / dataset
    # Before the download: the licence may be a reason not to start it.
    say(TERMS[dataset])
    with progress() as bar:
        report = download(files, folder, settings.images.download_url, progress=bar)
    done = f"{report.images} images in {report.folder}; next: relook data import {report.folder}"
    call.emit(report.as_dict(), done)


@verb(app, "audit")
def audit_command(
    call: Call,
    data: Annotated[str | None, typer.Option(help="Folder or dataset id; default: the newest version.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML page to write, with example images; keep it as you keep those.")
    ] = None,
    pretends: Annotated[
        bool, typer.Option("--pretend", help="Also train on an honest split and on leaky ones, and compare.")
    ] = False,
) -> None:
    """Show what would go wrong with a dataset: splits, classes, leaks, labels, sizes, missing metadata."""
    from images.audit import audit_dataset
    from images.audit_page import write_audit_page
    from images.importer import open_dataset

    if out is not None and out.suffix.lower() not in {".html", ".htm"}:
        raise ConfigError(f"--out {out} is no HTML page; give a name that ends in .html")
    with call.store() as store, progress() as bar:
        dataset = open_dataset(store, data, progress=bar)
        report = audit_dataset(store, dataset, progress=bar)
        if out is not None:
            write_audit_page(store, dataset, report, out)
        shown = None
        if pretends:
            from trainers.fitting.pretend import pretend, pretend_table

            shown = pretend(store, call.settings.trainers, dataset, progress=bar)
    # Printed after the progress has ended, which would otherwise draw over the tables.
    if shown is None:
        call.emit(report, _audit_tables(report))
        return
    result = {**report.model_dump(mode="json"), "pretend": shown.model_dump(mode="json")}
    call.emit(result, Stack(_audit_tables(report), pretend_table(shown)))


@verb(app, "versions")
def versions_command(call: Call) -> None:
    """List the dataset versions, newest first."""
    from records.types import DatasetRecord

    with call.store() as store, store.ledger.read() as tx:
        versions = tx.find(DatasetRecord, order_by=("-created_at",))
    table = Table("id", "made", "images", "groups", "round", "follows")
    for v in versions:
        parent = v.parent_id[:12] if v.parent_id else ""
        made = f"{v.created_at:%Y-%m-%d %H:%M}"
        table.add_row(v.id[:12], made, str(v.num_images), str(v.num_groups), str(v.round), parent)
    call.emit({"versions": [version.model_dump(mode="json") for version in versions]}, table)


@verb(app, "split")
def split_command(
    call: Call,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Draw all splits again; only before anything was trained or searched.")
    ] = False,
) -> None:
    """Show the images and groups of each split of the newest version."""
    from images.importer import open_dataset
    from records.datasets import redraw_splits
    from records.types import Split

    with call.store() as store:
        version = redraw_splits(store).version if redraw else open_dataset(store, None)
    table = Table("split", "images", "groups", title=f"dataset {version.id[:12]}")
    splits = {split.value: version.split(split) for split in Split}
    for name, rows in splits.items():
        table.add_row(name, str(len(rows)), str(rows["group_id"].nunique()))
    sizes = {name: {"images": len(rows), "groups": int(rows["group_id"].nunique())} for name, rows in splits.items()}
    call.emit({"dataset_id": version.id, "splits": sizes}, table)


@verb(app, "preview")
def preview_command(
    call: Call,
    policy: Annotated[
        str, typer.Argument(metavar="POLICY", help="YAML file or built-in policy: {choices}.", autocompletion=_policies)
    ],
    out: Annotated[Path, typer.Option("--out", help="PNG file to write.")],
    data: Annotated[
        str | None, typer.Option(help="Folder or dataset id; default: the newest version, else generated images.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=64, help="Number of images; one per row.")] = 8,
    draws: Annotated[int, typer.Option(min=1, max=64, help="Augmented versions of each image; one per column.")] = 8,
) -> None:
    """Draw an augmentation policy, and each of its operations alone, on images of the train split."""
    from images.samples import sample_images
    from trainers.augmentation import load_policy
    from trainers.augmentation.preview import paint_preview

    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} is not a PNG; give a name that ends in .png")
    settings = call.settings
    # Loaded first: a wrong policy is refused before images are read.
    checked = load_policy(policy)
    with call.store() as store, progress() as bar:
        sample = sample_images(store, data, images, settings.trainers.model.frame, progress=bar)
    seed = settings.trainers.seed
    sheet = paint_preview(checked, sample.pixels, sample.image_ids, sample.names, draws=draws, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    result = {
        "out": str(out), "policy": checked.name, "policy_hash": checked.content_hash(), "images": len(sample.names),
        "draws": draws, "seed": seed, "source": sample.source,
    }  # fmt: skip
    call.emit(result, f"{out}: policy {checked.name} on {len(sample.names)} {sample.source}")


def print_refusals(report: "ImportReport") -> None:
    """Print on stderr how an import read the folder, which rows it could not use, and its notes."""
    stderr.print(report.layout, highlight=False, markup=False)
    # On stderr, because stdout holds the report; a table with thousands of wrong rows would bury it.
    for refused in report.quarantined[:_SHOWN_REFUSALS]:
        stderr.print(f"not used ({refused.code}): {refused.reason}", highlight=False, markup=False)
    if len(report.quarantined) > _SHOWN_REFUSALS:
        stderr.print(f"... and {len(report.quarantined) - _SHOWN_REFUSALS} more; --json lists them all")
    for note in report.notes:
        stderr.print(f"note: {note}", highlight=False, markup=False)


def import_table(report: "ImportReport") -> Table:
    """Lay out the report of an import."""
    table = Table(show_header=False, title=f"import {report.import_id}")
    table.add_row("images", f"{report.images} ({report.new_images} new, {report.decoded} decoded)")
    table.add_row("lesions", str(report.lesions))
    table.add_row("classes", ", ".join(f"{code} {count}" for code, count in report.classes.items()))
    table.add_row("without a label", str(report.unlabelled))
    table.add_row("splits", ", ".join(f"{split} {count}" for split, count in report.splits.items()))
    table.add_row("not used", str(len(report.quarantined)))
    table.add_row("same image twice", str(len(report.same_bytes)))
    apart = sum(not pair.same_diagnosis for pair in report.near_duplicates)
    table.add_row("near-duplicate pairs", f"{len(report.near_duplicates)} ({apart} of two diagnoses, not joined)")
    table.add_row("dataset", report.dataset_id[:12])
    table.add_row("seconds", f"{report.seconds:.1f}")
    return table


def _audit_tables(report: "AuditReport") -> Stack:
    """Lay out the report of an audit."""
    splits = Table("split", "images", "lesions", title=f"dataset {report.dataset_id[:12]}")
    for split, count in report.splits.items():
        splits.add_row(split, str(count), str(report.split_lesions[split]))
    splits.add_row("all", str(report.images), str(report.lesions), style="bold")
    classes = Table("class", "images", "share")
    for code, count in report.classes.items():
        classes.add_row(code, str(count), f"{count / max(1, report.images):.1%}")
    random = report.random_split
    return Stack(
        splits,
        classes,
        f"lesions in two splits: {report.leaked_lesions}",
        f"near-duplicate pairs: {report.near_duplicate_pairs}, label conflicts: {report.label_conflicts}, "
        f"rows not used: {report.quarantined}",
        f"images with unusual quality: {len(report.quality_outliers)}{_worst(report)}",
        "\n".join(["what would go wrong:", *(f"- {problem}" for problem in report.problems)])
        if report.problems
        else "nothing was found that would go wrong",
        f"a random split of the images would have put {random.leaked_lesions} lesions in two splits; "
        f"{random.leaked_test_share:.1%} of its test images would show a lesion that is also in train",
    )


def _worst(report: "AuditReport") -> str:
    if not report.quality_outliers:
        return ""
    shown = [f"{o.image} {o.what}" for o in report.quality_outliers[:3]]
    return f" ({', '.join(shown)}{', ...' if len(report.quality_outliers) > 3 else ''})"


@verb(taxonomy_app, "from")
def taxonomy_from(
    call: JsonCall,
    place: Annotated[Path, typer.Argument(metavar="DIR|TABLE", help="Folder of images, or a table beside them.")],
    out: Annotated[Path | None, typer.Option(help="New file to write; default: stdout.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the taxonomy; default: the folder's.")] = None,
    columns: Annotated[str | None, typer.Option(help="Columns of the table, as for `data import`.")] = None,
) -> None:
    """Propose a taxonomy file from the labels that are there; what harms a patient is left to people."""
    from images.taxonomy_proposal import propose_taxonomy

    if not place.exists():
        raise DataError(f"there is no folder or table {str(place)!r}")
    if out is not None and out.exists():
        raise ConfigError(f"{out} exists; give --out a new file")
    proposal = propose_taxonomy(place, name=name, columns=parse_columns(columns))
    for note in proposal.notes:
        say(note)
    if out is not None:
        out.write_text(proposal.text, encoding="utf-8")
        say(f"{out}: {len(proposal.counts)} classes; complete it, then: relook taxonomy check {out}")
    call.emit({"taxonomy": proposal.text, "counts": proposal.counts, "notes": proposal.notes})
    if out is None and not call.as_json:
        typer.echo(proposal.text, nl=False)  # as it is: a console would wrap the lines of the file
