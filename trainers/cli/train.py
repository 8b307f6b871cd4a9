"""The verbs `relook train` and `relook catalog`.

relook train --data ./ham10000 --set trainers.epochs=20
"""

from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.progress import Progress, TaskID
from rich.table import Table

from records.command import ConfigOption, JsonOption, PresetOption, SetOption, emit, progress, ray_of, settings_of
from records.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from records.bundles import Bundle
    from records.datasets import DatasetVersion
    from records.store import Store
    from trainers.fitting.epoch_report import EpochReport
    from trainers.settings import TrainersSettings

REPORT = "report"
"""Folder beside a bundle's files, outside its id."""

NOT_FACTS = {"name", "description", "tunable"}
CATALOGUES = "relook.catalogues"
"""Key in the root context's `meta`: functions that return more kinds of the catalogue."""

app = typer.Typer()


@app.command("train")
def train_command(
    ctx: typer.Context,
    data: Annotated[str | None, typer.Option(help="Folder or dataset id; default: the newest version.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; more than one start Ray Train.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="How processes share the work: auto, single, ddp, fsdp, elastic.")
    ] = None,
    start_from: Annotated[str | None, typer.Option(help="Model to fine-tune: id prefix, path, champion.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the same training.")] = False,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model, calibrate it, and register its bundle."""
    from images.importer import open_dataset
    from records.models import find_bundle, register
    from records.store import open_store
    from trainers.fitting.fit import fit

    settings = settings_of(ctx, config, preset, sets)
    trainers = _with_options(settings.trainers, {"num_workers": workers, "strategy": strategy})
    use_ray = trainers.needs_ray
    with ExitStack() as stack:
        store = stack.enter_context(closing(open_store(settings.records)))
        bar = stack.enter_context(progress())
        start = find_bundle(store, start_from) if start_from else None
        dataset = open_dataset(store, data, progress=bar)
        run_dir = _run_dir(store, trainers, dataset, start, resume)
        stack.enter_context(ray_of(ctx, settings) if use_ray else nullcontext())
        bundle = fit(
            store,
            trainers,
            dataset,
            run_dir=run_dir,
            use_ray=use_ray,
            on_epoch=EpochBar(bar, trainers.epochs),
            start_from=start,
            progress=bar,
        )
        with store.ledger.begin() as tx:
            register(tx, bundle)
        _report_on_val(store, trainers, bundle, dataset, bar)
    emit(as_json, _summary(bundle, run_dir), _summary_tables(bundle))


@app.command("catalog")
def catalog_command(
    ctx: typer.Context,
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="One kind only, such as models.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List what can be chosen: models, optimizers, schedulers, augmentations and more."""
    from trainers.cli.catalog import catalogue

    whole = catalogue()
    for more in ctx.find_root().meta.get(CATALOGUES, ()):
        whole |= more()
    if kind is not None and kind not in whole:
        raise ConfigError(f"the catalogue has no kind {kind!r}; there are {', '.join(whole)}")
    chosen = whole if kind is None else {kind: whole[kind]}
    emit(as_json, chosen, Stack(*(_catalogue_table(name, rows) for name, rows in chosen.items())))


def _report_on_val(
    store: "Store", trainers: "TrainersSettings", bundle: "Bundle", dataset: "DatasetVersion", bar: Progress
) -> None:
    """Write the bundle's report, on the split that fitting has read anyway."""
    from records.types import Split
    from trainers.evaluation.evaluate import evaluate, predict_split
    from trainers.evaluation.report.write import write_report
    from trainers.evaluation.slices import with_slices
    from vision.inference.loaded import load_model

    document = bundle.document
    model = load_model(bundle, precision=trainers.precision)
    found = predict_split(store, bundle, dataset, Split.VAL, actor="cli", model=model, progress=bar)
    evaluation = with_slices(
        evaluate(found, document.taxonomy, document.operating), found, document.taxonomy, document.operating
    )
    write_report(bundle.path / REPORT, bundle, model, found, evaluation)


class EpochBar:
    """Shows a training as a bar with the last epoch's figures.

    Args:
        bar: where to show it.
        epochs: how many there will be.
    """

    def __init__(self, bar: Progress, epochs: int) -> None:
        self._bar = bar
        self._epochs = epochs
        self._task: TaskID | None = None

    def __call__(self, report: "EpochReport") -> bool:
        """Show an epoch; never stops the run."""
        if self._task is None:
            self._task = self._bar.add_task("Training", total=self._epochs)
        text = (
            f"Training: loss {report.train_loss:.3f}, val balanced accuracy {report.val_balanced_accuracy:.3f}, "
            f"{report.images_per_s:.0f} images/s"
        )
        self._bar.update(self._task, completed=report.epoch, description=text)
        return False


def _with_options(trainers: "TrainersSettings", options: dict[str, Any]) -> "TrainersSettings":
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return trainers
    from pydantic import ValidationError

    try:
        return type(trainers).model_validate(trainers.model_dump() | given)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        words = " ".join(f"--{name.removeprefix('num_')} {value}" for name, value in given.items())
        raise ConfigError(f"{words} cannot be used: {reason}") from error


def _run_dir(
    store: "Store", trainers: "TrainersSettings", dataset: "DatasetVersion", start: "Bundle | None", resume: bool
) -> Path:
    """Name the folder after what is trained, so that `--resume` can only go on with the same thing."""
    from records.ids import hash_of

    identity = hash_of([trainers.recipe_hash(), dataset.id, start.id if start is not None else None])
    run_dir = store.home.runs / f"train-{identity[:12]}"
    begun = (run_dir / "metrics.jsonl").is_file()
    if begun and not resume:
        raise RefusedError(
            f"these settings were trained on dataset {dataset.id[:12]} before ({run_dir}); "
            "go on with --resume, or change a setting such as --set trainers.seed=1"
        )
    if resume and not begun:
        raise RefusedError(
            f"there is no training with these settings on dataset {dataset.id[:12]} to resume; leave --resume out"
        )
    return run_dir


def _summary(bundle: "Bundle", run_dir: Path) -> dict[str, Any]:
    document = bundle.document
    val = document.metrics["val"]
    return {
        "model_id": bundle.id,
        "path": str(bundle.path),
        "run_dir": str(run_dir),
        "report": str(bundle.path / REPORT),
        "dataset_id": document.dataset_id,
        "model": document.architecture.name,
        "balanced_accuracy": val["balanced_accuracy"],
        **document.metrics,
    }


def _summary_tables(bundle: "Bundle") -> RenderableType:
    document = bundle.document
    training, val = document.metrics["training"], document.metrics["val"]
    table = Table(show_header=False, title=f"model {bundle.id[:12]}")
    table.add_row("network", document.architecture.name)
    table.add_row("dataset", document.dataset_id[:12])
    table.add_row("epochs", f"{training['epochs']}, best {training['best_epoch']}")
    table.add_row("val balanced accuracy", f"{val['balanced_accuracy']:.3f}")
    key = val["key_class"]
    if key is not None and key["sensitivity"] is not None:
        table.add_row(
            f"val {key['name']}", f"sensitivity {key['sensitivity']:.3f}, specificity {key['specificity']:.3f}"
        )
    table.add_row("val calibration error", f"{val['ece']:.3f}")
    table.add_row("report", str(bundle.path / REPORT / "report.html"))
    return Stack(table, "Val chose the epoch and the calibration: `relook evaluate` tells what the model is worth.")


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
