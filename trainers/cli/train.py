"""The verbs `relook train` and `relook catalog`.

relook train --data ./ham10000 --set trainers.epochs=20
"""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table

from records.command import Call, JsonCall, advises_resume, verb
from records.errors import ConfigError
from records.progress import progress, say

if TYPE_CHECKING:
    from records.bundles import Bundle
    from trainers.cli.catalog import Catalogue
    from trainers.settings import TrainersSettings

NOT_FACTS = {"name", "description", "tunable"}
CATALOGUES = "relook.catalogues"
"""Key in the root context's `meta`: functions that return more kinds of the catalogue."""

app = typer.Typer()


def _strategies() -> list[str]:
    from trainers.optimization.strategies import STRATEGIES

    return ["auto", *STRATEGIES]


def _kinds(ctx: typer.Context) -> list[str]:
    return list(_full_catalogue(ctx))


@verb(app, "train")
def train_command(
    call: Call,
    data: Annotated[str | None, typer.Option(help="Folder or dataset id; default: the newest version.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes; more than one run on Ray Train.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="How processes share the work: {choices}.", autocompletion=_strategies)
    ] = None,
    peers: Annotated[
        str | None, typer.Option(help="With strategy hivemind: addresses of peers to join, separated by commas.")
    ] = None,
    start_from: Annotated[
        str | None, typer.Option(help="Model to fine-tune: id prefix, bundle path or champion.")
    ] = None,
    distill_from: Annotated[
        str | None, typer.Option(help="Teacher whose probabilities are learned beside the labels: as --start-from.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Then train anew on train and val, for the epochs that val chose.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the training with these settings.")] = False,
) -> None:
    """Train a model, calibrate it and register its bundle."""
    from images.importer import open_dataset
    from records.models import find_bundle
    from records.types import Split
    from trainers.fitting.fit import METRICS_FILE
    from trainers.fitting.run import run_folder, train_and_register

    trainers = _with_options(call.settings.trainers, workers, strategy, peers, refit)
    with call.store() as store, progress() as bar:
        made_of = {
            role: find_bundle(store, name) if name else None
            for role, name in (("start_from", start_from), ("distill_from", distill_from))
        }
        dataset = open_dataset(store, data, progress=bar)
        run_dir = run_folder(store, trainers, dataset, resume=resume, **made_of)
        # One worker trains in this process: starting Ray costs seconds and memory that only several workers need.
        tracking = call.settings.tracking
        with advises_resume((run_dir / METRICS_FILE).is_file), call.ray() if trainers.needs_ray else nullcontext():
            bundle = train_and_register(store, trainers, dataset, run_dir, progress=bar, tracking=tracking, **made_of)
    if dataset.split(Split.VAL)["label"].nunique() == 1:
        say("note: all val images are of one class, so that the val figures say nothing of telling classes apart")
    call.emit(_summary(bundle, run_dir), _summary_tables(bundle))


@verb(app, "catalog")
def catalog_command(
    call: JsonCall,
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="One kind only: {choices}.", autocompletion=_kinds)
    ] = None,
) -> None:
    """List the names that settings can choose: models, optimizers, schedulers, augmentations and more."""
    kinds = _full_catalogue(call.context)
    if kind is not None and kind not in kinds:
        raise ConfigError(f"the catalogue has no kind {kind!r}; there are {', '.join(kinds)}")
    chosen = kinds if kind is None else {kind: kinds[kind]}
    call.emit(chosen, Stack(*(_catalogue_table(name, rows) for name, rows in chosen.items())))


def _full_catalogue(ctx: typer.Context) -> "Catalogue":
    from trainers.cli.catalog import catalogue

    # Rooms above this one may not be imported here; the root command leaves their part in the context.
    kinds = catalogue()
    for more in ctx.find_root().meta.get(CATALOGUES, ()):
        kinds |= more()
    return kinds


def _with_options(
    trainers: "TrainersSettings", workers: int | None, strategy: str | None, peers: str | None, refit: bool
) -> "TrainersSettings":
    options: dict[str, tuple[str, Any]] = {
        "--workers": ("workers.count", workers),
        "--strategy": ("workers.strategy", strategy),
        "--peers": ("workers.peers.addresses", tuple(peers.split(",")) if peers is not None else None),
        "--refit": ("refit", refit or None),
    }
    given = {option: pair for option, pair in options.items() if pair[1] is not None}
    if not given:
        return trainers
    from pydantic import ValidationError

    from records.settings import first_problem

    try:
        return trainers.with_values(dict(given.values()))
    except ValidationError as error:
        _, reason = first_problem(error)
        words = " ".join(f"{option} {value}" for option, (_, value) in given.items())
        raise ConfigError(f"{words} cannot be used: {reason}") from error


def _summary(bundle: "Bundle", run_dir: Path) -> dict[str, Any]:
    from trainers.fitting.run import REPORT

    document = bundle.document
    _, own = document.measured
    return {
        "model_id": bundle.id,
        "path": str(bundle.path),
        "run_dir": str(run_dir),
        "report": str(bundle.path / REPORT),
        "dataset_id": document.dataset_id,
        "model": document.architecture.name,
        "trained_on": document.trained_on,
        "balanced_accuracy": own["balanced_accuracy"],
        **document.metrics,
    }


def _summary_tables(bundle: "Bundle") -> RenderableType:
    from trainers.fitting.run import REPORT

    document = bundle.document
    training, (split, own) = document.metrics["training"], document.measured
    table = Table(show_header=False, title=f"model {bundle.id[:12]}")
    table.add_row("network", document.architecture.name)
    table.add_row("dataset", document.dataset_id[:12])
    if "first_fit" in training:
        table.add_row("epochs", f"{training['epochs']}, which val chose for model {training['first_fit'][:12]}")
    else:
        table.add_row("epochs", f"{training['epochs']}, best {training['best_epoch']}")
    table.add_row("trained on", f"{training['train_images']} images of {' and '.join(document.trained_on)}")
    table.add_row(f"{split} balanced accuracy", f"{own['balanced_accuracy']:.3f}")
    key = own["key_class"]
    if key is not None and key["sensitivity"] is not None:
        table.add_row(
            f"{split} {key['name']}", f"sensitivity {key['sensitivity']:.3f}, specificity {key['specificity']:.3f}"
        )
    table.add_row(f"calibration error on {split}", f"{own['ece']:.3f}")
    table.add_row("report", str(bundle.path / REPORT / "report.html"))
    return Stack(
        table,
        f"{split.capitalize()} chose the {'epoch' if split == 'val' else 'thresholds'}, so its score is optimistic; "
        "`relook evaluate MODEL --split test` measures the model.",
    )


def _catalogue_table(kind: str, rows: list[dict[str, Any]]) -> Table:
    table = Table("name", "what it is", "facts", title=f"{kind} ({len(rows)})", show_lines=True)
    for row in rows:
        facts = [f"{name.replace('_', ' ')} {_short(row[name])}" for name in row if name not in NOT_FACTS]
        table.add_row(row["name"], row["description"], "\n".join(facts))
    return table


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(value) or "none"
    if isinstance(value, list):
        return ", ".join(str(item.get("operation", item)) if isinstance(item, dict) else str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
