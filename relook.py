"""Relook from Python: the calls that a notebook needs, with the functions that the `relook` command calls.

    import relook

    home = relook.open_home("./my-home", set={"trainers.epochs": 5})
    relook.import_images(home, "./photos")
    model = relook.train(home)
    print(relook.evaluate(home, model, split="test").balanced_accuracy_ci)
    print(model.predict(["mole.jpg"]).to_frame())

Settings have the names of `--set room.field=value`, and come from the same sources: defaults, preset, file, the
environment, then `set`. Errors are `relook.RelookError` and its classes. Progress goes to stderr. Importing this module
loads neither torch nor Ray; each call loads what it needs, and Ray starts only for searches and several workers.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from records.errors import (
    ConfigError,
    DataError,
    ImageError,
    LabelStudioError,
    RefusedError,
    RelookError,
    TaxonomyError,
    UnknownIdError,
    UserError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.opened import Home, Search
    from cluster.round import RoundOutcome
    from cluster.selection import Selection
    from images.given import GivenImage
    from images.importer import ImportReport
    from images.synth import SynthReport
    from labeling.sync import SyncReport
    from serving.direct import Explanation, Model, Prediction, Predictions
    from trainers.classifier import RelookClassifier
    from trainers.evaluation.figures import Evaluation

__all__ = [
    "ConfigError", "DataError", "Explanation", "Home", "ImageError", "LabelStudioError", "Model", "Prediction",
    "Predictions", "RefusedError", "RelookClassifier", "RelookError", "Search", "TaxonomyError", "UnknownIdError",
    "UserError", "combine", "evaluate", "explain", "import_images", "load_model", "open_home", "run_round", "select",
    "sync_labels", "synthesize", "train", "tune",
]  # fmt: skip

_LOADED_ON_USE = {
    **dict.fromkeys(("Home", "Search"), "cluster.opened"),
    "RelookClassifier": "trainers.classifier",
    **dict.fromkeys(("Model", "Explanation", "Prediction", "Predictions"), "serving.direct"),
}


def __getattr__(name: str) -> Any:
    """Import what takes seconds to import when it is used, and not before."""
    if name not in _LOADED_ON_USE:
        raise AttributeError(f"module 'relook' has no attribute {name!r}")
    return getattr(importlib.import_module(_LOADED_ON_USE[name]), name)


def __dir__() -> list[str]:
    """List the names of this module that callers use."""
    return __all__


def open_home(
    path: str | os.PathLike[str] | None = None,
    *,
    preset: str | None = None,
    config: str | os.PathLike[str] | None = None,
    set: Mapping[str, Any] | None = None,
) -> Home:
    """Open the folder that holds images, labels and models, and create it if it is missing.

    Args:
        path: the folder; default: RELOOK_HOME, else `.relook`.
        preset: settings to start from, such as `laptop` or `ham10000_cpu`.
        config: YAML file with settings.
        set: settings by dotted names, such as `{"trainers.epochs": 5, "trainers.optimizer.momentum": 0.9}`.
    Returns:
        The open home; use it in a `with` block, or close it.
    Raises:
        ConfigError: a setting cannot work, or the folder cannot be used.
    """
    from cluster.opened import Home, setting_texts

    place = [] if path is None else [f"records.home={os.path.abspath(Path(path).expanduser())}"]
    return Home(None if config is None else Path(config), preset, (*place, *setting_texts(set or {})))


def import_images(
    home: Home,
    folder: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    table: str | os.PathLike[str] | None = None,
    layout: str | None = None,
    in_place: bool = False,
    correct: bool = False,
    **more: Any,
) -> ImportReport:
    """Import a folder of labelled images, as `relook data import` does; a second call repeats no work.

    Args:
        home: gets the images.
        folder: images and a table, or another layout that `docs/data.md` lists; or its .zip or .tar.gz.
        columns: what a column of the table means, such as `{"dx": "diagnosis", "lesion": "mole_id"}`.
        labels: labels of the table and the classes that they mean, such as `{"MEL": "mel"}`.
        table: the table, if the folder holds several.
        layout: the layout that the folder has, if it is not the one that is recognised.
        in_place: register the files where they are, and copy nothing.
        correct: take over labels that differ from those imported before.
        more: any other argument of `images.importer.import_folder`, such as `consent`.
    Returns:
        The report: images, lesions, classes, splits, `quarantined` rows with reasons, and notes.
    Raises:
        DataError: the folder or its table cannot be used.
        TaxonomyError: the home has images of another taxonomy.
    """
    from images.importer import import_folder
    from records.progress import progress

    # Decoded at the size that training will use, so that the first training need not decode again.
    more.setdefault("frames", (home.settings.trainers.model.frame,))
    more |= {"columns": dict(columns or {}), "labels": dict(labels or {}), "table": _path(table), "layout": layout}
    with progress() as bar:
        return import_folder(home.store, Path(folder), in_place=in_place, correct=correct, progress=bar, **more)


def synthesize(
    folder: str | os.PathLike[str], *, lesions: int = 700, seed: int = 7, width_px: int = 200
) -> SynthReport:
    """Generate dermatoscopy-like images in HAM10000's layout, to try things without data; as `relook data synth`.

    Args:
        folder: empty or missing.
        lesions: number of lesions; some have several images.
        seed: equal seeds give equal bytes.
        width_px: width of the images, at least 80.
    Returns:
        Number of images, lesions and images by class.
    Raises:
        ConfigError: an argument is out of range.
        DataError: the folder holds something else.
    """
    from images.synth import synthesize as write
    from records.progress import progress

    with progress() as bar:
        return write(Path(folder), lesions=lesions, seed=seed, width_px=width_px, progress=bar)


def train(
    home: Home,
    data: str | os.PathLike[str] | None = None,
    *,
    start_from: str | Model | None = None,
    distill_from: str | Model | None = None,
    resume: bool = False,
    set: Mapping[str, Any] | None = None,
) -> Model:
    """Train a model, calibrate and register it, as `relook train` does.

    One worker trains in this process; Ray starts for `trainers.workers.count` above 1, or streaming.

    Args:
        home: with the images.
        data: dataset id, or a folder that is imported first; default: the newest version.
        start_from: a model to fine-tune.
        distill_from: a teacher whose probabilities are learned beside the labels.
        resume: go on with the interrupted training of these settings.
        set: settings for this training, such as `{"trainers.epochs": 5}`.
    Returns:
        The model; its report on the val split is in `model.report`.
    Raises:
        RefusedError: these settings were trained on this dataset before; resume, or change a setting.
        DataError: there are no images, or a split is empty.
        DivergedError: a loss is not finite.
    """
    from images.importer import open_dataset
    from records.progress import progress
    from serving.direct import Model
    from trainers.fitting.run import run_folder, train_and_register

    settings = home.with_settings(set)
    start, teacher = (None if one is None else home.bundle(one) for one in (start_from, distill_from))
    made_of: dict[str, Any] = {"start_from": start, "distill_from": teacher}
    with progress() as bar:
        dataset = open_dataset(home.store, None if data is None else os.fspath(data), progress=bar)
        run_dir = run_folder(home.store, settings.trainers, dataset, resume=resume, **made_of)
        more = {**made_of, "progress": bar, "tracking": settings.tracking}
        with home.ray(settings, settings.trainers.needs_ray):
            return Model(train_and_register(home.store, settings.trainers, dataset, run_dir, **more), settings.serving)


def combine(
    home: Home,
    models: Sequence[str | os.PathLike[str] | Model],
    *,
    weights: Sequence[float] | None = None,
    data: str | None = None,
    set: Mapping[str, Any] | None = None,
) -> Model:
    """Make several models one, the weighted mean of their logits calibrated anew, as `relook models combine` does.

    Args:
        home: with the images; it gets the model.
        models: see `evaluate`; one alone is calibrated anew. Context, views and rule are the first one's, unless set.
        weights: how much each model's logits count; default: equally.
        data: dataset id; default: the newest version.
        set: settings such as `{"trainers.views": 4}`.
    Returns:
        The model; its report on the val split is in `model.report`.
    Raises:
        ConfigError: the models do not fit together, or weights are not as many positive numbers as models.
        RefusedError: one was trained on calibration, gate or test of the dataset, or nobody can tell.
    """
    from images.importer import open_dataset
    from records.progress import progress
    from serving.direct import Model
    from trainers.fitting.combine import choices_of, combine_and_register, shares_of

    bundles = [home.bundle(model) for model in models]
    shares = shares_of(weights, len(bundles))
    settings = home.with_settings(set, before=choices_of(bundles[0]))
    with progress() as bar:
        dataset = open_dataset(home.store, data, progress=bar)
        bundle = combine_and_register(home.store, bundles, shares, dataset, settings.trainers, bar)
    return Model(bundle, settings.serving)


def tune(
    home: Home,
    data: str | os.PathLike[str] | None = None,
    *,
    trials: int | None = None,
    space: Sequence[str] = (),
    fit: bool = True,
    resume: bool = False,
    run: str | None = None,
    set: Mapping[str, Any] | None = None,
) -> Search:
    """Search for better training settings on Ray, as `relook tune` does; val alone chooses the winner.

    Args:
        home: with the images.
        data: dataset id, or a folder; default: the newest version.
        trials: number of trials; default: `tuning.trials`.
        space: axes such as `"optimizer.learning_rate=1e-3..1e-1"`, besides those of the settings.
        fit: train the winner for all epochs and register it.
        resume: resume the unfinished search with the settings that it was started with.
        run: name of the search to resume, if there are several.
        set: settings for this search.
    Returns:
        The report, and the winner's model.
    Raises:
        ConfigError: settings or space cannot work.
        DataError: train or val is empty.
        RefusedError: another process runs this search.
    """
    from cluster.opened import Search
    from images.importer import open_dataset
    from records.progress import progress
    from serving.direct import Model
    from tuning.cli import show_search
    from tuning.journal import read_journal
    from tuning.report import report_on, write_report
    from tuning.resumed import require_unchanged, resumed_settings, with_options
    from tuning.search import fit_winner, search, search_folder, search_lease, searched_space

    settings, store = home.with_settings(set), home.store
    tuning, trainers = settings.tuning, settings.trainers
    folder = search_folder(store, resume=resume, name=run)
    if resume:
        tuning, trainers = resumed_settings(folder, tuning, trainers, list(set or {}))
        data = data or read_journal(folder)[0].dataset_id
    tuning = with_options(tuning, {"trials": trials}, space)
    if resume:
        require_unchanged(folder, tuning, trainers)
    searched_space(tuning, trainers)  # for its errors only, before data are imported and Ray starts
    with progress() as bar:
        dataset = open_dataset(store, None if data is None else os.fspath(data), progress=bar)
    shown = show_search(settings.tracking, folder.name, tuning)
    with search_lease(store, folder, resume=resume), home.ray(settings), shown as on_event:
        result = search(store, tuning, trainers, dataset, run_dir=folder, on_event=on_event)
    with progress() as bar:
        bundle = fit_winner(store, result, dataset, folder, bar, settings.tracking) if fit else None
    model = None if bundle is None else Model(bundle, settings.serving)
    report = report_on(folder)
    return Search(folder, report, write_report(report, folder), model)


def evaluate(
    home: Home,
    model: str | os.PathLike[str] | Model = "champion",
    *,
    split: Literal["train", "val", "calibration", "gate", "test"] = "val",
    data: str | None = None,
    images: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    prevalence: Mapping[str, float] | None = None,
    robustness: bool = False,
    explanations: bool = False,
    report: str | os.PathLike[str] | None = None,
    embed_images: bool = False,
) -> Evaluation:
    """Measure a model on a split, or on any folder of labelled images, as `relook evaluate` does.

    Args:
        home: with the images.
        model: a model, an id prefix, a bundle's path, `champion` or `candidate`.
        split: to measure on; every read of gate and test is audited and counted.
        data: dataset id; default: the dataset that the model was trained on.
        images: a folder of labelled images to measure on instead, with `labels`.
        labels: the table of `images`.
        columns: names of its columns where they differ from the usual ones.
        masks: folder of lesion masks.
        prevalence: class shares to re-weight to, such as `{"nv": 0.9}`.
        robustness: also attack a sample with FGSM and PGD.
        explanations: also measure how faithful the heat maps are.
        report: folder to write report.html and metrics.json to.
        embed_images: show the worst mistakes in the report, which has to be outside the home.
    Returns:
        The figures, with 95 % intervals that are resampled by group (lesion or patient).
    Raises:
        UnknownIdError: there is no such model or dataset.
        DataError: the split is empty, or the folder cannot be used.
    """
    from records.progress import progress
    from records.types import Split
    from trainers.evaluation.measure import measure_model
    from trainers.tracking.server import track_evaluation

    if split not in list(Split):
        raise ConfigError(f"split is {split!r}; it must be one of {', '.join(Split)}")
    with progress() as bar:
        return track_evaluation(home.settings.tracking, measure_model(
            home.store, home.bundle(model), split=Split(split), data=data, images=_path(images), columns=columns,
            labels=_path(labels), masks=_path(masks), prevalence=prevalence, report=_path(report), progress=bar,
            robustness=robustness, explanations=explanations, embed_images=embed_images,
            precision=home.settings.trainers.precision,
        ))  # fmt: skip


def load_model(model: str | os.PathLike[str], home: Home | None = None) -> Model:
    """Load a model to predict and explain with.

    Args:
        model: an id prefix of 8 or more characters, `champion`, `candidate`, or the path of a bundle.
        home: where models are looked up by name; default: RELOOK_HOME, else `.relook`. A path needs none.
    Returns:
        The model.
    Raises:
        UnknownIdError: there is no such model.
        IntegrityError: its files were altered.
    """
    from cluster.sources import load_settings
    from records.bundles import read_bundle
    from serving.direct import Model

    if home is not None:
        return Model(home.bundle(model), home.settings.serving)
    if Path(model).is_dir():
        return Model(read_bundle(Path(model)), load_settings(environ=os.environ).serving)
    with open_home() as default:
        return Model(default.bundle(model), default.settings.serving)


def explain(
    model: Model | str | os.PathLike[str],
    image: GivenImage,
    *,
    method: str = "gradcam",
    target: str | None = None,
    versus: str | None = None,
    home: Home | None = None,
) -> Explanation:
    """Compute a heat map: how much each region of an image contributed to a class, as `relook explain` does.

    Args:
        model: a model, or what `load_model` takes.
        image: a path, bytes of a file, a Pillow image, or an array uint8 [H, W, 3].
        method: `gradcam`, or another one of `relook catalog explanations`.
        target: class to explain; default: the label.
        versus: class to compare the target with.
        home: where a model is looked up by name.
    Returns:
        `heat_map` [H, W] in 0 to 1 over `image` [H, W, 3], with `overlay()` of the two, and the raw `values`.
    Raises:
        ConfigError: there is no such method, or the class would be compared with itself.
        TaxonomyError: there is no such class.
        ImageError: the image cannot be read.
    """
    from serving.direct import Model

    loaded = model if isinstance(model, Model) else load_model(model, home)
    return loaded.explain(image, method=method, target=target, versus=versus)


def select(
    home: Home,
    model: str | os.PathLike[str] | Model = "champion",
    *,
    budget: int = 40,
    rule: str | None = None,
    mix: Mapping[str, int] | None = None,
    pool: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Selection:
    """Select unlabelled images for annotators, at most one per lesion, as `relook label select` does.

    Args:
        home: with the images; it gets the review items, which `sync_labels` sends.
        model: that scores the images; see `evaluate`.
        budget: how many images at most.
        rule: acquisition rule of `relook catalog acquisition_rules`; default: a mix of three, see docs/label.md.
        mix: number of images by rule, instead of `rule` and `budget`.
        pool: folder of unlabelled images to import and select from; default: the unlabelled images of the home.
        seed: of rules that draw at random.
    Returns:
        How many were selected, and which files of the pool cannot be used.
    Raises:
        ConfigError: there is no such rule, or the budget is below 1.
        DataError: the pool has no usable image.
    """
    from cluster.selection import select_from

    if budget < 1 or any(number < 1 for number in (mix or {}).values()):
        raise ConfigError("a budget is at least 1 image")
    bundle, folder, at = home.bundle(model), _path(pool), home.settings.labeling.prevalence
    return select_from(home.store, bundle, budget=budget, rule=rule, mix=mix, folder=folder, seed=seed, prevalence=at)


def sync_labels(home: Home, *, set: Mapping[str, Any] | None = None, moved: bool = False) -> SyncReport:
    """Read new annotations from Label Studio and send waiting review items, once, as `relook label sync` does.

    Args:
        home: with the review items.
        set: settings for this call, such as `{"labeling.url": "http://labels.example"}`.
        moved: send open review items again that lie at an old address of Label Studio.
    Returns:
        What was read and sent.
    Raises:
        LabelStudioError: no Label Studio is set up, or it does not respond.
    """
    from cluster.task_cases import TaskCases
    from labeling.cli import counting
    from labeling.connection import require
    from labeling.sync import sync

    settings = home.with_settings(set)
    labeling, cases = settings.labeling, TaskCases(home.store, settings.serving, settings.labeling.cases_shown)
    with require(home.store.home, labeling) as client, counting("sync tasks and annotations") as advance:
        return sync(home.store, client, labeling, advance=advance, moved=moved, cases=cases)


def run_round(home: Home, *, resume: bool = False, set: Mapping[str, Any] | None = None) -> RoundOutcome:
    """Run a round: collect, version, tune, fit, evaluate, gate, roll out, select, push, as `relook round` does.

    Ray starts for the search; with `{"round.tune": "never"}` and one worker it does not.

    Args:
        home: with images and labels.
        resume: resume the interrupted round; its settings have to be the same.
        set: settings for this round.
    Returns:
        `record` of the round with its verdict, and `results` by step.
    Raises:
        RefusedError: a round is unfinished, or another process runs one.
    """
    from cluster.promotion import KEY_VARIABLE, caller_of, name_of
    from cluster.round import run_round as run
    from cluster.verbs import show_round

    settings, store = home.with_settings(set), home.store
    person = name_of(caller_of(store, os.environ.get(KEY_VARIABLE)))
    with home.ray(settings, settings.round.tune != "never" or settings.trainers.needs_ray), show_round() as show:
        return run(store, settings, resume=resume, started_by=person, on_event=show)


def _path(given: str | os.PathLike[str] | None) -> Path | None:
    return None if given is None else Path(given)
